"""Decode steps whose tensors change where they are, so that they can be captured in a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.cache_layer import CacheLayer
from sparsekv.cache.stored_layer import StoredLayer
from sparsekv.config import SparseConfig
from sparsekv.pages.page_store import PageStore
from sparsekv.pages.step_state import Read, Stage


class Step:
    """One decode step of all layers of a cache. It is run within it (`with`): room for its token is made before. If
    it fails before any layer has stored its token, the cache is what it was; of states, what was saved.

    Entering it raises CacheFullError or OutOfMemoryError if there is no room; nothing has changed then.

    Args:
        config: the settings in force.
        store: the pages.
        layers: the cache's layers, of which all are in place.
    """

    def __init__(self, config: SparseConfig, store: PageStore, layers: Sequence[CacheLayer]) -> None:
        self.config, self._store, self._layers = config, store, layers
        self._saved: list[tuple[Tensor, Tensor]] = []

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Batch size and width of every page table, and the phase of the policy, once it is entered."""
        tables = [part.table.on(device)[0] for part in self._store.parts for device in part.devices]
        return *(size for table in tables for size in table.shape), self._store.memory.phase

    @property
    def key(self) -> tuple[Any, ...]:
        """What a captured step depends on beside the model's inputs: the same key, the same step. Where the
        cache's tensors lie comes last."""
        states = [state.data_ptr() for layer in self._layers for state in layer.states]
        return self.config, self.shape, (*self._store.addresses(), *states)

    @functools.cached_property  # not before it is launched: the GPU is waiting
    def _stored(self) -> dict[int, StoredLayer]:
        return {layer.layer_idx: layer for layer in self._layers if isinstance(layer, StoredLayer)}

    @torch.no_grad()
    def save(self) -> None:
        """Notes what the step will overwrite, for `restore`."""
        self._saved = [(state, state.clone()) for layer in self._layers for state in layer.states]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back what was saved: the step can run again."""
        for state, saved in self._saved:
            state.copy_(saved)

    def __enter__(self) -> Step:
        self._store.begin_step()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._store.step.stage = Stage.EAGER
        if kind is not None and all(x.length < x.store.table.num_tokens for x in self._stored.values()):
            self._drop_pending()
            self._store.crop(1)
            self.restore()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[list[Read]]:
        """Within it, the layers' part of the step is run to be captured, not to count: yields the reads that `follow`
        is to be told of at every replay."""
        state = self._store.step
        state.stage, state.reads = Stage.CAPTURED, []
        try:
            yield state.reads
        finally:
            state.stage, state.reads = Stage.BEGUN, []
            self._drop_pending()

    def follow(self, reads: Sequence[Read]) -> None:
        """Brings lengths and counters to where a replayed step has left the tensors."""
        num_pages = {part: part.table.total_pages for part in self._store.parts}
        for each in self._layers:
            each.follow()
        seen: set[int] = set()
        listed: defaultdict[Any, list[Any]] = defaultdict(list)  # of many layers at once: few launches
        for layer_idx, slots in reads:
            layer = self._stored[layer_idx]
            layer.record_step(slots is None, num_pages[layer.store], layer_idx not in seen)
            seen.add(layer_idx)
            if slots is not None:
                listed[layer.stats, layer.page_nbytes, slots.shape, slots.device].append((layer_idx, slots))
        for (stats, page_nbytes, *_), parts in listed.items():
            layers, slots_of = zip(*parts, strict=True)
            stats.count_listed(layers, torch.stack(slots_of), page_nbytes)

    def _drop_pending(self) -> None:
        for layer in self._layers:
            layer.drop_pending()
