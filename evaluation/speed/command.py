"""How long one layer's decode step takes, sparse beside dense, on the same keys and values in the same run.

    sparsekv bench attention --device cpu --contexts 64k 256k --budget 1024
    sparsekv bench attention --device cuda --preset full --out results
    sparsekv bench attention --policy recent --contexts 32k
    sparsekv bench generate --device cuda --preset bars   # a token of a whole model

The policy's own step is timed beside PyTorch's scaled_dot_product_attention (SDPA) and the memory's speed; on a GPU
all are CUDA graphs, and FlashInfer and what can be assembled from parts off the shelf stand beside it, too.
Every step is checked before it is timed: no speed is printed of one that computes something else.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from sparsekv import SparseConfig
from sparsekv.command_line import (
    Parser,
    add_json_option,
    add_settings_option,
    choose_device,
    positive,
    settings_of,
    tokens,
    with_json,
)
from sparsekv.errors import ConfigError

from . import attention_bench, generate_bench, generate_points
from .attention_points import PRESETS, K, LayerPoint, grid, preset_points
from .competitors import COMPETITORS
from .geometry import GEOMETRIES, Geometry, named

_HEADS = ("q_heads", "kv_heads", "head_dim")
_SET_BY_PRESET = ("geometry", "model", *_HEADS, "contexts", "batches", "budgets", "settings")
_QUICK_REPEATS, _REPEATS = 5, 20


_ALL = list(COMPETITORS)
# What is measured where nothing else is asked for; fewer and smaller points on a CPU.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"contexts": [8 * K, 32 * K, 128 * K], "budgets": [2 * K], "against": _ALL, "heads": (32, 8, 128)},
    "cpu": {"contexts": [4 * K, 16 * K, 64 * K, 256 * K], "budgets": [K], "against": ["sdpa"], "heads": (8, 2, 64)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv bench attention`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    _add_shapes(parser)
    add_settings_option(parser)
    parser.add_argument("--page-size", type=positive, help=f"tokens per page (default {SparseConfig.page_size})")
    parser.add_argument("--policy", help=f"which pages a step reads (default {SparseConfig.policy})")
    parser.add_argument("--digest", help=f"page digest (default {SparseConfig.digest})")
    parser.add_argument(
        "--repeats", type=positive, help=f"timed calls, of which the median counts (default {_REPEATS})"
    )
    parser.add_argument("--against", nargs="*", choices=_ALL, help="competitors (default: all, on a CPU sdpa)")
    parser.add_argument(
        "--bandwidth", type=float, metavar="TB/s",
        help="of the memory, for the floors (default: 4.39 on an H200, else measured)",
    )  # fmt: skip
    parser.add_argument("--check-only", action="store_true", help="check all shapes, time none")
    parser.add_argument("--out", metavar="DIR", help="write DIR/attention_DEVICE.json and .png")
    add_json_option(parser)


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--contexts", type=tokens, nargs="+", metavar="TOKENS", help="32768, 32k or 1M (k: 1024 tokens)"
    )
    parser.add_argument(
        "--budget", "--budgets", dest="budgets", type=tokens, nargs="+", metavar="TOKENS",
        help="tokens read per kv head (default: those of --settings, or 2048, on a CPU 1024)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", "--batches", dest="batches", type=positive, nargs="+", metavar="N", help="sequences (default 1)"
    )
    parser.add_argument("--preset", choices=PRESETS, help="a fixed set of shapes for a GPU instead of these options")
    parser.add_argument(
        "--quick", dest="preset", action="store_const", const="quick", help="the same as --preset quick"
    )
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--model", metavar="ID_OR_PATH", help="layers like those of this model, whose config is read")
    layers.add_argument(
        "--geometry", nargs="+", metavar="NAME",
        help=f"layers like those of {', '.join(GEOMETRIES)} (default on a GPU: the first)",
    )  # fmt: skip
    parser.add_argument("--q-heads", type=positive, help="query heads (default on a CPU: 8)")
    parser.add_argument("--kv-heads", type=positive, help="kv heads (default on a CPU: 2)")
    parser.add_argument("--head-dim", type=positive, help="channels per head (default on a CPU: 64)")


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures, prints the tables and writes the files asked for; returns what the JSON file holds."""
    device = choose_device(args.device)
    against = _defaults(device)["against"] if args.against is None else args.against
    repeats = args.repeats or (_QUICK_REPEATS if args.preset == "quick" else _REPEATS)
    options = attention_bench.Options(repeats, against, args.bandwidth, args.check_only, args.out)
    return attention_bench.run(points_of(args, device), options, device, command)


def _defaults(device: torch.device) -> dict[str, Any]:
    return _DEFAULTS["cuda" if device.type == "cuda" else "cpu"]


def points_of(args: argparse.Namespace, device: torch.device) -> list[LayerPoint]:
    """What the options ask to be measured, checked before anything is. On a CPU all is in float32."""
    config = settings_of(args, budget=max(args.budgets or [], default=None))
    settings = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "budget"}
    default, on_gpu = _defaults(device), device.type == "cuda"
    if args.preset:
        _refuse(args, _SET_BY_PRESET, f"is set by --preset {args.preset}: leave one of them out")
        if not on_gpu:
            raise ConfigError(f"--preset={args.preset} is for --device cuda; name smaller --contexts here.")
        return preset_points(args.preset, **settings)
    layers = _layers(args, default["heads"], on_gpu)
    layers = layers if on_gpu else [replace(layer, dtype=torch.float32) for layer in layers]
    budgets = args.budgets or default["budgets"]
    if args.settings and not args.budgets:
        budgets = list(dict.fromkeys(each.plain_budget for each in config.each))
    return grid(layers, args.batches or [1], args.contexts or default["contexts"], budgets, **settings)


def _layers(args: argparse.Namespace, heads: tuple[int, int, int], on_gpu: bool) -> list[Geometry]:
    given = [getattr(args, name) for name in _HEADS]
    if args.model or args.geometry:
        _refuse(args, _HEADS, "is told by --model or --geometry: leave one of them out")
        return [Geometry.of(args.model)] if args.model else [named(name) for name in args.geometry]
    if on_gpu and not any(given):
        return [named("llama-3.1-8b")]
    return [Geometry.of_heads(*(asked or usual for asked, usual in zip(given, heads, strict=True)))]


def _refuse(args: argparse.Namespace, options: Sequence[str], why: str) -> None:
    for name in options:
        value = getattr(args, name)
        if value is not None:
            given = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ConfigError(f"--{name.replace('_', '-')}={given} {why}.")


def add_commands(parser: argparse.ArgumentParser) -> None:
    """`attention` and `generate`, each with its options and, as `run`, its function."""
    commands = parser.add_subparsers(title="what is timed", metavar="WHAT", required=True)
    attention = commands.add_parser(
        "attention",
        help="one layer's decode step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(attention)
    attention.set_defaults(run=with_json(run), measure=run)
    generate = commands.add_parser(
        "generate", help="a token of a whole model's generate", description=generate_bench.__doc__
    )
    generate_points.add_arguments(generate)
    generate.set_defaults(run=with_json(generate_bench.run), measure=generate_bench.run)


def measure(command: str) -> dict[str, Any]:
    """The same as `sparsekv bench COMMAND`, from Python: prints, and returns what `--json` does.

    Args:
        command: as `attention --contexts 8k 32k` or `generate --points 1x32k`.

    Raises:
        SparseKVError: an option is not allowed, or a check failed.
    """
    parser = Parser(prog="sparsekv bench")
    add_commands(parser)
    args = parser.parse_args(shlex.split(command))
    found: dict[str, Any] = args.measure(args, f"sparsekv bench {command}")
    return found
