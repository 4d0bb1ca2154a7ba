"""Which setting to take: of those that lose little enough in every run, the one that reads the fewest bytes.

What is lost is the upper end of the 95 % interval of the paired difference to dense: nats per token of natural text
(`perplexity:FILE`) and of what stands far back (`recall:FILE`), each at the longest length measured; points of
needles, at the longest length at which dense finds enough; and points of all tasks of the small model together, at
its longest length.

Bytes are those of one geometry at 32k, whatever models were measured: of every digest, and of the pages that are
read. Without `min_share` a layer that chooses reads its budget. With it, it reads as many tokens per row and kv head
as were counted on average, at the longest length of the run in which they were most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.report import short

from . import intervals
from .cells import SOLVED, Cell, cells, paired, per_token, unsolved
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
    min_share: float = 0.0

    @property
    def name(self) -> str:
        """As a method that says all of it."""
        least = f"{self.min_share:.9f}".strip("0") if self.min_share else ""
        return f"{self.digest}/{self.policy}+{self.pooling}{least}+dense{self.dense_layers}"

    def nbytes(self, num_tokens: float) -> int:
        """Bytes that a token reads at 32k, where layers that choose read `num_tokens` in each kv head."""
        token, pages = 4 * HEAD_DIM, CONTEXT // self.page_size
        digests = pages * digest_nbytes(self.digest, self.page_size, HEAD_DIM)
        sparse = round(min(num_tokens, CONTEXT) * token) + digests
        dense_layers = min(self.dense_layers, NUM_LAYERS)
        return NUM_KV_HEADS * (dense_layers * CONTEXT * token + (NUM_LAYERS - dense_layers) * sparse)


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
    """A setting, what it loses by every criterion, in its unit, and how many tokens it reads per row and kv head in
    layers that choose."""

    setting: Setting
    losses: Mapping[Criterion, Estimate]
    num_tokens: float

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads at 32k."""
        return self.setting.nbytes(self.num_tokens)

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


def candidates(runs: Sequence[Run], tolerances: Tolerances) -> list[Candidate]:
    """The settings that were measured by every criterion of every run, and of which it is known what they read.

    Raises:
        ConfigError: there are no criteria, or no such settings.
    """
    found = {c: losses for run in runs for c, losses in _criteria(run, tolerances)}
    if not found:
        raise ConfigError(
            "Nothing here says what is lost: measure `perplexity:FILE`, `recall:FILE` or needles on a model of your "
            f"own, or any task on {testbed.NAME}; with dense, and digests beside it."
        )
    read = _tokens_read(runs)
    in_all = [s for s in next(iter(found.values())) if s in read and all(s in losses for losses in found.values())]
    if not in_all:
        told = ", ".join(map(str, found))
        raise ConfigError(f"No setting was measured by all of: {told}. Measure the same digests and budgets in each.")
    return [Candidate(s, {c: losses[s] for c, losses in found.items()}, read[s]) for s in in_all]


def best(found: Sequence[Candidate]) -> tuple[Candidate, bool]:
    """The one that reads the fewest bytes of those that meet all, and True; else the one whose worst loss is nearest
    to its tolerance."""
    met = [candidate for candidate in found if candidate.meets]
    if met:
        return min(met, key=lambda x: x.nbytes), True
    return min(found, key=lambda x: (x.worst[0], x.nbytes)), False


def told(chosen: Candidate, is_met: bool) -> str:
    """The choice in a sentence."""
    setting = chosen.setting
    read = f", of which it reads {chosen.num_tokens:,.0f}" if setting.min_share else ""
    what = f"{setting.name} at {setting.budget:,} tokens{read} ({_mib(chosen)} MiB a token at {short(CONTEXT)})"
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
            f"{candidate.num_tokens:,.0f}",
            _mib(candidate),
            *(estimated(loss, True, forms[c.unit]) for c, loss in candidate.losses.items()),
            {True: "yes", False: "no", None: "undecided"}[candidate.meets],
        )
        for candidate in sorted(found, key=lambda x: (x.setting.name, x.setting.budget))
    ]
    limits = (f"{c} (at most {c.tolerance:g} {c.unit})" for c in criteria)
    return Grid(
        "What settings lose, and what they read",
        ("setting", "budget", "reads", "MiB", *limits, "meets all"),
        tuple(rows),
        tasks=range(4, 4 + len(criteria)),
        notes=(
            told(*best(found)),
            "Lost against dense, in brackets 95 % intervals, of which the upper end counts.",
            "Reads: tokens per kv head in layers that choose; with a least share, most that any run has counted.",
            f"MiB: read per token at {short(CONTEXT)} by {NUM_LAYERS} layers of {NUM_KV_HEADS} kv heads, "
            f"{HEAD_DIM} channels in 16 bits, digests included.",
        ),
    )


def _mib(candidate: Candidate) -> str:
    return f"{candidate.nbytes / (1 << 20):.1f}"


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
    groups = _by_method(line for line in run.lines if line["length"] == length and line["task"] in tasks)
    dense, losses = groups.pop((DENSE, None), []), {}
    numbers: dict[tuple[str, int], int] = {}
    for (name, budget), lines in groups.items():
        pairs, setting = paired(lines, dense, "score"), _setting(run, name, budget)
        if pairs and setting and {ours["task"] for ours, _ in pairs} == tasks:
            documents = [numbers.setdefault((x["task"], x["document"]), len(numbers)) for x, _ in pairs]
            changes = [ours["score"] - theirs["score"] for ours, theirs in pairs]
            losses[setting] = _points(intervals.difference(changes, documents))
    return losses


def _tokens_read(runs: Sequence[Run]) -> dict[Setting, float]:
    """What settings read per row and kv head in layers that choose: the budget, in whole pages; with a least share,
    the most that any run counted on average at its longest length. It is not known of all."""
    found: dict[Setting, float] = {}
    for run in runs:
        for (name, budget), lines in _by_method(run.lines).items():
            if (setting := _setting(run, name, budget)) is None:
                continue
            read: float | None = setting.budget // setting.page_size * setting.page_size
            if setting.min_share:
                longest = max(line["length"] for line in lines)
                read = per_token([line for line in lines if line["length"] == longest], "tokens_read")
            if read is not None:
                found[setting] = max(found.get(setting, 0.0), read)
    return found


def _by_method(lines: Iterable[Line]) -> dict[tuple[str, int | None], list[Line]]:
    """By method and budget, without those that are errors."""
    groups: dict[tuple[str, int | None], list[Line]] = {}
    for line in lines:
        if not line["error"]:
            groups.setdefault((line["method"], line["budget"]), []).append(line)
    return groups


def _setting(run: Run, name: str, budget: int | None) -> Setting | None:
    """None if it reads everything, chooses by what is no digest, reads what takes fewer bytes, or the run does not
    say how."""
    method, (pooling, dense_layers) = known(name), run.settings_of(name)
    if budget is None or method is None or method.digest is None or pooling is None or dense_layers is None:
        return None
    if (method.kv or run.manifest["settings"].get("kv", "plain")) != "plain":
        return None
    page_size, min_share = run.manifest["settings"].get("page_size", 16), method.min_share or 0.0
    return Setting(method.digest, method.policy, pooling, dense_layers, budget, page_size, min_share)


def _loss(cell: Cell) -> Estimate | None:
    if cell.nats_change is not None or cell.change is None:
        return cell.nats_change
    return _points(cell.change)


def _points(change: Estimate) -> Estimate:
    """Points lost."""
    low, high = (None if end is None else -100 * end for end in (change.high, change.low))
    return Estimate(-100 * change.value, low, high)
