"""All pages of a cache: what is done to whole sequences, in every layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekv.config import SparseConfig
from sparsekv.pages.arena import Arena
from sparsekv.pages.block_table import BlockTable
from sparsekv.pages.memory import Memory
from sparsekv.pages.step_state import Stage, StepState
from sparsekv.pages.store_part import StorePart, Window


class PageStore(StorePart):
    """The pages of layers that hold all tokens, and a part for the layers of each kind and size of windows, which
    hold the last ones.

    Args:
        config, reserve_pages, arena, dense_layers, step: as in `StorePart`.
    """

    def __init__(
        self,
        config: SparseConfig,
        reserve_pages: int = 0,
        arena: Arena | None = None,
        dense_layers: Collection[int] = (),
        step: StepState | None = None,
    ) -> None:
        super().__init__(config, reserve_pages, arena, dense_layers, step=step)
        self.windows: dict[Window, StorePart] = {}

    def window(self, window: Window) -> StorePart:
        """The part of layers whose tokens see such a window; its pages are on the device, wherever others are."""
        if window not in self.windows:
            config = self.config.with_(policy="all", residency="device", max_tokens=None)
            arena = None if self.arena is None else self.arena.part(window)
            self.windows[window] = StorePart(config, arena=arena, window=window, step=self.step)
        return self.windows[window]

    @property
    def parts(self) -> list[StorePart]:
        """This one and those of windows."""
        return [self, *self.windows.values()]

    @property
    def newest(self) -> BlockTable:
        """Of all tables the first to have moved: between passes all of those in use have the same columns."""
        return max((part.table for part in self.parts), key=lambda table: table.num_tokens)

    def begin_step(self) -> None:
        """Makes room for one more token of every sequence before any layer runs, so that the layers' part of the
        step changes nothing but tensors where they are.

        Raises:
            CacheFullError: no room. OutOfMemoryError: no memory. In both cases the table is what it was.
        """
        begun: list[StorePart] = []
        past = self.step.end
        try:
            for part in (part for part in self.parts if part.layers):
                part._advance(part.table.batch_size, 1, None)
                begun.append(part)
                for pages in part.layers.values():
                    part._ensure(pages)
                for device in part.devices:
                    part.table.on(device)
            for layer_idx in self.layers if self.memory.is_used else ():
                self.remembered(layer_idx)
        except BaseException:
            for part in begun:
                part.table.crop(1)
            self.step.past = self.step.end = past
            raise
        self.step.stage = Stage.BEGUN

    def addresses(self) -> tuple[Any, ...]:
        """Those of all parts."""
        return *super().addresses(), *(part.addresses() for part in self.windows.values())

    def crop(self, num_tokens: int) -> None:
        """Drops the last columns in every layer; digests of pages that became partly filled are made anew.

        Raises:
            CacheStateError: a window does not hold what was before. CacheFullError: no room for copies of pages that
                are shared. Nothing has changed then.
        """
        keep = self.newest.num_tokens - num_tokens
        behind = {part: part.table.num_tokens - keep for part in self.parts if part.table.num_tokens > keep}
        for part, count in behind.items():
            part.table.check_crop(count)
        for part, count in behind.items():
            part._renew(part.table.crop(count))
        self.step.past = self.step.end = keep

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes the batch these rows (repeats share their pages)."""
        self.memory.select(rows)
        for part in (part for part in self.parts if part.table.batch_size):
            part.table.select(rows)

    def fork(self, config: SparseConfig, dense_layers: Collection[int] = ()) -> PageStore:
        """A store over the same pages; what either appends from now on is its own."""
        step = StepState(past=self.step.past, end=self.step.end, valid=self.step.valid)
        twin = PageStore(config, self.reserve_pages, dense_layers=dense_layers, step=step)
        for window, part in self.windows.items():
            twin.window(window)._share(part)
        if not self.layers:  # nothing to share: each decides for itself what its layers keep
            return twin
        width = twin.table.width  # by the twin's own budget
        twin._share(self)
        twin.table.width = width
        if config == self.config:
            twin.memory = self.memory.fork()
        else:
            twin.memory = Memory(twin.memory.policy, self.loan, dense_layers)
        return twin
