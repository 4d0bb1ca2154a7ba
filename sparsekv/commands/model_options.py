"""The options that name a model and how it decodes: shared by generate and chat."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import sparsekv
from sparsekv import SparseConfig
from sparsekv.command_line import positive, tokens
from sparsekv.config import GROUP_POOLINGS
from sparsekv.evaluation import testbed
from sparsekv.hf import models


def add_arguments(parser: argparse.ArgumentParser, needs_model: bool) -> None:
    """The options, with the defaults of `SparseConfig`.

    Args:
        needs_model: whether `--model` must be given; else it is the small model that ships with the package.
    """

    def add(setting: str, text: str, **more: Any) -> None:
        default = getattr(SparseConfig, setting)
        parser.add_argument(f"--{setting.replace('_', '-')}", default=default, help=text, **more)

    which = {"required": True} if needs_model else {"default": testbed.NAME}
    help_text = models.WHAT if needs_model else f"{models.WHAT} (default)"
    parser.add_argument("--model", metavar="ID_OR_PATH", help=help_text, **which)
    of_context = "tokens read per kv head (4096 or 4k), or a fraction of the context (0.1); default %(default)s"
    pooled = "how the scores of a kv head's query heads become one (default %(default)s)"
    add("budget", of_context, type=budget, metavar="TOKENS")
    add("policy", f"which pages are read: {', '.join(sparsekv.POLICIES)} (default %(default)s)")
    add("digest", f"what they are chosen by: {', '.join(sparsekv.DIGESTS)} (default %(default)s)")
    add("page_size", "tokens per page (default %(default)s)", type=positive)
    add("dense_layers", "the first so many read everything (default %(default)s)", type=int, metavar="N")
    add("sinks", "first tokens that are always read (default %(default)s)", type=int, metavar="TOKENS")
    add("recent", "last tokens that are always read (default: by the budget, at most 64)", type=int, metavar="TOKENS")
    add("group_pooling", pooled, choices=GROUP_POOLINGS)
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="at most so many (default %(default)s)")
    models.add_arguments(parser)


def budget(text: str) -> int | float:
    """The type of `--budget`: `2048`, `2k`, or a fraction of the context."""
    try:
        return float(text) if "." in text else tokens(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget: 2048, 2k, or a fraction as 0.1") from error


def config_of(args: argparse.Namespace) -> SparseConfig:
    """The settings, checked before a large model is loaded.

    Raises:
        ConfigError, UnknownNameError: one is not allowed.
    """
    names = [field.name for field in fields(SparseConfig)]
    config = SparseConfig(**{name: value for name, value in vars(args).items() if name in names})
    sparsekv.DIGESTS.get(config.digest), sparsekv.POLICIES.get(config.policy)
    return config
