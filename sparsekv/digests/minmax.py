"""Channel-wise minimum and maximum of a page's keys: an upper bound of every dot product in the page.

Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (ICML 2024), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from sparsekv.digests.base import Digest, DigestKernel, Field, register


@register("minmax")
class MinMax(Digest):
    """One field `[2, d]` per page and kv head, in the keys' dtype: the minimum, then the maximum."""

    kernel = DigestKernel("common/minmax.cuh", "MinMax", (None,), staged=lambda d, heads: 2 * d * -(-heads // 8))

    def fields(self, page_size: int, head_dim: int) -> list[Field]:
        return [Field((2, head_dim))]

    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        missing = ~valid[:, None, :, None]
        low = keys.masked_fill(missing, float("inf")).amin(2)
        high = keys.masked_fill(missing, float("-inf")).amax(2)
        return [torch.stack([low, high], dim=2)]

    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        # max(q * min, q * max) per channel is q- * min + q+ * max, hence one matrix product for a whole group.
        signed = torch.cat([query.clamp_max(0), query.clamp_min(0)], dim=-1)  # [b, hkv, g, 2 d]
        bounds = rearrange(summary[0], "b pages h two d -> b h (two d) pages").float()
        return signed @ bounds
