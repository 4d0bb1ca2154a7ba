"""A whole decode step as one op: what it is handed, and what it means, the four ops one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekv.ops import reference

Result = tuple[Tensor, Tensor, Tensor]


@dataclass
class StepArguments:
    """The arguments of `sparse_decode`, in order: `sparse_decode(*StepArguments(...))`.

    Attributes:
        query: `[b, hq, d]`.
        key, value: `[b, hkv, 1, d]` of the new token; None: it is in its page already.
        block_table: `[b, max_pages]` int32; seq_lens: `[b]` int32, the new token counted.
        kv_pool: `[num_pages, 2, hkv, p, record]`.
        summary, state: the digest's tensors, `[num_pages, hkv, ...]` and `[hkv, ...]`.
        limits: `[b]` int32, fewer than k pages for some; None: k for all.
        digest: its name.
        group_pooling: "max", "sum", "mean_softmax" or "share".
        k: pages to list of every sequence and kv head.
        sink_tokens, recent_tokens: first and last tokens whose pages are listed whatever their scores.
        scaling: factor on the dot products.
        softcap: `softcap * tanh(x / softcap)` of the logits; 0: none.
        sinks: `[hq]`, a logit per head that takes mass and has no value; None: none.
        format: name of the pages' format.
        min_score: pages that score less are not listed; None: any may be.
        whole_tokens: sequences of up to so many tokens have no least score.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    block_table: Tensor
    seq_lens: Tensor
    kv_pool: Tensor
    summary: Sequence[Tensor]
    state: Sequence[Tensor]
    limits: Tensor | None
    digest: str
    group_pooling: str
    k: int
    sink_tokens: int
    recent_tokens: int
    scaling: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    format: str = "plain"
    min_score: float | None = None
    whole_tokens: int = 0

    @property
    def chooses(self) -> bool:
        """Whether a page may be left out."""
        return self.k < self.block_table.shape[1] or self.limits is not None or self.min_score is not None

    def __iter__(self) -> Iterator[Any]:
        return iter(vars(self).values())


def sparse_decode(*args: Any) -> Result:
    """A whole decode step by Quest's policy: append, score, select, attend, one after the other.

    A kernel may leave the digest of a last page as it is until the page is full: it is read whatever its score, and
    `append_kv` makes all of it anew.

    Args: those of `StepArguments`.

    Returns:
        output and log-sum-exp as `attend_pages` does, and the slots `[b, hkv, k]` that it read.
    """
    return step_by_step(reference, StepArguments(*args))


def step_by_step(ops: Any, step: StepArguments) -> Result:
    """`sparse_decode` by the four ops of a namespace."""
    where, page_size = (step.block_table, step.seq_lens), step.kv_pool.shape[3]
    digests, last = (step.summary, step.state), (step.scaling, step.softcap, step.sinks, step.format)
    if step.key is not None and step.value is not None:
        ops.append_kv(step.key, step.value, None, *where, step.kv_pool, *digests, step.digest, step.format)
    if not step.chooses:
        out, lse = ops.attend_pages(step.query, step.kv_pool, *where, None, *last)
        return out, lse, every_slot(*where, step.kv_pool, step.k)
    scores = ops.score_pages(step.query, *digests, *where, page_size, step.digest, step.group_pooling, step.scaling)
    forced, least = (step.sink_tokens, step.recent_tokens), (step.min_score, step.whole_tokens)
    slots = ops.select_pages(scores, step.seq_lens, page_size, step.k, *forced, step.limits, *least)
    out, lse = ops.attend_pages(step.query, step.kv_pool, *where, slots, *last)
    return out, lse, slots


def every_slot(block_table: Tensor, seq_lens: Tensor, kv_pool: Tensor, k: int) -> Tensor:
    """The selection of all pages: slots `[b, hkv, k]` int32."""
    slot = torch.arange(k, dtype=torch.int32, device=block_table.device)
    slots = torch.where(slot * kv_pool.shape[3] < seq_lens[:, None], slot, -1)
    return slots[:, None].expand(-1, kv_pool.shape[2], -1).contiguous()
