"""Where an answer ends."""

from __future__ import annotations

from typing import Any


def stop_ids(model: Any, tokenizer: Any, wording: Any = None) -> frozenset[int]:
    """Tokens that end an answer: the model's and the tokenizer's, and the one that a chat template puts behind it.

    Args:
        wording: of the chat; the text between an answer and the next question is `later[0]`. None: there is no chat.
    """
    found = model.generation_config.eos_token_id
    ids = [found] if isinstance(found, int) else list(found or [])
    known = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*ids, *known, *([] if wording is None else _first_special(tokenizer, wording.later[0]))])


def _first_special(tokenizer: Any, text: str) -> list[int]:
    """The first special token of a text, if it has one."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [i for i in ids if i in known and known[i].special and i != tokenizer.unk_token_id][:1]
