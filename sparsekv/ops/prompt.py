"""Attention of a prompt's tokens to listed blocks of keys, and scores of such blocks: what it means, in plain torch,
which is what CPUs run.

Names as in `reference.py`; t tokens of n have queries, the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

SCORED_ELEMENTS = 1 << 24  # logits at once, but for those of a single query
SCORED_ON_GPU = 4  # times as many, for fewer launches


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, block_size: int, scaling: float
) -> Tensor:
    """Attention of the last t of n tokens, each to the listed blocks, as far as they are not later than itself.

    Blocks of keys and of queries are counted from a sequence's first token, so of the first block of queries the
    beginning may be missing, and of the last one the end. There is no mask of t x n, and keys are not repeated.

    Args:
        query: `[b, hq, t, d]`.
        key: `[b, hkv, n, d]`; value: `[b, hkv, n, dv]`.
        counts: `[b, h, num_query_blocks]` int32, at least 1: blocks that each block of queries is to see. h is hq, or
            hkv where the heads of a group share their lists.
        indices: `[b, h, num_query_blocks, max]` int32, these blocks in ascending order. The last of them is the block
            of the queries itself, where each sees the tokens up to its own; those before are seen whole. What is
            behind `counts` is arbitrary.
        block_size: tokens of a block.
        scaling: factor on the dot products.

    Returns:
        `[b, hq, t, dv]`, with the heads of a token side by side in memory, as models want it.
    """
    (b, hq, t, _), (hkv, n), lists = query.shape, key.shape[1:3], counts.tolist()
    heads, past = hq // counts.shape[1], n - t  # heads that share a list
    out = query.new_empty(b, t, hq, value.shape[3]).transpose(1, 2)
    inside = torch.arange(block_size, device=query.device)
    later = torch.zeros(block_size, int(counts.max()) * block_size, dtype=query.dtype, device=query.device)
    later[:, -block_size:].masked_fill_(inside > inside[:, None], float("-inf"))
    for row, h, i in product(*map(range, counts.shape)):
        start, listed = (past // block_size + i) * block_size, indices[row, h, i, : lists[row][h][i]]
        first, end = max(start, past), min(start + block_size, n)
        columns = (listed[:, None] * block_size + inside).flatten()
        mask = later[first - start : end - start, -len(columns) :]
        seen = len(columns) - (start + block_size - end)  # of the last block, the end may be missing
        mine, new = slice(h * heads, (h + 1) * heads), slice(first - past, end - past)
        keys, values = (x[row, h * heads * hkv // hq].index_select(0, columns[:seen]) for x in (key, value))
        keys, values = (x.expand(1, heads, -1, -1) for x in (keys, values))
        own = query[row : row + 1, mine, new]
        out[row, mine, new] = F.scaled_dot_product_attention(own, keys, values, mask[:, :seen], scale=scaling)[0]
    return out


def score_blocks(
    query: Tensor,
    key: Tensor,
    positions: Sequence[int],
    block_size: int,
    scaling: float,
    by_block: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """How much attention of some queries each block of keys gets: the log-sum-exp of the logits of its keys, as far
    as they are not later than the query.

    Args:
        query: `[b, hq, m, d]`.
        key: `[b, hkv, n, d]`.
        positions: of the queries among the n tokens, ascending.
        block_size, scaling: as in `prompt_attention`.
        by_block: what does the work of `logsumexp_by_block`.

    Returns:
        `[b, hq, m, num_key_blocks]` float32, -inf for blocks that are later.
    """
    (b, hq, m, _), (hkv, n) = query.shape, key.shape[1:3]
    place, group = torch.tensor(list(positions), dtype=torch.int64, device=query.device), hq // hkv
    scores = query.new_full((b, hq, m, -(-n // block_size)), float("-inf"), dtype=torch.float32)
    at_once = max(1, SCORED_ELEMENTS * (SCORED_ON_GPU if query.is_cuda else 1) // (group * n))
    for start in range(0, m, at_once):
        first, last = positions[start], positions[min(start + at_once, m) - 1]
        some, end = slice(start, start + at_once), min(last // block_size * block_size + block_size, n)
        later = torch.arange(first, end, device=query.device) > place[some, None]
        for row, kv in product(range(b), range(hkv)):
            heads = slice(kv * group, (kv + 1) * group)
            logits = (query[row, heads, some] * scaling) @ key[row, kv, :end].T
            logits[..., first:].masked_fill_(later, float("-inf"))
            if end % block_size:
                logits = F.pad(logits, (0, -end % block_size), value=float("-inf"))
            found = (by_block or logsumexp_by_block)(logits, block_size)
            scores[row, heads, some, : found.shape[-1]] = found
    return scores


def logsumexp_by_block(logits: Tensor, block_size: int) -> Tensor:
    """`[..., n]` -> `[..., n / block_size]`, in float32."""
    return logits.unflatten(-1, (-1, block_size)).float().logsumexp(-1)


def lists_of(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices, as `prompt_attention` takes them, of the blocks that are True: `[b, h, num_query_blocks,
    num_key_blocks]` bool, of which each block of queries has its own, and none that is later. The lists have room for
    all, so no device is waited for."""
    places, width = blocks.cumsum(-1, dtype=torch.int32), blocks.shape[-1]
    counts = places[..., -1].clone()
    places = places.sub_(1).masked_fill_(~blocks, width).long()  # those not listed go behind the end
    numbers = torch.arange(width, dtype=torch.int32, device=blocks.device).expand_as(blocks)
    indices = counts.new_zeros(*counts.shape, width + 1).scatter_(-1, places, numbers)
    return counts, indices[..., :width].contiguous()
