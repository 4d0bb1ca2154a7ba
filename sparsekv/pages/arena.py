"""The tensors of a cache, and who gets them when it is gone.

A captured decode step holds the addresses of what it reads. If the next cache of the same model takes over the
tensors of the last one, the step can be used again for another prompt, and nothing is allocated anew.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from sparsekv.pages.block_table import DeviceTables
from sparsekv.pages.layer_pages import LayerPages

Tensors = dict[Hashable, list[Tensor]]  # what is remembered, by the layer that keeps it, or the state's name


class Arena:
    """Keeps the tensors of the cache that went last. They are lent to one cache at a time; others get new ones."""

    def __init__(self) -> None:
        self._kept: Loan | None = None
        self._parts: defaultdict[Hashable, Arena] = defaultdict(Arena)

    def take(self) -> Loan | None:
        """What is kept, which from now on is not."""
        kept, self._kept = self._kept, None
        return kept

    def keep(self, layers: dict[int, LayerPages], tables: DeviceTables, memories: list[Tensors]) -> None:
        """Keeps the tensors of a loan that has ended."""
        self._kept = Loan()
        self._kept.layers, self._kept.tables, self._kept.memories = layers, tables, memories

    def part(self, window: Hashable) -> Arena:
        """The arena of layers that see such a window."""
        return self._parts[window]

    def clear(self) -> None:
        """Gives the memory back. What is lent stays lent."""
        self._kept = None
        for part in self._parts.values():
            part.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Arena:
        """A copied model starts with nothing kept."""
        return Arena()

    def __reduce__(self) -> tuple[type[Arena], tuple[()]]:
        return Arena, ()


class Loan:
    """The tensors of one cache and its forks, which go to the arena when the last of them is gone.

    Args:
        arena: where they come from and go to; None: they are made anew and freed.

    Attributes:
        layers: pages of each layer in use.
        tables: block tables on devices.
        memories: what was remembered in caches that are gone, one after the other.
    """

    def __init__(self, arena: Arena | None = None) -> None:
        self._arena = None if arena is None else weakref.ref(arena)
        self.layers: dict[int, LayerPages] = {}
        self.tables: DeviceTables = {}
        self.memories: list[Tensors] = []
        self._spare: dict[int, LayerPages] = {}
        self._has_drawn = False

    def draw(self) -> None:
        """Takes over what the arena keeps. At the first use, not before: by then an earlier cache may have gone; and
        never again."""
        arena = self._arena() if self._arena is not None and not self._has_drawn else None
        self._has_drawn = True
        kept = arena.take() if arena is not None else None
        if kept is not None:
            self._spare = kept.layers
            self.tables.update(kept.tables)
            self.memories += kept.memories

    def add(self, layer_idx: int, made: LayerPages) -> None:
        """Puts a layer's pages to use: those that an earlier cache has left to it, if they are like the ones made."""
        kept = self._spare.pop(layer_idx, None)
        if kept is not None and kept.is_like(made):
            for state, fitted in zip(kept.state, made.state, strict=True):
                state.copy_(fitted)
            made = kept
        self.layers[layer_idx] = made

    def __del__(self) -> None:
        arena = self._arena() if self._arena is not None else None
        if arena is not None and self.layers:
            arena.keep(self._spare | self.layers, self.tables, self.memories)

    def __deepcopy__(self, memo: dict[int, Any]) -> Loan:
        twin = Loan()
        twin.layers = copy.deepcopy(self.layers, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"_arena": None, "layers": self.layers, "tables": {}, "memories": [], "_spare": {}, "_has_drawn": True}
