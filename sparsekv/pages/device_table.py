"""A block table's copy on a device. It is changed in place, so that what a captured step reads stays where it is."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WIDTH_STEP = 512  # pages; tables on a GPU grow in such steps
FEW_CHANGES = 1024  # entries, up to which single ones are sent instead of the whole table


class DeviceTable:
    """Page ids and lengths of a batch on one device.

    Attributes:
        pages: `[b, width]` int32; entries past a sequence's end are valid page ids and nothing more.
        first: `[b]` int32, the first of them that the newest token sees.
    """

    def __init__(self, batch_size: int, width: int, device: torch.device) -> None:
        with torch.inference_mode(False), torch.no_grad():  # else nothing could be written outside of it later
            self.pages = torch.zeros(batch_size, width, dtype=torch.int32, device=device)
            self._counts = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)  # sent at once
            self.first = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._owner: weakref.ref[object] | None = None
        self.forget()

    @property
    def lengths(self) -> Tensor:
        """`[b]` int32, tokens of each sequence."""
        return self._counts[:-1]

    @property
    def num_tokens(self) -> Tensor:
        """`[]` int32, columns of the batch, padding counted."""
        return self._counts[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences, and the most pages of one."""
        return self.pages.shape[0], self.pages.shape[1]

    def is_of(self, owner: object) -> bool:
        """Whether it follows this one's sequences."""
        return self._owner is not None and self._owner() is owner

    def take(self, owner: object) -> None:
        """Makes it follow other sequences."""
        self._owner = weakref.ref(owner)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_owner": None}  # whoever uses the copy takes it anew

    def forget(self) -> None:
        """Nothing that it holds is known to be right: the next `sync` sends everything."""
        self._all_stale = self._lengths_stale = True
        self._changes: list[NDArray[np.int64]] = []

    def lengths_changed(self) -> None:
        """Other lengths, to be sent at the next `sync`."""
        self._lengths_stale = True

    def entries_changed(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """Other page ids at these places, to be sent at the next `sync`."""
        if self._all_stale:
            return
        self._changes.append(rows * self.shape[1] + columns)
        self._all_stale = sum(map(len, self._changes)) > FEW_CHANGES

    def sync(
        self,
        pages: NDArray[np.int32],
        lengths: NDArray[np.int64],
        first: NDArray[np.int64] | None = None,
        num_tokens: int = 0,
    ) -> None:
        """Sends what has changed. Nothing waits for the device."""
        if self._all_stale:
            known = np.zeros(self.shape, np.int32)
            width = min(pages.shape[1], self.shape[1])
            known[:, :width] = pages[:, :width]
            self.pages.copy_(torch.from_numpy(known))
        elif self._changes:
            where = np.unique(np.concatenate(self._changes))
            values = pages[where // self.shape[1], where % self.shape[1]]
            sent = torch.from_numpy(np.stack([where, values])).to(self.pages.device)
            self.pages.view(-1).index_copy_(0, sent[0], sent[1].int())
        if self._lengths_stale:
            counts = np.append(lengths, num_tokens).astype(np.int32)
            self._counts.copy_(torch.from_numpy(counts), non_blocking=True)
            if first is not None:
                self.first.copy_(torch.from_numpy(first.astype(np.int32)), non_blocking=True)
        self._all_stale = self._lengths_stale = False
        self._changes = []


def width_for(num_pages: int, device: torch.device, steps: Sequence[int]) -> int:
    """How wide a table is for sequences of up to `num_pages` pages.

    On a GPU, where a wider table costs next to nothing and another width another captured graph, it grows in steps.
    The first is the smallest budget's, and it stops at every other: up to there nothing is chosen. Elsewhere work
    follows the width.

    Args:
        steps: pages of the layers' budgets, ascending, at least one.
    """
    if device.type != "cuda":
        return num_pages
    if num_pages <= steps[0]:
        return steps[0]
    return min([-(-num_pages // WIDTH_STEP) * WIDTH_STEP, *(step for step in steps if num_pages <= step)])
