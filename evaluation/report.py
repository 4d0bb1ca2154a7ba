"""What every measurement shares: the JSON file with its circumstances, and the plots' look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sparsekv
from sparsekv.command_line import circumstances
from sparsekv.ops import compiler

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
PURPLE, SKY = "#CC79A7", "#56B4E9"


def short(num_tokens: int) -> str:
    """`32k` for 32768, `1M` for 1048576; other numbers in full."""
    for letter, scale in (("M", 1 << 20), ("k", 1 << 10)):
        if num_tokens % scale == 0:
            return f"{num_tokens // scale}{letter}"
    return f"{num_tokens:,}"


def result(command: str, settings: dict[str, Any], rows: Sequence[Any]) -> dict[str, Any]:
    """What is written and what `--json` prints: circumstances, the fingerprint of the kernels, settings, rows."""
    here = {**circumstances(command), "kernels": compiler.fingerprint()}
    return {**here, "settings": settings, "rows": list(rows)}


def file_name(what: str, device: str, configs: Sequence[sparsekv.SparseConfig]) -> str:
    """The name of a result's file: `what_DEVICE`, and the digests, formats and policies that are not the default."""
    names, default = [what, device], sparsekv.SparseConfig()
    for setting in ("digest", "kv", "policy"):
        found = dict.fromkeys(getattr(config, setting) for config in configs)
        names += found if list(found) != [getattr(default, setting)] else []
    return "_".join(names)


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

    size = {name: kwargs.pop(name) for name in ("figsize", "dpi") if name in kwargs}
    figure = Figure(layout="constrained", **size)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**kwargs)
