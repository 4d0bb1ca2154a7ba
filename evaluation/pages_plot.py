"""The picture of what a sparse decode read: pages against decoded tokens, one panel per sparse layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsekv import DecodeStep

from .report import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, new_figure

_HEAD_COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, "black")
_MAX_PANELS = 6  # of more sparse layers some are shown, evenly spread


@dataclass
class PageTrace:
    """Notes the pages of every step. `observe` is an observer for `PagedCache.observers`.

    Attributes:
        evidence: where the answer stands in the text, spans `[start, end)` in tokens.
        page_size, budget: of the cache, in tokens.
        slots: per layer, the pages read at each step, `[hkv, k]`.
        words: the word fed at each step; the first `num_asked` are the question's.
    """

    evidence: Sequence[tuple[int, int]]
    page_size: int
    budget: int
    num_asked: int = 0
    slots: dict[int, list[Tensor]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    @property
    def evidence_pages(self) -> list[int]:
        """The pages that hold the answer."""
        spans = [range(start // self.page_size, (end - 1) // self.page_size + 1) for start, end in self.evidence]
        return sorted({page for span in spans for page in span})

    def observe(self, step: DecodeStep, slots: Tensor | None) -> None:
        if slots is not None:
            self.slots.setdefault(step.layer_idx, []).append(slots[0].cpu())


def pages_figure(trace: PageTrace, context: int) -> Any:
    """The pages that each sparse layer read while it took in one question and answered it.

    Args:
        context: tokens of the text.
    """
    layers = sorted(trace.slots)
    count = min(len(layers), _MAX_PANELS)
    layers = [layers[i * (len(layers) - 1) // max(count - 1, 1)] for i in range(count)]
    columns = min(len(layers), 2)
    rows = -(-len(layers) // columns)
    size = {"figsize": (6.2 * columns, 0.8 + 3.0 * rows), "dpi": 110}
    figure, axes = new_figure(nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False, **size)
    for panel, layer_idx in zip(axes.flat, layers, strict=False):
        _draw_layer(panel, trace, layer_idx)
    for panel in axes[-1]:
        panel.set_xticks(range(len(trace.words)), trace.words, rotation=90, fontsize=7)
        panel.set_xlabel("token decoded")
    for panel in axes[:, 0]:
        panel.set_ylabel(f"page of the text ({trace.page_size} tokens each)")
    num_pages, budget_pages = -(-context // trace.page_size), trace.budget // trace.page_size
    figure.suptitle(
        f"Pages read per decoded token: {budget_pages} of {num_pages} per kv head (budget {trace.budget} tokens)"
    )
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize=9)
    num_heads = trace.slots[layers[0]][0].shape[0]
    for dot in legend.legend_handles[:num_heads]:  # larger than in the panels, where there are many
        dot.set_sizes([25])
    return figure


def _draw_layer(panel: Any, trace: PageTrace, layer_idx: int) -> None:
    steps = trace.slots[layer_idx]
    num_heads = steps[0].shape[0]
    for head, color in zip(range(num_heads), itertools.cycle(_HEAD_COLORS), strict=False):
        shift = 0.6 * ((head + 0.5) / num_heads - 0.5)  # the heads side by side, not on top of each other
        points = [(x + shift, int(slot)) for x, step in enumerate(steps) for slot in step[head] if slot >= 0]
        panel.scatter(*zip(*points, strict=True), s=2, color=color, label=f"kv head {head}", linewidths=0)
    wanted = trace.evidence_pages
    for page in wanted:
        panel.axhline(
            page, color=GREY, lw=0.6, zorder=0, label="page that holds the answer" if page == wanted[0] else None
        )
    hits = [(x, int(slot)) for x, step in enumerate(steps) for slot in set(step.flatten().tolist()) & set(wanted)]
    panel.scatter(
        *(zip(*hits, strict=True) if hits else ([], [])), s=55, facecolors="none", edgecolors=RED, label="it is read"
    )
    panel.axvline(trace.num_asked - 1.5, color="black", lw=0.8, ls=":", label="the answer begins")
    panel.set_title(
        f"layer {layer_idx}: the answer's page is read at {len({x for x, _ in hits})} of {len(steps)} steps",
        fontsize=10,
    )
