"""The pages that each row of a batch refers to, in order, and who gets a copy before a shared one is written to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sparsekv.pages.device_table import DeviceTable
from sparsekv.pages.page_pool import NO_PAGES, PageIds, PagePool


@dataclass(frozen=True)
class PageCopies:
    """Pages whose content must be copied, in every layer, before the next write."""

    source: PageIds
    target: PageIds


class PageRows:
    """Lists of pages, one a row. A page that several refer to is copied before one writes to it.

    Args:
        pool: the pages.

    Attributes:
        lengths: `[b]` int64, tokens that each row holds.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self._pages: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._current: dict[torch.device, DeviceTable] = {}  # the copies on devices, which are told of every change

    @property
    def batch_size(self) -> int:
        """Sequences in the batch; 0 while nothing was appended."""
        return len(self.lengths)

    @property
    def num_pages(self) -> NDArray[np.int64]:
        """`[b]`, pages of each sequence."""
        return -(-self.lengths // self.pool.page_size)

    @property
    def total_pages(self) -> int:
        """Pages of all sequences together, shared ones counted for each."""
        return int(self.num_pages.sum())

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence, at least 1: tables of width 0 would be a special case everywhere."""
        return int(self.num_pages.max(initial=1))

    def pages_of(self, row: int) -> PageIds:
        """The pages of one sequence, in order."""
        return self._pages[row, : self.num_pages[row]]

    def first_pages(self, lengths: NDArray[np.int64]) -> PageIds:
        """`[b, n]`, the pages of the first `lengths [b]` tokens of each sequence; 0 where there are fewer than n."""
        counts = -(-lengths // self.pool.page_size)
        column = np.arange(counts.max(initial=1))
        ids: PageIds = np.zeros((self.batch_size, len(column)), np.int32)
        known = column < counts[:, None]
        ids[known] = self._pages[:, : len(column)][known[:, : self._pages.shape[1]]]
        return ids

    def touched_pages(self, new: int | NDArray[np.int64]) -> PageIds:
        """The pages that hold the last tokens, `new` or `new [b]`, of the sequences, or more of these; each once,
        ascending."""
        start = (self.lengths - new) // self.pool.page_size
        pages = [self.pages_of(row)[start[row] :] for row in range(self.batch_size)]
        return np.unique(np.concatenate([NO_PAGES, *pages]))

    def packed(self) -> tuple[PageIds, PageIds]:
        """The pages that rows refer to, each once, in the order in which rows do; and where in these stand those of
        each row, `[b, max_pages]`, 0 behind its last."""
        found, first, place = np.unique(self._all_pages(), return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        places: PageIds = np.zeros((self.batch_size, self.max_pages), np.int32)
        places[np.arange(self.max_pages) < self.num_pages[:, None]] = rank[place]
        return found[order], places

    def unpack(self, lengths: NDArray[np.int64], places: PageIds) -> PageIds:
        """Makes the rows those of a table that was `packed`, and returns the new pages that stand for its own.

        Raises:
            CacheFullError: there is no room for them; nothing has changed.
        """
        pages = self.pool.allocate(int(places.max(initial=-1)) + 1)
        self._replace(lengths, pages[places])
        self.pool.release(pages)  # the rows have them now
        return pages

    def __del__(self) -> None:
        if getattr(self, "_pages", None) is not None and self._pages.size:
            self.pool.release(self._all_pages())

    # -- how

    def _followers(self) -> list[DeviceTable]:
        return [table for table in self._current.values() if table.is_of(self)]

    def _check_room(self, lengths: NDArray[np.int64], new: NDArray[np.int64], removed: NDArray[np.int64]) -> None:
        """Raises CacheFullError if there is no room for new tokens in place of the last so many, and for copies of
        shared last pages of the rows that are written to."""
        if self.pool.max_pages is None:
            return
        page_size, kept = self.pool.page_size, lengths - removed
        before, after = -(-lengths // page_size), -(-kept // page_size)
        column = np.arange(self._pages.shape[1])
        dropped = self._pages[(column >= after[:, None]) & (column < before[:, None])] if removed.any() else NO_PAGES
        self.pool.release(dropped)  # they are room, too
        try:
            grown = -(-(kept + new) // page_size) - after
            self.pool.check_room(int(grown.sum()) + len(self._shared_tails(kept, removed + new)[0]))
        finally:
            self.pool.share(dropped)

    def _shorten(self, removed: NDArray[np.int64], new: NDArray[np.int64]) -> PageCopies:
        """Drops the last tokens of each row, if there is then room for so many new ones."""
        self._check_room(self.lengths, new, removed)
        self._replace(self.lengths - removed, self._pages)
        return self._writable(self.lengths, removed)

    def _all_pages(self) -> PageIds:
        used = np.arange(self._pages.shape[1]) < self.num_pages[:, None]
        pages: PageIds = self._pages[used]
        return pages

    def _shared_tails(
        self, lengths: NDArray[np.int64], writes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], PageIds]:
        """Rows that will write to a partly filled page which others refer to, and those pages.

        If all who refer to a page write to it, the last of them may keep it.
        """
        page_size = self.pool.page_size
        rows = np.flatnonzero((writes > 0) & (lengths % page_size > 0))
        if not len(rows):
            return rows, NO_PAGES
        tails = self._pages[rows, lengths[rows] // page_size]
        earlier_writers = np.tril(tails[:, None] == tails, k=-1).sum(1)
        must_copy = earlier_writers < self.pool.references(tails) - 1
        return rows[must_copy], tails[must_copy]

    def _writable(self, lengths: NDArray[np.int64], writes: NDArray[np.int64]) -> PageCopies:
        """Gives each row that will write its own copy of a shared, partly filled last page."""
        rows, source = self._shared_tails(lengths, writes)
        target = self.pool.allocate(len(rows))
        self.pool.release(source)
        if len(rows):
            columns = lengths[rows] // self.pool.page_size
            self._pages[rows, columns] = target
            for table in self._followers():
                table.entries_changed(rows, columns)
        return PageCopies(source, target)

    def _extend(self, old: NDArray[np.int64], new: NDArray[np.int64]) -> None:
        page_size = self.pool.page_size
        before, after = -(-old // page_size), -(-new // page_size)
        self.lengths = new
        for table in self._followers():
            table.lengths_changed()
        if len(self._pages) and (before == after).all():
            return
        self._widen(len(new), int(after.max(initial=1)))
        grown = after - before
        rows = np.repeat(np.arange(len(new)), grown)
        columns = np.arange(len(rows)) - np.repeat(np.cumsum(grown) - grown, grown) + before[rows]
        self._pages[rows, columns] = self.pool.allocate(len(rows))
        for table in self._followers():
            table.entries_changed(rows, columns)

    def _widen(self, batch_size: int, width: int) -> None:
        """Room for more pages, an eighth more than asked for, so that a decode step seldom copies the table."""
        if self._pages.shape[1] >= width and len(self._pages):
            return
        wider = np.zeros((batch_size, width + width // 8), np.int32)
        wider[: len(self._pages), : self._pages.shape[1]] = self._pages
        self._pages = wider

    def _replace(self, lengths: NDArray[np.int64], pages: PageIds) -> None:
        """Refers to other pages, all of them in use already."""
        self.pool.release(self._all_pages())
        self.lengths, self._pages = lengths, pages
        self.pool.share(self._all_pages())
        for table in self._followers():
            table.forget()
