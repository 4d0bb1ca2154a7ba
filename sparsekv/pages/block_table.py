"""Which pages hold each sequence of a batch, in order, and how many tokens they hold.

Padding is not stored: transformers' index of a token counts padding (`num_tokens`), the position in the pages does
not (`seq_lens`), and `valid` leads from one to the other.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sparsekv.errors import CacheStateError
from sparsekv.pages.device_table import DeviceTable
from sparsekv.pages.masks import without_last
from sparsekv.pages.page_pool import PagePool
from sparsekv.pages.page_rows import PageCopies, PageRows

Width = Callable[[int, torch.device], int]
DeviceTables = dict[tuple[torch.device, int, int], DeviceTable]  # by device, batch size and width
MAX_TABLES = 16  # that are kept for batch sizes and widths that may come back


class BlockTable(PageRows):
    """The page lists of a batch of sequences, and which of their columns are padding.

    Args:
        pool: the pages.
        width: how wide a table is on a device for so many pages a sequence; None: no wider than it must be.
        tables: tables of an earlier batch that are used again where they fit.

    Attributes:
        num_tokens: columns of the batch so far, padding counted (transformers' sequence length).
        valid: `[b, n]` bool for the first n columns, False for padding; None: no padding. Later columns are valid.
        max_new: columns of a pass whose tokens are held: its last.
    """

    max_new = sys.maxsize

    def __init__(self, pool: PagePool, width: Width | None = None, tables: DeviceTables | None = None) -> None:
        super().__init__(pool)
        self.width = width
        self.num_tokens = 0
        self.valid: Tensor | None = None
        # Forks share the tables on a device, so that they share captured steps: a table follows who used it last.
        self._tables: DeviceTables = {} if tables is None else tables

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

    def _append_valid(self, valid: Tensor | None) -> None:
        """Columns after the last padding are valid by convention, so decode steps add nothing."""
        if valid is None or bool(valid.all()):
            return
        self.valid = torch.cat([self.columns(), valid], dim=1)
