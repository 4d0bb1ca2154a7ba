"""What a page of keys and values looks like in memory: the interface of a page format, and plain pages.

Formats are filed here under their name, because an op's schema can carry a name but not a callable. Others than plain
pages belong where pages do: `sparsekv/pages/formats.py`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsekv.registry import Registry

KEYS, VALUES = 0, 1  # where they lie in a pool


@dataclass(frozen=True)
class FormatKernel:
    """How kernels read and write pages: a C++ type that is compiled into them, see cuda/common/format.cuh.

    Attributes:
        header: the file that has the type, absolute or below `cuda/`.
        type_name: of it. The compiler holds its `record` and `Element` against `PageFormat.record`.
        query_words: `(head_dim, tiles)` -> words of 16 bytes that a query of so many tiles of eight heads takes in
            shared memory. The compiler holds it against the type's own.
    """

    header: str | Path
    type_name: str
    query_words: Callable[[int, int], int] = lambda head_dim, tiles: tiles * head_dim


class PageFormat(ABC):
    """How tokens become what a page holds, and come back, in plain torch. Stateless.

    The pool of a layer is one tensor, `[num_pages, 2, hkv, p, record]`: of every page, keys or values, and kv head it
    has p records; `[num_pages, 1, ...]` where keys are the values, too, as latents are. A record is what a token
    takes; what a page keeps beside its tokens, such as scales, is shared out among its records, so that all of a page
    lies side by side. Within it the elements of records may lie in any order (`places`), as those who read pages want
    them. Where records of keys and of values differ in size, the tensor's are of their mean size, and a page really
    is `[hkv, p records of keys, p records of values]`: `stored` knows.

    Attributes:
        by_token: whether a token's record is made of that token alone. Then new tokens are encoded and written by
            themselves; else all of the pages that they come to is decoded and encoded anew.
        kernel: what does the same on a GPU; None: plain torch does, and kernels for the rest of a step only.
    """

    by_token: bool = False
    kernel: FormatKernel | None = None

    @abstractmethod
    def record(self, page_size: int, head_dim: int, dtype: torch.dtype, which: int) -> tuple[int, torch.dtype]:
        """Elements of a record, and their dtype.

        Args:
            dtype: the model's.
            which: KEYS or VALUES.

        Raises:
            ConfigError: there are no such pages of such heads.
        """

    def places(self, page_size: int, head_dim: int, which: int) -> Tensor | None:
        """Where in a page the elements of its records lie, `[p, record]` int64 on the CPU; None: one record after the
        other."""
        return None

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
    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        """The tokens of pages.

        Args:
            records: `[..., p, record]`; what no token was written to is arbitrary.
            dtype: the model's, or a wider one to reckon in.
            which: KEYS or VALUES.

        Returns:
            `[..., p, d]` in that dtype; it may be `records` itself.
        """

    def mean_record(
        self, page_size: int, head_dim: int, dtype: torch.dtype, num_halves: int = 2
    ) -> tuple[int, torch.dtype]:
        """What the tensor of a pool of so many halves says of records: elements, on the mean of the halves, and
        dtype. Raises as `record`."""
        records = [self.record(page_size, head_dim, dtype, which) for which in range(num_halves)]
        return sum(size for size, _ in records) // num_halves, records[KEYS][1]

    def stored(self, kv_pool: Tensor, head_dim: int, which: int) -> Tensor:
        """The keys or the values of all pages as they lie in a pool, `[num_pages, hkv, p, record]`: a view."""
        num_pages, _, num_kv_heads, page_size, _ = kv_pool.shape
        sizes = self._sizes(kv_pool, head_dim)
        if len(set(sizes)) == 1:
            return kv_pool[:, which]
        by_head = kv_pool.view(num_pages, num_kv_heads, sum(sizes))
        return by_head.split(sizes, -1)[which].unflatten(-1, (page_size, -1))

    def of_heads(self, kv_pool: Tensor, pages: Tensor, heads: Tensor, head_dim: int) -> list[Tensor]:
        """The keys and the values of pages of single kv heads, or both in one, `[..., p, record]` each; `pages`,
        `heads` are `[...]`, or one of them broadcasts. Whole rows are copied, which is fastest."""
        _, num_halves, num_kv_heads, page_size, _ = kv_pool.shape
        sizes = self._sizes(kv_pool, head_dim)
        if len(set(sizes)) == 1:
            by_head, rows = kv_pool.flatten(0, 2), pages * (num_halves * num_kv_heads) + heads
            return [take_rows(by_head, rows + i * num_kv_heads) for i in range(num_halves)]
        both = take_rows(kv_pool.view(-1, sum(sizes)), pages * num_kv_heads + heads)
        return [x.unflatten(-1, (page_size, -1)) for x in both.split(sizes, -1)]

    def _sizes(self, kv_pool: Tensor, head_dim: int) -> list[int]:
        """Elements of the keys and of the values of a page in one kv head, or of both in one."""
        page_size = kv_pool.shape[3]
        return [page_size * self.record(page_size, head_dim, kv_pool.dtype, x)[0] for x in halves(kv_pool)]

    def read(self, stored: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        """As `decode`, of pages `[..., p, record]` as they lie in a pool."""
        places = _places(type(self), stored.shape[-2], head_dim, which, stored.device)
        records = stored if places is None else stored.flatten(-2)[..., places]
        return self.decode(records, head_dim, dtype, which)

    def write(
        self, records: Tensor, kv_pool: Tensor, pages: Tensor, offset: Tensor, head_dim: int, which: int
    ) -> None:
        """Puts records `[..., hkv, record]` of tokens in their places: pages `[...]`, at offsets `[...]` in them."""
        stored = self.stored(kv_pool, head_dim, which)
        places = _places(type(self), kv_pool.shape[3], head_dim, which, kv_pool.device)
        if places is None:
            stored[pages, :, offset] = records
            return
        heads = torch.arange(records.shape[-2], device=kv_pool.device)[:, None]
        stored.flatten(2)[pages[..., None, None], heads, places[offset][..., None, :]] = records


def halves(kv_pool: Tensor) -> tuple[int, ...]:
    """What a pool has places for: KEYS and VALUES, or KEYS alone where they are the values, too."""
    return (KEYS, VALUES)[: kv_pool.shape[1]]


@functools.lru_cache(256)
def _places(kind: type[PageFormat], page_size: int, head_dim: int, which: int, device: torch.device) -> Tensor | None:
    """`places`, on a device."""
    with torch.inference_mode(False):  # else autograd could not keep it as an index
        places = kind().places(page_size, head_dim, which)
        return None if places is None else places.to(device)


def take_rows(source: Tensor, rows: Tensor) -> Tensor:
    """`source[rows]`, by the operator that copies whole rows."""
    return source.index_select(0, rows.flatten()).unflatten(0, rows.shape)


FORMATS: Registry[PageFormat] = Registry("kv")


@FORMATS.register("plain")
class Plain(PageFormat):
    """Keys and values as they are."""

    by_token = True
    kernel = FormatKernel("common/format.cuh", "Plain")

    def record(self, page_size: int, head_dim: int, dtype: torch.dtype, which: int) -> tuple[int, torch.dtype]:
        return head_dim, dtype

    def encode(self, states: Tensor, valid: Tensor | None, which: int) -> Tensor:
        return states

    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        return records.to(dtype)


def formats_with_kernels() -> list[str]:
    """The formats that kernels read and write."""
    return [name for name in FORMATS if FORMATS.get(name).kernel is not None]


def page_format(name: str) -> PageFormat:
    """The format of that name; raises UnknownNameError."""
    return FORMATS.get(name)()
