"""A question about a document, asked so that every token of the answer is decoded, and what was read is recorded."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekv.cache import PagedCache
from sparsekv.errors import ConfigError, PatchError
from sparsekv.hf import wording
from sparsekv.hf.chunks import chunk_size
from sparsekv.hf.inspection.page import Page, page
from sparsekv.hf.inspection.recorder import Recorder, budgets_up_to
from sparsekv.hf.support import CACHE, context_of

if TYPE_CHECKING:
    from sparsekv.hf.patch import Patch


def inspect(
    patch: Patch,
    tokenizer: Any,
    document: str,
    question: str,
    max_new_tokens: int,
    words: wording.Wording | None,
) -> Page:
    """What `Patch.inspect` says."""
    if not patch.is_active:
        raise PatchError("The patch is undone, and reads nothing: patch the model again.")
    if not document.strip() or not question.strip():
        raise ConfigError("document and question must hold more than blanks.")
    if words is None:
        has_template = getattr(tokenizer, "chat_template", None)
        words = wording.of_template(tokenizer, True) if has_template else wording.plain(True)
    text = words.start + document + words.question(question, is_first=True)
    ids, starts = _encoded(tokenizer, text, words)
    room = context_of(patch.model.config)
    if room is not None and len(ids) + max_new_tokens > room:
        raise ConfigError(
            f"Document, question and answer take {len(ids) + max_new_tokens:,} tokens, and the model was made for "
            f"{room:,}."
        )
    cache = patch.new_cache(reserve_tokens=len(ids) + max_new_tokens)
    tokens = torch.tensor([ids], dtype=torch.int64, device=patch.model.device)
    _prefill(patch.model, tokens[:, :-1], cache)
    layers = frozenset(status.layer_idx for status in patch.layers if status.is_sparse)
    if not layers:
        raise ConfigError("No layer of this model chooses what it reads: print(patch) says why.")
    recorder = Recorder(budgets_up_to(patch.config, len(ids)), layers)
    cache.observers.append(recorder)
    said = _answer(patch.model, tokenizer, tokens, cache, max_new_tokens, words)
    upto = [tokenizer.decode(said[:count]) for count in range(len(said) + 1)]
    pieces = [later[len(before) :] for before, later in pairwise(upto)]
    return page(patch, recorder, text, starts, question, pieces, tokenizer.decode(said, skip_special_tokens=True))


def _encoded(tokenizer: Any, text: str, words: wording.Wording) -> tuple[list[int], list[int]]:
    """The tokens of a text, and where each begins in it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} does not tell where in a text its tokens are. Load the tokenizer with "
            "AutoTokenizer, as a fast one."
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    own = tokenizer("").input_ids if words.adds_start_token else []
    start = [token for token in own if token == tokenizer.bos_token_id]
    return [*start, *found.input_ids], [0] * len(start) + [begin for begin, _ in found.offset_mapping]


def _prefill(model: Any, tokens: Tensor, cache: PagedCache) -> None:
    """Fills an empty cache: all but the question's last token, which is decoded, so that the answer's first reads."""
    with torch.inference_mode():
        for chunk in tokens.split(chunk_size(1, tokens.shape[1]) or tokens.shape[1], dim=1):
            model(input_ids=chunk, use_cache=True, logits_to_keep=1, **{CACHE: cache})


def _answer(
    model: Any, tokenizer: Any, tokens: Tensor, cache: PagedCache, max_new_tokens: int, words: wording.Wording
) -> list[int]:
    """The tokens that follow, greedily, up to what ends an answer."""
    ends, num_given = wording.stop_ids(model, tokenizer, words), tokens.shape[1]

    def is_over(given: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        said = "" if words.end is None else tokenizer.decode(given[0, num_given:])
        has_ended = bool(said.strip()) and said.endswith(words.end or "")
        return torch.full((1,), has_ended, dtype=torch.bool, device=given.device)

    output = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), **{CACHE: cache}, max_new_tokens=max_new_tokens,
        do_sample=False, stopping_criteria=[is_over], eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=None),
    )  # fmt: skip
    said: list[int] = output[0, num_given:].tolist()
    return said
