"""Random layers in sparsekv's layout, made on the device in a second or two also for millions of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_points import Point

# Pools are filled in pieces of so many elements: what is needed beside them stays small.
CHUNK_ELEMENTS = 1 << 28
FITTED_TOKENS = 1024  # of the prompt that a digest is fitted to


@dataclass(frozen=True)
class Layer:
    """One layer's inputs and cache.

    Attributes:
        query: `[b, hq, d]`; key, value: `[b, hkv, 1, d]`, the new token.
        kv_pool: `[num_pages, 2, hkv, p, d]`; summary, state: the pages' digests, and what is fixed of them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kv_pool: Tensor
    summary: list[Tensor]
    state: list[Tensor]


class Inputs:
    """Layers with caches of their own and, as in a model, one table for all of them; its pages are shuffled.

    Attributes:
        block_table: `[b, max_pages]` int32; seq_lens: `[b]` int32, the new token counted.
        sinks: `[hq]` logits, or None.
    """

    def __init__(self, point: Point, num_layers: int, device: torch.device) -> None:
        self.point, self.device = point, device
        self.generator = torch.Generator(device).manual_seed(point.context)
        num_pages = point.batch * point.num_pages
        order = torch.randperm(num_pages, generator=self.generator, device=device)
        self.block_table = order.int().view(point.batch, point.num_pages)
        self.seq_lens = torch.full((point.batch,), point.context, dtype=torch.int32, device=device)
        self.sinks = self._random(point.geometry.num_q_heads) if point.geometry.sinks else None
        self.layers = [self._layer(num_pages) for _ in range(num_layers)]

    def contiguous(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values as SDPA reads them, each `[b, hkv, n, d]`."""
        point, geometry, pool = self.point, self.point.geometry, self.layers[layer].kv_pool
        size = (2, point.batch, geometry.num_kv_heads, point.context, geometry.head_dim)
        dense = torch.empty(size, dtype=pool.dtype, device=pool.device)
        for row, pages in enumerate(self.block_table):  # a sequence at a time: the copies in between stay small
            tokens = pool.index_select(0, pages).permute(1, 2, 0, 3, 4).flatten(2, 3)  # [2, hkv, pages * p, d]
            dense[:, row] = tokens[:, :, : point.context]
        return dense[0], dense[1]

    def _layer(self, num_pages: int) -> Layer:
        b, geometry = self.point.batch, self.point.geometry
        heads, d = geometry.num_kv_heads, geometry.head_dim
        pool = torch.empty(
            num_pages, 2, heads, self.point.config.page_size, d, dtype=geometry.dtype, device=self.device
        )
        digest = self.point.digest
        fields = digest.fields(self.point.config.page_size, d)
        summary = [pool.new_empty(num_pages, heads, *f.shape, dtype=f.dtype or pool.dtype) for f in fields]
        state = digest.fit(self._random(1, heads, FITTED_TOKENS, d), None)
        chunk = max(1, CHUNK_ELEMENTS // pool[0].numel())
        for first in range(0, num_pages, chunk):
            pages = pool[first : first + chunk].normal_(generator=self.generator)
            # A last page that is partly filled is summarised anew by every append.
            every = torch.ones(len(pages), pages.shape[3], dtype=torch.bool, device=self.device)
            for field, computed in zip(summary, digest.summarize(pages[:, 0], every, state), strict=True):
                field[first : first + chunk] = computed
        new = [self._random(b, heads, 1, d) for _ in range(2)]
        return Layer(self._random(b, geometry.num_q_heads, d), new[0], new[1], pool, summary, state)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device, dtype=torch.float32).to(
            self.point.geometry.dtype
        )
