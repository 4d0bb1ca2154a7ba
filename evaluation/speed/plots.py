"""Pictures of the speed measurements: a layer's decode step, its parts, a token of `generate`, memory.

Each takes the rows of a result file (`attention_DEVICE.json`, `generate_DEVICE.json`) and returns a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekv import SparseConfig
from sparsekv.evaluation.report import BLUE, GREEN, GREY, ORANGE, RED, SKY, new_figure, short

from .generate_points import MODES

Row = dict[str, Any]

# A layer's competitors: name in the rows' keys (sparse_us), label, style.
_STEP_LINES = (
    ("sparse", "sparsekv", {"marker": "s", "color": BLUE, "linewidth": 2}),
    ("flashinfer", "FlashInfer, dense", {"marker": "o", "color": ORANGE}),
    ("sdpa", "PyTorch SDPA, dense", {"marker": "^", "color": GREEN}),
    ("shelf", "parts off the shelf", {"marker": "D", "color": RED}),
    ("dense_floor", "memory's speed, all keys and values", {"linestyle": "--", "color": GREY}),
    ("floor", "memory's speed, digests and budget", {"linestyle": "--", "color": BLUE}),
)
_ALIKE = ("geometry", "budget", "digest", "policy", "kv", "group_pooling", "min_share")
_PARTS = {"append": GREY, "score": BLUE, "select": ORANGE, "attend": GREEN}
_SPLIT = {"attention": ("attention", BLUE), "gemm": ("matrix products", GREY), "rest": ("norms, rotary ...", ORANGE),
          "all_reduce": ("all-reduces", GREEN)}  # fmt: skip

# mode of the rows, style; in the order of the legend
_MODE_STYLES: dict[str, dict[str, Any]] = {
    "sparse": {"marker": "s", "color": BLUE, "linewidth": 2},
    "sparse-unfused": {"marker": "P", "color": SKY, "linewidth": 2},
    "sparse-eager": {"marker": "s", "color": BLUE, "linestyle": "--", "markerfacecolor": "none"},
    "all": {"marker": "D", "color": RED},
    "default": {"marker": "o", "color": ORANGE},
    "static": {"marker": "^", "color": GREEN},
}


# -- one layer's decode step


def step_figure(rows: Sequence[Row], title: str | None = None) -> Any:
    """Time of a step against the context, and how much faster than dense it is at every batch and context.

    Args:
        rows: of `attention_DEVICE.json`. Shown are the first row's geometry and settings; on the left, its batch.
        title: of the figure (default: geometry and budget).
    """
    same = _like_the_first(rows)
    figure, (left, right) = new_figure(figsize=(11.5, 4.6), dpi=120, ncols=2)
    if same:
        _plot_steps(left, [row for row in same if row["batch"] == same[0]["batch"]])
        figure.suptitle(title or _title("One layer's decode step", same[0]))
    _plot_ratios(right, same)
    return figure


def _title(what: str, row: Row) -> str:
    usual = SparseConfig()
    told = [row.get("digest", usual.digest), row.get("policy", usual.policy)]  # older rows do not say the defaults
    named = [name for name in told if name not in (usual.digest, usual.policy)]
    return ", ".join([f"{what}: {row.get('geometry') or row['model']}", f"budget {row['budget']} tokens", *named])


def _like_the_first(rows: Sequence[Row]) -> list[Row]:
    """Those measured, of the first one's geometry and settings, by batch and context."""
    timed = [row for row in rows if row.get("sparse_us")]
    same = [row for row in timed if all(row.get(key) == timed[0].get(key) for key in _ALIKE)]
    return sorted(same, key=lambda row: (row["batch"], row["context"]))


def _plot_steps(axes: Any, rows: Sequence[Row]) -> None:
    for name, label, style in _STEP_LINES:
        _plot_line(axes, [row for row in rows if row.get(f"{name}_us")], f"{name}_us", label, style)
    _context_axis(axes, [row["context"] for row in rows])
    axes.set(yscale="log", ylabel="one layer's decode step [us]", title=f"batch {rows[0]['batch']}")
    axes.legend(fontsize=8)


def _plot_line(axes: Any, rows: Sequence[Row], key: str, label: str, style: Mapping[str, Any]) -> None:
    if rows:
        axes.plot([row["context"] for row in rows], [row[key] for row in rows], label=label, **style)


def _context_axis(axes: Any, contexts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [short(context) for context in contexts])
    axes.set(xlabel="context [tokens]")
    axes.grid(alpha=0.3, which="both")


def _plot_ratios(axes: Any, rows: Sequence[Row]) -> None:
    """Bars; an open mark where the memory's speed would put them."""
    rows = [row for row in rows if row.get("speedup")]
    bars = axes.bar(range(len(rows)), [row["speedup"] for row in rows], color=BLUE, label="sparsekv")
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
    possible = [row["dense_floor_us"] / row["floor_us"] for row in rows]
    axes.plot(possible, "_", color=GREY, markersize=14, markeredgewidth=2, label="at the memory's speed")
    axes.axhline(1, color=GREY, linewidth=0.8)
    _point_axis(axes, rows)
    axes.set(ylabel="times faster than the faster dense competitor")
    axes.legend(fontsize=8)


def _point_axis(axes: Any, rows: Sequence[Row]) -> None:
    labels = [f"{row['batch']} x {short(row['context'])}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=45, ha="right")
    axes.set(xlabel="batch x context [tokens]")


def parts_figure(rows: Sequence[Row]) -> Any:
    """A step's parts, each timed alone, stacked; beside them the step itself, and the memory's speed."""
    shown = [row for row in _like_the_first(rows) if "attend_us" in row]
    figure, axes = new_figure(figsize=(8, 4.6), dpi=120)
    _stack(axes, [([row.get(f"{part}_us", 0) for row in shown], f"{part}, alone", _PARTS[part]) for part in _PARTS])
    axes.plot([row["sparse_us"] for row in shown], "s", color="black", markersize=9, label="the step")
    axes.plot([row["floor_us"] for row in shown], "_", color=RED, markersize=9, label="memory's speed")
    _point_axis(axes, shown)
    axes.set(ylabel="one layer's decode step [us]", title="Where a step's time goes")
    axes.legend(fontsize=8)
    return figure


def _stack(axes: Any, parts: Sequence[tuple[Sequence[float], str, str]]) -> None:
    """Bars on top of each other: values, label, colour."""
    tops: list[float] = []
    for values, label, color in parts:
        tops = tops or [0.0] * len(values)
        axes.bar(range(len(values)), values, 0.6, bottom=tops, color=color, label=label)
        tops = [top + value for top, value in zip(tops, values, strict=True)]


# -- a token of generate


def tokens_figure(rows: Sequence[Row]) -> Any:
    """Milliseconds of a token of `generate`: against the context at batch 1, and at the other batches.

    Args:
        rows: of `generate_DEVICE.json`.
    """
    timed = [row for row in rows if row["ms_per_token"] is not None]
    several = [row for row in timed if row["batch"] > 1]
    figure, axes = new_figure(
        figsize=(11.5 if several else 6.4, 4.6), dpi=120, ncols=2 if several else 1, squeeze=False
    )
    _plot_tokens(axes[0, 0], [row for row in timed if row["batch"] == 1])
    if several:
        _plot_batches(axes[0, 1], several)
        axes[0, 1].set_title("larger batches")
    if rows:
        figure.suptitle(_title("A token of generate", rows[0]))
    return figure


def _plot_tokens(axes: Any, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: row["context"])
    for mode, style in _MODE_STYLES.items():
        known = [row for row in rows if row["mode"] == mode]
        _plot_line(axes, known, "ms_per_token", MODES[mode].label, style)
    _context_axis(axes, sorted({row["context"] for row in rows}))
    axes.set(ylim=(0, None), ylabel="a token [ms]", title="batch 1")
    if rows:
        axes.legend(fontsize=8)


def _plot_batches(axes: Any, rows: Sequence[Row], key: str = "ms_per_token", scale: float = 1.0) -> None:
    """Bars; where one is missing, the mode was not measured or ran out of memory."""
    points = sorted({(row["batch"], row["context"]) for row in rows})
    modes = [mode for mode in _MODE_STYLES if any(row["mode"] == mode for row in rows)]
    width = 0.8 / max(len(modes), 1)
    for i, mode in enumerate(modes):
        known = [row for row in rows if row["mode"] == mode]
        places = [points.index((row["batch"], row["context"])) + (i - (len(modes) - 1) / 2) * width for row in known]
        look = {"color": _MODE_STYLES[mode]["color"], "alpha": 0.5 if mode == "sparse-eager" else 1}
        bars = axes.bar(places, [row[key] / scale for row in known], width, **look, label=MODES[mode].label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(points)), [f"{batch} x {short(context)}" for batch, context in points])
    axes.margins(y=0.15)
    width = max(len(points), 1)
    axes.set(xlim=(-0.5, width - 0.5), xlabel="batch x context [tokens]", ylabel="a token of every sequence [ms]")
    axes.legend(fontsize=8)


def split_figure(rows: Sequence[Row]) -> Any:
    """Where a captured step's time goes: attention, matrix products, the rest, and gaps between kernels."""
    shown = [row for row in rows if row.get("split_ms")]
    figure, axes = new_figure(figsize=(8, 4.6), dpi=120)
    parts = [part for part in _SPLIT if any(part in row["split_ms"] for row in shown)]
    _stack(axes, [([row["split_ms"].get(part, 0) for row in shown], *_SPLIT[part]) for part in parts])
    marks = [row["ms_per_token"] for row in shown]
    axes.plot(marks, "_", color="black", markersize=24, label="a token, launches and gaps included")
    _point_axis(axes, shown)
    axes.set_ylim(0, 1.4 * max(marks, default=1))  # with room for the legend
    of_mode = MODES[shown[0]["mode"]].label if shown else ""
    axes.set(ylabel="a token of every sequence [ms]", title=f"Where a token's time goes: {of_mode}")
    axes.legend(fontsize=8, loc="upper left")
    return figure


def memory_figure(rows: Sequence[Row]) -> Any:
    """The most memory a call of `generate` took beyond the weights, in GB, prefill included."""
    known = [row for row in rows if row.get("peak_bytes")]
    figure, axes = new_figure(figsize=(8, 4.6), dpi=120)
    _plot_batches(axes, known, "peak_bytes", 1e9)
    title = "Memory of a call of generate, its prefill included"
    axes.set(ylabel="most memory beyond the weights [GB]", title=title)
    return figure


# -- what the time buys


def accuracy_figure(accuracy: Mapping[int, float], rows: Sequence[Row], dense: float, title: str) -> Any:
    """Accuracy against the time of a layer's decode step, a point per budget.

    Args:
        accuracy: share of right answers by budget in tokens.
        rows: of `attention_DEVICE.json` at one context, one per budget.
        dense: share of right answers of dense attention.
        title: of the figure.
    """
    figure, axes = new_figure(figsize=(7, 4.6), dpi=120)
    shown = sorted((row for row in rows if row["budget"] in accuracy), key=lambda row: row["budget"])
    points = [(row["sparse_us"], 100 * accuracy[row["budget"]]) for row in shown]
    axes.plot(*zip(*points, strict=True), "s-", color=BLUE, label="sparsekv, by budget [tokens]")
    for row, point in zip(shown, points, strict=True):
        axes.annotate(short(row["budget"]), point, xytext=(5, -12), textcoords="offset points", fontsize=8)
    fastest = min((row["best_dense_us"] for row in shown), default=0)
    axes.plot(fastest, 100 * dense, "o", color=ORANGE, label="dense: the faster competitor")
    axes.set(xlim=(0, None), xlabel="one layer's decode step [us]", ylabel="right answers [%]", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
