"""What is kept per page so that it can be scored without reading it: the interface of a digest.

A new digest is one file here: a subclass of `Digest` under `@register("name")`, imported in `__init__`. It may keep
any number of tensors per page and kv head (per-token summaries have the page size in their shape), in any dtype, and
tensors per kv head that are fitted once to a prompt and stay fixed. On a GPU it runs in plain torch, or in the
kernels if its class names a header that says how (`kernel`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sparsekv.ops import FORMULAS, DigestKernel, Formula
from sparsekv.registry import Registry

__all__ = ["DIGESTS", "Digest", "DigestKernel", "Field", "register"]


@dataclass(frozen=True)
class Field:
    """One tensor of a digest: `[num_pages, hkv, *shape]`; dtype None means the keys' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


class Digest(Formula):
    """A page summary: how it is made and scored (`Formula`: `summarize`, `score`), and what is kept for it.

    Stateless: what it keeps lies in the tensors that it is handed.

    Attributes:
        revision: of one that ships, raised when it chooses other pages than before: an accuracy run does not mix the
            answers of two.
    """

    revision = 1

    @abstractmethod
    def fields(self, page_size: int, head_dim: int) -> list[Field]:
        """The tensors kept per page and kv head, in the order `summarize` returns them.

        Raises:
            ConfigError: the digest cannot be kept of such pages or heads.
        """

    def fit(self, keys: Tensor, valid: Tensor | None) -> list[Tensor]:
        """Fixed per-head state from the first tokens of a cache (default: none).

        What is learned of the keys ties a row to its batch and to the first chunk of its prompt. A digest that learns
        nothing keeps of a page what follows from the page alone; those that ship learn nothing.

        Args:
            keys: `[b, hkv, t, d]`, in the model's dtype.
            valid: `[b, t]` bool, or None when all are.

        Returns:
            Tensors `[hkv, ...]` on the keys' device, which are kept in the dtypes they have.
        """
        return []


# One table for the settings and the ops: every formula that is filed here is a digest.
DIGESTS = cast("Registry[Digest]", FORMULAS)


def register(name: str) -> Callable[[type[Digest]], type[Digest]]:
    """Class decorator: files a digest under `name` for `SparseConfig(digest=name)`.

    Raises:
        ConfigError: another digest has that name.
    """
    return DIGESTS.register(name)
