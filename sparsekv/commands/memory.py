"""Tells what of a GPU's memory a context takes, and the longest that fits, by a model's config: `doctor --model`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoConfig

from sparsekv.command_line import add_settings_option, positive, settings_of, tokens
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError
from sparsekv.hf import models
from sparsekv.hf.memory import GIB, forecast_memory
from sparsekv.pages import FORMATS

_CONTEXT = 32 << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, and the options that go with it."""
    add = parser.add_argument
    add("--model", metavar="M", help=f"tell what its contexts take of a GPU's memory: {models.WHAT}")
    add("--context", type=tokens, metavar="TOKENS", help="of a sequence, those to come counted (default 32k)")
    add("--batch", type=positive, metavar="N", help="sequences (default 1)")
    add("--memory", type=float, metavar="GIB", help="of the device (default: that of the GPU that is here)")
    add("--dtype", choices=models.DTYPES[1:], help="of weights (default: the checkpoint's own, or bfloat16)")
    add("--kv", metavar="FORMAT", help=f"of keys and values: {', '.join(FORMATS)} (default {SparseConfig.kv})")
    add("--digest", help=f"of pages: {', '.join(DIGESTS)} (default {SparseConfig.digest})")
    add_settings_option(parser)


def is_asked(args: argparse.Namespace) -> bool:
    """Whether there is a model whose memory is to be told.

    Raises:
        ConfigError: an option is given that goes with `--model`, which is not.
    """
    for name in ("context", "batch", "memory", "dtype", "digest", "settings"):
        if args.model is None and getattr(args, name) is not None:
            raise ConfigError(f"--{name} goes with --model.")
    if args.kv is not None and args.model is None and not args.compile:
        raise ConfigError("--kv goes with --model, or with --compile.")
    return args.model is not None


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Prints and returns what `Memory.as_dict` says.

    Raises:
        ConfigError, UnknownNameError: an option is not allowed, or there is no such model.
        UnsupportedModelError: the model cannot be served.
    """
    if args.memory is not None and not args.memory > 0:
        raise ConfigError(f"--memory={args.memory} must be more than 0 GiB.")
    config, limit = settings_of(args), None
    if args.memory is not None:
        limit = int(args.memory * GIB)
    elif torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    shape = (args.context or _CONTEXT, args.batch or 1)
    found = forecast_memory(models.pretrained(AutoConfig, args.model), config, *shape, limit, dtype)
    print(found)
    return found.as_dict()
