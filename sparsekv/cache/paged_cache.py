"""The transformers cache whose full-attention layers live in pages."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from sparsekv.cache import saving
from sparsekv.cache.attention_layer import AttentionLayer
from sparsekv.cache.batch_rows import BatchRows
from sparsekv.cache.cache_layer import CacheLayer, FallbackListener, NoticeListener, Observer
from sparsekv.cache.gradients import untracked_copy, untracked_tensors
from sparsekv.cache.handshake import attention_of, not_patched, warn_fallback
from sparsekv.cache.layer_kinds import EMPTY, places, plain_layers
from sparsekv.cache.model_check import check_digests, settings_for
from sparsekv.cache.paged_layer import PagedLayer
from sparsekv.cache.state_layer import BesideState
from sparsekv.cache.stats import DecodeStats
from sparsekv.cache.steps import Step
from sparsekv.cache.stored_layer import StoredLayer
from sparsekv.config import SparseConfig
from sparsekv.errors import CacheStateError, ConfigError
from sparsekv.pages.arena import Arena
from sparsekv.pages.page_store import PageStore
from sparsekv.pages.pieces import Progress
from sparsekv.pages.step_state import Stage

_FORK_FIXED = ("page_size", "digest", "backend", "max_tokens", "kv", "residency")


class PagedCache(BatchRows):
    """Keys and values in pages, with a digest per page, for a model patched with `sparsekv.patch`.

    `generate` and plain forwards of a patched model make one by themselves. Made by hand it is passed as
    `past_key_values`. Of sliding windows the last tokens are in pages. The states of linear, convolution and
    state-space layers stay where they are. Other special layers stay transformers' own, unless a kind is registered
    for them (`sparsekv.cache.LAYER_KINDS`). Of layers in pages `layers[i].keys`, `.values` and iteration give copies.

    >>> from transformers import LlamaConfig
    >>> cache = PagedCache(LlamaConfig(num_hidden_layers=4), budget=512)
    >>> cache.config.budget
    512
    >>> cache.fork(budget=256)  # goes on from the same pages, reading less
    PagedCache(0 sequences, 0 tokens, 0 of 4 layers in pages, 0.0 MiB)

    Args:
        model_config: the model's config (of a multimodal model its text part is used).
        config: settings; single ones may be given by name: `PagedCache(model.config, budget=1024)`.
        stats: counters to add to; default: its own.
        reserve_tokens: tokens to allocate pages for at once, over all sequences.
        on_fallback: called with (layer_idx, reason) when a layer turns out not to be servable sparsely; default:
            a warning.
        on_notice: called with a sentence about what a setting asks for and cannot be done; default: a warning.
        arena: lends the tensors, and gets them back for the next cache; default: they are freed with the cache.
        origin: says what tells the model from others, for `save`; default: a cache that cannot be saved.

    Attributes:
        config: the settings in force.
        ids: the tokens of the first columns, `[b, n]` int64 on the CPU, of a cache that was loaded with them; else
            None. What is added later they do not tell.
        stats: what the decode steps have read.
        observers: functions that are called after every decode step of a layer, with the `DecodeStep` and the slots
            that it has read, `[b, hkv, k]` int32 (None: all pages). Add to it, or assign another list.

    Raises:
        ConfigError, UnknownNameError: a setting is not allowed, or not for this model.
    """

    def __init__(
        self,
        model_config: PretrainedConfig,
        config: SparseConfig | None = None,
        *,
        stats: DecodeStats | None = None,
        reserve_tokens: int = 0,
        on_fallback: FallbackListener | None = None,
        on_notice: NoticeListener | None = None,
        arena: Arena | None = None,
        origin: Callable[[], dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(config=model_config)
        self.config = settings_for(SparseConfig.of(config, **settings), model_config)
        self.model_config = model_config
        self.stats = stats if stats is not None else DecodeStats()
        self._observers: list[Observer] = []  # the layers refer to this list
        self._on_fallback, self._on_notice = on_fallback or warn_fallback, on_notice or warnings.warn
        self._origin = origin
        self.ids: Tensor | None = None
        self._attention: Any = None  # what the model's config named when the first tokens came
        plain = plain_layers(model_config)
        dense = self.config.dense_among(plain)
        self._store = PageStore(self.config, self.config.pages_for(reserve_tokens), arena, dense)
        for i, place in enumerate(places(model_config)):
            if place.kind is not None:
                self.layers[i] = self._made(place.kind, i, i in dense, place.config)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new keys and values.

        Args:
            key_states, value_states: `[b, hkv, t, d]`.

        Returns:
            What the attention function gets: of a layer in pages the new ones alone, of any other all.

        Raises:
            CacheStateError: the batch has another size, or the model is not patched any more: its attention does not
                ask for the pages.
        """
        self._check_patched()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Columns so far, padding counted, of one layer or of the first that counts them. Asked for one layer while a
        step is captured, it is a tensor `[]` int32 that every replay finds up to date."""
        layer = None if layer_idx is None else self.layers[layer_idx]
        if isinstance(layer, StoredLayer) and self._store.step.stage is Stage.CAPTURED:
            return layer.captured_length
        return super().get_seq_length(layer_idx or 0)

    @property
    def observers(self) -> list[Observer]:
        """Called after every decode step of a layer: see the class."""
        return self._observers

    @observers.setter
    def observers(self, observers: Iterable[Observer]) -> None:
        self._observers[:] = observers

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """The layers that live, or may come to live, in pages, and of which a policy may choose some."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def stored_layers(self) -> list[StoredLayer]:
        """All layers that live, or may come to live, in pages: those with sliding windows, too."""
        return [layer for layer in self.layers if isinstance(layer, StoredLayer)]

    @property
    def _asked_layers(self) -> list[AttentionLayer]:
        """The layers that answer their attention themselves."""
        return [layer for layer in self.layers if isinstance(layer, AttentionLayer)]

    @property
    def dense_layers(self) -> frozenset[int]:
        """The layers that read everything because the setting of that name, or their budget, asks for it."""
        return self.config.dense_among([layer.layer_idx for layer in self.paged_layers])

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, digests and growth slack (of forks: together)."""
        return sum(pages.nbytes for part in self._store.parts for pages in part.layers.values())

    def check_room(self, batch_size: int, num_new: int, visible: Tensor | None = None) -> None:
        """Raises CacheFullError if `num_new` more tokens per sequence would go beyond `max_tokens`, CacheStateError
        if batch or mask do not continue what is stored. `visible [b, n]`: which columns are no padding; None: all."""
        if self._store.step.stage is Stage.EAGER:
            self._store.check(batch_size, num_new, visible)

    @property
    def visible(self) -> Tensor | None:
        """`[b, n]` bool on the CPU, False for padding: the mask of what is stored; None if nothing is."""
        table = self._store.newest
        return table.columns() if table.batch_size else None

    @property
    def is_steady(self) -> bool:
        """Whether a decode step changes nothing but tensors where they are: every layer that keeps anything has the
        same tokens in pages, or a state."""
        num_tokens = self._store.newest.num_tokens
        kept = [layer for layer in self._parts if not isinstance(layer, EMPTY)]
        return bool(num_tokens) and all(isinstance(x, CacheLayer) and x.is_steady(num_tokens) for x in kept)

    def step(self) -> Step:
        """A decode step of every layer, to be entered: room for its token is made before any layer runs."""
        self._settle()
        return Step(self.config, self._store, self._own_layers)

    def fork(self, config: SparseConfig | None = None, **settings: Any) -> PagedCache:
        """A second cache over the same pages, to go on from here differently: full pages are shared, not copied.

        It counts what it reads by itself and has no observers yet.

        Args:
            config, settings: what to change: budget, policy, sinks, recent, group_pooling, dense_layers.

        Raises:
            ConfigError: page_size, digest, backend, max_tokens, kv or residency would change, or digests are
                needed that were not kept for some layer.
            UnknownNameError: there is no such setting or policy.
        """
        changed = SparseConfig.of(config if config is not None else self.config, **settings)
        for field in _FORK_FIXED:
            if getattr(changed, field) != getattr(self.config, field):
                raise ConfigError(f"A fork keeps the pages, so {field} must stay {getattr(self.config, field)!r}.")
        changed = settings_for(changed, self.model_config)
        self._settle()
        twin = copy.copy(self)
        twin.config, twin.stats, twin._observers = changed, DecodeStats(), []
        dense = twin.dense_layers
        check_digests(changed, dense, {i: bool(pages.summary) for i, pages in self._store.layers.items()})
        twin._store = self._store.fork(changed, dense)
        twin.layers = [twin._like(layer, dense) for layer in self.layers]
        for layer, other in zip(self._own_layers, twin._own_layers, strict=True):
            layer.fork(other)
        return twin

    def save(
        self,
        path: str | os.PathLike[str],
        ids: Tensor | None = None,
        title: str = "",
        progress: Progress = lambda nbytes: None,
    ) -> None:
        """Writes all of it to a file, which `Patch.load` reads: pages that rows hold, digests, tables, states, and
        what the policy remembers. A file that was there is replaced in one step, when the new one is whole.

        Args:
            ids: the tokens that it holds, `[b, n]`, as `generate` was given or has returned; if there are more, the
                first ones. Tokens are not in a cache, and without them a file can be loaded, but not compared with a
                prompt. None: those that it was loaded with, if nothing has been added.
            title: what the file is told by to people.
            progress: called with the number of bytes that are done since the last call.

        Raises:
            CacheStateError: a layer keeps what is not saved, `ids` are not its tokens, or a patch did not make it.
            OSError: the file cannot be written; one that was there is what it was.
        """
        self._settle()
        if self._origin is None:
            raise CacheStateError("This cache was not made by a patch, so its model is not known: patch.new_cache().")
        if ids is None and self.ids is not None and self.ids.shape[1] == self._store.newest.num_tokens:
            ids = self.ids
        saving.save(self, path, self._origin(), ids, title, progress)

    def to_dynamic(self) -> DynamicCache:
        """A plain transformers cache with a copy of the same content, for an unpatched model: keys and values as the
        pages hold them, which are rounded where `kv` is not plain. Gradients do not flow back through it."""
        self._settle()
        plain = DynamicCache(config=self.model_config)
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                if not isinstance(layer, CacheLayer):
                    plain.layers[i] = untracked_copy(layer)
            for layer in self._own_layers:
                layer.export(plain.layers[layer.layer_idx])
        return plain

    # -- operations on whole sequences: once for the pages, then for every layer that has none

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drops the last tokens. As in transformers, the count is given as a negative number (`crop(-3)`).

        Raises:
            ConfigError: the number is positive.
            CacheStateError: a layer's kind cannot drop tokens, or no state what it has taken in; nothing has changed.
            CacheFullError: there is no room to copy a page that others share; nothing has changed.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise ConfigError(f"crop({-count}): give the number of tokens to remove as a negative number.")
        self._settle()
        for layer in self._own_layers:
            layer.check_crop(count)
        stored = min(count, self._store.newest.num_tokens)
        if stored:
            self._store.crop(stored)
            self.ids = None if self.ids is None else self.ids[:, : self._store.newest.num_tokens]
            # The smaller: a layer that an interrupted pass left behind does not hold the others' tokens.
            for kept in (layer for layer in self.stored_layers if layer.is_paged):
                kept.length = min(kept.length, self._store.newest.num_tokens)
        for other in self._other_layers():  # transformers' own take it as it came, as in an unpatched model
            other.crop(-count if isinstance(other, CacheLayer) else tokens_to_remove)

    def reset(self) -> None:
        """Empties the cache."""
        self.ids = None
        self._store = PageStore(self.config, self._store.reserve_pages, self._store.arena, self.dense_layers)
        for layer in self._parts:
            layer.reset()
            if isinstance(layer, CacheLayer):
                layer.join(self._store)

    def __repr__(self) -> str:
        if self._store.is_torn:
            return "PagedCache(not whole any more: start from a new one)"
        table, num_layers = self._store.newest, sum(len(part.layers) for part in self._store.parts)
        return (
            f"PagedCache({table.batch_size} sequences, {table.num_tokens} tokens, "
            f"{num_layers} of {len(self.layers)} layers in pages, {self.nbytes / 2**20:.1f} MiB)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """All on its own but the counters; gradients do not flow back through it."""
        memo.update(untracked_tensors(self._parts))
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    # -- how

    def _settle(self) -> None:
        """Nothing is pending any more."""
        for layer in self._own_layers:
            layer.settle()

    def _made(self, kind: type[CacheLayer], layer_idx: int, is_dense: bool, layer_config: Any) -> Any:
        own, told = self.config.at(layer_idx), (self._observers, self._on_fallback)
        own = own.with_(prefill="dense") if is_dense else own
        return kind(self._store, layer_idx, own, self.stats, *told, is_dense, layer_config, self._on_notice)

    def _check_patched(self) -> None:
        """The attention that answered before must be the one that is asked now: another would see the new tokens
        alone. A model may be patched after its cache was made, so the first tokens count."""
        attention = attention_of(self.model_config)
        served = [layer for layer in self._asked_layers if layer.is_served]
        if not served:
            self._attention = attention
        passed_by = [layer for layer in served if layer.is_unanswered or attention != self._attention]
        if passed_by:
            raise not_patched(passed_by[0])

    def _like(self, layer: Any, dense: frozenset[int]) -> Any:
        """A layer of the same kind, still empty; of transformers' own, a copy."""
        if not isinstance(layer, CacheLayer):
            return untracked_copy(layer)
        return self._made(type(layer), layer.layer_idx, layer.layer_idx in dense, layer.layer_config)

    @property
    def _parts(self) -> list[Any]:
        """All layers, and the states beside keys and values."""
        return [*self.layers, *(layer.state for layer in self.layers if isinstance(layer, BesideState))]

    @property
    def _own_layers(self) -> list[CacheLayer]:
        """Those that are not transformers' own."""
        return [part for part in self._parts if isinstance(part, CacheLayer)]

    def _other_layers(self) -> Iterable[Any]:
        return [x for x in self._parts if not isinstance(x, StoredLayer) or x.is_dense]
