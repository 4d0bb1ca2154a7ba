"""The rows of a cache's batch, put in another order, left out or repeated: once for the pages, which repeats share,
then for every layer that has none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sparsekv.pages.page_store import PageStore


class BatchRows(DynamicCache):
    """A cache whose rows can be chosen anew, as beam search does."""

    _store: PageStore
    ids: Tensor | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row `beam_idx[i]` was.

        Args:
            beam_idx: `[b]` int64.

        Raises:
            IndexError: there is no such row.
        """
        self._select(beam_idx, "reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps these rows, in this order.

        Args:
            indices: int64, negative ones count from the end; or a bool per row, `[b]`.

        Raises:
            IndexError: there is no such row, or not so many.
        """
        self._select(indices, "batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; the repeats share their pages."""
        rows = np.arange(self._store.newest.batch_size).repeat(repeats)
        self._select(rows, "batch_repeat_interleave", repeats)

    # -- how

    def _select(self, rows: Any, method: str, argument: Any) -> None:
        self._settle()
        batch_size = self._store.newest.batch_size
        if batch_size:
            wanted = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
            kept = np.arange(batch_size)[wanted.flatten()]  # indexes as torch would
            self._store.select(kept)
            self.ids = None if self.ids is None else self.ids[torch.from_numpy(kept)]
        for layer in self._other_layers():
            getattr(layer, method)(argument)

    @abstractmethod
    def _settle(self) -> None:
        """Nothing is pending any more."""

    @abstractmethod
    def _other_layers(self) -> Iterable[Any]:
        """The layers that have no pages."""
