"""Dense attention of several new tokens to all before them, for prompts whose mask would be large.

A chunk of a prompt sees the tokens before it whole, and its own causally: two calls without a mask, for which PyTorch
has fast kernels that share keys and values among the heads of a group, put together by their log-sum-exps. Padding is
left out row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.cache.contents import ReadableLayer

BLOCK_ELEMENTS = 1 << 24  # of a mask, where there is no kernel without one


Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # as `causal`


def attend(
    layer: ReadableLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    attention: Attention | None = None,
) -> Tensor:
    """Causal attention of a layer's newest tokens, which are in its pages already: query `[b, hq, t, d]`, key and
    value `[b, hkv, t, d]` -> `[b, hq, t, d]`; zero where there is padding. `attention` (default: `causal`) gets
    sequences without padding, and all keys and values of each."""
    attention = attention or causal
    num_new = query.shape[2]
    past, valid = layer.length - num_new, layer.valid
    if valid is None and not past:
        return attention(query, key, value, scaling)
    out = query.new_zeros(query.shape[0], num_new, *query.shape[1::2]).transpose(1, 2)  # as models want it to lie
    for row in range(len(out)):
        columns = _columns(valid, row, past, num_new)
        if columns is None:
            continue
        own = [x[row : row + 1, :, columns] for x in (query, key, value)]
        if layer.row_length(row) > own[0].shape[2]:
            own[1:] = layer.sequence(row)
        out[row, :, columns] = attention(own[0], own[1], own[2], scaling)[0]
    return out


def _columns(valid: Tensor | None, row: int, past: int, num_new: int) -> Any:
    """Which of the new columns of a row hold tokens, as an index; None: none."""
    if valid is None or valid.shape[1] <= past:
        return slice(None)
    new = valid[row, past : past + num_new]
    first = len(new) - int(new.sum())  # if the padding comes first; columns past those known hold tokens
    if bool(new[first:].all()):
        return slice(first, None) if first < num_new else None
    return torch.cat([new, new.new_ones(num_new - len(new))]).nonzero().flatten()


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of the last t of n tokens, each to those up to itself: `[b, hq, t, d]` over `[b, hkv, n, d]` ->
    `[b, hq, t, d]`. Keys and values are not repeated for the heads of a group, and there is no mask of t x n."""
    past = key.shape[2] - query.shape[2]
    if not past:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    for kernel in _kernels(query.device, query.dtype):
        try:
            return _in_two(kernel, query, key, value, past, scaling)
        except RuntimeError as error:  # a head size it does not serve, or a library that is not there
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return _in_blocks(query, key, value, past, scaling)


def _in_two(kernel: Any, query: Tensor, key: Tensor, value: Tensor, past: int, scaling: float) -> Tensor:
    own, own_lse = kernel(query, key[:, :, past:], value[:, :, past:], True, scaling)
    old, old_lse = kernel(query, key[:, :, :past], value[:, :, :past], False, scaling)
    share = torch.sigmoid(own_lse - old_lse)  # of the weight that lies on the new tokens
    return torch.lerp(old.float(), own.float(), share).to(query.dtype)


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, past: int, scaling: float) -> Tensor:
    """A few queries at a time, under masks of a bounded size; the heads of a group are taken as more queries."""
    (b, num_heads, t, d), (num_kv_heads, n) = query.shape, key.shape[1:3]
    group, column = num_heads // num_kv_heads, torch.arange(n, device=query.device)
    out = torch.empty_like(query)
    for rows in torch.arange(t, device=query.device).split(max(1, BLOCK_ELEMENTS // (n * group))):
        mask = (column <= past + rows[:, None]).repeat(group, 1)
        folded = query[:, :, rows].reshape(b, num_kv_heads, group * len(rows), d)
        block = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
        out[:, :, rows] = block.reshape(b, num_heads, len(rows), d)
    return out


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Attention kernels that also return log-sum-exps `[b, hq, t, 1]`, the fastest first."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return []
    return [_cudnn, _flash] if torch.cuda.get_device_capability(device) >= (9, 0) else [_flash]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse = attention(query, key, value, None, True, 0.0, is_causal, False, scale=scaling)[:2]
    return out, lse.view(*query.shape[:3], 1)


def _flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = attention(query, key, value, 0.0, is_causal, False, scale=scaling)[:2]
    return out, lse.view(*query.shape[:3], 1)
