"""Decode steps whose tensors change where they are, so that they can be captured in a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from transformers.cache_utils import DynamicCache

from sparsekv.cache.paged_layer import PagedLayer
from sparsekv.config import SparseConfig
from sparsekv.pages.page_store import PageStore


class SteppedCache(DynamicCache):
    """What a paged cache does around a decode step that is captured or replayed, and around one that fails."""

    config: SparseConfig
    layers: list[Any]
    _store: PageStore
    _updated: PagedLayer | None  # the layer that took tokens last

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """The layers that live, or may come to live, in pages."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def is_steady(self) -> bool:
        """Whether a decode step changes nothing but tensors where they are: every layer lives in pages and holds the
        same tokens."""
        table = self._store.table
        return all(
            isinstance(layer, PagedLayer) and layer.is_paged and layer.length == table.num_tokens
            for layer in self.layers
        )

    @property
    def step_key(self) -> tuple[Any, ...]:
        """What a captured step depends on beside the model's inputs: the same key, the same step."""
        return self.config, self.step_shape, *self._store.addresses()

    @property
    def step_shape(self) -> tuple[int, ...]:
        """Batch size and width of the page table, and the phase of the policy."""
        device = next(iter(self._store.layers.values())).kv.device
        return *self._store.table.on(device)[0].shape, self._store.memory.phase

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within it, one decode step of every layer is run: room for its token is made before. If it fails before any
        layer has taken its token, the cache is what it was.

        Raises:
            CacheFullError, OutOfMemoryError: there is none; nothing has changed.
        """
        self._settle()
        self._store.begin_step()
        try:
            yield
        except BaseException:
            if all(layer.length < self._store.table.num_tokens for layer in self.paged_layers):
                self._drop_pending()
                self._store.crop(1)
            raise
        finally:
            self._store.step_begun = False

    @contextlib.contextmanager
    def capturing(self) -> Iterator[list[tuple[int, bool]]]:
        """Within it (and within `step`), the layers' part of a step is run to be captured, not to count: yields the
        reads that `follow` is to be told of at every replay."""
        reads: list[tuple[int, bool]] = []
        self._store.captured_reads = reads
        try:
            yield reads
        finally:
            self._store.captured_reads = None
            self._drop_pending()

    def follow(self, reads: Sequence[tuple[int, bool]]) -> None:
        """Brings lengths and counters to where a replayed step has left the tensors."""
        num_pages, to_read = self._store.table.total_pages, self._store.pages_to_read()
        for layer in self.layers:
            layer.length += 1
        seen: set[int] = set()
        for layer_idx, read_all in reads:
            self.layers[layer_idx].record_step(read_all, num_pages, to_read, layer_idx not in seen)
            seen.add(layer_idx)

    def _settle(self) -> None:
        """Nothing is pending any more."""
        self._updated = None
        for layer in self.paged_layers:
            layer.store_or_fall_back()

    def _drop_pending(self) -> None:
        for layer in self.paged_layers:
            layer.drop_pending()
