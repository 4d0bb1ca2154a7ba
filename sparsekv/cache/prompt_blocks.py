"""Attention of a prompt to the blocks of keys that a policy chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.ops.prompt import lists_of, prompt_attention
from sparsekv.policies import PromptChunk

BLOCK_TOKENS = 128  # of a block, or as many as a page has


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


def attend(ops: Any, chunk: PromptChunk, value: Tensor, blocks: Tensor) -> Tensor:
    """Causal attention of a chunk to the keys of some blocks, `[b, hq, t, dv]`.

    Args:
        ops: the namespace of the ops.
        value: `[b, hkv, n, dv]`, of the chunk's keys.
        blocks: as `settled` gives them.
    """
    is_tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (chunk.query, chunk.key, value))
    attention = prompt_attention if is_tracked else ops.prompt_attention  # an op has no gradient
    out: Tensor = attention(chunk.query, chunk.key, value, *lists_of(blocks), chunk.block_size, chunk.scaling)
    return out
