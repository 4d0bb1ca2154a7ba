"""Where the keys and values of pages lie between steps. Digests are no part of it: they stay on the device.

A page is known by its number; a frame is a place for one on the device. By default page i lies in frame i, always,
and nothing is ever fetched. Another residency is a subclass of `Residency` under `@register("name")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparsekv.pages.page_pool import PageIds
from sparsekv.registry import Registry

RESIDENCIES: Registry[Residency] = Registry("residency")


def register(name: str) -> Callable[[type[Residency]], type[Residency]]:
    """Class decorator: files a residency under `name` for `SparseConfig(residency=name)`.

    Raises:
        ConfigError: another residency has that name.
    """
    return RESIDENCIES.register(name)


class Residency(ABC):
    """The pages of one layer.

    Args:
        pool: `[0, 2, hkv, p, record]`: of which device, shape and dtype frames are; 1 in place of 2, here and below,
            where keys are the values, too.

    Attributes:
        pool: `[frames, 2, hkv, p, record]`, the frames.
        capacity: pages there is room for.
        in_place: whether page i lies in frame i, always. Then the ops read and write the pool as it is.
        can_be_captured: whether `view` does nothing but work on the device, in the same memory every time.
    """

    in_place: bool = False
    can_be_captured: bool = False

    def __init__(self, pool: Tensor) -> None:
        self.pool, self.capacity = pool, 0

    def ensure(self, capacity: int) -> None:
        """Makes room for the pages below `capacity`, which is more than there was. If memory runs out, there is as
        much room as before."""
        self.capacity = capacity

    @abstractmethod
    def read(self, pages: PageIds) -> Tensor:
        """Whole pages, `[n, 2, hkv, p, record]` on the device, which are not written to if `in_place`. Of a page that
        was never written, anything."""

    @abstractmethod
    def write(self, pages: PageIds, content: Tensor) -> None:
        """Puts `content [n, 2, hkv, p, record]` in the place of whole pages, each of which is named once."""

    def view(self, block_table: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """A pool on the device that has the listed pages, and the table that leads to them.

        Args:
            block_table: `[b, max_pages]` int32, page ids.
            slots: `[b, hkv, k]` int32, positions in the table, -1 for none.

        Returns:
            The pool, `[frames, 2, hkv, p, record]`, and frames in place of page ids, `[b, max_pages]` int32; those of
            pages that are not listed are any.
        """
        slots = slots.flatten(1)
        listed = block_table.gather(1, slots.clamp_min(0).long())
        pages = listed[slots >= 0].unique()  # sorted
        if not len(pages):
            pages = listed[:1, 0]  # a frame there must be
        return self.read(pages.cpu().numpy()), frames_of(pages, block_table)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, wherever they lie, and of the frames."""
        return self.pool.nbytes


@register("device")
class OnDevice(Residency):
    """Everything stays where the ops read it."""

    in_place = can_be_captured = True

    def ensure(self, capacity: int) -> None:
        self.pool = grown(self.pool, capacity)
        super().ensure(capacity)

    def read(self, pages: PageIds) -> Tensor:
        run = run_of(pages)
        return self.pool[self._ids(pages) if run is None else run]

    def write(self, pages: PageIds, content: Tensor) -> None:
        run = run_of(pages)
        if run is not None:  # another part of the pool at most
            self.pool[run].copy_(content, non_blocking=True)
        else:
            self.pool[self._ids(pages)] = content.clone()  # it may be a part of the pool

    def _ids(self, pages: PageIds) -> Tensor:
        """On the pool's device, which nothing waits for: memory that is not pinned is copied before it is sent."""
        return torch.from_numpy(pages).to(self.pool.device, non_blocking=True)


def run_of(pages: PageIds) -> slice | None:
    """Where pages lie that follow one another, as in a fresh pool; None: they do not."""
    is_run = len(pages) > 0 and bool((np.diff(pages) == 1).all())
    return slice(int(pages[0]), int(pages[0]) + len(pages)) if is_run else None


def frames_of(pages: Tensor, block_table: Tensor) -> Tensor:
    """A table of the same shape that says where in `pages [n]`, ascending, each id stands; any place if nowhere."""
    return torch.searchsorted(pages, block_table, out_int32=True).clamp_max(len(pages) - 1)


def grown(old: Tensor, capacity: int) -> Tensor:
    """The same rows in a tensor that has room for more."""
    with torch.inference_mode(False), torch.no_grad():  # else a later call outside inference mode cannot write
        new = old.new_empty(capacity, *old.shape[1:])
        new[: old.shape[0]] = old
        return new
