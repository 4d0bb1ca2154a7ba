"""Loads a transformers model, patches it, and streams its continuation of a prompt. What was read of the cache is
printed to stderr at the end. A document before the prompt is read once and kept for the next prompt about it."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparsekv
from sparsekv.command_line import add_json_option, circumstances, read_text
from sparsekv.errors import ConfigError
from sparsekv.hf import models, wording
from sparsekv.hf.ranks import Ranks
from sparsekv.hf.support import CACHE

from . import model_options, reading, shelf
from .streaming import Stream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv generate`."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="F", help="text file with the prompt; - for standard input")
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    parser.add_argument("--document", metavar="F", help="text file that comes before the prompt, and is read once")
    shelf.add_arguments(parser)
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
    given = partial(read_text, "--document", args.document)
    document = Ranks.of_launch().told(given, "the document") if args.document is not None else None
    config = model_options.config_of(args)
    model, tokenizer = models.load(args.model, args.device, args.dtype, args.parallel)
    stream = Stream(tokenizer, (lambda text: None) if args.json else partial(print, end="", flush=True))
    with sparsekv.patch(model, config) as patch:
        print(patch, file=sys.stderr)
        if document is None:
            inputs = _encode(tokenizer, text, args.chat).to(model.device)
        else:
            inputs = _after_document(patch, tokenizer, document, text, args)
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
    _check_template(tokenizer)
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _check_template(tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        raise ConfigError("--chat: this model's tokenizer has no chat template. Leave --chat out.")


def _after_document(
    patch: sparsekv.Patch, tokenizer: Any, document: str, text: str, args: argparse.Namespace
) -> dict[str, Any]:
    """The prompt behind a document, an empty line between them, and the cache that has read the document. Its tokens
    are its own, whatever is asked: so it need not be read again."""
    start, before, asked = reading.start_ids(tokenizer), document, f"\n\n{text}"
    if args.chat:
        _check_template(tokenizer)
        words = wording.of_template(tokenizer, has_document=True, way_out="Leaving --chat out")
        start, before, asked = [], words.start + document, words.question(text, is_first=True)
    read, rest = (tokenizer(x, add_special_tokens=False).input_ids for x in (before, asked))
    read = [*start, *read]
    reserved = len(read) + len(rest) + args.max_new_tokens
    cache = reading.cache_of(patch, read, reserved, shelf.chosen(args), Path(args.document).name)
    ids = torch.tensor([[*read, *rest]], dtype=torch.int64, device=patch.model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache}
