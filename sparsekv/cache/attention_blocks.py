"""Dense attention by its formula, a few queries at a time: with softcaps, windows, sinks and padding, in memory of a
bounded size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # of a mask, or of the logits, at once


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    window: int | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last t of n columns. Products are taken in the dtype of the tensors, all else in
    float32 or wider; the heads of a group are taken as more queries.

    Args:
        query: `[b, hq, t, d]`.
        key: `[b, hkv, n, d]`.
        value: `[b, hkv, n, dv]`.
        scaling: factor on the dot products.
        softcap: `softcap * tanh(x / softcap)` of the logits; 0: none.
        sinks: `[hq]`, a logit per head that takes mass and has no value; None: none.
        window: columns that a query sees at most, its own included; None: all.
        visible: `[b, n]` bool, False for padding; None: there is none. What padding itself attends to means nothing.

    Returns:
        `[b, hq, t, dv]`.
    """
    (b, hq, t, d), (hkv, n), window = query.shape, key.shape[1:3], window or key.shape[2]
    group, past, column = hq // hkv, n - t, torch.arange(n, device=query.device)
    is_plain = not softcap and sinks is None  # for which there are kernels: only the masks take memory
    size = BLOCK_ELEMENTS // (b * (group if is_plain else hq) * min(n, 2 * window))
    size = max(1, min(size, window))  # of a window's keys every second one is seen, then
    out = query.new_empty(b, t, hq, value.shape[-1]).transpose(1, 2)  # as models want it to lie
    for first in range(past, n, size):
        rows = column[first : first + size, None]
        new = slice(first - past, first - past + len(rows))
        seen = slice(max(0, first + 1 - window), first + len(rows))
        mask = (column[seen] <= rows) & (column[seen] > rows - window)
        if visible is not None:
            mask = mask & visible[:, None, None, seen]
        mask = mask.repeat(*[1] * (mask.ndim - 2), group, 1)
        folded = query[:, :, new].reshape(b, hkv, -1, d)
        if is_plain:
            block = F.scaled_dot_product_attention(folded, key[:, :, seen], value[:, :, seen], mask, scale=scaling)
        else:
            logits = _logits(folded, key[:, :, seen], scaling, softcap)
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
            block = logits.softmax(-1).to(query.dtype) @ value[:, :, seen]
        if sinks is not None:
            folded_sinks = sinks.view(hkv, group, 1).repeat_interleave(len(rows), dim=1)
            block = block * share(logits.logsumexp(-1, keepdim=True), folded_sinks)
        out[:, :, new] = block.reshape(b, hq, len(rows), -1)
    return out


def share(lse: Tensor, sinks: Tensor) -> Tensor:
    """How much of the mass sinks leave to what has a value; `lse` is the log of the latter's."""
    return torch.sigmoid(lse - sinks.to(lse.dtype))


def _logits(query: Tensor, key: Tensor, scaling: float, softcap: float) -> Tensor:
    products = query @ key.transpose(-1, -2)
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    return torch.tanh(products * (scaling / softcap)) * softcap if softcap else products * scaling
