"""Pages drawn by lot: what a budget is worth without knowing anything of the query."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekv.policies.base import DecodeStep, Policy, register

# Large odd multipliers, one per coordinate: what is added up differs for different steps, pages and heads.
_PAGE, _HEAD, _LAYER, _LENGTH = 2654435761, 2246822519, 3266489917, 668265263
_MASK = 0xFFFFFFFF


@register("random")
class RandomPages(Policy):
    """Forced pages, and others drawn anew at every step for every layer, kv head and sequence length.

    The lots are a hash of these numbers, so that the same step draws the same pages again, also in a replay.
    """

    def select(self, step: DecodeStep) -> Tensor:
        device, num_heads = step.query.device, step.kv_pool.shape[2]
        pages = torch.arange(step.block_table.shape[1], device=device) * _PAGE
        heads = torch.arange(num_heads, device=device)[:, None] * _HEAD
        lengths = step.seq_lens.long()[:, None, None] * _LENGTH
        lots = _mixed((pages + heads + step.layer_idx * _LAYER + lengths) & _MASK)
        return step.select(lots.to(torch.float32).contiguous())


def _mixed(x: Tensor) -> Tensor:
    """Spreads 32-bit numbers, so that neighbours have nothing in common (the finalizer of MurmurHash3)."""
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = ((x ^ (x >> 16)) * multiplier) & _MASK
    return x ^ (x >> 16)
