"""The pages that really hold the best keys, as a perfect digest would find them. It reads every key to know."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from sparsekv.ops.reference import pool_group
from sparsekv.policies.base import DecodeStep, Policy, Reads, register


def exact_logits(step: DecodeStep) -> Tensor:
    """The true logit of every token, `[b, hkv, g, max_pages, p]` float32, without softcaps; -inf where none is."""
    keys = rearrange(step.keys().float(), "b pages h p d -> b h (pages p) d")
    grouped = rearrange(step.query.float() * step.scaling, "b (h g) d -> b h g d", h=keys.shape[1])
    logits = grouped @ keys.transpose(-1, -2)  # [b, hkv, g, pages * p]
    missing = torch.arange(keys.shape[2], device=keys.device) >= step.seq_lens[:, None]  # [b, pages * p]
    logits = logits.masked_fill(missing[:, None, None], float("-inf"))
    return rearrange(logits, "b h g (pages p) -> b h g pages p", p=step.config.page_size)


def exact_scores(step: DecodeStep) -> Tensor:
    """The best true logit in every page, `[b, hkv, max_pages]` float32, pooled like a digest's scores."""
    best = exact_logits(step).amax(-1)
    return pool_group(best, step.seq_lens, step.config.page_size, step.config.group_pooling)


@register("oracle")
class Oracle(Policy):
    """Forced pages, then those with the best true dot product, up to the budget."""

    reads = Reads.KEYS

    def select(self, step: DecodeStep) -> Tensor:
        return step.select(exact_scores(step), step.config.min_score)
