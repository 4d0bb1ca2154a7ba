"""A run's figures as text: Markdown, a terminal's tables, CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .cells import MEAN, SOLVED, Cell, cells, means, unsolved
from .intervals import MIN_DOCUMENTS, Estimate
from .summary import Run

CSV_COLUMNS = (
    "task", "length", "method", "budget", "num_examples", "num_documents", "num_errors",
    "score", "score_low", "score_high", "perplexity", "perplexity_low", "perplexity_high",
    "change", "change_low", "change_high",
    "bytes_per_token", "dense_bytes_per_token", "share", "pages_per_token",
    "nats_change", "nats_change_low", "nats_change_high", "nats_change_error", "pooling", "dense_layers", "gpu",
)  # fmt: skip
_ESTIMATES = ("score", "perplexity", "change", "nats_change")
ERROR = "error"
_PERCENT, _POINTS = (".1f", ".0f", 100), ("+.1f", "+.1f", 100)


@dataclass(frozen=True)
class Grid:
    """A table of texts; its first two columns name the row.

    Attributes:
        tasks: columns that are one task's.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    tasks: range
    notes: tuple[str, ...]


def grids(run: Run, with_intervals: bool = True) -> list[Grid]:
    """A table per length: a row per method and budget, a column per task, then what is lost and what is read."""
    found = cells(run)
    return [_grid(run, [c for c in found if c.length == length], with_intervals) for length in run.lengths]


def markdown(run: Run) -> str:
    """All tables as text, each under a heading."""
    parts = [f"# {escaped(run.model)}: accuracy and bytes read\n", *(f"**Note.** {note}\n" for note in notes(run))]
    return "\n".join([*parts, *map(section, grids(run))])


def section(grid: Grid) -> str:
    """A table as text, under its heading."""
    lines = [map(escaped, grid.header), ["---"] * len(grid.header), *(map(escaped, row) for row in grid.rows)]
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return "\n".join([f"## {grid.title}\n\n{table}", *(f"{note}\n" for note in grid.notes)])


def terminal_tables(run: Run, width: int = 118) -> Iterator[Table]:
    """A table per length, without intervals."""
    for grid in grids(run, with_intervals=False):
        yield from fitted(grid, width)


def fitted(grid: Grid, width: int) -> list[Table]:
    """A table as a terminal shows it; tasks for which there is no room follow in further ones."""
    columns = zip(map(_breakable, grid.header), zip(*grid.rows, strict=True), strict=True)
    wide = [max(map(len, [*name.split(), *figures])) for name, figures in columns]
    tables = [_terminal_table(grid, columns, wide) for columns in _fitting(wide, grid.tasks, width)]
    for table in tables[1:]:
        table.title = f"{grid.title}, more tasks"
    tables[-1].caption = "\n".join(grid.notes)
    return tables


def _fitting(wide: Sequence[int], tasks: range, width: int) -> list[list[int]]:
    """The columns of each table: all in one if they fit, else tasks come last."""
    room = width - 2  # at the edges; and two signs between columns
    if sum(wide) + 2 * len(wide) <= room:
        return [list(range(len(wide)))]
    tables: list[list[int]] = []
    for column in [*(i for i in range(2, len(wide)) if i not in tasks), *tasks]:
        if not tables or sum(wide[i] + 2 for i in [*tables[-1], column]) > room:
            tables.append([0, 1])
        tables[-1].append(column)
    return tables


def _terminal_table(grid: Grid, columns: Sequence[int], wide: Sequence[int]) -> Table:
    table = Table(title=grid.title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for i in columns:
        name = textwrap.fill(_breakable(grid.header[i]), wide[i])
        table.add_column(escape(name), justify="right" if i else "left", no_wrap=True)
    for row, after in zip(grid.rows, (*grid.rows[1:], None), strict=True):
        table.add_row(*(escape(row[i]) for i in columns), end_section=after is None or after[0] != row[0])
    return table


def _breakable(name: str) -> str:
    return name.replace("_", " ")


def notes(run: Run) -> list[str]:
    """What a reader must know before the figures."""
    found = list(run.notes)
    if run.errors:
        found.insert(0, f"{len(run.errors)} of {len(run.lines)} results are errors. They count in no figure.")
    few = {c.task: c.num_documents for c in cells(run) if 0 < c.num_documents < MIN_DOCUMENTS}
    if few:
        told = ", ".join(f"{task} {count}" for task, count in few.items())
        found.append(
            f"Intervals are as wide as they can be where there are fewer than {MIN_DOCUMENTS} documents ({told}), "
            "however many questions are about each: ask for more examples (--examples)."
        )
    return found


def csv_text(run: Run) -> str:
    """Every cell with its intervals, one per line; what there is not is left empty. Where no prompt was sparse, there
    is no column for it."""
    file, found = io.StringIO(), cells(run)
    writer = csv.writer(file, lineterminator="\n")
    columns = (*CSV_COLUMNS, *(["prompt_density"] if _with_sparse_prompts(found) else []))
    writer.writerow(columns)
    for cell in found:
        writer.writerow(["" if (value := _csv_value(cell, name)) is None else value for name in columns])
    return file.getvalue()


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", text).replace("\n", " ")


def estimated(estimate: Estimate | None, full: bool, form: str, form_of_ends: str = "", scale: float = 1) -> str:
    """`93.8 (91 to 96)`, or nothing."""
    if estimate is None:
        return ""
    text = _number(scale * estimate.value, form)
    if not full or estimate.low is None or estimate.high is None:
        return text
    low, high = (_number(scale * end, form_of_ends or form) for end in (estimate.low, estimate.high))
    return f"{text} ({low} to {high})"


def _with_sparse_prompts(found: Sequence[Cell]) -> bool:
    return any(cell.prompt_density is not None for cell in found)


def _number(value: float, form: str) -> str:
    text = format(value, form)
    return format(0.0, form) if float(text) == 0 else text  # not -0.0


def _csv_value(cell: Cell, name: str) -> object:
    for estimate in _ESTIMATES:
        if name.startswith(estimate):
            end = name.removeprefix(estimate).lstrip("_") or "value"
            return getattr(getattr(cell, estimate), end, None)
    return getattr(cell, name)


# -- the grid of a length


def _grid(run: Run, found: Sequence[Cell], full: bool) -> Grid:
    """The table of the cells of one length.

    Args:
        full: whether with intervals.
    """
    by_place = {(c.task, c.method, c.budget): c for c in [*found, *means(found)]}
    most = {task: max(c.num_examples for c in found if c.task == task) for task in {c.task for c in found}}
    too_hard = {task: value for (_, task), value in unsolved(found).items()}
    texts = {c.task for c in found if c.perplexity}
    scored = [task for task in run.tasks if task in most and task not in texts]
    likely = [task for task in run.tasks if task in texts]

    header = [f"{task} (n={most[task]}{', unsolved' * (task in too_hard)})" for task in scored]
    header += [MEAN, "against dense"] if scored else []
    for task in likely:
        what = task if task == "perplexity" else f"{task} perplexity"
        header += [f"{what} (n={most[task]})", "nats over dense"]

    sparse_prompts = _with_sparse_prompts(found)

    def row(method: str, budget: int | None) -> Iterator[str]:
        average = by_place[MEAN, method, budget]
        yield from (method, "" if budget is None else f"{budget:,}")
        for task in scored:
            yield _figure(by_place.get((task, method, budget)), most[task], full)
        if scored:
            yield from (estimated(average.score, full, *_PERCENT), estimated(average.change, full, *_POINTS))
        for task in likely:
            cell = by_place.get((task, method, budget))
            yield from (_figure(cell, most[task], full), estimated(cell.nats_change if cell else None, full, "+.4f"))
        yield "" if average.share is None else f"{100 * average.share:.1f}%"
        if sparse_prompts:
            yield f"{100 * (average.prompt_density or 1):.1f}%"

    places = dict.fromkeys((c.method, c.budget) for c in found)
    ordered = sorted(places, key=lambda place: (run.methods.index(place[0]), place[1] or 0))
    return Grid(
        f"{found[0].length:,} tokens",
        ("method", "budget", *header, "cache read", *(["prompt read"] if sparse_prompts else [])),
        tuple(tuple(row(*place)) for place in ordered),
        tasks=range(2, 2 + len(scored)),
        notes=tuple(_grid_notes(full, bool(scored), sparse_prompts, too_hard)),
    )


def _figure(cell: Cell | None, most: int, full: bool) -> str:
    """The figure of a cell, with the number of its examples if it has fewer than others, and with its errors."""
    if cell is None:
        return ""
    text = estimated(cell.perplexity, full, ".2f") or estimated(cell.score, full, *_PERCENT)
    fewer = f"n={cell.num_examples}" if 0 < cell.num_examples < most else ""
    wrong = f"{cell.num_errors} {ERROR}{'s' * (cell.num_errors > 1)}" if cell.num_errors else ""
    return ", ".join(filter(None, (text, fewer, wrong)))


def _grid_notes(full: bool, is_scored: bool, sparse_prompts: bool, unsolved: Mapping[str, float]) -> Iterator[str]:
    if unsolved:
        told = ", ".join(f"{task} ({100 * value:.1f} %)" for task, value in unsolved.items())
        yield f"Dense itself solves less than {SOLVED:.0%} of {told}: nothing is compared there, no mean counts it."
    if is_scored:
        yield "Accuracy in %; against dense: points won or lost in the questions that both answered."
    if full:
        yield "In brackets: 95 % intervals."
    yield "Budget: tokens read per kv head and layer. Cache read: share of dense decoding's bytes, digests included."
    if sparse_prompts:
        yield "Prompt read: share of the causal blocks that a prompt attended to."
