"""How much likelier dense decoding finds a text, against the bytes read per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsekv.evaluation.report import short

from .cells import Cell
from .plots import draw_line, grid, legend_below, lowest, mib, put_title, scale_bytes, shown, styles
from .summary import Run
from .tolerances import Tolerances

_LINEAR = 0.01  # nats: below, an axis of logarithms would show noise
_TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


def loss_figure(run: Run, found: Sequence[Cell]) -> Any:
    """A panel per text and length: nats per token above dense, a line per method; what may be lost, as a line.

    Returns:
        The figure, or None if there is nothing to draw.
    """
    points = [cell for cell in found if cell.nats_change and cell.bytes_per_token]
    places = dict.fromkeys((cell.task, cell.length) for cell in points)
    if not places:
        return None
    figure, panels = grid(len(places), 3, (4.6, 3.8), 1.5)
    for panel, (task, length) in zip(panels, places, strict=True):
        _draw(panel, run, [cell for cell in points if (cell.task, cell.length) == (task, length)])
        panel.set_title(f"{shown(task)}, {short(length)} tokens", fontsize=10)
    for panel in lowest(panels):
        panel.set_xlabel("cache read per token [MiB]")
    budgets = " ".join(short(budget) for budget in run.budgets)
    put_title(
        figure,
        f"{shown(run.model, 60)}: what is lost against bytes read",
        f"bars: 95 % intervals of the paired difference; budgets along each line: {budgets}; dots: what may be lost",
    )
    legend_below(figure, panels)
    return figure


def _draw(panel: Any, run: Run, points: Sequence[Cell]) -> None:
    for method, look in styles(run).items():
        ours = sorted((cell for cell in points if cell.method == method), key=mib)
        if ours:
            lost = [cell.nats_change for cell in ours]
            draw_line(panel, [mib(cell) for cell in ours], lost, label=shown(method), **look)
    most = max(cell.nats_change.value for cell in points if cell.nats_change)
    if tolerance := Tolerances().nats(points[0].task):
        panel.axhline(tolerance, color="black", linestyle=":", linewidth=1.2, zorder=1)
    scale_bytes(panel, points)
    panel.set_yscale("symlog", linthresh=_LINEAR, linscale=0.5)
    ticks = [tick for tick in _TICKS if tick <= 2 * most]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_ylim(-_LINEAR, max(1.5 * most, 2 * _LINEAR))
    panel.minorticks_off()
    panel.set_ylabel("above dense [nats per token]")
    panel.grid(alpha=0.3)
