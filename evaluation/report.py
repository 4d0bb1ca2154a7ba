"""What every measurement shares: the device, the JSON file with its circumstances, and the plots' look."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
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
PURPLE, SKY = "#CC79A7", "#56B4E9"


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


class PipeConsole(Console):
    """A console that says when nobody reads its output any more; rich would end the process with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def new_console() -> Console:
    """A console wide enough for our tables where the output is a file or a pipe."""
    console = PipeConsole()
    if console.is_jupyter:  # the same text as in a pipe, not a display for each line
        return PipeConsole(force_jupyter=False, force_terminal=False, width=118)
    return console if console.is_terminal else PipeConsole(width=max(console.width, 118))


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
    if device.type == "meta":
        raise ConfigError(f"device={name!r} holds no numbers: use cpu, cuda, cuda:N or auto.")
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


def result(command: str, settings: dict[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """What is written and what `--json` prints: circumstances, settings, rows."""
    return {**circumstances(command), "settings": settings, "rows": list(rows)}


def file_name(what: str, device: str, digest: str) -> str:
    """Of a result: `what_DEVICE`, and `what_DEVICE_DIGEST` where it is not the default's."""
    return "_".join([what, device, *([] if digest == sparsekv.SparseConfig().digest else [digest])])


def save_json(folder: str, name: str, content: dict[str, Any]) -> Path:
    """Writes `folder/name.json`."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
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
