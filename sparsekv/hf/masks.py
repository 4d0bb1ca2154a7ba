"""Masks as transformers makes them: which of them need not be made, and the same ones made after all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from sparsekv.cache.masks import columns_only, is_left_out, window_of


def is_causal_only(
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> bool:
    """Whether a mask says no more than padding, and that the last tokens see what is before them, or a window of it.
    (A static cache has room behind them.) Arguments as of transformers' mask interface."""
    end = kv_offset + kv_length
    newest = isinstance(q_offset, int) and q_offset + q_length == end and (local_size is not None or not kv_offset)
    known = attention_mask is None or attention_mask.shape[-1] >= end
    return newest and known and allow_is_causal_skip and _is_same(mask_function, _causal(local_size))


def left_out(
    implementation: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What stands for such a mask: that of `columns_only`; None where sdpa would need none."""
    visible = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if visible is None or bool(visible.all()):
        if implementation == "sdpa" and q_length == kv_length and (local_size is None or kv_length < local_size):
            return None
        visible = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    return columns_only(visible, local_size)


def whole(
    implementation: str, query: Tensor, key: Tensor, attention_mask: Tensor | None, config: Any
) -> Tensor | None:
    """The mask that a model's own implementation gets, made if it was left out.

    Args:
        query: `[b, hq, t, d]`; key: `[b, hkv, n, d]`.
        attention_mask: any mask, `left_out` or not.
    """
    (b, _, t, _), n, window = query.shape, key.shape[2], window_of(attention_mask)
    not_made = implementation == "sdpa" and n > t > 1 if attention_mask is None else is_left_out(attention_mask)
    if not not_made:
        return attention_mask
    made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        b,
        t,
        n,
        n - t,
        mask_function=_causal(window),
        attention_mask=None if attention_mask is None else attention_mask[:, 0, 0].bool(),
        local_size=window,
        dtype=query.dtype,
        device=query.device,
        config=config,
    )
    return made


def _causal(window: int | None) -> Any:
    """transformers' function for a causal mask."""
    return causal_mask_function if window is None else sliding_window_causal_mask_function(window)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions, or what they have taken in, are the same: transformers makes one anew for every mask."""
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(_is_same, one, other))
    code = getattr(one, "__code__", None)
    if code is None:
        return type(one) is type(other) and bool(one == other)
    contents = (tuple(cell.cell_contents for cell in getattr(x, "__closure__", None) or ()) for x in (one, other))
    return code is getattr(other, "__code__", None) and _is_same(*contents)
