"""Needle in a haystack: how many needles are found, by their depth and the length of the document."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsekv.evaluation.report import short

from .plots import MIN_WIDTH, grid, lowest, put_title, shown
from .results import Line
from .summary import Run

_MAX_DEPTHS = 12  # more are put into tenths
_MAX_PRINTED = 100  # cells of a panel that have their value in them
Grid = dict[tuple[float, int], float]


def save_heatmaps(run: Run, folder: Path) -> list[Path]:
    """A picture per budget of every task with depths: dense first, then every method."""
    files = []
    for task in run.tasks:
        lines = [line for line in run.lines if line["task"] == task and _has_depth(line)]
        budgets = sorted({line["budget"] for line in lines if line["budget"]}) or [None] * bool(lines)
        for budget in budgets:
            some = [line for line in lines if line["budget"] in (budget, None)]
            name = re.sub(r"[^\w.-]+", "-", task).strip("-") or "task"
            path = folder / f"{name}_depths{'' if budget is None else f'_{budget}'}.png"
            _save(run, task, budget, some, path)
            files.append(path)
    return files


def _has_depth(line: Line) -> bool:
    depth = (line.get("details") or {}).get("depth")
    return not line["error"] and line.get("score") is not None and isinstance(depth, (int, float))


def _save(run: Run, task: str, budget: int | None, lines: Sequence[Line], path: Path) -> None:
    methods = [name for name in run.methods if any(line["method"] == name for line in lines)]
    lengths = sorted({line["length"] for line in lines})
    depth_of = _binning(lines)
    depths = sorted({depth_of(line) for line in lines})
    columns = min(len(methods), 4 if len(lengths) <= 4 else 3 if len(lengths) <= 8 else 2)
    width, height = max(1.0 + 0.5 * len(lengths), 2.6), max(1.0 + 0.27 * len(depths), 2.2)
    figure, panels = grid(len(methods), columns, (width, height), 1.0, sharex=True, sharey=True)
    figure.set_figwidth(max(width * columns + 1.2, MIN_WIDTH))  # with the bar of colors
    for panel, method in zip(panels, methods, strict=True):
        found = _means([x for x in lines if x["method"] == method], depth_of)
        image = _draw(panel, found, depths, lengths)
        panel.set_title(shown(method), fontsize=10)
    for panel in panels[::columns]:
        panel.set_ylabel("depth [%]")
    for panel in lowest(panels):
        panel.set_xlabel("length [tokens]")
        panel.tick_params(labelbottom=True)
    figure.colorbar(image, ax=figure.axes, label="found [%]", shrink=0.8)
    each = len(lines) / max(len({(x["method"], depth_of(x), x["length"]) for x in lines}), 1)
    told = "dense" if budget is None else f"budget {budget:,} tokens"
    put_title(
        figure,
        f"{shown(run.model, 60)}: {shown(task)} by depth and length, {told}",
        f"{each:.0f} question{'s' * (each >= 1.5)} per square",
    )
    figure.savefig(path)


def _binning(lines: Sequence[Line]) -> Any:
    """The depth of a line, in tenths if there are many."""
    if len({line["details"]["depth"] for line in lines}) <= _MAX_DEPTHS:
        return lambda line: float(line["details"]["depth"])
    return lambda line: min(line["details"]["depth"] // 10, 9) * 10.0 + 5


def _means(lines: Sequence[Line], depth_of: Any) -> Grid:
    scores: dict[tuple[float, int], list[float]] = defaultdict(list)
    for line in lines:
        scores[depth_of(line), line["length"]].append(100 * line["score"])
    return {place: sum(some) / len(some) for place, some in scores.items()}


def _draw(panel: Any, found: Grid, depths: Sequence[float], lengths: Sequence[int]) -> Any:
    """What was not measured stays blank."""
    values = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    image = panel.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    if len(depths) * len(lengths) <= _MAX_PRINTED:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                color = "white" if value < 55 else "black"
                text = "" if value != value else f"{value:.0f}"
                panel.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    panel.set_xticks(range(len(lengths)), [short(length) for length in lengths], rotation=45 * (len(lengths) > 8))
    panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    return image
