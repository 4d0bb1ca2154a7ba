"""A calibration's outcomes as a table and as a picture: what is lost, against what is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from sparsekv import POLICIES, SparseConfig
from sparsekv.evaluation.accuracy.methods import DENSE
from sparsekv.evaluation.accuracy.plots import DPI, legend_below, put_title
from sparsekv.evaluation.report import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, new_figure
from sparsekv.layer_budgets import REST, as_mapping, spans

from .verdicts import Loss, Outcome, Verdict

_COLUMNS = ("digest", "pooling", "budget", "natural", "recall", "KiB/token", "of dense", "n", "verdict")
_COLORS = (BLUE, GREEN, ORANGE, PURPLE, SKY, RED, GREY)
_MARKERS = {Verdict.MEETS: "o", Verdict.UNDECIDED: "d", Verdict.FAILS: "x"}


def table(title: str, outcomes: Iterable[Outcome], dense_bytes: float, best: Outcome | None) -> Table:
    """A row per setting, by digest and by what is read; the best is marked."""
    found = Table(
        title=escape(title),
        caption="natural, recall: nats per token above dense, with 95 % intervals over all looks; n: documents",
        box=SIMPLE_HEAD,
    )
    for i, name in enumerate(_COLUMNS):
        found.add_column(name, justify="left" if i in (0, 1, 8) else "right", no_wrap=name != "budget")
    for (digest, pooling), some in _by_line(outcomes):
        for x in some:
            found.add_row(
                digest, pooling, budget_shown(x.config), str(x.natural), str(x.recall),
                f"{x.cost / 1024:,.0f}", f"{x.cost / dense_bytes:.1%}", str(x.num_documents),
                x.verdict.value, end_section=x is some[-1], style="bold" if x is best else None,
            )  # fmt: skip
    return found


def figure(title: str, outcomes: Iterable[Outcome], dense_bytes: float, best: Outcome | None) -> Any:
    """Both losses against the bytes that a token reads, with the tolerances as lines."""
    made, panels = new_figure(ncols=2, figsize=(10, 4.6), dpi=DPI)
    lines = _by_line(outcomes)
    for panel, kind in zip(panels, ("natural", "recall"), strict=True):
        for color, ((digest, pooling), some) in zip(_COLORS * len(lines), lines, strict=False):
            _draw(panel, kind, some, color, f"{digest}, {pooling}")
        _finish(panel, kind, [x for _, some in lines for x in some], dense_bytes, best)
    put_title(
        made,
        title,
        "bars: 95 % intervals; numbers: budgets, small marks: by layer; o meets, diamond undecided, x fails",
    )
    legend_below(made, panels)
    return made


def named(config: SparseConfig) -> str:
    """A setting in a few words."""
    if POLICIES.get(config.policy).reads_all:
        return DENSE
    prompts = f", prompts of mass {config.prefill_mass:g}" if config.prefill == "sparse" else ""
    return f"{config.digest}, {config.group_pooling}, {budget_shown(config)} tokens{prompts}"


def budget_shown(config: SparseConfig) -> str:
    """`512`, or with the layers that have their own, `256, 512 in 0-3`."""
    by_layer = as_mapping(config.budget)
    rest = by_layer.pop(REST)
    values = sorted(set(by_layer.values()))
    own = [f"{v:,} in {spans(int(layer) for layer in by_layer if by_layer[layer] == v)}" for v in values]
    return ", ".join([f"{rest:,}", *own])


def _by_line(outcomes: Iterable[Outcome]) -> list[tuple[tuple[str, str], list[Outcome]]]:
    """By digest and pooling, ordered by what is read."""

    def line(outcome: Outcome) -> tuple[str, str]:
        return outcome.config.digest, outcome.config.group_pooling

    ordered = sorted(outcomes, key=lambda outcome: (line(outcome), outcome.cost))
    return [(name, list(some)) for name, some in groupby(ordered, key=line)]


def _draw(panel: Any, kind: str, some: Sequence[Outcome], color: str, label: str) -> None:
    """One digest's losses: a line through those of one budget for all layers, and points beside it."""
    for by_layer in (False, True):
        of_kind = [x for x in some if isinstance(x.config.budget, tuple) is by_layer]
        losses: list[Loss] = [getattr(x, kind) for x in of_kind]
        x, y = [x.cost / 1024 for x in of_kind], [loss.mean for loss in losses]
        reach = [loss.reach if math.isfinite(loss.reach) else 0 for loss in losses]
        look = {"linestyle": "none", "alpha": 0.5} if by_layer else {"label": label}
        panel.errorbar(x, y, reach, color=color, linewidth=1.2, elinewidth=1, **look)
        for place, outcome in zip(zip(x, y, strict=True), of_kind, strict=True):
            panel.plot(*place, _MARKERS[outcome.verdict], color=color, markersize=4 if by_layer else 6)
            if not by_layer:
                text = budget_shown(outcome.config)
                panel.annotate(text, place, (4, 4), textcoords="offset points", fontsize=7, color=color)


def _finish(panel: Any, kind: str, outcomes: Sequence[Outcome], dense_bytes: float, best: Outcome | None) -> None:
    tolerance = getattr(outcomes[0], kind).tolerance
    panel.axhline(0, color="black", linestyle="--", linewidth=1, zorder=0)
    panel.axhline(tolerance, color=RED, linewidth=1, zorder=0, label="tolerance")
    if best is not None:
        panel.axvline(best.cost / 1024, color=GREY, linewidth=6, alpha=0.25, zorder=0, label="chosen")
    panel.set_yscale("symlog", linthresh=2 * tolerance)
    panel.set_xscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:,.4g}")
    panel.xaxis.set_minor_formatter("{x:,.4g}")
    panel.tick_params(axis="x", which="both", labelsize=8, rotation=30)
    panel.set_xlabel(f"cache read per token [KiB], dense {dense_bytes / 1024:,.0f}")
    panel.set_ylabel("nats per token above dense")
    panel.set_title(kind, fontsize=10)
    panel.grid(alpha=0.3)
