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
        bytes_per_token, dense_bytes_per_token, pages_per_token: of all layers of one sequence.
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

    @property
    def share(self) -> float | None:
        """Of the bytes that dense decoding reads."""
        if self.bytes_per_token is None or not self.dense_bytes_per_token:
            return None
        return self.bytes_per_token / self.dense_bytes_per_token


def cells(run: Run) -> list[Cell]:
    """In the order of tasks, lengths, methods and budgets."""
    groups: dict[tuple[str, int, str, int | None], list[Line]] = defaultdict(list)
    for line in run.lines:
        groups[line["task"], line["length"], line["method"], line["budget"]].append(line)
    dense = {(task, length): lines for (task, length, method, _), lines in groups.items() if method == DENSE}
    found = [_cell(lines, dense.get((task, length), ())) for (task, length, _, _), lines in groups.items()]
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


def _cell(lines: Sequence[Line], dense: Sequence[Line]) -> Cell:
    good = [line for line in lines if not line["error"]]
    score, perplexity, change = _figures(good, dense)
    return Cell(
        lines[0]["task"], lines[0]["length"], lines[0]["method"], lines[0]["budget"],
        num_examples=len(good),
        num_documents=len(set(_documents(good))),
        num_errors=len(lines) - len(good),
        score=score, perplexity=perplexity, change=change,
        bytes_per_token=_per_token(good, "bytes_per_token"),
        dense_bytes_per_token=_per_token(good, "dense_bytes_per_token"),
        pages_per_token=_per_token(good, "pages_per_token"),
    )  # fmt: skip


def _figures(good: Sequence[Line], dense: Sequence[Line]) -> tuple[Estimate | None, Estimate | None, Estimate | None]:
    """Score, perplexity, and the change of the one that there is."""
    scored = [line for line in good if line.get("score") is not None]
    if scored:
        score = intervals.proportion([line["score"] for line in scored], _documents(scored))
        return score, None, _score_change(_paired(scored, dense, "score"))
    if not good:
        return None, None, None
    nll, tokens = _columns(good, "nll", "num_scored")
    perplexity = intervals.perplexity(nll, tokens, _documents(good))
    return None, perplexity, _perplexity_change(_paired(good, dense, "nll"))


def _score_change(pairs: Pairs) -> Estimate | None:
    if not pairs:
        return None
    changes = [ours["score"] - theirs["score"] for ours, theirs in pairs]
    return intervals.difference(changes, _documents([ours for ours, _ in pairs]))


def _perplexity_change(pairs: Pairs) -> Estimate | None:
    if not pairs:
        return None
    ours, theirs = zip(*pairs, strict=True)
    (dense_nll,) = _columns(theirs, "nll")
    nll, tokens = _columns(ours, "nll", "num_scored")
    return intervals.perplexity_difference(nll, dense_nll, tokens, _documents(ours))


def _paired(lines: Sequence[Line], dense: Sequence[Line], name: str) -> Pairs:
    """The lines whose question dense has answered too, with its line; none for dense itself."""
    if lines[0]["method"] == DENSE:
        return []
    theirs = {_place(line): line for line in dense if not line["error"] and line.get(name) is not None}
    return [(line, theirs[_place(line)]) for line in lines if _place(line) in theirs]


def _place(line: Line) -> tuple[int, int]:
    return line["document"], line["question"]


def _documents(lines: Sequence[Line]) -> list[int]:
    return [line["document"] for line in lines]


def _columns(lines: Sequence[Line], *names: str) -> list[list[Any]]:
    return [[line[name] for line in lines] for name in names]


def _per_token(lines: Sequence[Line], name: str) -> float | None:
    """The mean over all tokens; over lines where they are not counted."""
    known = [line for line in lines if line.get(name) is not None]
    if not known:
        return None
    weights = [line.get("num_tokens") or 1 for line in known]
    return sum(line[name] * weight for line, weight in zip(known, weights, strict=True)) / sum(weights)


def _mean(some: Sequence[Cell], tasks: set[str]) -> Cell:
    scored = [cell for cell in some if cell.score and cell.task in tasks]
    is_whole = bool(tasks) and {cell.task for cell in scored} == tasks
    read = scored or some
    return Cell(
        MEAN, some[0].length, some[0].method, some[0].budget,
        num_examples=sum(cell.num_examples for cell in scored),
        num_documents=sum(cell.num_documents for cell in scored),
        num_errors=sum(cell.num_errors for cell in some),
        score=intervals.mean([cell.score for cell in scored if cell.score]) if is_whole else None,
        change=_mean_change(scored) if is_whole else None,
        bytes_per_token=_plain_mean([cell.bytes_per_token for cell in read]),
        dense_bytes_per_token=_plain_mean([cell.dense_bytes_per_token for cell in read]),
        pages_per_token=_plain_mean([cell.pages_per_token for cell in read]),
    )  # fmt: skip


def _mean_change(scored: Sequence[Cell]) -> Estimate | None:
    changes = [cell.change for cell in scored if cell.change]
    return intervals.mean(changes) if changes and len(changes) == len(scored) else None


def _plain_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
