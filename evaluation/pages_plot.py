"""The picture of what a sparse decode read: pages against decoded tokens, one panel per sparse layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekv import DecodeStep

from .report import BLUE, GREY, ORANGE, RED, new_figure
from .testbed.stories import Question


@dataclass
class PageTrace:
    """Notes the pages of every step. `observe` is an observer for `PagedCache.observers`.

    Attributes:
        question: what is asked.
        page_size, budget: of the cache, in tokens.
        slots: per layer, the pages read at each step, `[hkv, k]`.
        words: the word fed at each step.
    """

    question: Question
    page_size: int
    budget: int
    slots: dict[int, list[Tensor]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    def observe(self, step: DecodeStep, slots: Tensor | None) -> None:
        if slots is not None:
            self.slots.setdefault(step.layer_idx, []).append(slots[0].cpu())


def save_pages_plot(path: Path, trace: PageTrace, context: int) -> None:
    """Draws the pages each sparse layer read while it took in one question and answered it."""
    layers = sorted(trace.slots)
    columns = min(len(layers), 2)
    rows = -(-len(layers) // columns)
    size = {"figsize": (6.2 * columns, 0.8 + 3.0 * rows), "dpi": 110}
    figure, axes = new_figure(nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False, **size)
    for panel, layer_idx in zip(axes.flat, layers, strict=False):
        _draw_layer(panel, trace, layer_idx)
    for panel in axes[-1]:
        panel.set_xticks(range(len(trace.words)), trace.words, rotation=90, fontsize=7)
    for panel in axes[:, 0]:
        panel.set_ylabel(f"page of the story ({trace.page_size} tokens each)")
    num_pages, budget_pages = -(-context // trace.page_size), trace.budget // trace.page_size
    figure.suptitle(
        f"Pages read per decoded token: {budget_pages} of {num_pages} per kv head (budget {trace.budget} tokens)"
    )
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    figure.savefig(path)


def _draw_layer(panel: Any, trace: PageTrace, layer_idx: int) -> None:
    steps = trace.slots[layer_idx]
    for head, color in zip(range(steps[0].shape[0]), (BLUE, ORANGE), strict=False):
        shift = 0.15 if head else -0.15  # the heads side by side, not on top of each other
        points = [(x + shift, int(slot)) for x, step in enumerate(steps) for slot in step[head] if slot >= 0]
        panel.scatter(*zip(*points, strict=True), s=2, color=color, label=f"kv head {head}", linewidths=0)
    wanted = _evidence_pages(trace.question, trace.page_size)
    for page in wanted:
        panel.axhline(
            page, color=GREY, lw=0.6, zorder=0, label="page that holds the answer" if page == wanted[0] else None
        )
    hits = [(x, int(slot)) for x, step in enumerate(steps) for slot in set(step.flatten().tolist()) & set(wanted)]
    panel.scatter(
        *(zip(*hits, strict=True) if hits else ([], [])), s=55, facecolors="none", edgecolors=RED, label="it is read"
    )
    panel.axvline(len(trace.question.prompt.split()) - 1.5, color="black", lw=0.8, ls=":", label="the answer begins")
    panel.set_title(
        f"layer {layer_idx}: the answer's page is read at {len({x for x, _ in hits})} of {len(steps)} steps",
        fontsize=10,
    )


def _evidence_pages(question: Question, page_size: int) -> list[int]:
    spans = [range(start // page_size, (end - 1) // page_size + 1) for start, end in question.evidence]
    return sorted({page for span in spans for page in span})
