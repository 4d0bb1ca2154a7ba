"""Random layers in sparsekv's layout, made on the device in a second or two also for millions of tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsekv import ops
from sparsekv.pages.formats import KEYS, VALUES, Plain
from sparsekv.policies import DecodeStep

from .attention_points import LayerPoint
from .planted_keys import plant

# Pools are filled in pieces of so many elements: what is needed beside them stays small.
CHUNK_ELEMENTS = 1 << 28
FITTED_TOKENS = 1024  # of the prompt that a digest is fitted to


class Inputs:
    """A decode step of several layers with caches of their own and, as in a model, one table for all of them; its
    pages are shuffled.

    Attributes:
        layers: the policies' step of each layer. Digests are there if the policy looks at them.
        block_table: `[b, max_pages]` int32; seq_lens: `[b]` int32, the new token counted.
        sinks: `[hq]` logits, or None.
    """

    def __init__(self, point: LayerPoint, num_layers: int, device: torch.device) -> None:
        self.point, self.device = point, device
        self.generator = torch.Generator(device).manual_seed(point.context)
        num_pages = point.batch * point.num_pages
        order = torch.randperm(num_pages, generator=self.generator, device=device)
        self.block_table = order.int().view(point.batch, point.num_pages)
        self.seq_lens = torch.full((point.batch,), point.context, dtype=torch.int32, device=device)
        self.sinks = self._random(point.geometry.num_q_heads) if point.geometry.sinks else None
        self.layers = [self._step(i) for i in range(num_layers)]

    def contiguous(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values as SDPA reads them, each `[b, hkv, n, d]`."""
        point, geometry, pool = self.point, self.point.geometry, self.layers[layer].kv_pool
        size = (2, point.batch, geometry.num_kv_heads, point.context, geometry.head_dim)
        dense = torch.empty(size, dtype=geometry.dtype, device=pool.device)
        for row, pages in enumerate(self.block_table):  # a sequence at a time: the copies in between stay small
            held = pool.index_select(0, pages)
            for which in (KEYS, VALUES):
                tokens = self.read(held, which).transpose(0, 1).flatten(1, 2)  # [hkv, pages * p, d]
                dense[which, row] = tokens[:, : point.context]
        return dense[0], dense[1]

    def read(self, pool: Tensor, which: int) -> Tensor:
        """Keys or values of pages `[n, 2, hkv, p, record]`, `[n, hkv, p, d]`."""
        kind, geometry = self.point.format, self.point.geometry
        return kind.read(kind.stored(pool, geometry.head_dim, which), geometry.head_dim, geometry.dtype, which)

    def exact(self, rows: slice) -> DecodeStep:
        """The first layer's step of some sequences, by the reference and in float32, the new token in its page."""
        step = self.layers[0]
        return replace(
            step, query=step.query[rows].float(), block_table=step.block_table[rows], seq_lens=step.seq_lens[rows],
            ops=ops.for_backend("reference"), key=None, value=None,
        )  # fmt: skip

    def _pages(self, query: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Keys and values, their digests, and what is fixed of these."""
        geometry, page_size, digest = self.point.geometry, self.point.config.page_size, self.point.digest
        num_pages, heads, d = self.block_table.numel(), geometry.num_kv_heads, geometry.head_dim
        pool = torch.empty(num_pages, 2, heads, page_size, d, dtype=geometry.dtype, device=self.device)
        chunk = max(1, CHUNK_ELEMENTS // pool[0].numel())
        for pages in pool.split(chunk):
            pages.normal_(generator=self.generator)
        if self.point.is_planted:
            plant(self.point, query, pool, self.block_table, self.generator)
        pool = self._in_format(pool, chunk)
        if digest is None:
            return pool, [], []
        fields = digest.fields(page_size, d)
        summary = [pool.new_empty(num_pages, heads, *f.shape, dtype=f.dtype or geometry.dtype) for f in fields]
        state = digest.fit(self._random(1, heads, FITTED_TOKENS, d), None)
        for pages, *kept in zip(*(x.split(chunk) for x in (pool, *summary)), strict=True):
            # A last page that is partly filled is summarised anew by every append.
            every = torch.ones(len(pages), page_size, dtype=torch.bool, device=self.device)
            for field, computed in zip(kept, digest.summarize(self.read(pages, KEYS), every, state), strict=True):
                field.copy_(computed)
        return pool, summary, state

    def _in_format(self, plain: Tensor, chunk: int) -> Tensor:
        """Plain pages `[n, 2, hkv, p, d]` in the format of the settings, made a few at a time."""
        kind, (num_pages, _, heads, page_size, d) = self.point.format, plain.shape
        if isinstance(kind, Plain):
            return plain
        record, dtype = kind.mean_record(page_size, d, plain.dtype)
        pool = torch.empty(num_pages, 2, heads, page_size, record, dtype=dtype, device=self.device)
        offset = torch.arange(page_size, device=self.device)
        for pages, coded in zip(plain.split(max(1, chunk // 8)), pool.split(max(1, chunk // 8)), strict=True):
            where = torch.arange(len(pages), device=self.device)[:, None]
            for which in (KEYS, VALUES):
                records = kind.encode(pages[:, which], None, which).transpose(1, 2)
                kind.write(records, coded, where, offset.expand(len(pages), -1), d, which)
        return pool

    def _step(self, layer_idx: int) -> DecodeStep:
        point, geometry = self.point, self.point.geometry
        key, value = (self._random(point.batch, geometry.num_kv_heads, 1, geometry.head_dim) for _ in range(2))
        query = self._random(point.batch, geometry.num_q_heads, geometry.head_dim)
        kv_pool, summary, state = self._pages(query)
        return DecodeStep(
            layer_idx=layer_idx,
            query=query,
            kv_pool=kv_pool,
            summary=summary,
            state=state,
            block_table=self.block_table,
            seq_lens=self.seq_lens,
            k=point.config.selection_width(point.num_pages),
            scaling=point.scaling,
            config=point.config,
            ops=ops.for_backend(point.config.backend),
            key=key,
            value=value,
        )

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device, dtype=torch.float32).to(
            self.point.geometry.dtype
        )
