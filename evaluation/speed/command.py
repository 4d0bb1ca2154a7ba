"""How long one layer's decode step takes, sparse beside dense, on the same keys and values in the same run.

    sparsekv bench attention --device cpu --contexts 64k 256k --budget 1024
    sparsekv bench attention --device cuda --preset full --out results
    sparsekv bench attention --policy recent --contexts 32k
    sparsekv bench attention --device cuda --preset bars --settings one.json other.json
    sparsekv bench generate --device cuda --preset bars   # a token of a whole model
    sparsekv bench documents --device cuda   # what is read once: saved, loaded

The policy's own step is timed beside PyTorch's scaled_dot_product_attention (SDPA) and the memory's speed; on a GPU
all are CUDA graphs, and FlashInfer and what can be assembled from parts off the shelf stand beside it, too.
Every step is checked before it is timed: no speed is printed of one that computes something else.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsekv import POLICIES, SparseConfig
from sparsekv.command_line import (
    Parser,
    add_json_option,
    choose_device,
    positive,
    settings_of,
    tokens,
    with_json,
)
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError
from sparsekv.evaluation.report import short
from sparsekv.hf.parallel import by_all_ranks
from sparsekv.pages import FORMATS

from . import attention_bench, documents_bench, generate_bench, generate_points, prompt_bench
from .attention_points import PRESETS, K, LayerPoint, grid, preset_points
from .competitors import COMPETITORS
from .generate_points import add_format_option, add_share_options
from .geometry import NAMES, Geometry, named
from .planted_keys import check_read

_HEADS = ("q_heads", "kv_heads", "head_dim")
_SET_BY_PRESET = ("geometry", "model", *_HEADS, "contexts", "batches")
_READ = 2 * K  # tokens, where the settings have a least share
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
    parser.add_argument(
        "--settings", nargs="+", metavar="FILE",
        help="JSON files of SparseConfig.save, side by side at every point; other options given here override them",
    )  # fmt: skip
    parser.add_argument("--page-size", type=positive, help=f"tokens per page (default {SparseConfig.page_size})")
    parser.add_argument("--policy", help=f"which pages a step reads (default {SparseConfig.policy})")
    parser.add_argument("--digest", help=f"page digest (default {SparseConfig.digest})")
    add_format_option(parser)
    add_share_options(parser)
    parser.add_argument(
        "--read", type=tokens, metavar="TOKENS",
        help="with --min-share, which no page of random keys reaches: keys are planted so that pages of so many "
        "tokens, those always read among them, do, and others are far below; what the step then lists is told "
        f"(default {short(_READ)}, or the budget if that is less)",
    )  # fmt: skip
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
    parser.add_argument("--preset", choices=PRESETS, help="a fixed set of shapes for a GPU; bars: of any settings")
    parser.add_argument(
        "--quick", dest="preset", action="store_const", const="quick", help="the same as --preset quick"
    )
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--model", metavar="ID_OR_PATH", help="layers like those of this model, whose config is read")
    layers.add_argument(
        "--geometry", nargs="+", metavar="NAME",
        help=f"layers like those of {', '.join(NAMES)} (default on a GPU: the first)",
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
    default, on_gpu = _defaults(device), device.type == "cuda"
    if args.preset:
        set_by_preset = _SET_BY_PRESET + (() if args.preset == "bars" else ("budgets", "settings"))
        _refuse(args, set_by_preset, f"is set by --preset {args.preset}: leave one of them out")
        if not on_gpu:
            raise ConfigError(f"--preset={args.preset} is for --device cuda; name smaller --contexts here.")
    configs = [config for file in args.settings or [None] for config in _configs(args, file, default["budgets"])]
    if args.preset:
        return _planted(preset_points(args.preset, configs), args.read)
    layers = _layers(args, default["heads"], on_gpu)
    layers = layers if on_gpu else [replace(layer, dtype=torch.float32) for layer in layers]
    points = grid(layers, args.batches or [1], args.contexts or default["contexts"], configs)
    return _planted(points, args.read)


def _configs(args: argparse.Namespace, file: str | None, usual: Sequence[int]) -> list[SparseConfig]:
    """The settings of a file, or the defaults, under the options: with each budget that they have, or are given."""
    one_file = argparse.Namespace(**vars(args) | {"settings": file})
    config = settings_of(one_file, budget=max(args.budgets or [], default=None))
    POLICIES.get(config.policy), DIGESTS.get(config.digest), FORMATS.get(config.page_format)
    of_file = dict.fromkeys(each.plain_budget for each in config.each) if file else usual
    return [config.with_(budget=budget) for budget in args.budgets or of_file]


def _planted(points: Sequence[LayerPoint], read: int | None) -> list[LayerPoint]:
    """The points, each with the tokens that keys are planted for, where the settings have a least share."""
    if read is not None and not any(point.config.min_share for point in points):
        raise ConfigError(f"--read={read} is for --min-share: without one a step reads its budget, so set --budget.")
    found = []
    for point in points:
        if point.config.min_share:
            budget = point.config.budget_pages(point.context) * point.config.page_size
            point = replace(point, read=read or min(_READ, budget))
            if point.is_planted:
                check_read(point)
        found.append(point)
    return found


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
    """`attention`, `generate`, `prompt` and `documents`, each with its options and, as `run`, its function."""
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
    generate.set_defaults(run=by_all_ranks(with_json(generate_bench.run)), measure=generate_bench.run)
    for name, bench, told in (
        ("prompt", prompt_bench, "one layer's attention of a prompt over listed blocks"),
        ("documents", documents_bench, "saving and loading a document's cache"),
    ):
        timed = commands.add_parser(
            name, help=told, description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        bench.add_arguments(timed)
        timed.set_defaults(run=with_json(bench.run), measure=bench.run)


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
