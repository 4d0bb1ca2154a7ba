"""A policy as a user would write it: it scores pages in every second layer, at every fourth step, and goes by these
scores in between."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekv.policies import DecodeStep, Policy, Reads, Remembered, register

UNKNOWN = float("inf")  # the score of a page that had none: it is read


@register("alternating")
class Alternating(Policy):
    """Forced pages, pages that were not full or not there when the others were scored, then the best scores."""

    reads = Reads.DIGESTS
    period = 4

    def memory(self, k: int, max_pages: int) -> list[Remembered]:
        return [Remembered((max_pages,), torch.float32, fill=UNKNOWN)]

    def keeper(self, ordinal: int) -> int:
        return ordinal - ordinal % 2

    def select(self, step: DecodeStep) -> Tensor:
        (scores,) = step.memory  # [b, hkv, max_pages]
        if step.phase == 0 and step.ordinal % 2 == 0:
            num_full = step.seq_lens // step.config.page_size  # [b]
            is_open = torch.arange(scores.shape[2], device=scores.device) >= num_full[:, None]
            scores.copy_(step.digest_scores().masked_fill(is_open[:, None], UNKNOWN))
        return step.select(scores)
