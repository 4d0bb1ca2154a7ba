"""A document and the turns about it, in pages that all of them share.

Every turn goes on in a fork of the cache that the turn before has left. Nothing is written into that one, so a turn
can be dropped as if it had never been, and what a turn has read is what its own cache has counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekv import PagedCache, Patch
from sparsekv.errors import ConfigError
from sparsekv.hf.support import CACHE, context_of
from sparsekv.hf.wording import Wording, stop_ids

from . import reading
from .shelf import Shelf
from .streaming import Stream


@dataclass(frozen=True)
class Turn:
    """A question with its answer, or the document before all questions.

    Attributes:
        ids: all tokens so far. The cache holds them, but for the last token of an answer that was cut off.
        cache: that of a question counts what the answer read.
        answer: of the document's turn it is empty.
    """

    ids: list[int]
    cache: PagedCache
    answer: Stream

    def __str__(self) -> str:
        count, ms = self.answer.num_tokens, self.answer.ms_per_token
        read = took = ""
        if ms is not None:
            read, took = f", {self.cache.stats.share:.1%} of the cache read per token", f", {ms:.1f} ms a token"
        return f"[{count} token{'s' * (count != 1)}{read}, {self.cache.get_seq_length():,} tokens in the cache{took}]"


class Conversation:
    """Questions about a document, or about nothing, one after the other.

    Attributes:
        turns: the document's, then those of the questions. Whatever is taken off its end is forgotten.
        config: of the turns to come; its budget may be changed.
    """

    def __init__(self, patch: Patch, tokenizer: Any, wording: Wording, max_new_tokens: int) -> None:
        self.patch, self.wording, self.max_new_tokens = patch, wording, max_new_tokens
        self.config, self._model, self._tokenizer = patch.config, patch.model, tokenizer
        self._ends = stop_ids(patch.model, tokenizer, wording)
        self._start = reading.start_ids(tokenizer) if wording.adds_start_token else []
        self.turns = [Turn(self._start, patch.new_cache(), Stream(tokenizer, print))]

    def read(self, document: str, shelf: Shelf | None = None, title: str = "") -> None:
        """Begins anew with a document, prefilled densely; shows its progress where stderr is a terminal.

        Args:
            shelf: where it is looked for, and then kept; None: nowhere.
            title: what it is called in lists.

        Raises:
            ConfigError: with an answer, it has more tokens than the model was made for.
        """
        ids = [*self._start, *self._encode(self.wording.start + document)]
        self._check_room(ids, "The document")
        cache = reading.cache_of(self.patch, ids, len(ids) + 4 * self.max_new_tokens, shelf, title)
        self.turns = [Turn(ids, cache, Stream(self._tokenizer, print))]

    def ask(
        self, question: str, show: Callable[[str], object], is_stopped: Callable[[], bool] = lambda: False
    ) -> Turn | None:
        """A turn: the question is prefilled densely over the cache, the answer is decoded sparsely.

        Args:
            show: called with every piece of the answer.
            is_stopped: asked after every token.

        Returns:
            The turn; None if it was stopped. Then the conversation is what it was.

        Raises:
            ConfigError: the model was made for fewer tokens. The conversation is what it was.
        """
        before, end = self.turns[-1], self.wording.end
        ids = [*before.ids, *self._encode(self.wording.question(question, is_first=len(self.turns) == 1))]
        self._check_room(ids, "The conversation")
        answer, cache = Stream(self._tokenizer, show), before.cache.fork(budget=self.config.budget)

        def is_over(tokens: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            has_ended = end is not None and bool(answer.said.strip()) and answer.said.endswith(end)
            return torch.full((len(tokens),), is_stopped() or has_ended, dtype=torch.bool, device=tokens.device)

        tokens = self._tensor(ids)
        output = self._model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), **{CACHE: cache}, streamer=answer,
            max_new_tokens=self.max_new_tokens, stopping_criteria=[is_over], eos_token_id=sorted(self._ends) or None,
            pad_token_id=min(self._ends, default=None),  # nothing is padded; where there is none, generate complains
        )  # fmt: skip
        if is_stopped():
            return None
        # What a later turn begins with says how an answer ends: the end token is left out.
        said = output[0].tolist()
        self.turns.append(Turn(said[:-1] if said[-1] in self._ends else said, cache, answer))
        return self.turns[-1]

    def _check_room(self, ids: list[int], what: str) -> None:
        needed, most = len(ids) + self.max_new_tokens, context_of(self._model.config)
        if most is not None and needed > most:
            raise ConfigError(
                f"{what}, with an answer, takes {needed:,} tokens, and the model was made for {most:,}."
            )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self._model.device)
