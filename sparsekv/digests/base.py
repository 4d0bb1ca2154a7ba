"""What is kept per page so that it can be scored without reading it: the interface of a digest.

A new digest is one file here: a subclass of `Digest` under `@register("name")`, imported in `__init__`. It may keep
any number of tensors per page and kv head (per-token summaries have the page size in their shape), in any dtype, and
tensors per kv head that are fitted once to a prompt and stay fixed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.ops import register_formula
from sparsekv.registry import Registry

DIGESTS: Registry[Digest] = Registry("digest")


@dataclass(frozen=True)
class Field:
    """One tensor of a digest: `[num_pages, hkv, *shape]`; dtype None means the keys' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


class Digest(ABC):
    """A page summary. Stateless: what it keeps lies in the tensors that it is handed."""

    @abstractmethod
    def fields(self, page_size: int, head_dim: int) -> list[Field]:
        """The tensors kept per page and kv head, in the order `summarize` returns them."""

    def fit(self, keys: Tensor, valid: Tensor | None) -> list[Tensor]:
        """Fixed per-head state `[hkv, ...]` from the first tokens of a cache (default: none).

        Args:
            keys: `[b, hkv, t, d]`; valid: `[b, t]` bool, or None when all are.
        """
        return []

    @abstractmethod
    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """Summaries of m pages: keys `[m, hkv, p, d]`, valid `[m, p]` bool -> fields `[m, hkv, *shape]`.

        Every page has at least one valid token; what lies in the others is arbitrary, NaN included.
        """

    @abstractmethod
    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        """A score per query head and page: query `[b, hkv, g, d]` float32, fields `[b, pages, hkv, *shape]`
        -> `[b, hkv, g, pages]` float32. Only the order of the pages within a head matters."""


def register(name: str) -> Callable[[type[Digest]], type[Digest]]:
    """Class decorator: files a digest under `name` for `SparseConfig(digest=name)`."""

    def add(cls: type[Digest]) -> type[Digest]:
        DIGESTS.register(name)(cls)
        register_formula(name, cls())
        return cls

    return add
