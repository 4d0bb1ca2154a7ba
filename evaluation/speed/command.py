"""How long one layer's decode step takes, sparse beside dense, on the same keys and values in the same run.

    sparsekv bench attention --device cpu --contexts 64k 256k --budget 1024
    sparsekv bench attention --device cuda --preset full --out results
    sparsekv bench generate --device cuda --preset bars   # a token of a whole model

On a CPU a whole cache layer is timed beside PyTorch's scaled_dot_product_attention (SDPA); on a GPU the operators
are, as CUDA graphs, beside FlashInfer, SDPA, what can be assembled from parts off the shelf, and the memory's speed.
Every step is checked before it is timed: no speed is printed of one that computes something else.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from sparsekv import SparseConfig
from sparsekv.command_line import (
    EXIT_CODES,
    Parser,
    add_json_option,
    choose_device,
    positive,
    run_to_exit_code,
    tokens,
    with_json,
)
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError

from . import attention_cpu, attention_gpu, generate_bench, generate_points
from .attention_points import GEOMETRIES, PRESETS, Geometry, Point, geometries, grid, preset_points
from .competitors import COMPETITORS

_CPU_ONLY = ("q_heads", "kv_heads", "head_dim")
_GPU_ONLY = ("preset", "geometry", "model", "bandwidth", "against", "check_only")
_SET_BY_PRESET = ("geometry", "model", "contexts", "batches", "budgets")
_QUICK_REPEATS, _REPEATS = 5, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv bench attention` and `python -m evaluation.speed attention`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    _add_sizes(parser)
    parser.add_argument("--page-size", type=positive, default=16, help="tokens per page (default %(default)s)")
    parser.add_argument("--digest", default="minmax", help="page digest (default %(default)s)")
    parser.add_argument(
        "--repeats", type=positive, help=f"timed calls, of which the median counts (default {_REPEATS})"
    )
    parser.add_argument("--out", metavar="DIR", help="write DIR/attention_DEVICE.json and .png")
    add_json_option(parser)
    cpu = parser.add_argument_group("on a CPU")
    cpu.add_argument("--q-heads", type=positive, help="query heads (default 8)")
    cpu.add_argument("--kv-heads", type=positive, help="kv heads (default 2)")
    cpu.add_argument("--head-dim", type=positive, help="channels per head (default 64)")
    _add_gpu_options(parser.add_argument_group("on a GPU"))


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--contexts", type=tokens, nargs="+", metavar="TOKENS", help="32768, 32k or 1M (k: 1024 tokens)"
    )
    parser.add_argument(
        "--budget", "--budgets", dest="budgets", type=tokens, nargs="+", metavar="TOKENS",
        help="tokens read per kv head (default 1024 on a CPU, 2048 on a GPU); several on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--batch", "--batches", dest="batches", type=positive, nargs="+", metavar="N",
        help="sequences (default 1); several on a GPU",
    )  # fmt: skip


def _add_gpu_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--preset", choices=PRESETS, help="a fixed set of shapes instead of those named by options")
    group.add_argument(
        "--quick", dest="preset", action="store_const", const="quick", help="the same as --preset quick"
    )
    layers = group.add_mutually_exclusive_group()
    layers.add_argument("--model", metavar="ID_OR_PATH", help="layers like those of this model, whose config is read")
    layers.add_argument(
        "--geometry", nargs="+", metavar="NAME", help=f"layers like those of {', '.join(GEOMETRIES)} (default: first)"
    )
    group.add_argument("--against", nargs="*", choices=list(COMPETITORS), help="competitors (default: all)")
    group.add_argument(
        "--bandwidth",
        type=float,
        metavar="TB/s",
        help="of the memory, for the floors (default: 4.39 on an H200, else measured)",
    )
    group.add_argument("--check-only", action="store_true", default=None, help="check all shapes, time none")


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures, prints the tables and writes the files asked for; returns what the JSON file holds."""
    device = choose_device(args.device)
    if device.type == "cuda":
        _refuse(args, _CPU_ONLY, "is for --device cpu; on a GPU --geometry names the heads")
        repeats = args.repeats or (_QUICK_REPEATS if args.preset == "quick" else _REPEATS)
        against = list(COMPETITORS) if args.against is None else args.against
        options = attention_gpu.Options(repeats, against, args.bandwidth, bool(args.check_only), args.out)
        return attention_gpu.run(points_of(args), options, device, command)
    shape = attention_cpu.Shape(_single(args.batches, 1), args.q_heads or 8, args.kv_heads or 2, args.head_dim or 64)
    _refuse(args, _GPU_ONLY, "is for --device cuda")
    config = SparseConfig(budget=_single(args.budgets, 1024), page_size=args.page_size, digest=args.digest)
    contexts = args.contexts or [4096, 16384, 65536, 262144]
    return attention_cpu.run(shape, config, contexts, args.repeats or _REPEATS, device, command, args.out)


def points_of(args: argparse.Namespace) -> list[Point]:
    """What the options ask to be measured on a GPU, checked before anything is."""
    DIGESTS.get(args.digest)
    if args.preset:
        _refuse(args, _SET_BY_PRESET, f"is set by --preset {args.preset}: leave one of them out")
        return preset_points(args.preset, args.page_size, args.digest)
    layers = [Geometry.of(args.model)] if args.model else geometries(args.geometry or list(GEOMETRIES)[:1])
    contexts = args.contexts or [8192, 32768, 131072]
    return grid(layers, args.batches or [1], contexts, args.budgets or [2048], args.page_size, args.digest)


def _refuse(args: argparse.Namespace, options: Sequence[str], why: str) -> None:
    for name in options:
        value = getattr(args, name)
        if value is not None:
            given = " ".join(map(str, value)) if isinstance(value, list) else value
            option = f"--{name.replace('_', '-')}" + ("" if value is True else f"={given}")
            raise ConfigError(f"{option} {why}.")


def _single(values: Sequence[int] | None, default: int) -> int:
    if values is None:
        return default
    if len(values) > 1:
        raise ConfigError(
            f"{' '.join(map(str, values))}: only --device cuda takes several budgets or batches at once."
        )
    return values[0]


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


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m evaluation.speed`; returns the exit code (see `sparsekv.command_line`)."""
    parser = Parser(
        prog="python -m evaluation.speed",
        description="Times sparse attention beside dense attention.",
        epilog=f"`python -m evaluation.speed WHAT --help` lists the options; {EXIT_CODES}.",
    )
    add_commands(parser)
    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "evaluation.speed", *arguments])
    return run_to_exit_code(lambda: parser.run(arguments, command), "evaluation.speed")


if __name__ == "__main__":
    sys.exit(main())
