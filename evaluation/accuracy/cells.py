"""A run's figures: one cell per task, length, method and budget, and their means over the tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import intervals
from .intervals import Estimate
from .methods import DENSE
from .results import Line
from .summary import Run

Pairs = list[tuple[Line, Line]]
MEAN = "mean"  # stands for a task where several are averaged
SOLVED = 0.8  # by dense: of a task that it answers worse, nothing is learned about who reads less


@dataclass(frozen=True)
class Cell:
    """What one method does at one budget, in one task of one length; or, where the task is `MEAN`, in all of them
    that dense solves.

    Attributes:
        num_examples, num_documents, num_errors: questions that count, the documents they are about, and questions
            that do not count as they were not measured.
        score: None if there is none: another metric, or errors only.
        perplexity: where that is measured instead.
        change: of the one that there is: minus that of dense, of the questions that both answered.
        nats_change: the same in nats per token, where perplexity is measured.
        bytes_per_token, dense_bytes_per_token, pages_per_token: of all layers of one sequence.
        pooling, dense_layers: those that the method decoded with, as far as they make a difference to it.
        gpu: what it was measured on, as far as that is known.
        prompt_density: share of the causal blocks that sparse prompts read; None: prompts were dense.
    """

    task: str
    length: int
    method: str
    budget: int | None
    num_examples: int
    num_documents: int
    num_errors: int
    score: Estimate | None = None
    perplexity: Estimate | None = None
    change: Estimate | None = None
    bytes_per_token: float | None = None
    dense_bytes_per_token: float | None = None
    pages_per_token: float | None = None
    nats_change: Estimate | None = None
    pooling: str | None = None
    dense_layers: int | None = None
    gpu: str | None = None
    prompt_density: float | None = None

    @property
    def share(self) -> float | None:
        """What is read of the bytes that dense decoding reads."""
        if self.bytes_per_token is None or not self.dense_bytes_per_token:
            return None
        return self.bytes_per_token / self.dense_bytes_per_token


def cells(run: Run) -> list[Cell]:
    """The cells of a run, in the order of tasks, lengths, methods and budgets."""
    groups: dict[tuple[str, int, str, int | None], list[Line]] = defaultdict(list)
    for line in run.lines:
        groups[line["task"], line["length"], line["method"], line["budget"]].append(line)
    dense = {(task, length): lines for (task, length, method, _), lines in groups.items() if method == DENSE}
    found = [_cell(run, lines, dense.get((task, length), ())) for (task, length, _, _), lines in groups.items()]
    tasks, methods = run.tasks, run.methods
    return sorted(found, key=lambda c: (tasks.index(c.task), c.length, methods.index(c.method), c.budget or 0))


def unsolved(found: Iterable[Cell]) -> dict[tuple[int, str], float]:
    """Lengths and tasks that dense itself answers worse than `SOLVED`, with its score."""
    dense = ((cell, cell.score.value) for cell in found if cell.method == DENSE and cell.score)
    return {(cell.length, cell.task): value for cell, value in dense if value < SOLVED}


def means(found: Sequence[Cell]) -> list[Cell]:
    """Over all tasks of a length that dense solves, each weighing the same: of the scores, and of what was read.

    A method that was not measured in all of them has no mean score: it would be of other tasks than the rest.
    """
    too_hard = unsolved(found)
    tasks: dict[int, set[str]] = defaultdict(set)
    groups: dict[tuple[int, str, int | None], list[Cell]] = defaultdict(list)
    for cell in found:
        groups[cell.length, cell.method, cell.budget].append(cell)
        if cell.score and (cell.length, cell.task) not in too_hard:
            tasks[cell.length].add(cell.task)
    return [_mean(some, tasks[length]) for (length, _, _), some in groups.items()]


def _cell(run: Run, lines: Sequence[Line], dense: Sequence[Line]) -> Cell:
    good = [line for line in lines if not line["error"]]
    method = lines[0]["method"]
    pooling, dense_layers = run.settings_of(method)
    return Cell(
        lines[0]["task"], lines[0]["length"], method, lines[0]["budget"],
        num_examples=len(good),
        num_documents=len({line["document"] for line in good}),
        num_errors=len(lines) - len(good),
        bytes_per_token=per_token(good, "bytes_per_token"),
        dense_bytes_per_token=per_token(good, "dense_bytes_per_token"),
        pages_per_token=per_token(good, "pages_per_token"),
        pooling=pooling,
        dense_layers=dense_layers,
        prompt_density=_plain_mean([x["prompt_density"] for x in good if x.get("prompt_density", 1) != 1]),
        gpu=", ".join(dict.fromkeys(filter(None, (line.get("gpu", run.gpu) for line in lines)))) or None,
        **_figures(good, dense),
    )  # fmt: skip


def _figures(good: Sequence[Line], dense: Sequence[Line]) -> dict[str, Estimate | None]:
    """Score or perplexity, and its change."""
    scored = [line for line in good if line.get("score") is not None]
    if scored:
        pairs = paired(scored, dense, "score")
        changes = [ours["score"] - theirs["score"] for ours, theirs in pairs]
        change = intervals.difference(changes, [ours["document"] for ours, _ in pairs]) if pairs else None
        return {"score": intervals.proportion(*_columns(scored, "score", "document")), "change": change}
    if not good:
        return {}
    perplexity = intervals.perplexity(*_columns(good, "nll", "num_scored", "document"))
    pairs = paired(good, dense, "nll")
    if not pairs:
        return {"perplexity": perplexity}
    nll, tokens, documents = _columns([ours for ours, _ in pairs], "nll", "num_scored", "document")
    both = nll, [theirs["nll"] for _, theirs in pairs], tokens, documents
    return {
        "perplexity": perplexity,
        "change": intervals.perplexity_difference(*both),
        "nats_change": intervals.nats_difference(*both),
    }


def paired(lines: Sequence[Line], dense: Sequence[Line], name: str) -> Pairs:
    """The lines whose question dense has answered too, with its line; none for dense itself."""
    if lines[0]["method"] == DENSE:
        return []
    theirs = {
        (line["task"], line["document"], line["question"]): line
        for line in dense
        if not line["error"] and line.get(name) is not None
    }
    found = ((line, theirs.get((line["task"], line["document"], line["question"]))) for line in lines)
    return [(ours, other) for ours, other in found if other is not None]


def _columns(lines: Sequence[Line], *names: str) -> list[list[Any]]:
    return [[line[name] for line in lines] for name in names]


def per_token(lines: Sequence[Line], name: str) -> float | None:
    """The mean over all tokens; over lines where they are not counted."""
    known = [line for line in lines if line.get(name) is not None]
    if not known:
        return None
    weights = [line.get("num_tokens") or 1 for line in known]
    return sum(line[name] * weight for line, weight in zip(known, weights, strict=True)) / sum(weights)


def _mean(some: Sequence[Cell], tasks: set[str]) -> Cell:
    scored = [cell for cell in some if cell.score and cell.task in tasks]
    is_whole = bool(tasks) and {cell.task for cell in scored} == tasks
    scores, changes = ([x for cell in scored if (x := getattr(cell, name))] for name in ("score", "change"))
    read = scored or some
    return Cell(
        MEAN, some[0].length, some[0].method, some[0].budget,
        num_examples=sum(cell.num_examples for cell in scored),
        num_documents=sum(cell.num_documents for cell in scored),
        num_errors=sum(cell.num_errors for cell in some),
        score=intervals.mean(scores) if is_whole else None,
        change=intervals.mean(changes) if is_whole and len(changes) == len(scored) else None,
        bytes_per_token=_plain_mean([cell.bytes_per_token for cell in read]),
        dense_bytes_per_token=_plain_mean([cell.dense_bytes_per_token for cell in read]),
        pages_per_token=_plain_mean([cell.pages_per_token for cell in read]),
        prompt_density=_plain_mean([cell.prompt_density for cell in read]),
    )  # fmt: skip


def _plain_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
