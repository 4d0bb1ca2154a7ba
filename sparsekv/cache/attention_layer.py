"""A layer of a cache that answers its model's attention itself: what every kind of them has in common.

A new kind is one class: a subclass of `AttentionLayer` under `@LAYER_KINDS.register("name")`. What it inherits keeps
all keys and values and lets the model's own attention run over them; it overrides what it does better.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from sparsekv.cache.cache_layer import CacheLayer, FallbackListener, NoticeListener, Observer
from sparsekv.cache.gradients import untracked_tensors
from sparsekv.cache.handshake import Mode, tagged
from sparsekv.cache.masks import visible_columns
from sparsekv.cache.stats import DecodeStats
from sparsekv.config import SparseConfig
from sparsekv.errors import CacheStateError
from sparsekv.pages.page_store import PageStore
from sparsekv.policies import POLICIES, Policy

# An output `[b, hq, t, d]`; or keys and values `[b, hkv, n, d]`, over which the model's own attention is to run.
Attended = Tensor | tuple[Tensor, Tensor]

_FROM_CACHE = "store layer_idx config stats observers on_fallback on_notice policy layer_config".split()


class AttentionLayer(CacheLayer, DynamicLayer):
    """Keeps a layer's keys and values, and is asked by its attention: `prefill` for several tokens, `decode` for one.
    Both store the tokens that `update` has noted (`commit`). If the attention never asks, it becomes a plain dynamic
    layer, for good, and says so. Arguments and further attributes as `CacheLayer`.

    Attributes:
        understands: arguments of an attention that change which keys are seen, and that it takes care of.
        is_croppable: whether the last tokens can be dropped (`crop`).
        policy: what decides for it, if it is a layer to decide for; of a dense one, "all".
        length: columns stored, those pending not counted.
    """

    understands: tuple[str, ...] = ()
    is_croppable = True
    mode = Mode.NEW
    keys: Any
    values: Any

    def __init__(
        self,
        store: PageStore,
        layer_idx: int,
        config: SparseConfig,
        stats: DecodeStats,
        observers: list[Observer],
        on_fallback: FallbackListener | None = None,
        is_dense: bool = False,
        layer_config: Any = None,
        on_notice: NoticeListener | None = None,
    ) -> None:
        told = (stats, observers, on_fallback, is_dense, layer_config, on_notice)
        CacheLayer.__init__(self, store, layer_idx, config, *told)
        policy = POLICIES.get(config.policy)  # resolved for dense layers too: a wrong name is never silent
        self.policy: Policy = POLICIES.get("all")() if is_dense else policy()
        self.length = 0
        self._pending: tuple[Tensor, Tensor] | None = None
        DynamicLayer.__init__(self)

    @property
    def is_served(self) -> bool:
        """Whether its attention has asked it: the handshake has succeeded."""
        return self.mode is Mode.SERVED

    @property
    def is_dense(self) -> bool:
        """Whether it has become a plain dynamic layer."""
        return self.mode is Mode.DENSE

    # -- what a kind may do in its own way

    def append(self, key: Tensor, value: Tensor, visible: Tensor | None) -> None:
        """Stores new tokens `[b, hkv, t, d]`. A kind that does not keep all sees to `crop`, and to `get_mask_sizes`.

        Args:
            visible: `[b or 1, n]` bool, False for padding, for the columns that a mask has for this layer; None: all.
        """
        past = [x[:, :, :0] for x in (key, value)] if self.keys is None else [self.keys, self.values]
        self.keys, self.values = torch.cat([past[0], key], dim=-2), torch.cat([past[1], value], dim=-2)

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_plain: bool
    ) -> Attended:
        """Attention of several new tokens, which are stored first if they are not yet.

        Args:
            query: `[b, hq, t, d]`.
            key, value: `[b, hkv, t, d]`, what `update` gave.
            mask: as the model's attention gets it; of a large one that is only causal, the columns (COLUMNS_ONLY).
            scaling: factor on the dot products.
            is_plain: whether the attention is softmax(q k^T) v and nothing else.

        Returns:
            The output, `[b, hq, t, d]`; or keys and values `[b, hkv, n, d]` in transformers' order, as many as
            `get_mask_sizes` told, over which the model's own attention is to run.

        Raises:
            CacheStateError, CacheFullError: as `commit`.
        """
        self.commit(visible_columns(mask))
        return self.content()

    def decode(
        self, query: Tensor, scaling: float, softcap: float, sinks: Tensor | None, visible: Tensor | None = None
    ) -> Attended:
        """Attention of one new token, which is stored first if it is not yet.

        Args:
            query: `[b, hq, 1, d]`.
            scaling: factor on the dot products.
            softcap: `softcap * tanh(x / softcap)` of the logits; 0: none.
            sinks: `[hq]`, a logit per head that takes mass and has no value; None: none.
            visible: `[b or 1, n]` bool, False for padding, for the columns that a mask has for this layer; None: all.

        Returns:
            As `prefill`.

        Raises:
            CacheStateError, CacheFullError: as `commit`.
        """
        self.commit(visible)
        return self.content()

    def content(self) -> tuple[Any, Any]:
        """`keys` and `values` of the tokens that it keeps, `[b, hkv, n, d]`; None: no tokens yet."""
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens; their number is given as a negative one."""
        super().crop(tokens_to_remove)
        self.length = max(self.length + tokens_to_remove, 0)

    def check_crop(self, count: int) -> None:
        """Raises CacheStateError if it has tokens and cannot drop any."""
        if count and self.is_served and not self.is_croppable:
            kind = type(self).__name__
            raise CacheStateError(f"Layer {self.layer_idx} of this cache is a {kind}, which cannot drop tokens.")

    def fork(self, twin: AttentionLayer) -> None:
        """Gives a new layer of another cache the same tokens; what either takes from now on is its own."""
        held = {name: x for name, x in vars(self).items() if name not in _FROM_CACHE}
        twin.__dict__.update(copy.deepcopy(held, untracked_tensors([self])))

    def export(self, plain: Any) -> None:
        """Gives a copy of its tokens to the layer that transformers' own cache has in its place."""
        if self.get_seq_length():
            plain.update(*self.content())
            if hasattr(plain, "cumulative_length"):  # a window holds only the last tokens
                plain.cumulative_length = self.get_seq_length()

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Nothing, if nobody has used it."""
        return super().described() if self.get_seq_length() else ({}, {})

    # -- transformers' protocol

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new keys and values `[b, hkv, t, d]`; returns what the attention function gets: the new ones alone,
        tagged with this layer, which it asks for the rest.

        Raises:
            CacheStateError: the batch has another size.
        """
        self.settle()
        if self.is_dense:
            keys, values = super().update(key_states, value_states)
            return keys, values
        if self.length and self.in_pages:
            self.store.table.check_batch(key_states.shape[0])
        self.lazy_initialization(key_states, value_states)
        self._pending = (key_states, value_states)
        return tagged(key_states, self), tagged(value_states, self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes dtype and device; memory is made when the first tokens are stored."""
        if self.is_dense:
            super().lazy_initialization(key_states, value_states)
        else:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def get_seq_length(self) -> int:
        """Columns so far, padding counted."""
        if self.is_dense:
            length: int = super().get_seq_length()
            return length
        return self.length + (self._pending[0].shape[-2] if self._pending else 0)

    def reset(self) -> None:
        """Forgets everything; the cache gives the pages back."""
        self.mode, self.length, self._pending = Mode.NEW, 0, None
        self.keys, self.values, self.is_initialized = None, None, False

    # -- what the cache and the attention function ask for

    @property
    def is_unanswered(self) -> bool:
        """Whether a served layer's attention has not asked for the tokens of the last `update`."""
        return self.is_served and self._pending is not None

    def commit(self, visible: Tensor | None) -> None:
        """Stores the tokens of the last `update`, if they are not yet: the handshake. `visible` is as in `append`.

        Raises:
            CacheStateError: they do not continue what is stored. CacheFullError: there is no room.
        """
        if self._pending is not None and not self.is_dense:
            (key, value), self._pending = self._pending, None
            self.append(key, value, visible)
            self.mode = Mode.SERVED
            self.length += key.shape[-2]

    def drop_pending(self) -> None:
        """Forgets tokens of a forward pass that was given up."""
        self._pending = None

    def refuse(self, reason: str) -> None:
        """Makes a layer that is not served yet a plain dynamic one.

        Raises:
            CacheStateError: it is served.
        """
        if self.is_served:
            self._pending = None
            raise CacheStateError(f"Layer {self.layer_idx} cannot go on sparsely: {reason}. Start from a new cache.")
        if self.is_dense:
            return
        self.mode, self.is_initialized = Mode.DENSE, False
        pending, self._pending = self._pending, None
        if pending is not None:
            super().update(*pending)
        if self.on_fallback is not None:
            self.on_fallback(self.layer_idx, reason)

    def settle(self) -> None:
        """Deals with tokens whose attention never came: without a handshake the layer is none of its kind."""
        if self._pending is None:
            return
        if self.mode is Mode.NEW:
            self.refuse("its keys or values are transformed between the cache and the attention function")
        else:
            columns = F.pad(self.store.table.columns(), (0, self._pending[0].shape[-2]), value=True)
            self.commit(columns)  # nothing is known of a mask
            self.store.memory.forget()  # no policy was asked
