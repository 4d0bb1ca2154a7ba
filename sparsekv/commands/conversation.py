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
from sparsekv.evaluation.accuracy.asking import stop_ids
from sparsekv.evaluation.wording import Wording
from sparsekv.hf.chunks import without_single
from sparsekv.hf.support import CACHE

from . import model_options
from .streaming import StopWhen, Stream

CHUNK = 4096  # tokens of a document that are read at once, so that progress can be shown


@dataclass(frozen=True)
class State:
    """Where a conversation stands.

    Attributes:
        ids: all tokens so far. The cache holds them, but for the last token of an answer that was cut off.
    """

    ids: list[int]
    cache: PagedCache


@dataclass(frozen=True)
class Turn:
    """A question with its answer.

    Attributes:
        after: where the conversation stands then; its cache's counters are those of this turn.
        num_tokens: of the answer, the end token included.
        ms_per_token: None if nothing was decoded.
    """

    after: State
    answer: str
    num_tokens: int
    ms_per_token: float | None

    def __str__(self) -> str:
        stats, length = self.after.cache.stats, self.after.cache.get_seq_length()
        parts = [f"{self.num_tokens} token{'s' * (self.num_tokens != 1)}"]
        if self.ms_per_token is not None:
            parts.append(f"{stats.share:.1%} of the cache read per token")
        parts.append(f"{length:,} tokens in the cache")
        if self.ms_per_token is not None:
            parts.append(f"{self.ms_per_token:.1f} ms a token")
        return f"[{', '.join(parts)}]"


class Conversation:
    """Questions about a document, or about nothing, one after the other.

    Attributes:
        turns: those that count.
        budget: of the turns to come; None: the patch's.
    """

    def __init__(self, patch: Patch, tokenizer: Any, wording: Wording, max_new_tokens: int) -> None:
        self.patch, self.wording, self.max_new_tokens = patch, wording, max_new_tokens
        self._model, self._tokenizer = patch.model, tokenizer
        self._ends = stop_ids(patch.model, tokenizer, wording)
        self._beginning = State(self._start_ids(), patch.new_cache())
        self.turns: list[Turn] = []
        self.budget: int | float | None = None

    @property
    def state(self) -> State:
        """Where it stands now."""
        return self.turns[-1].after if self.turns else self._beginning

    def encode_document(self, text: str) -> list[int]:
        """The tokens that `read` takes.

        Raises:
            ConfigError: with an answer, they are more than the model was made for.
        """
        ids = [*self._start_ids(), *self._encode(self.wording.start + text)]
        model_options.check_room(self._model, len(ids) + self.max_new_tokens, "The document, with an answer,")
        return ids

    def read(self, ids: list[int], progress: Callable[[int], object]) -> None:
        """Begins anew with a document, prefilled densely.

        Args:
            ids: of `encode_document`.
            progress: called with the number of tokens of every part read.
        """
        cache = self.patch.new_cache(reserve_tokens=len(ids) + 4 * self.max_new_tokens)
        step = without_single(CHUNK, len(ids))
        for start in range(0, len(ids), step):
            part = self._tensor(ids[start : start + step])
            with torch.inference_mode():
                self._model(input_ids=part, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            progress(part.shape[1])
        self._beginning = State(ids, cache)
        self.turns = []

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
        before = self.state
        ids = [*before.ids, *self._encode(self.wording.question(question, is_first=not self.turns))]
        model_options.check_room(self._model, len(ids) + self.max_new_tokens, "The conversation, with an answer,")
        changes: dict[str, Any] = {} if self.budget is None else {"budget": self.budget}
        cache = before.cache.fork(**changes)
        stream = Stream(self._tokenizer, show)
        said = self._generate(ids, cache, stream, is_stopped)
        if is_stopped():
            return None
        turn = Turn(State(ids + said, cache), stream.said, stream.num_tokens, stream.ms_per_token)
        self.turns.append(turn)
        return turn

    def set_budget(self, budget: int | float) -> None:
        """For the turns to come.

        Raises:
            ConfigError: it is not allowed.
        """
        self.patch.config.with_(budget=budget)
        self.budget = budget

    def reset(self) -> None:
        """Forgets all turns and keeps the document."""
        self.turns = []

    def undo(self) -> bool:
        """Forgets the last turn; returns whether there was one."""
        return bool(self.turns and self.turns.pop())

    def _generate(
        self, ids: list[int], cache: PagedCache, stream: Stream, is_stopped: Callable[[], bool]
    ) -> list[int]:
        """The answer's tokens, without the end token: what a later turn begins with says how an answer ends."""
        tokens, end = self._tensor(ids), self.wording.end

        def is_over() -> bool:
            return is_stopped() or (end is not None and bool(stream.said.strip()) and stream.said.endswith(end))

        output = self._model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), **{CACHE: cache}, streamer=stream,
            max_new_tokens=self.max_new_tokens, stopping_criteria=[StopWhen(is_over)],
            eos_token_id=sorted(self._ends) or None, pad_token_id=self._pad_id,
        )  # fmt: skip
        said: list[int] = output[0, len(ids) :].tolist()
        return said[:-1] if said and said[-1] in self._ends else said

    @property
    def _pad_id(self) -> int | None:
        """No row is ever padded, but generate complains where there is none."""
        known = (self._model.generation_config.pad_token_id, self._tokenizer.pad_token_id, *self._ends)
        return next((token for token in known if token is not None), None)

    def _start_ids(self) -> list[int]:
        start = self._tokenizer.bos_token_id
        own = self._tokenizer("").input_ids if self.wording.adds_start_token else []
        return [token for token in own if token == start]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self._model.device)
