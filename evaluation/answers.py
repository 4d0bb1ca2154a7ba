"""Questions over one prefilled text: the text once, densely; every question and answer token by token.

Decoding the question too is the point: a question inside the dense prefill would already have collected its answer
there, and nothing sparse would be measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparsekv.testing.timing import synchronize


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it took.

    Attributes:
        text: the decoded answer, without the end token.
        is_right: whether it equals the expected text.
        num_tokens: tokens decoded one by one, the question's included.
        ms_per_token: mean milliseconds of one of them.
    """

    text: str
    is_right: bool
    num_tokens: int
    ms_per_token: float


def encode(tokenizer: Any, text: str, device: torch.device) -> Tensor:
    """Token ids `[1, n]`."""
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
    return ids


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, cache: Cache) -> None:
    """Fills the cache with a text `[1, n]` in one dense pass."""
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, cache: Cache, prompt: str, expected: str) -> Answer:
    """Feeds a question token by token, decodes greedily to the end token, and puts the cache back as it was."""
    device = model.device
    question = encode(tokenizer, prompt, device)[0].tolist()
    budget = len(tokenizer(expected, add_special_tokens=False).input_ids) + 4  # a wrong answer may be longer
    synchronize(device)
    start = time.perf_counter()
    for token in question:
        following = _step(model, cache, token)
    said: list[int] = []
    while following != tokenizer.eos_token_id and len(said) < budget:
        said.append(following)
        following = _step(model, cache, following)
    seconds = time.perf_counter() - start
    num_tokens = len(question) + len(said)
    cache.crop(-num_tokens)
    text = tokenizer.decode(said)
    return Answer(text, text == expected, num_tokens, seconds / num_tokens * 1e3)


def _step(model: Any, cache: Cache, token: int) -> int:
    ids = torch.tensor([[token]], device=model.device)
    return int(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1].argmax())
