"""Loads a transformers model, patches it, and streams its continuation of a prompt. What was read of the cache is
printed to stderr at the end."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import sparsekv
from sparsekv.command_line import add_json_option, circumstances, read_text
from sparsekv.errors import ConfigError
from sparsekv.hf import models
from sparsekv.hf.ranks import Ranks

from . import model_options
from .streaming import Stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv generate`."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="F", help="text file with the prompt; - for standard input")
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    model_options.add_arguments(parser, needs_model=True)
    add_json_option(parser)


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Generates and prints as it goes; with `--json` only at the end, what this returns.

    Raises:
        ConfigError, UnsupportedModelError: the prompt, the model or a setting cannot be used.
    """
    given = partial(read_text, "--prompt-file", args.prompt_file)
    text = args.prompt if args.prompt is not None else Ranks.of_launch().told(given, "the prompt")
    if not text.strip():
        raise ConfigError("--prompt is empty.")
    config = model_options.config_of(args)
    model, tokenizer = models.load(args.model, args.device, args.dtype, args.parallel)
    inputs = _encode(tokenizer, text, args.chat).to(model.device)
    stream = Stream(tokenizer, (lambda text: None) if args.json else partial(print, end="", flush=True))
    with sparsekv.patch(model, config) as patch:
        print(patch, file=sys.stderr)
        model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=stream)
        if not args.json:
            print(flush=True)
        print(patch.stats, file=sys.stderr)
    return {
        **circumstances(command),
        "settings": {"model": args.model, "device": str(model.device), "dtype": str(model.dtype), **config.as_dict()},
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": stream.num_tokens,
        "text": stream.said,
        "ms_per_token": stream.ms_per_token,
        "stats": patch.stats.as_dict(),
    }


def _encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if tokenizer.chat_template is None:
        raise ConfigError("--chat: this model's tokenizer has no chat template. Leave --chat out.")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
