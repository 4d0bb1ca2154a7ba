"""Attention of a prompt to the blocks of keys that a policy chooses, in plain torch: what it means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies import PromptChunk

BLOCK_TOKENS = 64  # of a block, or as many as a page has
MASK_ELEMENTS = 1 << 24  # of a mask at most, but for those of a single query


def block_size(page_size: int) -> int:
    """Tokens of a block: whole pages."""
    return page_size * max(1, BLOCK_TOKENS // page_size)


def causal_blocks(chunk: PromptChunk) -> Tensor:
    """Which blocks hold keys that a block of queries may see, `[num_query_blocks, num_key_blocks]` bool."""
    shape = chunk.num_query_blocks, chunk.num_key_blocks
    return torch.ones(shape, dtype=torch.bool, device=chunk.query.device).tril(chunk.first_block)


def settled(chunk: PromptChunk, chosen: Tensor) -> Tensor:
    """The chosen blocks without those of later keys, and with the diagonal, where each query sees itself.

    Args:
        chosen: `[b, hkv or hq, num_query_blocks, num_key_blocks]` bool.

    Raises:
        ConfigError: it has another shape or dtype.
    """
    causal, (b, hq), hkv = causal_blocks(chunk), chunk.query.shape[:2], chunk.key.shape[1]
    if chosen.dtype != torch.bool or tuple(chosen.shape) not in {(b, h, *causal.shape) for h in (hkv, hq)}:
        raise ConfigError(
            f"policy={chunk.config.policy!r} chose blocks {tuple(chosen.shape)} of {chosen.dtype} for a prompt. Give "
            f"{(b, hkv, *causal.shape)} or {(b, hq, *causal.shape)} of torch.bool: Policy.prompt_blocks says what."
        )
    return chosen.to(causal.device) & causal | causal.triu(chunk.first_block)


def attend(chunk: PromptChunk, value: Tensor, blocks: Tensor) -> Tensor:
    """Causal attention of a chunk to the keys of some blocks, `[b, hq, t, dv]`. Keys that a block of queries does not
    see in any row or head are not read, and masks have a bounded size.

    Args:
        value: `[b, hkv, n, dv]`, of the chunk's keys.
        blocks: as `settled` gives them.
    """
    (b, hq, t, d), (hkv, n) = chunk.query.shape, chunk.key.shape[1:3]
    group, size, out = hq // hkv, chunk.block_size, chunk.query.new_empty(b, hq, t, value.shape[3])
    blocks = blocks.unflatten(1, (hkv, -1))  # [b, hkv, 1 or group, query blocks, key blocks]
    tokens = torch.arange(n, device=chunk.query.device)
    for i, start in enumerate(range(chunk.first_block * size, n, size)):
        seen = blocks[:, :, :, i].repeat_interleave(size, dim=-1)[..., :n]
        columns = seen.any(dim=(0, 1, 2)).nonzero().flatten()
        seen, key, values = seen[..., columns], chunk.key[:, :, columns], value[:, :, columns]
        at_once = max(1, MASK_ELEMENTS // (b * hq * len(columns)))
        for rows in tokens[max(start, chunk.past) : start + size].split(at_once):
            mask = seen[:, :, :, None] & (columns <= rows[:, None])
            mask = mask.expand(-1, -1, group, -1, -1).flatten(2, 3)
            query = chunk.query[:, :, rows - chunk.past].reshape(b, hkv, group * len(rows), d)
            found = F.scaled_dot_product_attention(query, key, values, attn_mask=mask, scale=chunk.scaling)
            out[:, :, rows - chunk.past] = found.reshape(b, hq, len(rows), -1)
    return out
