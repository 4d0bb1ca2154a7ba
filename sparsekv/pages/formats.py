"""The formats of pages: `PageFormat` is what a new one subclasses, under `@register("name")`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsekv.ops.formats import FORMATS, KEYS, VALUES, PageFormat

__all__ = ["FORMATS", "KEYS", "VALUES", "PageFormat", "Plain", "register"]


def register(name: str) -> Callable[[type[PageFormat]], type[PageFormat]]:
    """Class decorator: files a format under `name` for `SparseConfig(page_format=name)`.

    Raises:
        ConfigError: another format has that name.
    """
    return FORMATS.register(name)


@register("plain")
class Plain(PageFormat):
    """Keys and values as they are."""

    by_token = True

    def record(self, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        return head_dim, dtype

    def encode(self, states: Tensor, valid: Tensor | None, which: int) -> Tensor:
        return states

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        return stored.to(dtype)
