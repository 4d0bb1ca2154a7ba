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
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from sparsekv import Patch
from sparsekv.evaluation.tasks import Metric, Question
from sparsekv.hf.capture.decoder import Run
from sparsekv.hf.chunks import chunk_size, without_single
from sparsekv.hf.support import CACHE
from sparsekv.hf.wording import Wording

from .room import tokens_at_once

LONG = 16  # steps beyond which it pays to capture them: that takes as long as a few eager ones
_COPIED = 1 << 23  # logits that are made float32 at once
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
    """A question under way: what it feeds next, and what the model has said. Where the metric is perplexity nothing
    is said: `decode` feeds the text as it is (`given`).

    Attributes:
        said: tokens of the answer to every turn begun.
        nll: the negative log-likelihood of the reference's tokens, in nats, where they are given.
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
    def given(self) -> list[int]:
        """The turn's prompt and reference, for a metric that scores them."""
        return [*self.turns[0].prompt, *self.turns[0].reference]

    def take(self, best: int) -> None:
        """Goes on from what the model says would follow the last token."""
        if self.is_done:
            return
        if not self._queue:
            self._answer(best)
            return
        self._next = self._queue.pop(0)

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
        if self.metric is not Metric.PERPLEXITY:
            self._next, *self._queue = self.turns[len(self.said)].prompt
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
    step = min(chunk_size(1, longest) or longest, max(tokens_at_once(model) // len(documents), 1024))
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
        rows: of one metric.
        mask: `[rows, n]`, of what is in the cache.
        before_step: called with the number of each step.
        banned: tokens that are never said.
    """
    positions, num_steps = mask.sum(1, keepdim=True), 0
    is_finite = torch.ones(len(rows), dtype=torch.bool, device=mask.device)
    is_padded = not bool(mask.all())
    given = rows[0].metric is Metric.PERPLEXITY
    feed: _Given | _Said = _Given(rows, mask.device) if given else _Said(rows, mask.device, banned)
    while (ids := feed.next()) is not None:
        if before_step is not None:
            before_step(num_steps)
        inputs = {"input_ids": ids, "position_ids": positions + num_steps}
        if is_padded:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            inputs["attention_mask"] = mask
        logits = step(**inputs, **{CACHE: cache}, use_cache=True).logits[:, -1]
        # A model may rule out tokens with minus infinity; NaN goes through amax.
        is_finite &= logits.amax(-1).isfinite().to(is_finite.device)
        feed.take(logits)
        num_steps += 1
    for row, finite in zip(rows, is_finite.tolist(), strict=True):
        row.is_finite = finite
    return num_steps


class _Said:
    """What is fed to rows that answer: after their prompts, what the model has said."""

    def __init__(self, rows: Sequence[Row], device: torch.device, banned: Sequence[int]) -> None:
        self.rows, self.device, self.banned = rows, device, list(banned)

    def next(self) -> Tensor | None:
        """Tokens `[rows, 1]`; None: all have answered."""
        if all(row.is_done for row in self.rows):
            return None
        return torch.tensor([[row.feed()] for row in self.rows], device=self.device)

    def take(self, logits: Tensor) -> None:
        if self.banned:
            logits = logits.clone()
            logits[:, self.banned] = float("-inf")
        for row, best in zip(self.rows, logits.argmax(-1).tolist(), strict=True):
            row.take(best)


class _Given:
    """What is fed to rows whose text is given. The device keeps what it costs, and is asked at the end: no step waits
    for the one before."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows = rows
        texts = [torch.tensor(row.given) for row in rows]
        self.ids = pad_sequence(texts, batch_first=True).to(device)
        self._log_probs: list[Tensor] = []  # of the token after each that was fed, [rows]

    def next(self) -> Tensor | None:
        """Tokens `[rows, 1]`; None: only the last is left, which need not be decoded."""
        place = len(self._log_probs)
        if place + 1 < self.ids.shape[1]:
            return self.ids[:, place : place + 1]
        for row, log_probs in zip(self.rows, torch.stack(self._log_probs, 1).tolist(), strict=True):
            row.num_tokens = len(row.given) - 1
            row.num_scored = min(len(row.turns[0].reference), row.num_tokens)
            row.nll = -sum(log_probs[row.num_tokens - row.num_scored : row.num_tokens])
        return None

    def take(self, logits: Tensor) -> None:
        after = len(self._log_probs) + 1
        targets = self.ids[:, after : after + 1].to(logits.device)
        size = max(1, _COPIED // logits.shape[1])
        parts = zip(logits.split(size), targets.split(size), strict=True)
        self._log_probs.append(torch.cat([_log_probs(*part) for part in parts]))


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Of a token `[rows, 1]` each by logits `[rows, vocabulary]`: `[rows]` float32."""
    logits = logits.float()
    return logits.gather(1, targets)[:, 0] - logits.logsumexp(1)
