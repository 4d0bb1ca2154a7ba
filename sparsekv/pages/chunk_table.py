"""Which pages hold the chunk of each sequence that its next token belongs to."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekv.pages.window_table import WindowTable


class ChunkTable(WindowTable):
    """Holds what a window of a chunk's size would, but a token sees its own chunk alone. Arguments as `WindowTable`.

    As in transformers, chunks are of columns, and counted from a row's first token: padding after it counts.
    """

    @property
    def first(self) -> NDArray[np.int64]:
        """`[b]`, the first token that is held and that the newest one sees."""
        seen = self._before_in_chunk(self.num_tokens - 1) + 1
        columns = self.columns(max(self.num_tokens - self.window, 0)).numpy()
        seen_columns = np.arange(columns.shape[1], 0, -1) <= seen[:, None]
        return self.lengths - (columns & seen_columns).sum(1)

    def told(self, visible: Tensor, num_new: int) -> Tensor:
        """As `WindowTable.told`. Columns of chunks that no new token sees are as known, too."""
        told, past = super().told(visible, num_new), self.num_tokens
        if not past:
            return told
        is_seen = torch.arange(past, 0, -1, device="cpu") <= torch.from_numpy(self._before_in_chunk(past))[:, None]
        return torch.cat([torch.where(is_seen, told[:, :past], self.columns()), told[:, past:]], dim=1)

    def _before_in_chunk(self, column: int) -> NDArray[np.int64]:
        """`[b]`, how many columns before one belong to the same chunk."""
        if self.valid is None:
            return np.full(self.batch_size, column % self.window)
        valid = self.valid.numpy()
        start = valid.argmax(1)
        start = np.where(valid.any(1), start, valid.shape[1])  # of a row without tokens: all that is known is padding
        found: NDArray[np.int64] = (column - start) % self.window
        return found
