"""What a layer that may live in pages holds, for its attention and for whoever looks into a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.attention_layer import AttentionLayer
from sparsekv.cache.gradients import barrier
from sparsekv.cache.handshake import Mode
from sparsekv.errors import CacheStateError


class ReadableLayer(AttentionLayer):
    """The reading half of a paged layer. `keys` and `values` of pages are copies, made when they are read: to change
    such a copy in place changes nothing in the cache, and to assign others is an error.
    """

    in_pages = is_in_place = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tracked_from: float = math.inf  # the first column whose keys or values had a gradient to wait for
        self._own: list[Tensor | None] = [None, None]  # keys and values of a layer that runs dense
        super().__init__(*args, **kwargs)

    @property
    def is_paged(self) -> bool:
        """Whether the handshake has succeeded."""
        return self.is_served

    # -- for those who look

    @property
    def keys(self) -> Tensor | None:
        """`[b, hkv, n, d]` in transformers' order; of pages a copy, zero where there is padding; None: no tokens yet.

        Raises:
            CacheStateError: others are assigned, and the layer does not run dense.
        """
        return self.content()[0]

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._assign(0, states)

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self.content()[1]

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._assign(1, states)

    def content(self) -> tuple[Tensor | None, Tensor | None]:
        """`keys` and `values` at once."""
        if self._pending is not None:
            return self._after(self.length, *self._pending)
        return self._stored(self.length) if self.is_paged else (self._own[0], self._own[1])

    # -- for the attention

    def with_past(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values `[b, hkv, n, d]` in transformers' order, given the newest, which are stored already."""
        return self._after(self.length - key.shape[-2], key, value)

    @property
    def valid(self) -> Tensor | None:
        """`[b, n]` bool for the first n columns, False for padding; None: no padding. Later columns are valid."""
        return self.store.table.valid

    def row_length(self, row: int) -> int:
        """Tokens of one sequence, padding not counted."""
        return int(self.store.table.lengths[row])

    def sequences(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of sequences as long as one another, without padding, `[rows, hkv, length, d]` each."""
        keys, values = self._untracked(*self.store.sequences(self.layer_idx, rows))
        return keys, values

    # -- how

    def reset(self) -> None:
        """Forgets everything; the cache gives the pages back."""
        super().reset()
        self._own, self._tracked_from = [None, None], math.inf

    def fork(self, twin: AttentionLayer) -> None:
        """Gives a new layer of another cache the same tokens. What a dense one holds grows by concatenation, so the
        tensors themselves can be shared."""
        names = ("mode", "length", "is_initialized", "_tracked_from", "dtype", "device")
        twin.__dict__.update({name: x for name, x in vars(self).items() if name in names}, _own=list(self._own))

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Of pages, how many columns they hold."""
        return ({"length": self.length}, {}) if self.is_paged else super().described()

    def restored(self, facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """Goes on from pages."""
        if facts:
            pages = self.store.layers[self.layer_idx]
            self.mode, self.length, self.is_initialized = Mode.SERVED, facts["length"], True
            self.dtype, self.device = pages.no_tokens.dtype, device

    def _assign(self, which: int, states: Tensor | None) -> None:
        if self.is_dense:
            self._own[which] = states
        elif states is not None or self.is_paged:
            raise CacheStateError(
                f"Layer {self.layer_idx} of this cache keeps its tokens in pages: keys and values can be read, not "
                "assigned or moved. The cache's own crop, reorder_cache, batch_select_indices and "
                "batch_repeat_interleave change it; for anything else edit a plain cache: cache.to_dynamic()."
            )

    def _stored(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first columns, `[b, hkv, num_tokens, d]`."""
        keys, values = self._untracked(*self.store.dense(self.layer_idx, num_tokens), before=num_tokens)
        return keys, values

    def _after(self, past: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values behind those of the first columns."""
        if not past:
            return key, value
        keys, values = self._stored(past)
        return torch.cat([keys, key], dim=-2), torch.cat([values, value], dim=-2)

    def _untracked(self, *tensors: Tensor, tracked: bool = False, before: float = math.inf) -> tuple[Tensor, ...]:
        """The same tensors, which the pages gave; a gradient that a token before some column waits for cannot reach
        it, and to ask for it is an error. `tracked`: whether something else waits for one."""
        is_lost = torch.is_grad_enabled() and (tracked or self._tracked_from < min(self.length, before))
        return barrier(*tensors) if is_lost else tensors
