"""What every measurement shares: the device, the JSON file with its circumstances, and the plots' look."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Sequence
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
        },
    }


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
    axes.set_xticks(contexts, [f"{c // 1024}k" for c in contexts])
    axes.set_xlabel("context [tokens]")
    axes.set_ylabel("one layer's decode step [ms]")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)
