"""Which setting to take: of those that lose little enough in every run, the one that reads the fewest bytes.

What is lost is the upper end of the 95 % interval of the paired difference to dense: nats per token of natural text
(`perplexity:FILE`) and of what stands far back (`recall:FILE`), each at the longest length measured; points of
needles, at the longest length at which dense finds enough; and points of all tasks of the small model together, at
its longest length. Bytes are those of one geometry, whatever models were measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.report import short

from . import intervals
from .cells import SOLVED, Cell, cells, paired, unsolved
from .intervals import Estimate
from .methods import DENSE, known
from .results import Line
from .room import digest_nbytes
from .summary import Run
from .tables import Grid, estimated
from .tolerances import Tolerances

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, CONTEXT = 32, 8, 128, 32768  # of Llama 3.1 8B; keys and values of 16 bits


@dataclass(frozen=True)
class Setting:
    """How pages are chosen."""

    digest: str
    policy: str
    pooling: str
    dense_layers: int
    budget: int
    page_size: int

    @property
    def name(self) -> str:
        """As a method that says all of it."""
        return f"{self.digest}/{self.policy}+{self.pooling}+dense{self.dense_layers}"

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads at 32k."""
        page, pages = 4 * HEAD_DIM * self.page_size, CONTEXT // self.page_size
        digests = pages * digest_nbytes(self.digest, self.page_size, HEAD_DIM)
        sparse = min(self.budget // self.page_size, pages) * page + digests
        dense_layers = min(self.dense_layers, NUM_LAYERS)
        return NUM_KV_HEADS * (dense_layers * pages * page + (NUM_LAYERS - dense_layers) * sparse)


@dataclass(frozen=True)
class Criterion:
    """What must not be lost: of a task of a run.

    Attributes:
        unit: nats or points.
        tolerance: in that unit.
    """

    model: str
    task: str
    length: int
    unit: str
    tolerance: float

    def __str__(self) -> str:
        return f"{self.task.partition(':')[0]} of {self.model} at {short(self.length)}"


@dataclass(frozen=True)
class Candidate:
    """A setting, and what it loses by every criterion, in its unit."""

    setting: Setting
    losses: Mapping[Criterion, Estimate]

    @property
    def meets(self) -> bool | None:
        """Whether nothing is lost beyond the tolerances; None: the intervals are too wide to say."""
        if any(loss.low is not None and loss.low > c.tolerance for c, loss in self.losses.items()):
            return False
        return all(loss.high is not None and loss.high <= c.tolerance for c, loss in self.losses.items()) or None

    @property
    def worst(self) -> tuple[float, Criterion]:
        """The criterion by which most is lost, measured by its tolerance: how many times that."""
        high = {c: loss.high if loss.high is not None else float("inf") for c, loss in self.losses.items()}
        criterion = max(high, key=lambda c: high[c] / c.tolerance)
        return high[criterion] / criterion.tolerance, criterion


def candidates(runs: Iterable[Run], tolerances: Tolerances) -> list[Candidate]:
    """The settings that were measured by every criterion of every run.

    Raises:
        ConfigError: there are no criteria, or no such settings.
    """
    found = {c: losses for run in runs for c, losses in _criteria(run, tolerances)}
    if not found:
        raise ConfigError(
            "Nothing here says what is lost: measure `perplexity:FILE`, `recall:FILE` or needles on a model of your "
            f"own, or any task on {testbed.NAME}; with dense, and digests beside it."
        )
    in_all = [s for s in next(iter(found.values())) if all(s in losses for losses in found.values())]
    if not in_all:
        told = ", ".join(map(str, found))
        raise ConfigError(f"No setting was measured by all of: {told}. Measure the same digests and budgets in each.")
    return [Candidate(s, {c: losses[s] for c, losses in found.items()}) for s in in_all]


def best(found: Sequence[Candidate]) -> tuple[Candidate, bool]:
    """The one that reads the fewest bytes of those that meet all, and True; else the one whose worst loss is nearest
    to its tolerance."""
    met = [candidate for candidate in found if candidate.meets]
    if met:
        return min(met, key=lambda x: x.setting.nbytes), True
    return min(found, key=lambda x: (x.worst[0], x.setting.nbytes)), False


def told(chosen: Candidate, is_met: bool) -> str:
    """The choice in a sentence."""
    setting = chosen.setting
    what = f"{setting.name} at {setting.budget:,} tokens ({_mib(setting)} MiB a token at {short(CONTEXT)})"
    if is_met:
        return f"The fewest bytes of all that meet every tolerance: {what}."
    factor, criterion = chosen.worst
    lost = f"at most {factor * criterion.tolerance:.3g} {criterion.unit}, where {criterion.tolerance:g} are allowed"
    return f"Nothing meets every tolerance. The closest is {what}: {criterion} loses {lost}."


def grid(found: Sequence[Candidate]) -> Grid:
    """A row per setting and budget, a column per criterion."""
    criteria = list(found[0].losses)
    forms = {"nats": "+.4f", "points": "+.1f"}
    rows = [
        (
            candidate.setting.name,
            f"{candidate.setting.budget:,}",
            _mib(candidate.setting),
            *(estimated(loss, True, forms[c.unit]) for c, loss in candidate.losses.items()),
            {True: "yes", False: "no", None: "undecided"}[candidate.meets],
        )
        for candidate in sorted(found, key=lambda x: (x.setting.name, x.setting.budget))
    ]
    return Grid(
        "What settings lose, and what they read",
        ("setting", "budget", "MiB", *(f"{c} (at most {c.tolerance:g} {c.unit})" for c in criteria), "meets all"),
        tuple(rows),
        tasks=range(3, 3 + len(criteria)),
        notes=(
            told(*best(found)),
            "Lost against dense, in brackets 95 % intervals, of which the upper end counts.",
            f"MiB: read per token at {short(CONTEXT)} by {NUM_LAYERS} layers of {NUM_KV_HEADS} kv heads, "
            f"{HEAD_DIM} channels in 16 bits, digests included.",
        ),
    )


def _mib(setting: Setting) -> str:
    return f"{setting.nbytes / (1 << 20):.1f}"


# -- what runs say


def _criteria(run: Run, tolerances: Tolerances) -> Iterator[tuple[Criterion, dict[Setting, Estimate]]]:
    """The criteria of a run, and what every setting loses."""
    found = cells(run)
    if run.model == testbed.NAME:
        length, too_hard = max(run.lengths), unsolved(found)
        tasks = [c.task for c in found if c.length == length and c.score and (length, c.task) not in too_hard]
        if losses := _of_all_tasks(run, length, set(tasks)):
            yield Criterion(run.model, "all tasks", length, "points", tolerances.testbed), losses
        return
    for task in run.tasks:
        ours, nats = [c for c in found if c.task == task], tolerances.nats(task)
        if nats is None and task.partition(":")[0] != "needle":
            continue
        solved = [
            c.length for c in ours if nats is not None or (c.method == DENSE and c.score and c.score.value >= SOLVED)
        ]
        length = max(solved, default=0)
        kind = (length, "points", tolerances.needles) if nats is None else (length, "nats", nats)
        pairs = ((_setting(run, c.method, c.budget), _loss(c)) for c in ours if c.length == length)
        if losses := {setting: loss for setting, loss in pairs if setting and loss}:
            yield Criterion(run.model, task, *kind), losses


def _of_all_tasks(run: Run, length: int, tasks: set[str]) -> dict[Setting, Estimate]:
    """Points lost in the questions of these tasks together. Documents of different tasks are different ones."""
    groups: dict[tuple[str, int | None], list[Line]] = {}
    for line in run.lines:
        if line["length"] == length and line["task"] in tasks and not line["error"]:
            groups.setdefault((line["method"], line["budget"]), []).append(line)
    dense, losses = groups.pop((DENSE, None), []), {}
    numbers: dict[tuple[str, int], int] = {}
    for (name, budget), lines in groups.items():
        pairs, setting = paired(lines, dense, "score"), _setting(run, name, budget)
        if pairs and setting and {ours["task"] for ours, _ in pairs} == tasks:
            documents = [numbers.setdefault((x["task"], x["document"]), len(numbers)) for x, _ in pairs]
            changes = [ours["score"] - theirs["score"] for ours, theirs in pairs]
            losses[setting] = _points(intervals.difference(changes, documents))
    return losses


def _setting(run: Run, name: str, budget: int | None) -> Setting | None:
    """None if it reads everything, chooses by what is no digest, or the run does not say how."""
    method, (pooling, dense_layers) = known(name), run.settings_of(name)
    if budget is None or method is None or method.digest is None or pooling is None or dense_layers is None:
        return None
    if method.min_share:  # what it reads is not known from its budget
        return None
    page_size = run.manifest["settings"].get("page_size", 16)
    return Setting(method.digest, method.policy, pooling, dense_layers, budget, page_size)


def _loss(cell: Cell) -> Estimate | None:
    if cell.nats_change is not None or cell.change is None:
        return cell.nats_change
    return _points(cell.change)


def _points(change: Estimate) -> Estimate:
    """Points lost."""
    low, high = (None if end is None else -100 * end for end in (change.high, change.low))
    return Estimate(-100 * change.value, low, high)
