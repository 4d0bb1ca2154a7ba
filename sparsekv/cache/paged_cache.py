"""The transformers cache whose full-attention layers live in pages."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparsekv.cache.arena import Arena
from sparsekv.cache.page_store import PageStore
from sparsekv.cache.paged_layer import FallbackListener, Mode, Observer, PagedLayer
from sparsekv.cache.stats import DecodeStats
from sparsekv.config import SparseConfig
from sparsekv.errors import CacheStateError, ConfigError
from sparsekv.policies import POLICIES, Reads

_FORK_FIXED = ("page_size", "digest", "backend", "max_tokens")


class PagedCache(DynamicCache):
    """Keys and values in pages, with a digest per page, for a model patched with `sparsekv.patch`.

    `generate` and plain forwards of a patched model make one by themselves. Made by hand it is passed as
    `past_key_values`. Sliding-window, linear and other special layers stay transformers' own.

    Args:
        model_config: the model's config (of a multimodal model its text part is used).
        config: settings; single ones may be given by name: `PagedCache(model.config, budget=1024)`.
        stats: counters to add to; default: its own.
        reserve_tokens: tokens to allocate pages for at once, over all sequences.
        on_fallback: called with (layer_idx, reason) when a layer turns out not to be servable sparsely; default:
            a warning.
        arena: lends the tensors, and gets them back for the next cache; default: they are freed with the cache.

    Raises:
        ConfigError, UnknownNameError: a setting is not allowed.
    """

    layers: list[Any]

    def __init__(
        self,
        model_config: PretrainedConfig,
        config: SparseConfig | None = None,
        *,
        stats: DecodeStats | None = None,
        reserve_tokens: int = 0,
        on_fallback: FallbackListener | None = None,
        arena: Arena | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(config=model_config)
        self.config = SparseConfig.of(config, **settings)
        self.model_config = model_config
        self.stats = stats if stats is not None else DecodeStats()
        self.observers: list[Observer] = []
        self._on_fallback = on_fallback or _warn_fallback
        self._updated: PagedLayer | None = None  # the layer that took tokens last
        self._store = PageStore(self.config, self.config.pages_for(reserve_tokens), arena)
        self.layers = [
            self._paged(i) if type(layer) is DynamicLayer else layer for i, layer in enumerate(self.layers)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new keys and values; see `PagedLayer.update`.

        Raises:
            CacheStateError: the layer before was in pages, and its attention has not asked for them.
        """
        if self._updated is not None and self._updated.is_unanswered:
            raise CacheStateError(
                f"Layer {self._updated.layer_idx} of this cache lives in pages, but its attention now runs without "
                "them: the model is not patched any more. Patch it again, or go on with cache.to_dynamic()."
            )
        layer = self.layers[layer_idx]
        self._updated = layer if isinstance(layer, PagedLayer) else None
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, digests and growth slack (of forks: together)."""
        return sum(pages.nbytes for pages in self._store.layers.values())

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """The layers that live, or may come to live, in pages."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def check_room(self, batch_size: int, num_new: int, valid: Tensor | None = None) -> None:
        """Raises CacheFullError if `num_new` more tokens per sequence would go beyond `max_tokens`, and
        CacheStateError if the batch does not continue this one. `valid [b, num_new]`: which are no padding."""
        if not self._store.step_begun:
            self._store.table.check_room(batch_size, num_new, valid)

    # -- steps whose tensors change where they are, so that they can be captured in a CUDA graph and replayed

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
        """Batch size and width of the page table."""
        device = next(iter(self._store.layers.values())).kv.device
        return tuple(self._store.table.on(device)[0].shape)

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
        self._store.capturing = reads
        try:
            yield reads
        finally:
            self._store.capturing = None
            self._drop_pending()

    def follow(self, reads: Sequence[tuple[int, bool]]) -> None:
        """Brings lengths and counters to where a replayed step has left the tensors."""
        num_pages, num_selected = self._store.table.total_pages, self._store.num_selected()
        for layer in self.layers:
            layer.length += 1
        seen: set[int] = set()
        for layer_idx, read_all in reads:
            self.layers[layer_idx].record_step(read_all, num_pages, num_selected, layer_idx not in seen)
            seen.add(layer_idx)

    def fork(self, config: SparseConfig | None = None, **settings: Any) -> PagedCache:
        """A second cache over the same pages, to go on from here differently: full pages are shared, not copied.

        It counts what it reads by itself and has no observers yet.

        Args:
            config, settings: what to change: budget, policy, sinks, recent, group_pooling, dense_layers.

        Raises:
            ConfigError: page_size, digest, backend or max_tokens would change, or digests are needed that were not
                kept for some layer.
        """
        changed = SparseConfig.of(config if config is not None else self.config, **settings)
        for field in _FORK_FIXED:
            if getattr(changed, field) != getattr(self.config, field):
                raise ConfigError(f"A fork keeps the pages, so {field} must stay {getattr(self.config, field)!r}.")
        self._settle()
        self._check_digests(changed)
        twin = copy.copy(self)
        twin.config, twin.stats, twin.observers = changed, DecodeStats(), []
        twin._store = self._store.fork(changed)
        twin.layers = [twin._fork_layer(layer) for layer in self.layers]
        return twin

    def to_dynamic(self) -> DynamicCache:
        """A plain transformers cache with a copy of the same content, for an unpatched model."""
        self._settle()
        plain = DynamicCache(config=self.model_config)
        for i, layer in enumerate(self.layers):
            if isinstance(layer, PagedLayer) and layer.is_paged:
                plain.layers[i].update(*self._store.dense(i))
            elif not isinstance(layer, PagedLayer):
                plain.layers[i] = copy.deepcopy(layer)
            elif layer.get_seq_length():
                plain.layers[i].update(layer.keys, layer.values)
        return plain

    # -- operations on whole sequences: once for the pages, then for every layer that has none

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drops the last tokens. As in transformers, the count is given as a negative number (`crop(-3)`).

        Raises:
            ConfigError: the number is positive.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ConfigError(f"crop({-count}): give the number of tokens to remove as a negative number.")
        self._settle()
        stored = min(count, self._store.table.num_tokens)
        if stored:
            self._store.crop(stored)
            self._sync_lengths()
        for layer in self._dense_layers():
            layer.crop(-count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row `beam_idx[i]` was."""
        self._select(beam_idx, "reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps these rows (indices, or a bool per row), in this order."""
        self._select(torch.as_tensor(indices), "batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times; the repeats share their pages."""
        rows = torch.arange(self._store.table.batch_size).repeat_interleave(repeats)
        self._select(rows, "batch_repeat_interleave", repeats)

    def reset(self) -> None:
        """Empties the cache."""
        self._store = PageStore(self.config, self._store.reserve_pages, self._store.arena)
        for layer in self.layers:
            layer.reset()
            if isinstance(layer, PagedLayer):
                layer.store = self._store

    def __repr__(self) -> str:
        table = self._store.table
        return (
            f"PagedCache({table.batch_size} sequences, {table.num_tokens} tokens, "
            f"{len(self._store.layers)} of {len(self.layers)} layers in pages, {self.nbytes / 2**20:.1f} MiB)"
        )

    # -- how

    def _paged(self, layer_idx: int) -> PagedLayer:
        return PagedLayer(self._store, layer_idx, self.config, self.stats, self.observers, self._on_fallback)

    def _fork_layer(self, layer: Any) -> Any:
        if not isinstance(layer, PagedLayer):
            return copy.deepcopy(layer)
        twin = self._paged(layer.layer_idx)
        # A dense layer grows by concatenation, so the tensors themselves can be shared.
        twin.keys, twin.values, twin.mode, twin.length = layer.keys, layer.values, layer.mode, layer.length
        twin.is_initialized = layer.is_initialized
        if layer.is_initialized:
            twin.dtype, twin.device = layer.dtype, layer.device
        return twin

    def _check_digests(self, config: SparseConfig) -> None:
        if POLICIES.get(config.policy).reads is not Reads.DIGESTS:
            return
        for layer_idx, pages in self._store.layers.items():
            if not pages.summary and not config.is_dense_layer(layer_idx):
                raise ConfigError(
                    f"policy={config.policy!r} needs digests, and layer {layer_idx} kept none. Make the first cache "
                    f"with policy={config.policy!r} and the fewest dense_layers, then fork the others from it."
                )

    def _dense_layers(self) -> Iterable[Any]:
        return [x for x in self.layers if not isinstance(x, PagedLayer) or x.mode is Mode.DENSE]

    def _select(self, rows: Tensor, method: str, argument: Any) -> None:
        self._settle()
        batch_size = self._store.table.batch_size
        if batch_size:
            self._store.select(np.arange(batch_size)[rows.flatten().cpu().numpy()])  # indexes as torch would
        for layer in self._dense_layers():
            getattr(layer, method)(argument)

    def _settle(self) -> None:
        self._updated = None
        for layer in self.paged_layers:
            layer._settle()

    def _drop_pending(self) -> None:
        for layer in self.paged_layers:
            layer.drop_pending()

    def _sync_lengths(self) -> None:
        for layer in self.paged_layers:
            if layer.is_paged:
                # The smaller: a layer that an interrupted pass left behind does not hold the others' tokens.
                layer.length = min(layer.length, self._store.table.num_tokens)


def _warn_fallback(layer_idx: int, reason: str) -> None:
    warnings.warn(
        f"Layer {layer_idx} of this PagedCache runs dense: {reason}, or the model is not patched "
        "(sparsekv.patch(model) first).",
        stacklevel=4,
    )
