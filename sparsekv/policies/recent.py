"""Sinks and a sliding window, whatever the query: the baseline that forgets.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024), section 3.2. Nothing is
evicted here: the other pages stay in the cache, unread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekv.policies.base import DecodeStep, Policy, register


@register("recent")
class Recent(Policy):
    """The sinks, and the last pages up to the budget."""

    def select(self, step: DecodeStep) -> Tensor:
        b, max_pages = step.block_table.shape
        later_is_better = torch.arange(max_pages, dtype=torch.float32, device=step.query.device)
        return step.select(later_is_better.expand(b, step.kv_pool.shape[2], -1).contiguous())
