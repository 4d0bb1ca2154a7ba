"""What every measurement shares: the device, the JSON file with its circumstances, and the plots' look."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import sparsekv
from sparsekv.errors import ConfigError

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"


def positive(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: at least 1")
    return number


def tokens(text: str) -> int:
    """The type of an option that counts tokens: `32768`, `32k` or `1M`, where k is 1024 and M is 1024 k."""
    scale = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower())
    try:
        return positive(text) if scale is None else positive(text[:-1]) * scale
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: 32768, 32k or 1M") from error


def short(num_tokens: int) -> str:
    """`32k` for 32768, `1M` for 1048576; other numbers in full."""
    for letter, scale in (("M", 1 << 20), ("k", 1 << 10)):
        if num_tokens % scale == 0:
            return f"{num_tokens // scale}{letter}"
    return f"{num_tokens:,}"


def new_console() -> Console:
    """A console wide enough for our tables where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 118))


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not known: use cpu, cuda, cuda:N or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: PyTorch sees no GPU here. Use cpu; `sparsekv doctor` says more.")
    return device


def circumstances(command: str) -> dict[str, Any]:
    """Where and when something was measured: command, date, versions, processor."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    flashinfer = _version("flashinfer-python")
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "cpu_threads": torch.get_num_threads(),
        "versions": {
            "sparsekv": sparsekv.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            **({"flashinfer": flashinfer} if flashinfer else {}),
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def save_json(folder: str, name: str, command: str, settings: dict[str, Any], rows: Sequence[Any]) -> Path:
    """Writes `folder/name.json`: circumstances, settings, rows."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**circumstances(command), "settings": settings, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def new_figure(**kwargs: Any) -> tuple[Any, Any]:
    """A figure and its axes without a screen, whatever backend is configured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **{k: v for k, v in kwargs.items() if k in ("figsize", "dpi")})
    FigureCanvasAgg(figure)
    rest = {k: v for k, v in kwargs.items() if k not in ("figsize", "dpi")}
    return figure, figure.subplots(**rest)


def save_speed_plot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Milliseconds of a decode step against the context, sparse beside dense."""
    figure, axes = new_figure(figsize=(6.4, 4.2), dpi=120)
    contexts = [row["context"] for row in rows]
    axes.plot(contexts, [row["dense_ms"] for row in rows], "o-", color=ORANGE, label="dense (PyTorch SDPA)")
    axes.plot(contexts, [row["sparse_ms"] for row in rows], "s-", color=BLUE, label="sparsekv")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [short(c) for c in contexts])
    axes.set_xlabel("context [tokens]")
    axes.set_ylabel("one layer's decode step [ms]")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)


# key of the rows, label, style
_SPEED_LINES = (
    ("sparse_us", "sparsekv", {"marker": "s", "color": BLUE, "linewidth": 2}),
    ("flashinfer_us", "FlashInfer, dense", {"marker": "o", "color": ORANGE}),
    ("sdpa_us", "PyTorch SDPA, dense", {"marker": "^", "color": GREEN}),
    ("shelf_us", "parts off the shelf", {"marker": "D", "color": RED}),
    ("dense_floor_us", "memory's speed, all keys and values", {"linestyle": "--", "color": GREY}),
    ("floor_us", "memory's speed, digests and budget", {"linestyle": "--", "color": BLUE}),
)


def save_gpu_speed_plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Microseconds of a step against the context, and how much faster than dense it is at every batch and context.

    Args:
        rows: of `attention_cuda.json`. Shown are the first row's geometry and budget; on the left, its batch.
    """
    first = next((row for row in rows if "sparse_us" in row), None)
    figure, (left, right) = new_figure(figsize=(11.5, 4.6), dpi=120, ncols=2)
    if first is not None:
        same = [row for row in rows if "sparse_us" in row]
        same = [row for row in same if all(row[key] == first[key] for key in ("geometry", "budget"))]
        _plot_latency(left, [row for row in same if row["batch"] == first["batch"]])
        _plot_ratios(right, same)
        figure.suptitle(f"One layer's decode step: {first['geometry']}, budget {first['budget']} tokens")
    figure.savefig(path)


def _plot_latency(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["context"])
    for key, label, style in _SPEED_LINES:
        known = [row for row in rows if row.get(key) is not None]
        if known:
            axes.plot([row["context"] for row in known], [row[key] for row in known], label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([row["context"] for row in rows], [short(row["context"]) for row in rows])
    axes.set_xlabel("context [tokens]")
    axes.set_ylabel("one layer's decode step [us]")
    axes.set_title(f"batch {rows[0]['batch']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _plot_ratios(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Bars; an open mark where the memory's speed would put them."""
    rows = sorted((row for row in rows if row.get("speedup")), key=lambda row: (row["batch"], row["context"]))
    places = range(len(rows))
    axes.bar(places, [row["speedup"] for row in rows], color=BLUE, label="sparsekv")
    possible = [row["dense_floor_us"] / row["floor_us"] for row in rows]
    axes.plot(places, possible, "_", color=GREY, markersize=14, markeredgewidth=2, label="at the memory's speed")
    for place, row in zip(places, rows, strict=True):
        axes.annotate(f"{row['speedup']:.1f}", (place, row["speedup"]), ha="center", va="bottom", fontsize=8)
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_xticks(places, [f"{row['batch']} x {short(row['context'])}" for row in rows], rotation=45, ha="right")
    axes.set_xlabel("batch x context")
    axes.set_ylabel("times faster than the faster dense competitor")
    axes.legend(fontsize=8)


# mode of the rows, style; in the order of the legend
_GENERATE_STYLES: dict[str, dict[str, Any]] = {
    "sparse": {"marker": "s", "color": BLUE, "linewidth": 2},
    "sparse-unfused": {"marker": "P", "color": "#56B4E9", "linewidth": 2},
    "sparse-eager": {"marker": "s", "color": BLUE, "linestyle": "--", "markerfacecolor": "none"},
    "all": {"marker": "D", "color": RED},
    "default": {"marker": "o", "color": ORANGE},
    "static": {"marker": "^", "color": GREEN},
}


def save_generate_plot(path: Path, rows: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> None:
    """Milliseconds of a token of `generate`: against the context at batch 1, and at the other batches.

    Args:
        rows: of `generate_DEVICE.json`.
        labels: of the modes.
    """
    timed = [row for row in rows if row["ms_per_token"] is not None]
    several = [row for row in timed if row["batch"] > 1]
    figure, axes = new_figure(figsize=(11.5 if several else 6.4, 4.6), dpi=120, ncols=2 if several else 1)
    left, right = axes if several else (axes, None)
    _plot_tokens(left, [row for row in timed if row["batch"] == 1], labels)
    if right is not None:
        _plot_batches(right, several, labels)
    if rows:
        figure.suptitle(f"A token of generate: {rows[0]['model']}, budget {rows[0]['budget']} tokens")
    figure.savefig(path)


def _plot_tokens(axes: Any, rows: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> None:
    rows = sorted(rows, key=lambda row: row["context"])
    for mode, style in _GENERATE_STYLES.items():
        known = [row for row in rows if row["mode"] == mode]
        if known:
            values = [row["ms_per_token"] for row in known]
            axes.plot([row["context"] for row in known], values, label=labels[mode], **style)
    contexts = sorted({row["context"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [short(context) for context in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context [tokens]")
    axes.set_ylabel("a token [ms]")
    axes.set_title("batch 1")
    axes.grid(alpha=0.3, which="both")
    if rows:
        axes.legend(fontsize=8)


def _plot_batches(axes: Any, rows: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> None:
    """Bars; where one is missing, the mode was not measured or ran out of memory."""
    points = sorted({(row["batch"], row["context"]) for row in rows})
    modes = [mode for mode in _GENERATE_STYLES if any(row["mode"] == mode for row in rows)]
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        known = [row for row in rows if row["mode"] == mode]
        places = [points.index((row["batch"], row["context"])) + (i - (len(modes) - 1) / 2) * width for row in known]
        values = [row["ms_per_token"] for row in known]
        alpha = 0.5 if mode == "sparse-eager" else 1
        color = _GENERATE_STYLES[mode]["color"]
        bars = axes.bar(places, values, width, color=color, alpha=alpha, label=labels[mode])
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=7)
    axes.set_xticks(range(len(points)), [f"{batch} x {short(context)}" for batch, context in points])
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.set_xlabel("batch x context")
    axes.margins(y=0.15)
    axes.set_ylabel("a token of every sequence [ms]")
    axes.set_title("larger batches")
    axes.legend(fontsize=8)
