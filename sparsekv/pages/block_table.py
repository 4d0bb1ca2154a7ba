"""Which pages hold each sequence of a batch, in order, and how many tokens they hold.

Padding is not stored: transformers' index of a token counts padding (`num_tokens`), the position in the pages does
not (`seq_lens`), and `valid` leads from one to the other.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sparsekv.errors import CacheStateError
from sparsekv.pages.device_table import DeviceTable
from sparsekv.pages.masks import without_last
from sparsekv.pages.page_pool import NO_PAGES, PageIds, PagePool

Width = Callable[[int, torch.device], int]
DeviceTables = dict[tuple[torch.device, int, int], DeviceTable]  # by device, batch size and width
MAX_TABLES = 16  # that are kept for batch sizes and widths that may come back


@dataclass(frozen=True)
class PageCopies:
    """Pages whose content must be copied, in every layer, before the next write."""

    source: PageIds
    target: PageIds


class BlockTable:
    """The page lists of a batch of sequences. A page that several refer to is copied before one writes to it.

    Args:
        pool: the pages.
        width: how wide a table is on a device for so many pages a sequence; None: no wider than it must be.
        tables: tables of an earlier batch that are used again where they fit.

    Attributes:
        num_tokens: columns of the batch so far, padding counted (transformers' sequence length).
        lengths: `[b]` int64, tokens each sequence holds.
        valid: `[b, n]` bool for the first n columns, False for padding; None: no padding. Later columns are valid.
        max_new: columns of a pass whose tokens are held: its last.
    """

    max_new = sys.maxsize

    def __init__(self, pool: PagePool, width: Width | None = None, tables: DeviceTables | None = None) -> None:
        self.pool, self.width = pool, width
        self.num_tokens = 0
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self.valid: Tensor | None = None
        self._pages: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        # Forks share the tables on a device, so that they share captured steps: a table follows who used it last.
        self._tables: DeviceTables = {} if tables is None else tables
        self._current: dict[torch.device, DeviceTable] = {}

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

    @property
    def min_pages(self) -> int:
        """Pages that there is to be memory for at least."""
        return 1

    @property
    def first(self) -> NDArray[np.int64] | None:
        """`[b]`, the first token that is held and that the newest one sees; None: all see all."""
        return None

    def at(self, num_tokens: int) -> BlockTable:
        """The table that names what was held when there were so many columns."""
        return self

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`block_table [b, width]` and `seq_lens [b]`, both int32, on a device. They are changed in place."""
        table = self.device_table(device)
        return table.pages, table.lengths

    def device_table(self, device: torch.device) -> DeviceTable:
        """The copy on a device, up to date."""
        width = self.max_pages if self.width is None else self.width(self.max_pages, device)
        table = self._current.get(device)
        if table is None or not table.is_of(self) or table.shape != (self.batch_size, width):
            table = self._current[device] = self._take_table(device, width)
        table.sync(self._pages, self.lengths, self.first, self.num_tokens)
        return table

    def _take_table(self, device: torch.device, width: int) -> DeviceTable:
        key = device, self.batch_size, width
        if key not in self._tables:
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            self._tables[key] = DeviceTable(self.batch_size, width, device)
        self._tables[key].take(self)
        return self._tables[key]

    def _followers(self) -> list[DeviceTable]:
        return [table for table in self._current.values() if table.is_of(self)]

    # -- what changes the table

    def append(self, batch_size: int, num_new: int, valid: Tensor | None = None) -> PageCopies:
        """Makes room for `num_new` columns, of which `valid [b, num_new]` (bool, on the CPU) says what is no padding.

        Raises:
            CacheStateError: the batch has another size.
            CacheFullError: the pool's limit is reached. In both cases nothing has changed.
        """
        self.check_room(batch_size, num_new, valid)
        lengths, new = self._lengths_and_new(batch_size, num_new, valid)
        copies = self._writable(lengths, new)
        self._extend(lengths, lengths + new)
        self._append_valid(valid)
        self.num_tokens += num_new
        return copies

    def check_batch(self, batch_size: int) -> None:
        """Raises CacheStateError if an input of `batch_size` sequences does not continue those of the table."""
        if batch_size != self.batch_size and (self.batch_size or self.num_tokens):
            raise CacheStateError(
                f"The cache holds {self.batch_size} sequences, the input has {batch_size}. Use a new cache, or "
                "batch_select_indices / batch_repeat_interleave to fit this one."
            )

    def check_room(
        self, batch_size: int, num_new: int, valid: Tensor | None = None, hidden: Tensor | None = None
    ) -> None:
        """Raises what `append` would, after `hide` if tokens are hidden, and changes nothing."""
        self.check_batch(batch_size)
        lengths, new = self._lengths_and_new(batch_size, num_new, valid)
        self._check_room(lengths, new, np.zeros_like(new) if hidden is None else hidden.numpy())

    def columns(self, start: int = 0, end: int | None = None) -> Tensor:
        """`[b, n]` bool on the CPU, False for padding: of all columns, or of those from `start` to before `end`."""
        end = self.num_tokens if end is None else end
        columns = torch.ones(self.batch_size, end - start, dtype=torch.bool, device="cpu")
        if self.valid is not None:
            known = self.valid[:, start:end]
            columns[:, : known.shape[1]] = known
        return columns

    def tokens_in(self, start: int, end: int) -> NDArray[np.int64]:
        """`[b]`, how many tokens the sequences have in columns from `start` to before `end`."""
        if self.valid is None or start >= self.valid.shape[1]:
            return np.full(self.batch_size, end - start)
        counts: NDArray[np.int64] = self.columns(start, end).sum(1).numpy()
        return counts

    def told(self, visible: Tensor, num_new: int) -> Tensor:
        """What a mask says of all columns and `num_new` more, `[b, n]` bool on the CPU. `visible [b, m]` is of the
        first m of them; what it leaves out is visible."""
        missing = self.num_tokens + num_new - visible.shape[1]
        return F.pad(visible, (0, missing), value=True)  # or cut off

    def hide(self, counts: Tensor, num_new: int, valid: Tensor | None = None) -> PageCopies:
        """Makes padding of the last `counts [b]` tokens of the rows. Pages become this table's own as in `crop`.

        Raises:
            CacheFullError: there is no room for that, or for the columns appended next; nothing has changed.
        """
        _, new = self._lengths_and_new(self.batch_size, num_new, valid)
        copies = self._shorten(counts.numpy(), new)
        self.valid = without_last(self.columns(), counts)
        return copies

    def check_crop(self, num_tokens: int) -> None:
        """Raises what `crop` would, and changes nothing."""
        removed = self.tokens_in(self.num_tokens - num_tokens, self.num_tokens)
        self._check_room(self.lengths, np.zeros_like(removed), removed)

    def crop(self, num_tokens: int) -> PageCopies:
        """Drops the last `num_tokens` columns. A page that becomes partly filled is made this table's own, since its
        digest will change.

        Raises:
            CacheFullError: the pool's limit is reached; nothing has changed.
        """
        keep = self.num_tokens - num_tokens
        removed = self.tokens_in(keep, self.num_tokens)
        copies = self._shorten(removed, np.zeros_like(removed))
        known = None if self.valid is None else self.valid[:, :keep]
        self.num_tokens, self.valid = keep, None if known is None or bool(known.all()) else known
        return copies

    def clear(self) -> None:
        """Drops everything, the batch size too."""
        self._replace(np.zeros(0, np.int64), np.zeros((0, 0), np.int32))
        self.num_tokens, self.valid = 0, None

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes the batch these rows, in this order; a row listed twice is shared, not copied."""
        if self.valid is not None:
            self.valid = self.valid[torch.from_numpy(rows)]
        self._replace(self.lengths[rows], self._pages[rows])

    def fork(self) -> BlockTable:
        """A second table over the same pages."""
        return self._twin(self.pool)

    def __del__(self) -> None:
        if getattr(self, "_pages", None) is not None and self._pages.size:
            self.pool.release(self._all_pages())

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockTable:
        return self._twin(copy.deepcopy(self.pool, memo))

    # -- how

    def _twin(self, pool: PagePool) -> BlockTable:
        twin = copy.copy(self)
        twin.pool, twin._tables, twin._current = pool, self._tables if pool is self.pool else {}, {}
        twin.lengths, twin._pages = self.lengths.copy(), self._pages.copy()
        pool.share(self._all_pages())
        return twin

    def _lengths_and_new(
        self, batch_size: int, num_new: int, valid: Tensor | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens every sequence holds, and tokens it is about to get."""
        lengths = self.lengths if self.batch_size else np.zeros(batch_size, np.int64)
        return lengths, np.full(batch_size, num_new) if valid is None else valid.sum(1).cpu().numpy()

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

    def _append_valid(self, valid: Tensor | None) -> None:
        """Columns after the last padding are valid by convention, so decode steps add nothing."""
        if valid is None or bool(valid.all()):
            return
        self.valid = torch.cat([self.columns(), valid], dim=1)
