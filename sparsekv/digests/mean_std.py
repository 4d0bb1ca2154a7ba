"""Channel-wise mean and standard deviation of a page's keys: where most of them lie, whatever one of them does.

Source: the page score of Deng et al., "UNIQUE: Universal Top-k Sparse Attention for Training-free Inference and
Sparsity-aware Training" (2026), q.mean + |q|.std, the deviation as an offset of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekv.digests.base import DigestKernel, register
from sparsekv.digests.minmax import MinMax


@register("mean_std")
class MeanStd(MinMax):
    """One field `[2, d]` per page and kv head, in the keys' dtype: mean - std, then mean + std. In 16 bits, at pages
    of 16 tokens, that is d / 4 bytes per token, as for min/max.

    It is a box and is scored as one: q.mean + |q|.std = q- . (mean - std) + q+ . (mean + std).
    """

    kernel = DigestKernel("common/mean_std.cuh", "MeanStd", (None,), staged=lambda d, heads: 2 * d * -(-heads // 8))

    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        exists = valid[:, None, :, None]
        count, values = exists.sum(2), torch.where(exists, keys.float(), 0.0)  # [m, hkv, p, d]
        mean = values.sum(2) / count
        # About the mean: where it is large, sums of squares would have lost the deviation.
        std = (torch.where(exists, values - mean[:, :, None], 0.0).square().sum(2) / count).sqrt()
        return [torch.stack([mean - std, mean + std], dim=2).to(keys.dtype)]

    def why_unlike(
        self, summary: Sequence[Tensor], expected: Sequence[Tensor], page_size: int, head_dim: int
    ) -> str | None:
        """Up to the order of sums, which decides about the last bit, and about more of what is nearly zero."""
        (mine,), (theirs,) = summary, expected
        size = theirs.float().abs().amax(2, keepdim=True)
        allowed = torch.finfo(theirs.dtype).eps * theirs.float().abs() + 1e-5 * size
        differ = ~torch.isclose(mine.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)
        wrong = differ & ~((mine.float() - theirs.float()).abs() <= allowed)
        return f"{int(wrong.sum())} of {wrong.numel()} means or deviations are others" if wrong.any() else None
