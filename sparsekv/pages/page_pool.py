"""Which pages are in use, and by how many sequences. Bookkeeping only: no tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv.errors import CacheFullError

PageIds = NDArray[np.int32]
NO_PAGES: PageIds = np.zeros(0, np.int32)


class PagePool:
    """Hands out page ids and counts who refers to them; a page is free when nobody does.

    Every layer of a cache stores its own tensors under the same page ids.

    Args:
        page_size: tokens per page.
        max_tokens: the most tokens all pages together may hold; None: no limit.
    """

    def __init__(self, page_size: int, max_tokens: int | None = None) -> None:
        self.page_size = page_size
        self.max_pages = None if max_tokens is None else max_tokens // page_size
        self._references: NDArray[np.int32] = np.zeros(0, np.int32)

    @property
    def num_pages(self) -> int:
        """Page ids handed out so far: a layer's tensors must have room for this many."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Page ids that nobody refers to."""
        return int((self._references == 0).sum())

    def references(self, pages: PageIds) -> NDArray[np.int32]:
        """How many sequences refer to each of the pages."""
        counts: NDArray[np.int32] = self._references[pages]
        return counts

    def check_room(self, num_pages: int) -> None:
        """Raises CacheFullError if `num_pages` more pages would go beyond the limit; changes nothing."""
        if self.max_pages is None:
            return
        room = self.max_pages - (self.num_pages - self.num_free)
        if num_pages > room:
            raise CacheFullError(
                f"The cache needs {num_pages} more pages of {self.page_size} tokens, and max_tokens leaves {room} of "
                f"{self.max_pages}. Nothing was written. Raise max_tokens, shorten the input, crop the cache or "
                "drop sequences (batch_select_indices)."
            )

    def allocate(self, num_pages: int) -> PageIds:
        """`num_pages` pages with one reference each, lowest ids first, so that the pool stays compact."""
        if num_pages == 0:
            return NO_PAGES
        self.check_room(num_pages)
        missing = num_pages - self.num_free
        if missing > 0:
            self._references = np.concatenate([self._references, np.zeros(missing, np.int32)])
        pages = np.flatnonzero(self._references == 0)[:num_pages].astype(np.int32)
        self._references[pages] = 1
        return pages

    def share(self, pages: PageIds) -> None:
        """One more reference to each page; a page listed twice gets two."""
        np.add.at(self._references, pages, 1)

    def release(self, pages: PageIds) -> None:
        """One reference less to each page; a page listed twice loses two."""
        np.subtract.at(self._references, pages, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagePool:
        """Without references: the tables that are copied along bring theirs, those left behind hold nothing in it."""
        twin = PagePool(self.page_size)
        twin.max_pages, twin._references = self.max_pages, np.zeros_like(self._references)
        return twin
