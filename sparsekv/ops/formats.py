"""What a page of keys and values looks like in memory: the interface of a page format, and plain pages.

Formats are filed here under their name, because an op's schema can carry a name but not a callable. Others than plain
pages belong where pages do: `sparsekv/pages/formats.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsekv.registry import Registry

KEYS, VALUES = 0, -1  # where they lie in a pool: at the same place where keys are the values, too


@dataclass(frozen=True)
class FormatKernel:
    """How kernels read and write pages: a C++ type that is compiled into them, see cuda/common/format.cuh.

    Attributes:
        header: the file that has the type, absolute or below `cuda/`.
        type_name: of it. The compiler holds its `record` and `Element` against `PageFormat.record`.
    """

    header: str | Path
    type_name: str


class PageFormat(ABC):
    """How tokens become what a page holds, and come back, in plain torch. Stateless.

    The pool of a layer is one tensor, `[num_pages, 2, hkv, p, record]`: of every page, keys or values, and kv head it
    has p records; `[num_pages, 1, ...]` where keys are the values, too, as latents are. A record is what a token
    takes; what a page keeps beside its tokens, such as scales, is shared out among its records, so that all of a page
    lies side by side.

    Attributes:
        by_token: whether a token's record is made of that token alone. Then new tokens are encoded and written by
            themselves; else all of the pages that they come to is decoded and encoded anew.
        kernel: what does the same on a GPU; None: plain torch does, and kernels for the rest of a step only.
    """

    by_token: bool = False
    kernel: FormatKernel | None = None

    @abstractmethod
    def record(self, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Elements of a record, and their dtype.

        Args:
            dtype: the model's.

        Raises:
            ConfigError: there are no such pages of such heads.
        """

    @abstractmethod
    def encode(self, states: Tensor, valid: Tensor | None, which: int) -> Tensor:
        """The records of m pages, or by token of m times p tokens. What `decode` gave of a page, it must give again.

        Args:
            states: `[m, hkv, p, d]`, in the model's dtype.
            valid: `[m, p]` bool; what lies in the other tokens is arbitrary, NaN included. None: all valid.
            which: KEYS or VALUES.

        Returns:
            `[m, hkv, p, record]`, in the records' dtype.
        """

    @abstractmethod
    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        """The tokens of pages.

        Args:
            stored: `[..., p, record]`; what no token was written to is arbitrary.
            dtype: the model's.
            which: KEYS or VALUES.

        Returns:
            `[..., p, d]` in the model's dtype; it may be `stored` itself.
        """


FORMATS: Registry[PageFormat] = Registry("page_format")


@FORMATS.register("plain")
class Plain(PageFormat):
    """Keys and values as they are."""

    by_token = True
    kernel = FormatKernel("common/format.cuh", "Plain")

    def record(self, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        return head_dim, dtype

    def encode(self, states: Tensor, valid: Tensor | None, which: int) -> Tensor:
        return states

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        return stored.to(dtype)


def formats_with_kernels() -> list[str]:
    """The formats that kernels read and write."""
    return [name for name in FORMATS if FORMATS.get(name).kernel is not None]


def page_format(name: str) -> PageFormat:
    """The format of that name; raises UnknownNameError."""
    return FORMATS.get(name)()
