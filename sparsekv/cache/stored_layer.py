"""A layer whose tokens lie in pages: how they get there, and how what is read of them is counted."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.contents import ReadableLayer
from sparsekv.cache.handshake import Mode
from sparsekv.pages.step_state import Stage
from sparsekv.policies import Reads

Accepted = tuple[Tensor, Tensor, "Tensor | None"]  # what StorePart.accept returns


def own_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Keeps autocast out of the ops, which say themselves what is float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class StoredLayer(ReadableLayer):
    """The writing half of a layer in pages. Arguments as `AttentionLayer`.

    Attributes:
        values_in_keys: whether its values are the first channels of its keys, and are kept once.
    """

    values_in_keys = False

    def commit(self, visible: Tensor | None) -> None:
        """Stores the tokens of the last `update` in pages: the handshake, and the append of every step.

        Args:
            visible: `[b, n]` bool for the first n columns, False for padding; later ones, or None: no padding. Of
                what is stored only the last tokens of a row may have become padding.

        Raises:
            CacheStateError: batch or mask do not continue what is stored, or a paged layer's keys and values have
                other shapes. CacheFullError: there is no room.
        """
        accepted = self._accept(visible)
        if accepted is not None:
            self._write(accepted)

    def is_steady(self, num_tokens: int) -> bool:
        """Whether it lives in pages and holds all columns of the cache."""
        return self.is_paged and self.length == num_tokens

    def follow(self) -> None:
        """A step has been replayed."""
        self.length += 1

    @property
    def captured_length(self) -> Tensor:
        """`[]` int32, where a captured step finds the columns before its token: the table has made room for that."""
        return self.store.table.device_table(self.store.layers[self.layer_idx].kv.device).num_tokens - 1

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page's keys and values in one kv head."""
        return self.store.layers[self.layer_idx].page_nbytes

    def record_step(self, read_all: bool, num_pages: int, new: bool) -> None:
        """Counts what is known of a step without asking the device: all but the pages that it listed.

        Args:
            read_all: whether it read every page.
            num_pages: pages of all sequences.
            new: False if another module has read the same step's cache already (shared KV).
        """
        pages = self.store.layers[self.layer_idx]
        num_kv_heads = pages.kv.shape[2]
        cost = 0 if read_all else pages.nbytes_to_choose(self.policy.reads) * num_pages * num_kv_heads
        self.stats.record_step(self.layer_idx, read_all, num_pages * num_kv_heads, pages.page_nbytes, cost, new)

    # -- how

    def _as_stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens as pages hold them."""
        return key, value

    def _accept(self, visible: Tensor | None) -> Accepted | None:
        """Room for the tokens of the last `update`, which are to be written next; None if there are none to store."""
        if self._pending is None or self.is_dense:
            return None
        key, value = self._as_stored(*self._pending)
        value_dim = min(key.shape[3], value.shape[3])
        if self.is_paged:
            value_dim = self.store.layers[self.layer_idx].value_dim
        if value.shape != (*key.shape[:3], value_dim):
            self.refuse(f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape")
            return None
        self._pending = None  # also if the store refuses the tokens: they must not come back with the next ones
        scored = self.policy.reads is Reads.DIGESTS
        with torch.no_grad(), own_precision(key.device):
            accepted = self.store.accept(
                self.layer_idx, self.length, key, value, visible, scored, self.values_in_keys
            )
        if self.length <= self._tracked_from:
            is_tracked = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
            self._tracked_from = self.length if is_tracked else math.inf
        return accepted

    def _write(self, accepted: Accepted) -> None:
        with torch.no_grad(), own_precision(accepted[0].device):
            self.store.write(self.layer_idx, *accepted)
        self._count_tokens(accepted[0])

    def _count_tokens(self, key: Tensor) -> None:
        """Counts tokens that were written; those of a captured step are counted when it is replayed."""
        if self.store.step.stage is Stage.CAPTURED:
            return
        self.mode = Mode.SERVED
        self.length += key.shape[-2]

    def _record(self, slots: Tensor | None, new: bool) -> None:
        """Counts what a step read: the listed pages, or all, and what it took to choose them."""
        if self.store.step.stage is Stage.CAPTURED:
            self.store.step.reads.append((self.layer_idx, slots))
            return
        self.record_step(slots is None, self.store.table.total_pages, new)
        if slots is not None:
            self.stats.count_listed((self.layer_idx,), slots[None], self.page_nbytes)
