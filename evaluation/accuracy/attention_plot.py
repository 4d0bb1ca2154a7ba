"""How much of the true attention lies in the pages that were read, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from .plots import grid, legend_below, lowest, put_title, shown, styles
from .results import Line
from .summary import Run


def attention_figure(run: Run, length: int, budgets: Sequence[int] = ()) -> Any:
    """By layer, a row per budget: the true attention in the pages read, and the oracle's pages among them.

    Args:
        budgets: those to show (default: all that were measured).

    Returns:
        The figure, or None if there is nothing to draw.
    """
    lines = [line for line in run.probes if line["length"] == length]
    measured = sorted({line["budget"] for line in lines if line["budget"]})
    budgets = [budget for budget in measured if budget in budgets or not budgets]
    if not budgets:
        return None
    figure, panels = grid(2 * len(budgets), 2, (5.25, 2.7), 1.3, sharex=True, sharey=True)
    kinds = (("mass", "attention in the pages read"), ("overlap", "oracle's pages that were read"))
    for panel, (budget, (name, told)) in zip(panels, product(budgets, kinds), strict=True):
        _draw_layers(panel, run, [line for line in lines if line["budget"] == budget], name)
        panel.set_title(f"{told}, budget {budget:,}", fontsize=10)
    for panel in panels[::2]:
        panel.set_ylabel("share [%]")
    for panel in lowest(panels):
        panel.set_xlabel("layer")
    put_title(figure, *_title(run, lines))
    legend_below(figure, panels)
    return figure


def _title(run: Run, lines: Sequence[Line]) -> tuple[str, str]:
    num_tasks = len({line["task"] for line in lines})
    told = f"{num_tasks} task{'s' * (num_tasks > 1)}, a sample of steps; bands: from the worst to the best kv head"
    dense = set(range(run.manifest.get("model", {}).get("num_layers", 0))) - {line["layer"] for line in lines}
    told += f"; layers that read everything: {', '.join(map(str, sorted(dense)))}" if 0 < len(dense) <= 8 else ""
    return f"{shown(run.model, 60)}, {lines[0]['length']:,} tokens: what the pages read hold of the attention", told


def _draw_layers(panel: Any, run: Run, lines: Sequence[Line], name: str) -> None:
    layers = sorted({line["layer"] for line in lines})
    for method, look in styles(run).items():
        by_layer = by_head([line for line in lines if line["method"] == method], name)
        if by_layer:
            x = list(by_layer)
            heads = [100 * by_layer[layer] for layer in x]
            panel.plot(
                x, [h.mean() for h in heads], label=shown(method), **{**look, "markersize": 5 if len(x) < 20 else 4}
            )
            panel.fill_between(x, [h.min() for h in heads], [h.max() for h in heads], color=look["color"], alpha=0.15)
    panel.set_ylim(-4, 104)
    panel.set_xticks(layers[:: max(1, -(-len(layers) // 16))])
    panel.grid(alpha=0.3)


def by_head(lines: Sequence[Line], name: str) -> dict[int, Any]:
    """By layer, the mean of every kv head over tasks and processes, each step weighing the same."""
    sums: dict[int, Any] = defaultdict(float)
    steps: dict[int, int] = defaultdict(int)
    for line in lines:
        if line["steps"] > 0 and line[name]:
            sums[line["layer"]] += line["steps"] * np.asarray(line[name], np.float64)
            steps[line["layer"]] += line["steps"]
    return {layer: sums[layer] / steps[layer] for layer in sorted(sums)}
