"""Tells what `sparsekv.patch` would do with models, from their configs alone: no weights are read or made.

For every type of model that generates text in the transformers installed here, or for those named: how each kind of
its layers would decode, and whether the decode step would be captured on a GPU, and why not. A type is told by its
default config: a checkpoint may have other layers, so name the one you mean. `dense_layers` is 0 here.

    sparsekv models
    sparsekv models llama gemma3_text gpt_oss
    sparsekv models ./my-model Qwen/Qwen3-8B --json
"""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from sparsekv import Support, supports
from sparsekv.command_line import add_json_option, new_console
from sparsekv.errors import ConfigError, did_you_mean
from sparsekv.hf.models import PUBLISHED, SHIPPED, pretrained

TYPES = list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES]))
UNBUILT = "cannot be built by its name"
_STYLES = {"sparse": "green", "some": "green", "dense": "yellow", "refused": "red", UNBUILT: "dim"}
_MAX_SIGNS = 80  # of why a step is not captured, which may list all layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv models`."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help="a type of transformers, a folder, a .gguf file, or a model id on the hub (default: every type)",
    )  # fmt: skip
    add_json_option(parser)


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Prints the table and returns it: of each model its `name`, its `verdict`, and the rest of `Support.as_dict` or
    the `error`; and how many there are of each verdict.

    Raises:
        ConfigError: a name is no type and no model, or the model's config cannot be loaded.
        UnsupportedModelError: no model can be built from that.
    """
    transformers.logging.set_verbosity_error()
    for name in args.names:
        _check(name)
    names = track(args.names or TYPES, "Building", console=Console(stderr=True), transient=True)
    found = {name: _support_of(name) for name in names}
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "decodes", "layers", "captured on a GPU"):
        table.add_column(heading, overflow="fold")
    for name, told in found.items():
        table.add_row(name, Text(_verdict(told), _STYLES[_verdict(told)]), *map(Text, _cells(told)))
    counts = Counter(map(_verdict, found.values()))
    console = new_console()
    console.print(table)
    console.print("\n" + ", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES if verdict in counts))
    models = [{"name": name, "verdict": _verdict(told), **_rest(told)} for name, told in found.items()]
    return {"transformers": transformers.__version__, "counts": counts, "models": models}


def _check(name: str) -> None:
    """A name that is not known, no path and no id with an owner is answered before any work."""
    known = [*TYPES, *SHIPPED, *PUBLISHED]
    if name not in known and "/" not in name and not Path(name).exists():
        raise ConfigError(
            f"There is no type {name!r} in transformers {transformers.__version__}.{did_you_mean(name, known)} "
            "`sparsekv models` lists all; a folder or an id on the hub is allowed, too."
        )


def _support_of(name: str) -> Support | str:
    """What is told of a model; a string: why a type cannot be built."""
    if name not in TYPES:
        return supports(pretrained(AutoConfig, name), dense_layers=0)
    try:
        return supports(CONFIG_MAPPING[name](), dense_layers=0)
    except Exception as error:  # a default config may lack what its model needs, which says so in any way
        return " ".join(str(error).split()) or type(error).__name__


def _verdict(told: Support | str) -> str:
    return UNBUILT if isinstance(told, str) else told.verdict


def _rest(told: Support | str) -> dict[str, Any]:
    return {"error": told} if isinstance(told, str) else told.as_dict()


def _cells(told: Support | str) -> tuple[str, str]:
    """How its layers decode, a line for each kind, and whether the step is captured."""
    if isinstance(told, str):
        return told, "-"
    if told.refusal is not None:
        return told.refusal, "-"
    return "\n".join(map(str, told.layers)), textwrap.shorten(told.why_eager or "yes", _MAX_SIGNS, placeholder=" ...")
