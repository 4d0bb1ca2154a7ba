"""What a measurement of `generate` covers: points (batch and context), modes, and the options that choose them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsekv import SparseConfig
from sparsekv.command_line import (
    add_json_option,
    add_prefill_options,
    add_settings_option,
    positive,
    settings_of,
    tokens,
)
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation.report import short
from sparsekv.hf import parallel
from sparsekv.pages import FORMATS
from sparsekv.policies import POLICIES

from .known_models import MODELS

MIN_NEW_TOKENS = 8
MIN_FIRST_TOKENS = 4  # tokens that are not timed: an eager step, one that is captured, and one that is compared
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Mode:
    """A way to generate.

    Attributes:
        label: its name in tables and plots.
        settings: of the patch; None: the model is not patched.
        options: of `generate`.
    """

    label: str
    settings: dict[str, Any] | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_patched(self) -> bool:
        return self.settings is not None


# In the order of tables.
MODES = {
    "sparse": Mode("sparsekv", {}),
    "sparse-unfused": Mode("sparsekv, fuse=False", {"fuse": False}),
    "sparse-eager": Mode("sparsekv, eager", {"capture": False}),
    "all": Mode("sparsekv, all pages", {"policy": "all"}),
    "default": Mode("unpatched", None),
    "static": Mode("unpatched, static", None, {"cache_implementation": "static"}),
}
CAPTURED = ("sparse", "sparse-unfused")
_MODES_ON = {"cuda": ("sparse", "default", "static"), "cpu": ("sparse", "default")}


@dataclass(frozen=True)
class Point:
    """`batch` prompts of `context` tokens each."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch} x {short(self.context)}"


def point(text: str) -> Point:
    """The type of an option that names a point: `8x128k` is a batch of 8 prompts of 131,072 tokens."""
    parts = re.fullmatch(r"(\d+)x(\w+)", text)
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no point: batch x context, as 1x32k or 8x128k")
    return Point(positive(parts[1]), tokens(parts[2]))


PRESETS = {
    "quick": ("1x1k", "1x32k"),
    "bars": ("1x1k", "1x32k", "1x128k", "1x512k", "8x32k", "8x128k", "16x32k"),
}
_POINTS_ON = {"cuda": ("1x1k", "1x32k", "1x128k"), "cpu": ("1x1k", "1x4k", "1x8k")}


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        config: of the patch; a mode may change it.
        points, modes: what to measure; modes are put into the order of `MODES`.
        new_tokens: tokens to generate; the first third is not timed.
        unpatched_up_to, static_up_to: tokens of a batch up to which unpatched modes (the static one) take part.
        split: whether to profile a captured step.
        out: folder of the result files, or None.
        add: whether other points of an earlier result file stay in it.

    Raises:
        ConfigError: a value is not allowed.
    """

    config: SparseConfig
    points: Sequence[Point]
    modes: Sequence[str] = ("sparse", "default")
    new_tokens: int = 64
    unpatched_up_to: int | None = None
    static_up_to: int | None = None
    split: bool = False
    out: str | None = None
    add: bool = False

    def __post_init__(self) -> None:
        for name in self.modes:
            if name not in MODES:
                raise UnknownNameError("--modes", name, MODES)
        object.__setattr__(self, "modes", tuple(name for name in MODES if name in self.modes))
        object.__setattr__(self, "points", tuple(dict.fromkeys(self.points)))
        if self.new_tokens < MIN_NEW_TOKENS:
            raise ConfigError(
                f"--new-tokens={self.new_tokens} is not allowed: at least {MIN_NEW_TOKENS}, as the first third "
                "(capture, warm-up) is not timed."
            )
        if self.split and not set(CAPTURED).intersection(self.modes):
            raise ConfigError(f"--split takes apart a captured step: add {' or '.join(CAPTURED)} to --modes.")
        if self.add and self.out is None:
            raise ConfigError("--add adds to the result file in --out DIR: name that folder, too.")

    @property
    def first_tokens(self) -> int:
        """Tokens that are not timed, the one that the prefill gives included."""
        return max(self.new_tokens // 3, MIN_FIRST_TOKENS)

    @property
    def order(self) -> list[str]:
        """The modes as they are measured: the unpatched one before the patched ones, and again after them."""
        is_around = "default" in self.modes and any(MODES[name].is_patched for name in self.modes)
        return [*(["default"] if is_around else []), *self.modes]

    @property
    def timed_tokens(self) -> int:
        return self.new_tokens - self.first_tokens

    def fits(self, where: Point) -> bool:
        """Whether every budget holds the context: then nothing is chosen."""
        return all(each.covers(each.pages_for(where.context)) for each in self.config.each)

    def why_not(self, name: str, where: Point) -> str | None:
        """Why a mode is not measured at a point, or None."""
        limits = {"--unpatched-up-to": self.unpatched_up_to} if not MODES[name].is_patched else {}
        if name == "static":
            limits["--static-up-to"] = self.static_up_to
        for option, limit in limits.items():
            if limit is not None and where.batch * where.context > limit:
                return f"not measured ({option} {short(limit)})"
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv bench generate`."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="ID_OR_PATH", help="model id on the hub, or a folder")
    model.add_argument(
        "--geometry", metavar="NAME",
        help=f"random weights in the sizes of {', '.join(MODELS)} (default: the first, on a CPU the last)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16, on a CPU float32)")
    parallel.add_argument(parser)
    _add_points(parser)
    add_settings_option(parser)
    parser.add_argument(
        "--budget", type=tokens, metavar="TOKENS", help=f"read per kv head (default {SparseConfig.budget})"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=64, metavar="N",
        help="generated; the first third is not timed (default %(default)s)",
    )  # fmt: skip
    _add_modes(parser)
    parser.add_argument(
        "--split", action=argparse.BooleanOptionalAction,
        help="profile captured steps: attention, GEMMs, the rest, gaps (default: on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--dense-layers", type=int, metavar="N",
        help=f"the first so many read everything (default {SparseConfig.dense_layers})",
    )  # fmt: skip
    parser.add_argument("--digest", help=f"page digest (default {SparseConfig.digest})")
    add_format_option(parser)
    add_share_options(parser)
    add_prefill_options(parser)
    parser.add_argument("--out", metavar="DIR", help="write DIR/generate_DEVICE.json and .png")
    parser.add_argument("--add", action="store_true", help="keep the other points of the files that are there")
    add_json_option(parser)


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """What keys and values look like, for both benchmarks."""
    formats = ", ".join(FORMATS)
    parser.add_argument("--kv", metavar="FORMAT", help=f"of keys and values: {formats} (default {SparseConfig.kv})")


def add_share_options(parser: argparse.ArgumentParser) -> None:
    """How pages are pooled over a group of heads, and which are left out, for both benchmarks."""
    parser.add_argument("--group-pooling", help=f"over the heads of a kv head (default {SparseConfig.group_pooling})")
    parser.add_argument(
        "--min-share", type=float, metavar="SHARE",
        help="with --group-pooling share: pages with less of every head's attention are not read "
        f"(default {SparseConfig.min_share:g})",
    )  # fmt: skip


def _add_points(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--points", type=point, nargs="+", metavar="BxN",
        help="batch x context, as 1x32k 8x128k (k: 1024 tokens; default: "
        f"{' '.join(_POINTS_ON['cuda'])}, on a CPU {' '.join(_POINTS_ON['cpu'])})",
    )  # fmt: skip
    presets = "; ".join(f"{name}: {' '.join(points)}" for name, points in PRESETS.items())
    group.add_argument("--preset", choices=PRESETS, help=f"a fixed set of points ({presets})")
    group.add_argument(
        "--quick", dest="preset", action="store_const", const="quick", help="the same as --preset quick"
    )


def _add_modes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--modes", nargs="+", metavar="MODE",
        help="sparse; sparse-unfused: fuse=False; sparse-eager: not captured; all: patched, reads every page; "
        "default: unpatched; static: unpatched with a static cache, which transformers compiles on a GPU, anew at "
        "every point "
        f"(default: {' '.join(_MODES_ON['cuda'])}, on a CPU {' '.join(_MODES_ON['cpu'])})",
    )  # fmt: skip
    for name, what in {"unpatched": "default and static", "static": "static"}.items():
        parser.add_argument(
            f"--{name}-up-to", type=tokens, metavar="TOKENS",
            help=f"leave out {what} where batch x context is more (default: no limit)",
        )  # fmt: skip


def options_of(args: argparse.Namespace, device: torch.device) -> Options:
    """The options, with what is not given chosen for the device.

    Raises:
        ConfigError: a value is not allowed. UnknownNameError: there is no such digest or policy.
    """
    on_gpu = device.type == "cuda"
    kind = "cuda" if on_gpu else "cpu"
    modes = args.modes or _MODES_ON[kind]
    config = settings_of(args)
    DIGESTS.get(config.digest), POLICIES.get(config.policy), FORMATS.get(config.page_format)
    if args.split and not on_gpu:
        raise ConfigError("--split profiles a captured step, and only --device cuda has one.")
    return Options(
        config=config,
        points=args.points or [point(text) for text in (PRESETS.get(args.preset) or _POINTS_ON[kind])],
        modes=modes,
        new_tokens=args.new_tokens,
        unpatched_up_to=args.unpatched_up_to,
        static_up_to=args.static_up_to,
        split=(on_gpu and not set(CAPTURED).isdisjoint(modes)) if args.split is None else args.split,
        out=args.out,
        add=args.add,
    )
