"""Accuracy against budget, and against the bytes read per token."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from sparsekv.evaluation.report import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, new_figure, short

from .cells import MEAN, Cell, unsolved
from .intervals import Estimate
from .methods import DENSE, WITH, known
from .summary import Run

_OWN_STYLES = {
    "quest": (BLUE, "o"),
    "sketch": (GREEN, "s"),
    "recent": (ORANGE, "^"),
    "oracle": (PURPLE, "D"),
    "random": (GREY, "X"),
}
_MORE_STYLES = [(RED, "v"), (SKY, "P"), ("black", "<"), (GREEN, ">"), (ORANGE, "h"), (BLUE, "*"), (PURPLE, "p")]
_MARKERS, _LINES = ("p", "*", "h", "<"), ("-", "--", ":", "-.")
_MIB = 1 << 20
DPI, MIN_WIDTH = 120, 6.4


def styles(run: Run) -> dict[str, dict[str, Any]]:
    """Color and marker by method: our own always look the same. A pooling of its own changes a method's marker, a
    number of dense layers of its own its line."""
    plain = {name: name.partition(WITH)[0] for name in run.methods if name != DENSE}
    others = [name for name in dict.fromkeys(plain.values()) if name not in _OWN_STYLES]
    looks = {**_OWN_STYLES, **{name: _MORE_STYLES[i % len(_MORE_STYLES)] for i, name in enumerate(others)}}
    own = {name: (m.group_pooling, m.dense_layers) if (m := known(name)) else (None, None) for name in plain}
    poolings, layers = (list(dict.fromkeys([None, *(some[i] for some in own.values())])) for i in range(2))

    def look(name: str) -> dict[str, Any]:
        color, marker = looks[plain[name]]
        pooling, line = poolings.index(own[name][0]), layers.index(own[name][1]) % len(_LINES)
        markers = (marker, *_MARKERS)
        return {"color": color, "marker": markers[pooling % len(markers)], "linestyle": _LINES[line], "markersize": 6}

    return {name: look(name) for name in plain}


def grid(count: int, columns: int, panel_size: tuple[float, float], height: float, **shared: Any) -> Any:
    """A figure of panels in rows.

    Args:
        columns: at most so many panels beside each other.
        panel_size: width and height of each, in inches.
        height: of what stands above and below all of them, in inches.
        shared: as `Figure.subplots` takes them.

    Returns:
        The figure, and its panels.
    """
    columns = min(count, columns)
    rows = -(-count // columns)
    size = (max(panel_size[0] * columns, MIN_WIDTH), height + panel_size[1] * rows)
    figure, axes = new_figure(nrows=rows, ncols=columns, squeeze=False, figsize=size, dpi=DPI, **shared)
    for panel in axes.flat[count:]:
        panel.set_visible(False)
    return figure, list(axes.flat[:count])


def lowest(panels: Sequence[Any]) -> Sequence[Any]:
    """The lowest panel of each column."""
    return panels[-panels[0].get_gridspec().ncols :]


# -- accuracy against budget


def accuracy_figure(run: Run, found: Sequence[Cell], mean: Sequence[Cell]) -> Any:
    """A panel per task of one length and one of their mean: the figure against the budget, dense as a line.

    Returns:
        The figure, or None if there is nothing to draw.
    """
    by_task = _by_task(run, found, mean)
    if not any(cell.budget for some in by_task.values() for cell in some):
        return None
    figure, panels = grid(len(by_task), 4, (3.3, 2.7), 1.3)
    for panel, (task, some) in zip(panels, by_task.items(), strict=True):
        _draw_accuracy(panel, run, task, some)
    for panel in lowest(panels):
        panel.set_xlabel("budget [tokens per kv head]")
    what = "accuracy" if any(cell.score for cell in found) else "perplexity"
    put_title(
        figure,
        f"{shown(run.model, 60)}, {found[0].length:,} tokens: {what} against budget",
        "n: questions per point; bars and grey band: 95 % intervals",
    )
    legend_below(figure, panels)
    return figure


def _by_task(run: Run, found: Sequence[Cell], mean: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells that have a figure, of tasks that dense solves; the mean first, if it is of several tasks."""
    groups = {task: [c for c in found if c.task == task and _figure(c)] for task in run.tasks}
    groups = {task: some for task, some in groups.items() if (found[0].length, task) not in unsolved(found)}
    if sum(any(c.score for c in some) for some in groups.values()) > 1:
        groups = {MEAN: [c for c in mean if c.score], **groups}
    return {task: some for task, some in groups.items() if some}


def _draw_accuracy(panel: Any, run: Run, task: str, some: Sequence[Cell]) -> None:
    looks = styles(run)
    budgets = sorted({cell.budget for cell in some if cell.budget})
    scale = 1 if some[0].perplexity else 100
    for place, (method, look) in enumerate(looks.items()):
        ours = sorted((c for c in some if c.method == method and c.budget), key=lambda c: c.budget or 0)
        if ours:
            shift = 2 ** (0.07 * (place - (len(looks) - 1) / 2))  # intervals side by side, not on top of each other
            x = [(c.budget or 0) * shift for c in ours]
            draw_line(panel, x, [_figure(c) for c in ours], scale, label=shown(method), **look)
    for cell in some:
        if cell.method == DENSE and (figure := _figure(cell)):
            _draw_dense(panel, figure, scale)
    if budgets:
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [short(b) for b in budgets])
        panel.set_xlim(budgets[0] / 1.4, budgets[-1] * 1.4)
    panel.minorticks_off()
    _scale_figures(panel, some)
    panel.set_title(f"{shown(task)}, n={max(c.num_examples for c in some)}", fontsize=10)
    panel.grid(alpha=0.3)


def draw_line(panel: Any, x: Sequence[float], y: Sequence[Estimate | None], scale: float = 1, **look: Any) -> None:
    """Draws figures, each with its interval."""
    found = [(place, one) for place, one in zip(x, y, strict=True) if one]
    values = [scale * one.value for _, one in found]
    below = [0 if one.low is None else max(scale * (one.value - one.low), 0) for _, one in found]
    above = [0 if one.high is None else max(scale * (one.high - one.value), 0) for _, one in found]
    drawn = panel.errorbar([place for place, _ in found], values, (below, above), elinewidth=1, linewidth=1.5, **look)
    for bar in drawn.lines[2]:
        bar.set_alpha(0.5)


def _draw_dense(panel: Any, figure: Estimate, scale: float) -> None:
    panel.axhline(scale * figure.value, color="black", linestyle="--", linewidth=1.2, label=DENSE, zorder=1)
    if figure.low is not None and figure.high is not None:
        panel.axhspan(scale * figure.low, scale * figure.high, color="black", alpha=0.08, linewidth=0, zorder=0)


# -- accuracy against bytes


def bytes_figure(run: Run, found: Sequence[Cell], averages: Sequence[Cell]) -> Any:
    """A panel per length: the mean accuracy (where there is none, perplexity) against bytes read per token.

    Returns:
        The figure, or None if there is nothing to draw.
    """
    by_length = {n: _points(found, averages, n) for n in run.lengths}
    by_length = {length: points for length, points in by_length.items() if points}
    if not by_length:
        return None
    figure, panels = grid(len(by_length), 3, (4.4, 3.6), 1.2)
    for panel, (length, points) in zip(panels, by_length.items(), strict=True):
        _draw_bytes(panel, run, length, points)
    for panel in lowest(panels):
        panel.set_xlabel("cache read per token [MiB]")
    put_title(figure, *_bytes_title(run, [cell for points in by_length.values() for cell in points], found))
    legend_below(figure, panels)
    return figure


def _bytes_title(run: Run, points: Sequence[Cell], found: Sequence[Cell]) -> tuple[str, str]:
    is_text, too_hard = bool(points[0].perplexity), unsolved(found)
    some = [c for c in found if (c.perplexity if is_text else c.score) and (c.length, c.task) not in too_hard]
    tasks = list({cell.task: None for cell in some})
    counts = sorted({cell.num_examples for cell in some})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    told = f"means of {len(tasks)} tasks, {many} questions each" if len(tasks) > 1 else f"{shown(tasks[0])}, n={many}"
    title = f"{shown(run.model, 60)}: {'perplexity' if is_text else 'accuracy'} against bytes read"
    return title, f"{told}; bars: 95 % intervals; numbers: budgets in tokens"


def _points(found: Sequence[Cell], averages: Sequence[Cell], length: int) -> list[Cell]:
    """Means; or the one task that has a perplexity."""
    known = [c for c in averages if c.length == length and c.score] or [
        c for c in found if c.length == length and c.perplexity
    ]
    return [c for c in known if c.bytes_per_token and c.task == known[0].task]


def _draw_bytes(panel: Any, run: Run, length: int, points: Sequence[Cell]) -> None:
    scale = 1 if points[0].perplexity else 100
    front = pareto(points)
    panel.plot(
        [mib(c) for c in front], [scale * _value(c) for c in front], color="black", alpha=0.25, linewidth=7,
        drawstyle="steps-post", solid_capstyle="round", zorder=0, label="best for its bytes",
    )  # fmt: skip
    for method, look in {**styles(run), DENSE: {"color": "black", "marker": "o", "markerfacecolor": "none"}}.items():
        ours = sorted((c for c in points if c.method == method), key=mib)
        if ours:
            draw_line(panel, [mib(c) for c in ours], [_figure(c) for c in ours], scale, label=shown(method), **look)
    scale_bytes(panel, points)
    _scale_figures(panel, points)
    _name_budgets(panel, points, scale)  # now that it is known where they are
    panel.set_title(f"{length:,} tokens", fontsize=10)
    panel.grid(alpha=0.3, which="both")


def pareto(points: Iterable[Cell]) -> list[Cell]:
    """Those of which none reads no more and is better, by bytes."""
    front: list[Cell] = []
    for cell in sorted(points, key=lambda c: (mib(c), -_worth(c))):
        if not front or _worth(cell) > _worth(front[-1]):
            front.append(cell)
    return front


def _name_budgets(panel: Any, points: Sequence[Cell], scale: float) -> None:
    """Writes budgets left of the points of the front, over all but other budgets; the best have the right of way."""
    from matplotlib.patheffects import Normal, Stroke

    halo = [Stroke(linewidth=2.5, foreground="white"), Normal()]
    named: list[tuple[float, float]] = []
    for cell in reversed(pareto(points)):
        place = (mib(cell), scale * _value(cell))
        x, y = panel.transData.transform(place)
        if cell.budget and all(abs(x - left) > 40 or abs(y - top) > 14 for left, top in named):
            named.append((x, y))
            panel.annotate(
                short(cell.budget), place, (-6, 4), textcoords="offset points", fontsize=8, ha="right",
                path_effects=halo, zorder=5,
            )  # fmt: skip


# -- what they share


def scale_bytes(panel: Any, points: Sequence[Cell]) -> None:
    """The x axis: bytes read, by their logarithm."""
    panel.set_xscale("log")
    low, high, ticks = _log_ticks([mib(c) for c in points])
    panel.set_xlim(low, high)
    panel.set_xticks(ticks, [f"{tick:,.7g}" for tick in ticks])
    panel.minorticks_off()


def _scale_figures(panel: Any, some: Sequence[Cell]) -> None:
    """The y axis: accuracy from 0 to 100; perplexity by its logarithm if it differs much."""
    if not some[0].perplexity:
        panel.set_ylim(-4, 108)
        panel.set_ylabel("accuracy [%]")
        return
    low, high, ticks = _log_ticks([_value(cell) for cell in some])
    if high > 6 * low:
        panel.set_yscale("log")
        panel.set_yticks(ticks, [f"{tick:,.7g}" for tick in ticks])
        panel.minorticks_off()
    panel.set_ylabel("perplexity")


def _log_ticks(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """The values' range and a little more, and the 1, 2, 5, 10 ... in it."""
    low, high = min(values) / 1.5, max(values) * 1.3
    steps = (1,) if high > 1e4 * low else (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 6, 8)
    return low, high, [m * 10.0**e for e in range(-6, 305) for m in steps if low <= m * 10.0**e <= high]


def put_title(figure: Any, *lines: str) -> None:
    """Puts a title above all panels, broken where the picture ends."""
    room = int(figure.get_figwidth() * 11)
    figure.suptitle("\n".join(part for line in lines for part in textwrap.wrap(line, room)), fontsize=11)


def _figure(cell: Cell) -> Estimate | None:
    return cell.score or cell.perplexity


def _value(cell: Cell) -> float:
    figure = _figure(cell)
    return figure.value if figure else float("nan")


def _worth(cell: Cell) -> float:
    return -_value(cell) if cell.perplexity else _value(cell)


def mib(cell: Cell) -> float:
    """MiB that a token reads."""
    return (cell.bytes_per_token or 0) / _MIB


def shown(name: str, most: int = 30) -> str:
    """A name in a picture: a long one (a file's, say) without its middle; none is a formula."""
    text = name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def legend_below(figure: Any, panels: Iterable[Any]) -> None:
    """Puts one legend below all panels."""
    found: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    if found:
        wide = 0.6 + 0.075 * max(map(len, found))  # inches of an entry
        rows = -(-len(found) // min(7, max(1, int(figure.get_figwidth() / wide))))
        columns = -(-len(found) // rows)
        figure.set_figheight(figure.get_figheight() + 0.2 * max(0, rows - 2))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=9)
