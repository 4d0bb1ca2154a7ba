"""The layer kinds of sliding windows and of chunks: the last tokens in pages, all of which a decode step reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.attention_layer import Attended
from sparsekv.cache.cache_layer import LAYER_KINDS
from sparsekv.cache.layer_kinds import why_not_paged
from sparsekv.cache.masks import seen_columns
from sparsekv.cache.stored_layer import StoredLayer, own_precision
from sparsekv.pages.chunk_table import ChunkTable
from sparsekv.pages.page_store import PageStore
from sparsekv.pages.window_table import WindowTable
from sparsekv.policies import POLICIES


@LAYER_KINDS.register("sliding_window")
class WindowLayer(StoredLayer):
    """Sliding-window attention over pages that hold the window and little more. Arguments as `AttentionLayer`.

    As in transformers, a window is one of columns: padding in it counts.

    Attributes:
        table: what says which of the tokens held a new one sees.
        setting: the config's name for the most tokens that one sees.
    """

    layer_types = ("sliding_attention",)
    understands = ("sliding_window",)
    is_sliding = True
    table: type[WindowTable] = WindowTable
    setting = "sliding_window"

    def __init__(self, store: PageStore, *args: Any, **kwargs: Any) -> None:
        super().__init__(store, *args, **kwargs)
        self.policy = POLICIES.get("all")()
        self.window: int = getattr(self.layer_config, self.setting)
        self.join(store)

    @classmethod
    def reason_against(cls, layer_type: str, text_config: Any, layer_idx: int) -> str | None:
        """Why it cannot live in pages: see `why_not_paged`."""
        return why_not_paged(text_config, layer_idx)

    def join(self, store: PageStore) -> None:
        """Goes on with the store of a cache that has been emptied."""
        self.store = store.window((self.table, self.window))

    @property
    def record_past(self) -> bool:
        """Whether more is kept than a window, so that the last tokens can be dropped."""
        table: Any = self.store.table
        return bool(table.keeps_past)

    @record_past.setter
    def record_past(self, wanted: bool) -> None:
        table: Any = self.store.table
        table.keeps_past = wanted

    def activate_past_recording(self) -> None:
        """Keeps more than a window from now on, so that the last tokens can be dropped."""
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that several new tokens see, these counted, and the number of those before."""
        if self.is_dense:
            return super().get_mask_sizes(query_length)
        length = self.get_seq_length()
        num_kept = min(length, self.window - 1)
        return num_kept + query_length, length - num_kept

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_plain: bool
    ) -> Attended:
        """Keys and values of the window before several new tokens, and these, as in `AttentionLayer`."""
        is_new = self._pending is not None
        self.commit(seen_columns(mask))
        if self.is_dense:
            return key, value
        if is_new:
            self.stats.record_pass(self.layer_idx)
        return self.with_past(key, value)

    def decode(
        self, query: Tensor, scaling: float, softcap: float, sinks: Tensor | None, visible: Tensor | None = None
    ) -> Attended:
        """Attention of one new token over its window, as in `AttentionLayer`. Keys and values are given only if the
        layer turns out not to be servable."""
        new = self._pending
        self.commit(visible)
        if new is not None and self.is_dense:
            return new
        pages, *where = self.store.on(self.layer_idx)
        first = self.store.table.device_table(pages.kv.device).first
        with torch.no_grad(), own_precision(query.device):
            last = (scaling, softcap, sinks, self.config.page_format, first)
            out = self.store.ops.attend_pages(query.squeeze(2), pages.kv, *where, None, *last)[0]
            self._record(None, new is not None)
        (out,) = self._untracked(out[..., : pages.value_dim], tracked=query.requires_grad)
        return out.unsqueeze(2)

    def _stored(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the window before column `num_tokens`, `[b, hkv, up to window - 1, d]`."""
        start = max(num_tokens - self.window + 1, 0)
        keys, values = self._untracked(*self.store.dense(self.layer_idx, num_tokens, start), before=num_tokens)
        return keys, values


@LAYER_KINDS.register("chunk")
class ChunkLayer(WindowLayer):
    """Attention within chunks of a sequence (Llama 4), over pages that hold one and little more."""

    layer_types = ("chunked_attention",)
    table = ChunkTable
    setting = "attention_chunk_size"
