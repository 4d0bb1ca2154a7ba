"""One layer of a paged cache, in transformers' cache protocol and in that of our attention function."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache import prefill
from sparsekv.cache.contents import ReadableLayer
from sparsekv.cache.handshake import Mode, tagged
from sparsekv.cache.masks import COLUMNS_ONLY, visible_columns
from sparsekv.cache.stats import DecodeStats
from sparsekv.config import SparseConfig
from sparsekv.errors import CacheStateError
from sparsekv.pages.page_store import PageStore
from sparsekv.pages.step_state import Stage
from sparsekv.policies import POLICIES, DecodeStep, Policy, Reads

# Called with a layer's decode step and the slots that it has read, `[b, hkv, k]` int32; None: all pages.
Observer = Callable[[DecodeStep, "Tensor | None"], None]
FallbackListener = Callable[[int, str], None]
Accepted = tuple[Tensor, Tensor, "Tensor | None"]  # what PageStore.accept returns
# An output `[b, hq, t, d]`; or keys and values `[b, hkv, n, d]`, over which the model's own attention is to run.
Attended = Tensor | tuple[Tensor, Tensor]


def _own_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Keeps autocast out of the ops, which say themselves what is float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class PagedLayer(ReadableLayer):
    """Full attention over pages: dense for several tokens, by the policy for one.

    Args:
        store: the pages, shared by the layers of a cache.
        layer_idx: the layer.
        config: the settings in force.
        stats: counters to add to.
        observers: called after every decode step of the layer with the step and its slots.
        on_fallback: called with (layer_idx, reason) if the layer turns out to be no plain attention layer.
        is_dense: whether it reads everything, whatever the policy.
    """

    def __init__(
        self,
        store: PageStore,
        layer_idx: int,
        config: SparseConfig,
        stats: DecodeStats,
        observers: list[Observer],
        on_fallback: FallbackListener | None = None,
        is_dense: bool = False,
    ) -> None:
        super().__init__(store, layer_idx)
        self.config = config
        self.stats, self.observers, self.on_fallback = stats, observers, on_fallback
        policy = POLICIES.get(config.policy)  # resolved for dense layers too: a wrong name is never silent
        self.policy: Policy = POLICIES.get("all")() if is_dense else policy()

    # -- transformers' protocol

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new keys and values `[b, hkv, t, d]`; returns what the attention function gets: the new ones
        alone, as the pages are read where they lie (`with_past` has all).

        Raises:
            CacheStateError: the batch has another size.
        """
        self.store_or_fall_back()
        if self.mode is Mode.DENSE:
            keys, values = super().update(key_states, value_states)
            return keys, values
        if self.length:
            self.store.table.check_batch(key_states.shape[0])
        self.lazy_initialization(key_states, value_states)
        self._pending = (key_states, value_states)
        return tagged(key_states, self), tagged(value_states, self)

    def get_seq_length(self) -> int:
        """Columns so far, padding counted."""
        if self.mode is Mode.DENSE:
            length: int = super().get_seq_length()
            return length
        return self.length + (self._pending[0].shape[-2] if self._pending else 0)

    def reset(self) -> None:
        """Forgets everything; the cache gives the pages back."""
        self.mode, self.length, self._pending, self._tracked_from = Mode.NEW, 0, None, math.inf
        self._own, self.is_initialized = [None, None], False

    @property
    def is_unanswered(self) -> bool:
        """Whether a paged layer's attention has not asked for the tokens of the last `update`."""
        return self.mode is Mode.PAGED and self._pending is not None

    def drop_pending(self) -> None:
        """Forgets tokens of a forward pass that was given up."""
        self._pending = None

    # -- what the attention function asks for

    def refuse(self, reason: str) -> None:
        """Makes a layer that is not paged yet a plain dynamic one.

        Raises:
            CacheStateError: it is paged.
        """
        if self.mode is Mode.PAGED:
            self._pending = None
            raise CacheStateError(f"Layer {self.layer_idx} cannot go on sparsely: {reason}. Start from a new cache.")
        if self.mode is Mode.DENSE:
            return
        self.mode, self.is_initialized = Mode.DENSE, False
        pending, self._pending = self._pending, None
        if pending is not None:
            super().update(*pending)
        if self.on_fallback is not None:
            self.on_fallback(self.layer_idx, reason)

    def commit(self, visible: Tensor | None) -> None:
        """Stores the tokens of the last `update` in pages: the handshake, and the append of every step.

        Args:
            visible: `[b, n]` bool for the first n columns, False for padding; later ones, or None: no padding. Of
                what is stored only the last tokens of a row may have become padding.

        Raises:
            CacheStateError: batch or mask do not continue what is stored, or a paged layer's keys and values differ
                in shape. CacheFullError: there is no room.
        """
        accepted = self._accept(visible)
        if accepted is not None:
            self._write(accepted)

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_plain: bool
    ) -> Attended:
        """Dense attention of several new tokens, which are stored first if they are not yet.

        Args:
            query: `[b, hq, t, d]`.
            key, value: `[b, hkv, t, d]`, what `update` gave.
            mask: as the model's attention gets it; of a large one that is only causal, the columns (COLUMNS_ONLY).
            scaling: factor on the dot products.
            is_plain: whether the attention is softmax(q k^T) v and nothing else.

        Returns:
            The output, `[b, hq, t, d]`; or keys and values of all tokens so far, `[b, hkv, n, d]` in transformers'
            order, over which the model's own attention is to run: under a mask that was made, or not a plain one.

        Raises:
            CacheStateError, CacheFullError: as `commit`.
        """
        is_new = self._pending is not None
        self.commit(visible_columns(mask))
        if self.is_dense:
            return key, value
        if is_new:
            self.stats.record_pass(self.layer_idx)
        if is_plain and self._is_left_out(mask, query.shape[2]) and key.shape[2] == query.shape[2]:
            return prefill.attend(self, query, key, value, scaling)
        return self.with_past(key, value)

    def decode(
        self, query: Tensor, scaling: float, softcap: float, sinks: Tensor | None, visible: Tensor | None = None
    ) -> Attended:
        """Attention of one new token over the pages the policy selects; if the token is not committed yet, it is
        stored on the way.

        Args:
            query: `[b, hq, 1, d]`.
            scaling: factor on the dot products.
            softcap: `softcap * tanh(x / softcap)` of the logits; 0: none.
            sinks: `[hq]`, a logit per head that takes mass and has no value; None: none.
            visible: as `commit` would get it.

        Returns:
            `[b, hq, 1, d]` in the query's dtype; or keys and values, if the layer turns out not to be servable.

        Raises:
            CacheStateError, CacheFullError: as `commit`.
            ConfigError: the policy asks for digests, and there are none.
        """
        new = self._pending
        if new is not None and not self.is_paged:
            self.commit(visible)
            if self.is_dense:
                return new
        accepted = self._accept(visible)
        if accepted is not None and accepted[2] is not None:  # some rows' token is padding
            self._write(accepted)
            accepted = None
        step = self._step(query.squeeze(2), scaling, accepted)
        with torch.no_grad(), _own_precision(query.device):
            out, slots = self.policy.decode(step, softcap, sinks)
            if accepted is not None:
                self._count_tokens(accepted[0])
            slots = None if step.fits else slots
            self._record(slots, new is not None)
            for observe in self.observers:
                observe(step, slots)
        (out,) = self._untracked(out, tracked=query.requires_grad)
        return out.unsqueeze(2)

    # -- how

    def _accept(self, visible: Tensor | None) -> Accepted | None:
        """Room for the tokens of the last `update`, which are to be written next; None if there are none to store."""
        if self._pending is None or self.mode is Mode.DENSE:
            return None
        key, value = self._pending
        if key.shape != value.shape:
            self.refuse(f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape")
            return None
        self._pending = None  # also if the store refuses the tokens: they must not come back with the next ones
        scored = self.policy.reads is Reads.DIGESTS
        with torch.no_grad(), _own_precision(key.device):
            accepted = self.store.accept(self.layer_idx, self.length, key, value, visible, scored)
        if self.length <= self._tracked_from:
            is_tracked = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
            self._tracked_from = self.length if is_tracked else math.inf
        return accepted

    def _is_left_out(self, mask: Tensor | None, num_new: int) -> bool:
        """Whether a mask was not made because of its size. (A prompt that needs none is the model's own business.)"""
        return self.length > num_new if mask is None else mask.dtype == COLUMNS_ONLY

    def _write(self, accepted: Accepted) -> None:
        with torch.no_grad(), _own_precision(accepted[0].device):
            self.store.write(self.layer_idx, *accepted)
        self._count_tokens(accepted[0])

    def _count_tokens(self, key: Tensor) -> None:
        """Counts tokens that were written; those of a captured step are counted when it is replayed."""
        if self.store.step.stage is Stage.CAPTURED:
            return
        self.mode = Mode.PAGED
        self.length += key.shape[-2]

    def _step(self, query: Tensor, scaling: float, new: Accepted | None = None) -> DecodeStep:
        pages, block_table, seq_lens = self.store.on(self.layer_idx)
        return DecodeStep(
            layer_idx=self.layer_idx,
            query=query,
            kv_pool=pages.kv,
            summary=pages.summary,
            state=pages.state,
            block_table=block_table,
            seq_lens=seq_lens,
            k=self.store.selection_width(block_table.shape[1]),
            scaling=scaling,
            config=self.config,
            ops=self.store.ops,
            is_covered=self.store.is_covered,
            key=None if new is None else new[0],
            value=None if new is None else new[1],
        )

    def _record(self, slots: Tensor | None, new: bool) -> None:
        """Counts what a step read: the listed pages, or all, and what it took to choose them."""
        read_all = slots is None
        if slots is not None and not self.policy.fills_budget:
            self.stats.count_listed(self.layer_idx, slots, self.store.layers[self.layer_idx].page_nbytes)
        if self.store.step.stage is Stage.CAPTURED:
            self.store.step.reads.append((self.layer_idx, read_all))
            return
        self.record_step(read_all, self.store.table.total_pages, self.store.pages_to_read(), new)

    def record_step(self, read_all: bool, num_pages: int, to_read: int, new: bool) -> None:
        """Counts what is known of a step without asking the device.

        Args:
            read_all: whether it read every page.
            num_pages, to_read: pages of all sequences, and those a policy that fills its budget reads of them.
            new: False if another module has read the same step's cache already (shared KV).
        """
        pages = self.store.layers[self.layer_idx]
        num_kv_heads = pages.kv.shape[2]
        cost = 0 if read_all else pages.nbytes_to_choose(self.policy.reads) * num_pages * num_kv_heads
        listed = None if read_all else to_read * num_kv_heads if self.policy.fills_budget else 0
        self.stats.record_step(self.layer_idx, listed, num_pages * num_kv_heads, pages.page_nbytes, cost, new)

    def store_or_fall_back(self) -> None:
        """Deals with tokens whose attention never came: without a handshake the layer is no plain attention layer."""
        if self._pending is None:
            return
        if self.mode is Mode.NEW:
            self.refuse("its keys or values are transformed between the cache and the attention function")
        else:
            self.commit(self.store.table.columns())  # nothing is known of a mask
