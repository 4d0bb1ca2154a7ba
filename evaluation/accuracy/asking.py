"""Questions about prefilled documents, asked side by side: a row per question, one token of each at a time.

Rows of one document share its pages. The question is decoded like the answer, as only what is decoded is sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparsekv import Patch
from sparsekv.evaluation.tasks import Metric, Question
from sparsekv.hf.capture.decoder import Run
from sparsekv.hf.chunks import chunk_size, without_single
from sparsekv.hf.support import CACHE
from sparsekv.hf.wording import Wording

MAX_AT_ONCE = 1 << 20  # of all documents together
LONG = 64  # steps beyond which it pays to capture them
_SPARE_TOKENS, _SPARE_IN_CHAT = 4, 32  # an answer may be so much longer than the expected one; some chat around it

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class PromptTurn:
    """A turn in tokens.

    Attributes:
        prompt: fed first.
        reference: fed too where the metric is perplexity; else how long the answer may be.
        spare: tokens by which an answer that ends by itself may be longer.
    """

    prompt: list[int]
    reference: list[int]
    spare: int = _SPARE_TOKENS


@dataclass
class Row:
    """A question under way: what it feeds next, and what the model has said.

    Attributes:
        said: tokens of the answer to every turn begun.
        nll: the negative log-likelihood of the reference's tokens, in nats, where they are fed.
        num_tokens: tokens decoded, until the row had ended.
        is_finite: whether the model has given numbers at every step; what it says without is no answer.
    """

    turns: Sequence[PromptTurn]
    metric: Metric
    stop_ids: frozenset[int]
    said: list[list[int]] = field(default_factory=list)
    nll: float = 0.0
    num_scored: int = 0
    num_tokens: int = 0
    is_finite: bool = True
    _queue: list[int] = field(default_factory=list)
    _next: int | None = None

    def __post_init__(self) -> None:
        self._begin()

    @property
    def longest(self) -> int:
        """Steps that it may take."""
        return sum(len(turn.prompt) + len(turn.reference) + turn.spare + 1 for turn in self.turns)

    @property
    def is_done(self) -> bool:
        return self._next is None

    def feed(self) -> int:
        """The token to be decoded; when all is said, any."""
        if self._next is None:
            return 0
        self.num_tokens += 1
        return self._next

    @property
    def given(self) -> int:
        """The token that comes next whatever the model says; 0 if none does."""
        return self._queue[0] if self._queue else 0

    def take(self, best: int, log_prob: float) -> None:
        """Goes on from what the model says would follow the last token.

        Args:
            log_prob: of the token `given`, in nats.
        """
        if self.is_done:
            return
        if not self._queue:
            self._answer(best)
            return
        self._next = self._queue.pop(0)
        if self.metric is Metric.PERPLEXITY:
            if len(self._queue) < len(self.turns[0].reference):  # the token given is the reference's
                self.nll -= log_prob
                self.num_scored += 1
            if not self._queue:  # the last need not be decoded
                self._next = None

    def _answer(self, best: int) -> None:
        turn, said = self.turns[len(self.said) - 1], self.said[-1]
        spare = turn.spare if self.stop_ids else 0
        if best in self.stop_ids or len(said) >= len(turn.reference) + spare:
            self._begin()
            return
        said.append(best)
        self._next = best

    def _begin(self) -> None:
        """The next turn, if there is one."""
        if len(self.said) == len(self.turns):
            self._next = None
            return
        turn = self.turns[len(self.said)]
        self._queue = [*turn.prompt, *(turn.reference if self.metric is Metric.PERPLEXITY else [])]
        self._next = self._queue.pop(0)
        self.said.append([])


def turns_of(question: Question, encode: Encode, wording: Wording | None = None) -> list[PromptTurn]:
    """A question's turns in tokens: in its own words, or as those of a chat."""
    if wording is None:
        return [PromptTurn(encode(turn.prompt), encode(turn.reference)) for turn in question.turns]
    texts = [wording.question(turn.asked, i == 0) + turn.begun for i, turn in enumerate(question.turns)]
    references = [encode(turn.reference) for turn in question.turns]
    return [PromptTurn(encode(text), ref, _SPARE_IN_CHAT) for text, ref in zip(texts, references, strict=True)]


@torch.inference_mode()
def prefill(model: Any, documents: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Fills a cache with documents in dense passes; returns the mask `[b, n]` of what is no padding (on the left)."""
    longest = max(len(ids) for ids in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, longest - len(document) :] = torch.tensor(list(document))
        mask[row, longest - len(document) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    step = min(chunk_size(1, longest) or longest, max(MAX_AT_ONCE // len(documents), 1024))
    step = without_single(step, longest)
    for start in range(0, longest, step):
        part = slice(start, start + step)
        model(
            input_ids=ids[:, part], attention_mask=mask[:, : start + step], position_ids=positions[:, part],
            use_cache=True, logits_to_keep=1, **{CACHE: cache},
        )  # fmt: skip
    return mask


def stepper(patch: Patch, num_steps: int) -> Callable[..., Any]:
    """What runs a decode step: the model, or on a GPU, where many are to come, its captured step."""
    if num_steps <= LONG or patch.model.device.type != "cuda":
        return patch.model
    return partial(patch.decoder, Run())


@torch.inference_mode()
def decode(
    step: Callable[..., Any],
    cache: Cache,
    rows: Sequence[Row],
    mask: Tensor,
    before_step: Callable[[int], object] | None = None,
    banned: Sequence[int] = (),
) -> int:
    """Decodes all rows to their ends, a token of each at a time; returns the number of steps.

    Rows whose logits were NaN or infinite at any step are told so (`is_finite`).

    Args:
        step: the model's forward.
        mask: `[rows, n]`, of what is in the cache.
        before_step: called with the number of each step.
        banned: tokens that are never said.
    """
    positions, num_steps = mask.sum(1, keepdim=True), 0
    is_finite = torch.ones(len(rows), dtype=torch.bool, device=mask.device)
    is_padded = not bool(mask.all())
    while not all(row.is_done for row in rows):
        if before_step is not None:
            before_step(num_steps)
        ids = torch.tensor([[row.feed()] for row in rows], device=mask.device)
        inputs = {"input_ids": ids, "position_ids": positions + num_steps}
        if is_padded:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            inputs["attention_mask"] = mask
        logits = step(**inputs, **{CACHE: cache}, use_cache=True).logits[:, -1]
        # A model may rule out tokens with minus infinity; NaN goes through amax.
        is_finite &= logits.amax(-1).isfinite().to(is_finite.device)
        _take(rows, logits, list(banned))
        num_steps += 1
    for row, finite in zip(rows, is_finite.tolist(), strict=True):
        row.is_finite = finite
    return num_steps


def _take(rows: Sequence[Row], logits: Tensor, banned: list[int]) -> None:
    log_probs = [0.0] * len(rows)
    if rows[0].metric is Metric.PERPLEXITY:
        given = torch.tensor([[row.given] for row in rows], device=logits.device)
        log_probs = logits.float().log_softmax(-1).gather(1, given)[:, 0].tolist()
    if banned:
        logits = logits.clone()
        logits[:, banned] = float("-inf")
    for row, best, log_prob in zip(rows, logits.argmax(-1).tolist(), log_probs, strict=True):
        row.take(best, log_prob)
