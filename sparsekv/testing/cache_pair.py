"""A PagedCache beside transformers' own DynamicCache, fed with the same tokens: one says what the other must hold.

There is no model: every layer gets random queries, keys and values, and the calls that the attention function makes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from sparsekv.cache import PagedCache, PagedLayer, tagged_layer
from sparsekv.testing.consistency import assert_consistent


def tiny_config(num_layers: int = 2, hq: int = 4, hkv: int = 2, d: int = 8) -> LlamaConfig:
    """The config of a model that nobody builds: only its layers and shapes matter."""
    return LlamaConfig(
        hidden_size=hq * d,
        num_hidden_layers=num_layers,
        num_attention_heads=hq,
        num_key_value_heads=hkv,
        head_dim=d,
        intermediate_size=8,
        vocab_size=8,
    )


class CachePair:
    """Two caches under the same operations.

    Args:
        num_layers, hq, hkv, d, dtype: the shapes of the model that is not there.
        settings: of the PagedCache.

    Attributes:
        paged, plain: the two caches; mask: `[b, n]` bool, False for padding.
        queries: of the last forward, `[b, hq, t, d]` per layer.
    """

    def __init__(
        self,
        num_layers: int = 2,
        hq: int = 4,
        hkv: int = 2,
        d: int = 8,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        self.hq, self.hkv, self.d, self.dtype = hq, hkv, d, dtype
        model_config = tiny_config(num_layers, hq, hkv, d)
        self.paged = PagedCache(model_config, **settings)
        self.plain = DynamicCache(config=model_config)
        self.mask = torch.ones(0, 0, dtype=torch.bool, device="cpu")
        self.queries: list[Tensor] = []

    # -- what a model does

    def forward(self, t: int, batch: int = 1, valid: Tensor | None = None, up_to: int | None = None) -> list[Tensor]:
        """A pass over t new columns; the attention of every layer when they are one, `[b, hq, d]` each.

        Args:
            batch: sequences; counts for the first pass only.
            valid: `[b, t]` bool, False for padding; None: all valid.
            up_to: the first so many layers only, as if the pass were interrupted.
        """
        b = len(self.mask) or batch
        past = self.mask if len(self.mask) else self.mask.new_ones(b, 0)
        mask = torch.cat([past, self.mask.new_ones(b, t) if valid is None else valid], dim=1)
        layers = range(len(self.paged.layers))[:up_to]
        self.queries = [self._random(b, self.hq, t, self.d) for _ in layers]
        attended = [self._attend(i, t, mask) for i in layers]
        self.mask = mask
        return [out for out in attended if out is not None]

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device="cpu").to(self.dtype)

    def _attend(self, layer_idx: int, t: int, mask: Tensor) -> Tensor | None:
        key, value = self._random(2, len(mask), self.hkv, t, self.d)
        keys, values = self.paged.update(key, value, layer_idx)
        layer = tagged_layer(keys, values)
        assert layer is self.paged.layers[layer_idx]
        visible = None if bool(mask.all()) else mask
        query, scaling = self.queries[layer_idx], self.d**-0.5
        attended = (
            layer.decode(query, scaling, 0.0, None, visible)
            if t == 1
            else layer.prefill(query, keys, values, visible, scaling, is_plain=False)
        )
        expected = self.plain.update(key, value, layer_idx)
        if isinstance(attended, Tensor):
            return attended[:, :, 0]
        for handed_out, held in zip(attended, expected, strict=True):
            assert torch.equal(self.unpadded(handed_out, mask), self.unpadded(held, mask))
        return None

    # -- operations on whole sequences

    def crop(self, count: int) -> None:
        """Drops the last columns."""
        self.paged.crop(-count)
        self.plain.crop(-count)
        self.mask = self.mask[:, : max(self.mask.shape[1] - count, 0)]

    def reorder(self, rows: Tensor) -> None:
        """What beam search does."""
        self.paged.reorder_cache(rows)
        self.plain.reorder_cache(rows)
        self.mask = self.mask[rows]

    def select(self, rows: Any) -> None:
        """Keeps rows: indices, negative ones too, or a bool per row."""
        self.paged.batch_select_indices(rows)
        self.plain.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def repeat(self, times: int) -> None:
        """Repeats every row."""
        self.paged.batch_repeat_interleave(times)
        self.plain.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, 0)

    def fork(self, **settings: Any) -> CachePair:
        """A second pair; its paged half shares pages."""
        twin = copy.copy(self)
        twin.paged, twin.plain = self.paged.fork(**settings), copy.deepcopy(self.plain)
        return twin

    # -- what must hold

    def unpadded(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Keys or values `[b, hkv, n, d]` with zeros for padding."""
        real = self.mask if mask is None else mask
        return states.masked_fill(~real[:, None, :, None], 0.0)

    def held(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The keys and values that the layer must hold."""
        layer: Any = self.plain.layers[layer_idx]
        return self.unpadded(layer.keys), self.unpadded(layer.values)

    def check(self, *forks: CachePair) -> None:
        """Content and length of every layer, digests, and the references of all caches that share the pool."""
        for pair in (self, *forks):
            pair._check_content()
        assert_consistent(*(pair.paged._store for pair in (self, *forks)))

    def _check_content(self) -> None:
        assert self.paged.get_seq_length() == self.plain.get_seq_length() == self.mask.shape[1]
        for i, layer in enumerate(self.paged.layers):
            assert isinstance(layer, PagedLayer)
            assert layer.is_paged
            for stored, expected in zip((layer.keys, layer.values), self.held(i), strict=True):
                assert stored is not None
                assert torch.equal(stored, expected)

    def attention(self, layer_idx: int, slots: Tensor | None = None) -> Tensor:
        """What the last forward's attention must be, in float64 over the plain cache: `[b, hq, d]`.

        Args:
            slots: `[b, hkv, k]`, the pages that are read; None: all.
        """
        keys, values = (x.double().repeat_interleave(self.hq // self.hkv, 1) for x in self.held(layer_idx))
        query = self.queries[layer_idx].double()
        logits = (query @ keys.transpose(-1, -2))[:, :, 0] * self.d**-0.5  # [b, hq, n]
        logits = logits.masked_fill(~self.mask[:, None], float("-inf"))
        if slots is not None:
            page = (self.mask.cumsum(1) - 1) // self.paged.config.page_size  # [b, n]
            listed = (slots[..., None] == page[:, None, None]).any(2)  # [b, hkv, n]
            logits = logits.masked_fill(~listed.repeat_interleave(self.hq // self.hkv, 1), float("-inf"))
        return (logits.softmax(-1).nan_to_num(0.0)[:, :, None] @ values)[:, :, 0]
