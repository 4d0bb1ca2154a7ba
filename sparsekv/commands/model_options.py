"""The options that name a model and how it decodes: shared by generate and chat."""

from __future__ import annotations

import argparse
from typing import Any

import sparsekv
from sparsekv import SparseConfig
from sparsekv.command_line import add_prefill_options, add_settings_option, positive, settings_of, tokens
from sparsekv.config import GROUP_POOLINGS
from sparsekv.evaluation import testbed
from sparsekv.hf import models, parallel
from sparsekv.layer_budgets import as_mapping
from sparsekv.pages import FORMATS


def add_arguments(parser: argparse.ArgumentParser, needs_model: bool) -> None:
    """The options; settings that are left out are those of `--settings`, or the defaults of `SparseConfig`.

    Args:
        needs_model: whether `--model` must be given; else it is the small model that ships with the package.
    """

    def add(setting: str, text: str, **more: Any) -> None:
        default = getattr(SparseConfig, setting)
        told = text if default is None else f"{text} (default {default})"
        parser.add_argument(f"--{setting.replace('_', '-')}", help=told, **more)

    which = {"required": True} if needs_model else {"default": testbed.NAME}
    help_text = models.WHAT if needs_model else f"{models.WHAT} (default)"
    parser.add_argument("--model", metavar="ID_OR_PATH", help=help_text, **which)
    add_settings_option(parser)
    of_context = "tokens read per kv head: 4096 or 4k, or a fraction of the context, as 0.1"
    add("budget", of_context, type=budget, metavar="TOKENS")
    parser.add_argument(
        "--budget-of", nargs="+", type=budget_of, metavar="LAYER=TOKENS", help="of single layers: 5=2048 17=0.1"
    )
    add("policy", f"which pages are read: {', '.join(sparsekv.POLICIES)}")
    add("digest", f"what they are chosen by: {', '.join(sparsekv.DIGESTS)}")
    add("page_size", "tokens per page", type=positive)
    add("kv", f"what keys and values look like in memory: {', '.join(FORMATS)}", metavar="FORMAT")
    add("dense_layers", "the first so many read everything", type=int, metavar="N")
    add("sinks", "first tokens that are always read", type=int, metavar="TOKENS")
    add("recent", "last tokens that are always read (default: by the budget, at most 64)", type=int, metavar="TOKENS")
    add("group_pooling", "how the scores of a kv head's query heads become one", choices=GROUP_POOLINGS)
    add("min_share", "pages of a smaller share of attention are not read", type=float, metavar="SHARE")
    add_prefill_options(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="at most so many (default %(default)s)")
    models.add_arguments(parser)
    parallel.add_argument(parser)


def budget(text: str) -> int | float:
    """The type of `--budget`: `2048`, `2k`, or a fraction of the context."""
    try:
        return float(text) if "." in text else tokens(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget: 2048, 2k, or a fraction as 0.1") from error


def budget_of(text: str) -> tuple[int, int | float]:
    """The type of `--budget-of`: a layer and its budget, `5=2048`."""
    layer, _, tokens_read = text.partition("=")
    if not layer.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no layer and its budget, as 5=2048")
    return int(layer), budget(tokens_read)


def config_of(args: argparse.Namespace) -> SparseConfig:
    """The settings, checked before a large model is loaded.

    Raises:
        ConfigError, UnknownNameError: one is not allowed, or the file of `--settings` cannot be used.
    """
    config = settings_of(args)
    if args.budget_of:
        config = config.with_(budget={**as_mapping(config.budget), **dict(args.budget_of)})
    sparsekv.DIGESTS.get(config.digest), sparsekv.POLICIES.get(config.policy), FORMATS.get(config.page_format)
    return config
