"""The options that name a model and how it decodes, and what they load: shared by generate and chat."""

from __future__ import annotations

import argparse
from typing import Any

import sparsekv
from sparsekv import SparseConfig
from sparsekv.command_line import positive, tokens
from sparsekv.config import GROUP_POOLINGS
from sparsekv.errors import ConfigError
from sparsekv.evaluation import models, testbed
from sparsekv.hf.support import context_of


def add_arguments(parser: argparse.ArgumentParser, needs_model: bool) -> None:
    """The options, with the defaults of `SparseConfig`.

    Args:
        needs_model: whether `--model` must be given; else it is the small model that ships with the package.
    """
    which = {"required": True} if needs_model else {"default": testbed.NAME}
    help_text = models.WHAT if needs_model else f"{models.WHAT} (default)"
    parser.add_argument("--model", metavar="ID_OR_PATH", help=help_text, **which)
    parser.add_argument(
        "--budget", type=budget, default=SparseConfig.budget, metavar="TOKENS",
        help="tokens read per kv head (4096 or 4k), or a fraction of the context (0.1); default %(default)s",
    )  # fmt: skip
    add = parser.add_argument
    policies, digests = ", ".join(sparsekv.POLICIES), ", ".join(sparsekv.DIGESTS)
    add("--policy", default=SparseConfig.policy, help=f"which pages are read: {policies} (default %(default)s)")
    add("--digest", default=SparseConfig.digest, help=f"what they are chosen by: {digests} (default %(default)s)")
    add("--page-size", type=positive, default=SparseConfig.page_size, help="tokens per page (default %(default)s)")
    add("--dense-layers", type=int, default=2, metavar="N", help="the first so many read everything (default 2)")
    add(
        "--sinks", type=int, default=SparseConfig.sinks, metavar="TOKENS",
        help="first tokens that are always read (default %(default)s)",
    )  # fmt: skip
    add(
        "--recent", type=int, default=SparseConfig.recent, metavar="TOKENS",
        help="last tokens that are always read (default: by the budget, at most 64)",
    )  # fmt: skip
    add(
        "--group-pooling", default=SparseConfig.group_pooling, choices=GROUP_POOLINGS,
        help="how the scores of a kv head's query heads become one (default %(default)s)",
    )  # fmt: skip
    add("--max-new-tokens", type=positive, default=256, help="at most so many (default %(default)s)")
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
    config = SparseConfig(
        budget=args.budget, policy=args.policy, digest=args.digest, page_size=args.page_size,
        dense_layers=args.dense_layers, sinks=args.sinks, recent=args.recent, group_pooling=args.group_pooling,
    )  # fmt: skip
    sparsekv.DIGESTS.get(config.digest), sparsekv.POLICIES.get(config.policy)
    return config


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, on its device and ready for inference, and its tokenizer.

    Raises:
        ConfigError: there is no such model or device.
    """
    return models.load(args.model, args.device, args.dtype)


def check_room(model: Any, num_tokens: int, what: str) -> None:
    """Raises ConfigError if the model was made for fewer tokens. `what` takes them."""
    most = context_of(model.config)
    if most is not None and num_tokens > most:
        raise ConfigError(f"{what} takes {num_tokens:,} tokens, and the model was made for {most:,}.")
