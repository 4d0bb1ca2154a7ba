"""Pages of 8-bit floats with a kernel of their own, as a user would write them: this file and `e5m2_pages.cuh`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparsekv.pages.formats import FormatKernel, PageFormat


class E5M2(PageFormat):
    """Keys and values rounded to e5m2, a byte to a channel."""

    by_token = True
    kernel = FormatKernel(Path(__file__).with_name("e5m2_pages.cuh"), "E5M2")

    def record(self, page_size: int, head_dim: int, dtype: torch.dtype, which: int) -> tuple[int, torch.dtype]:
        return head_dim, torch.uint8

    def encode(self, states: Tensor, valid: Tensor | None, which: int) -> Tensor:
        return states.to(torch.float8_e5m2).view(torch.uint8)

    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        return records.view(torch.float8_e5m2).to(dtype)
