"""A digest with a kernel of its own, as a user would write it: this file and `peak_digest.cuh`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparsekv.digests import Digest, DigestKernel, Field


class Peak(Digest):
    """Of a page, the largest magnitude of every channel, in the keys' dtype: half of min/max, and a looser bound."""

    kernel = DigestKernel(
        Path(__file__).with_name("peak_digest.cuh"), "Peak", (None,), staged=lambda d, heads: 2 * d * -(-heads // 8)
    )

    def fields(self, page_size: int, head_dim: int) -> list[Field]:
        return [Field((head_dim,))]

    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        return [keys.abs().masked_fill(~valid[:, None, :, None], 0.0).amax(2)]

    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        return torch.einsum("bhgd,bnhd->bhgn", query.abs(), summary[0].float())
