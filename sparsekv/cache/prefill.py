"""Dense attention of several new tokens to all before them, for prompts whose mask would be large.

A chunk of a prompt sees the tokens before it whole, and its own causally: two calls without a mask, for which PyTorch
has fast kernels that share keys and values among the heads of a group, put together by their log-sum-exps, as are
sinks. Padding is left out row by row. What no kernel does goes block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.cache import attention_blocks
from sparsekv.cache.contents import ReadableLayer
from sparsekv.cache.masks import padded_columns, window_of

MAX_TOGETHER = 1 << 17  # tokens of several sequences whose keys and values are copied out of the pages at once
FEW_QUERIES = 512  # for fewer, cuDNN plans longer (50 ms and more, for every length) than it computes

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
    sequences without padding, as long as one another, and all keys and values of each."""
    attention = attention or causal
    num_new = query.shape[2]
    past, valid = layer.length - num_new, layer.valid
    if valid is None and not past:
        return attention(query, key, value, scaling)
    out = _as_models_want_it(query, value)
    together = 1 if valid is not None else max(1, MAX_TOGETHER // layer.length)
    for first in range(0, len(out), together):
        columns, rows = _columns(valid, first, past, num_new), slice(first, first + together)
        if columns is None:
            continue
        own = [x[rows, :, columns] for x in (query, key, value)]
        if layer.row_length(first) > own[0].shape[2]:
            own[1:] = layer.sequences(rows)
        out[rows, :, columns] = attention(own[0], own[1], own[2], scaling)
    return out


def attend_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last t of n columns, whoever holds them: query `[b, hq, t, d]`, key `[b, hkv, n, d]`,
    value `[b, hkv, n, dv]` -> `[b, hq, t, dv]`. What padding itself attends to means nothing.

    Args:
        mask: as `columns_only` makes it.
        scaling, softcap, sinks: as in `attention_blocks.attend`.
    """
    (t, n), window, visible = (query.shape[2], key.shape[2]), window_of(mask), padded_columns(mask)
    if softcap or (window or n) < n:
        return attention_blocks.attend(query, key, value, scaling, softcap, sinks, window, visible)
    if visible is None:
        return causal(query, key, value, scaling, sinks)
    out = _as_models_want_it(query, value)
    for row, seen in enumerate(visible):
        columns = seen[n - t :]
        own = query[row : row + 1, :, columns], key[row : row + 1, :, seen], value[row : row + 1, :, seen]
        if own[0].shape[2]:
            out[row, :, columns] = causal(*own, scaling, sinks)[0]
    return out


def _as_models_want_it(query: Tensor, value: Tensor) -> Tensor:
    """Room for an output `[b, hq, t, dv]`, zero, with the heads of a token side by side."""
    return query.new_zeros(query.shape[0], *query.shape[2:0:-1], value.shape[-1]).transpose(1, 2)


def _columns(valid: Tensor | None, row: int, past: int, num_new: int) -> Any:
    """Which of the new columns of a row hold tokens, as an index; None: none."""
    if valid is None or valid.shape[1] <= past:
        return slice(None)
    new = valid[row, past : past + num_new]
    first = len(new) - int(new.sum())  # if the padding comes first; columns past those known hold tokens
    if bool(new[first:].all()):
        return slice(first, None) if first < num_new else None
    return torch.cat([new, new.new_ones(num_new - len(new))]).nonzero().flatten()


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float, sinks: Tensor | None = None) -> Tensor:
    """Attention of the last t of n tokens, each to those up to itself: `[b, hq, t, d]` over `[b, hkv, n, d]` ->
    `[b, hq, t, d]`. Keys and values are not repeated for the heads of a group, and there is no mask of t x n.

    Args:
        sinks: `[hq]`, a logit per head that takes mass and has no value; None: none.
    """
    if sinks is None and key.shape[2] == query.shape[2]:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    is_tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    kernels = _kernels(query.device, query.dtype, query.shape[2] < FEW_QUERIES)
    for kernel in () if is_tracked else kernels:  # a log-sum-exp has no gradient
        try:
            return _by_kernel(kernel, query, key, value, scaling, sinks)
        except RuntimeError as error:  # a head size it does not serve, or a library that is not there
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return attention_blocks.attend(query, key, value, scaling, sinks=sinks)


def _by_kernel(
    kernel: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, sinks: Tensor | None
) -> Tensor:
    past = key.shape[2] - query.shape[2]
    out, lse = kernel(query, key[:, :, past:], value[:, :, past:], True, scaling)
    out = out.to(lse.dtype)
    if past:
        old, old_lse = kernel(query, key[:, :, :past], value[:, :, :past], False, scaling)
        out = torch.lerp(old.to(lse.dtype), out, torch.sigmoid(lse - old_lse))  # by where the weight lies
        lse = torch.logaddexp(lse, old_lse)
    if sinks is not None:
        out = out * attention_blocks.share(lse, sinks.view(-1, 1, 1))
    return out.to(query.dtype)


@functools.cache
def _kernels(device: torch.device, dtype: torch.dtype, few: bool) -> list[Any]:
    """Attention kernels that also return log-sum-exps `[b, hq, t, 1]`, the fastest for so many queries first."""
    if device.type == "cpu":
        return [_flash_cpu]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return []
    if torch.cuda.get_device_capability(device) < (9, 0):
        return [_flash]
    return [_flash, _cudnn] if few else [_cudnn, _flash]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse = attention(query, key, value, None, True, 0.0, is_causal, False, scale=scaling)[:2]
    return out, lse.view(*query.shape[:3], 1)


def _flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = attention(query, key, value, 0.0, is_causal, False, scale=scaling)[:2]
    return out, lse.view(*query.shape[:3], 1)


def _flash_cpu(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    out, lse = attention(query, key, value, 0.0, is_causal, scale=scaling)
    return out, lse.unsqueeze(-1)
