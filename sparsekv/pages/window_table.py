"""Which pages hold the end of each sequence: what its next token may see through a sliding window."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekv.errors import CacheStateError
from sparsekv.pages.block_table import BlockTable, DeviceTables
from sparsekv.pages.page_pool import NO_PAGES, PagePool
from sparsekv.pages.page_rows import PageCopies

# Columns that are held beyond a window, so that the last tokens can be dropped: of a long pass, and of every pass if
# asked for.
OF_LONG, IF_ASKED = 64, 512


class WindowTable(BlockTable):
    """A block table from whose front pages go when no token can see them any more. `lengths`, and places in pages,
    count from the first token that is held.

    They go when the next tokens come, not before: so a pass can be taken back (`crop`).

    Args:
        pool: the pages.
        window: columns that a token sees, its own counted, padding as well.
        tables: as in `BlockTable`.
    """

    def __init__(self, pool: PagePool, window: int, tables: DeviceTables | None = None) -> None:
        self.window = window
        self._past: BlockTable | None = None  # before a pass of which not all is held: later layers read it, too
        super().__init__(pool, None, tables)
        self.keeps_past = False

    @property
    def keeps_past(self) -> bool:
        """Whether more is held than a window, so that up to IF_ASKED tokens can be dropped."""
        return self._beyond > 0

    @keeps_past.setter
    def keeps_past(self, wanted: bool) -> None:
        self._beyond = IF_ASKED if wanted else 0
        self.max_new = self.window - 1 + max(self._beyond, OF_LONG)
        held = self.window - 1 + self._beyond
        self._ring = -(-held // self.pool.page_size) + 1  # pages of a row in a step, at most
        self.width = partial(_width, ring=self._ring)

    @property
    def min_pages(self) -> int:
        """Pages for whole windows: their memory need not move while they fill."""
        return max(self.batch_size * self._ring, 1)

    @property
    def first(self) -> NDArray[np.int64]:
        """`[b]`, the first token that is held and that the newest one sees."""
        return self.lengths - self._seen(self.window, self.num_tokens)

    def at(self, num_tokens: int) -> BlockTable:
        """The table that names what was held when there were so many columns, now or before the last pass."""
        return self if self._past is None or num_tokens > self._past.num_tokens else self._past

    def told(self, visible: Tensor, num_new: int) -> Tensor:
        """What a mask says of all columns and `num_new` more, `[b, n]` bool on the CPU. `visible [b, m]` is of the
        last m of them; what it leaves out is as known."""
        missing = self.num_tokens + num_new - visible.shape[1]
        return torch.cat([self.columns(0, missing), visible], dim=1) if missing > 0 else visible[:, -missing:]

    def append(self, batch_size: int, num_new: int, valid: Tensor | None = None) -> PageCopies:
        """As `BlockTable.append`, of whose columns the last `max_new` are held."""
        self.check_batch(batch_size)
        self._past = None
        if num_new > self.max_new:
            self._past = self.fork() if self.num_tokens else None
            self._replace(np.zeros_like(self.lengths), self._pages)
        else:
            self._give_back()
        return super().append(batch_size, num_new, valid)

    def check_crop(self, num_tokens: int) -> None:
        """Raises CacheStateError if what could be seen without the last `num_tokens` columns is gone."""
        keep = self.num_tokens - num_tokens
        held = self.lengths - self.tokens_in(keep, self.num_tokens)
        if self._before(keep) is None and (held < self._seen(self.window - 1, keep)).any():
            raise CacheStateError(
                f"The last {num_tokens} tokens cannot be dropped: what is in the sliding window before them is gone. "
                "Drop fewer, fork the cache before it goes on, or call its activate_past_recording() first, so that "
                f"{IF_ASKED} tokens more are held."
            )

    def crop(self, num_tokens: int) -> PageCopies:
        """Drops the last `num_tokens` columns.

        Raises:
            CacheStateError: what could then be seen is gone; nothing has changed.
        """
        self.check_crop(num_tokens)
        before = self._before(self.num_tokens - num_tokens)
        if before is not None:
            self._replace(before.lengths, before._pages)
            self.num_tokens, self.valid = before.num_tokens, before.valid
            return PageCopies(NO_PAGES, NO_PAGES)
        return super().crop(num_tokens)

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes the batch these rows, in this order; a row listed twice is shared, not copied."""
        self._past = None
        super().select(rows)

    # -- how

    def _twin(self, pool: PagePool) -> BlockTable:
        past, self._past = self._past, None
        twin = super()._twin(pool)
        self._past = past
        return twin

    def _before(self, num_tokens: int) -> BlockTable | None:
        """What was held with so many columns, if it is known as a whole: before the last pass, or before all."""
        if self._past is not None and num_tokens == self._past.num_tokens:
            return self._past
        if num_tokens:
            return None
        empty = self.fork()
        empty._replace(np.zeros_like(self.lengths), self._pages)
        empty.num_tokens, empty.valid = 0, None
        return empty

    def _seen(self, width: int, end: int) -> NDArray[np.int64]:
        """`[b]`, the tokens in the last `width` of the columns before `end`."""
        return self.tokens_in(max(end - width, 0), end)

    def _give_back(self) -> None:
        """Refers no more to pages before what the next token sees, or may see when others are dropped."""
        needed = self._seen(self.window - 1 + self._beyond, self.num_tokens)
        passed = (self.lengths - needed).clip(0) // self.pool.page_size
        if passed.any():
            width = self._pages.shape[1]
            columns = np.minimum(np.arange(width) + passed[:, None], width - 1)
            self._replace(
                self.lengths - passed * self.pool.page_size, np.take_along_axis(self._pages, columns, axis=1)
            )

    def _lengths_and_new(
        self, batch_size: int, num_new: int, valid: Tensor | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        held = None if valid is None else valid[:, -self.max_new :]
        return super()._lengths_and_new(batch_size, min(num_new, self.max_new), held)


def _width(num_pages: int, device: torch.device, ring: int) -> int:
    """On a GPU always the same while steps are decoded, so that a captured step goes on."""
    return max(num_pages, ring) if device.type == "cuda" else num_pages
