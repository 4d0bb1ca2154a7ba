"""A whole decode step as one op, and what it means: the four ops one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekv.ops import reference


def sparse_decode(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    kv_pool: Tensor,
    summary: Sequence[Tensor],
    state: Sequence[Tensor],
    limits: Tensor | None,
    digest: str,
    group_pooling: str,
    k: int,
    sink_tokens: int,
    recent_tokens: int,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    format: str = "plain",
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole decode step by Quest's policy: append, score, select, attend, one after the other.

    A kernel may leave the digest of a last page as it is until the page is full: it is read whatever its score, and
    `append_kv` makes all of it anew.

    Args: those of the four ops; `key`, `value` `[b, hkv, 1, d]`, or None where the token is in its page already.

    Returns:
        output and log-sum-exp as `attend_pages` does, and the slots `[b, hkv, k]` that it read.
    """
    new = (key, value, block_table, seq_lens, kv_pool, summary, state, limits, digest, group_pooling)
    chosen = (k, sink_tokens, recent_tokens, scaling, softcap, sinks, format)
    return step_by_step(reference, query, *new, *chosen)


def step_by_step(
    ops: Any,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    kv_pool: Tensor,
    summary: Sequence[Tensor],
    state: Sequence[Tensor],
    limits: Tensor | None,
    digest: str,
    group_pooling: str,
    k: int,
    sink_tokens: int,
    recent_tokens: int,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    format: str = "plain",
) -> tuple[Tensor, Tensor, Tensor]:
    """`sparse_decode` by the four ops of a namespace."""
    where, page_size = (block_table, seq_lens), kv_pool.shape[3]
    if key is not None and value is not None:
        ops.append_kv(key, value, None, *where, kv_pool, summary, state, digest, format)
    if k >= block_table.shape[1] and limits is None:  # every page is read: there is nothing to choose
        slots = every_slot(block_table, seq_lens, kv_pool, k)
        out, lse = ops.attend_pages(query, kv_pool, *where, None, scaling, softcap, sinks, format)
        return out, lse, slots
    scores = ops.score_pages(query, summary, state, *where, page_size, digest, group_pooling, scaling)
    slots = ops.select_pages(scores, seq_lens, page_size, k, sink_tokens, recent_tokens, limits)
    out, lse = ops.attend_pages(query, kv_pool, *where, slots, scaling, softcap, sinks, format)
    return out, lse, slots


def every_slot(block_table: Tensor, seq_lens: Tensor, kv_pool: Tensor, k: int) -> Tensor:
    """The selection of all pages: slots `[b, hkv, k]` int32."""
    slot = torch.arange(k, dtype=torch.int32, device=block_table.device)
    slots = torch.where(slot * kv_pool.shape[3] < seq_lens[:, None], slot, -1)
    return slots[:, None].expand(-1, kv_pool.shape[2], -1).contiguous()
