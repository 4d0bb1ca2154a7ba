"""The options that name a model and how it decodes, and what they load: shared by generate and chat."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import sparsekv
from sparsekv import SparseConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.report import choose_device, positive, tokens
from sparsekv.hf.support import context_of

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser, needs_model: bool) -> None:
    """The options, with the defaults of `SparseConfig`.

    Args:
        needs_model: whether `--model` must be given; else it is the small model that ships with the package.
    """
    of_model = "model id on the hub, a folder, or testbed: the small model that ships"
    if needs_model:
        parser.add_argument("--model", required=True, metavar="ID_OR_PATH", help=of_model)
    else:
        help_text = f"{of_model} (default)"
        parser.add_argument("--model", default=testbed.NAME, metavar="ID_OR_PATH", help=help_text)
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
    add("--max-new-tokens", type=positive, default=256, help="at most so many (default %(default)s)")
    add("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (default: the model's own)")


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
        dense_layers=args.dense_layers,
    )  # fmt: skip
    sparsekv.DIGESTS.get(config.digest), sparsekv.POLICIES.get(config.policy)
    return config


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, on its device and ready for inference, and its tokenizer.

    Raises:
        ConfigError: there is no such model or device.
    """
    import transformers

    device = choose_device(args.device)
    if args.model == testbed.NAME:
        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        return testbed.load(device, usual if args.dtype == "auto" else getattr(torch, args.dtype))
    tokenizer = _pretrained(transformers.AutoTokenizer, args.model)
    model = _pretrained(transformers.AutoModelForCausalLM, args.model, dtype=args.dtype)
    return model.to(device).eval(), tokenizer


def _pretrained(factory: Any, name: str, **options: Any) -> Any:
    """What a user can have got wrong becomes one line; transformers says it in paragraphs, of several kinds."""
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        why = why if len(why) <= 200 else f"{why[:200]}..."
        raise ConfigError(
            f"--model {name} cannot be loaded ({why}). Give the id of a causal language model on the hub, or a "
            "folder with its config, tokenizer and weights."
        ) from error


def check_room(model: Any, num_tokens: int, what: str) -> None:
    """Raises ConfigError if the model was made for fewer tokens. `what` takes them."""
    most = context_of(model.config)
    if most is not None and num_tokens > most:
        raise ConfigError(f"{what} takes {num_tokens:,} tokens, and the model was made for {most:,}.")
