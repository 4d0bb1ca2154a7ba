"""One layer's pages: their keys and values, in a format and in a place, and their digests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv import ops
from sparsekv.digests import Digest
from sparsekv.pages import residency
from sparsekv.pages.formats import KEYS, page_format
from sparsekv.pages.page_pool import PageIds
from sparsekv.pages.page_rows import PageCopies
from sparsekv.policies import Reads

GROWTH_SLACK = 8  # a pool that must grow gets an eighth more than it needs, so that it grows seldom
RESERVE_SLACK = 64  # pages more than reserved, at most


class LayerPages:
    """Tensors of one layer, indexed by page id; caches forked from one another share them.

    Args:
        key: `[b, hkv, t, d]`, the layer's first; valid: `[b, t]` bool, or None when all are.
        page_size: in tokens.
        digest: what is kept of a page to score it; None: the layer is never scored.
        format, where: the name of what a page looks like, and where it lies.
        value_dim: channels of values, if they are not as many as those of keys.
        is_shared: whether values are the first channels of keys. Then they are kept once; else narrow ones lie in
            pages with zeros behind them.

    Attributes:
        no_tokens: `[1, hkv, 0, d]`: of which shape, dtype and device keys and values are.
        residency: where keys and values lie, in records of `format`. Tokens not written yet hold arbitrary memory.
        summary: the digest's fields, each `[capacity, hkv, ...]`; empty if the layer is never scored.
        state: the digest's fixed per-head tensors `[hkv, ...]`.
        addresses: where all of these lie.
        page_nbytes, key_nbytes, digest_nbytes: bytes of one page's keys and values, of its keys, and of its digest,
            of one kv head.
    """

    def __init__(
        self,
        key: Tensor,
        valid: Tensor | None,
        page_size: int,
        digest: Digest | None,
        format: str = "plain",
        where: type[residency.Residency] = residency.OnDevice,
        value_dim: int | None = None,
        is_shared: bool = False,
    ) -> None:
        num_kv_heads, head_dim = key.shape[1], key.shape[3]
        self.value_dim, num_halves = value_dim or head_dim, 1 if is_shared else 2
        fields = digest.fields(page_size, head_dim) if digest is not None else []
        self.format_name, self.format = format, page_format(format)
        record, dtype = self.format.mean_record(page_size, head_dim, key.dtype, num_halves)
        with torch.inference_mode(False), torch.no_grad():  # else a later call outside inference mode cannot write
            self.no_tokens = key.new_empty(1, num_kv_heads, 0, head_dim)
            self.residency = where(key.new_empty(0, num_halves, num_kv_heads, page_size, record, dtype=dtype))
            self.summary = [key.new_empty(0, num_kv_heads, *f.shape, dtype=f.dtype or key.dtype) for f in fields]
            self.state = [s.clone() for s in digest.fit(key.detach(), valid)] if digest is not None else []
        self._note()

    @property
    def kv(self) -> Tensor:
        """The frames that keys and values lie in, `[frames, 2, hkv, p, record]`, keys at 0 and values at 1, or
        `[frames, 1, ...]`, of keys that are the values, too."""
        return self.residency.pool

    @property
    def capacity(self) -> int:
        """Pages there is memory for."""
        return self.residency.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and digests, growth slack counted."""
        return self.residency.nbytes + sum(t.nbytes for t in (*self.summary, *self.state))

    def nbytes_to_choose(self, reads: Reads) -> int:
        """Bytes of a page, in one kv head, that a policy reads to decide whether to read all of it."""
        return {Reads.NOTHING: 0, Reads.DIGESTS: self.digest_nbytes, Reads.KEYS: self.key_nbytes}[reads]

    def _note(self) -> None:
        """Notes what every decode step asks for, after the tensors were made or moved."""
        tensors = (self.kv, *self.summary, *self.state)
        self.addresses = tuple(tensor.data_ptr() for tensor in tensors)
        self.page_nbytes = self.kv.shape[1] * self.kv.shape[3:].numel() * self.kv.itemsize if self.capacity else 0
        keys = self.format.stored(self.kv[:0], self.no_tokens.shape[3], KEYS)
        self.key_nbytes = keys.shape[2:].numel() * keys.itemsize if self.capacity else 0
        self.digest_nbytes = sum(field[0, 0].nbytes for field in self.summary) if self.capacity else 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._note()

    def is_like(self, other: LayerPages) -> bool:
        """Whether pages of both hold the same, in the same places."""
        mine, theirs = (
            [(type(p.format), type(p.residency), p.value_dim)]
            + [(t.shape[1:], t.dtype, t.device) for t in (p.no_tokens, p.kv, *p.summary, *p.state)]
            for p in (self, other)
        )
        return mine == theirs

    def ensure(self, num_pages: int, most: int | None = None, reserve: int = 0) -> None:
        """Makes room for the page ids below `num_pages`; tensors are copied one by one.

        Args:
            most: never more than this, unless asked for.
            reserve: pages to make room for at once; some more are, as last pages may be partly filled.
        """
        if num_pages <= self.capacity:
            return
        slack = max(num_pages, reserve) // GROWTH_SLACK
        capacity = reserve + min(slack, RESERVE_SLACK) if num_pages <= reserve else num_pages + slack
        capacity = capacity if most is None else max(num_pages, min(capacity, most))
        try:
            for i in range(len(self.summary)):
                self.summary[i] = residency.grown(self.summary[i], capacity)
            self.residency.ensure(capacity)  # last, as it says how much room there is
        finally:  # memory may have run out on the way
            self._note()

    def read(self, pages: PageIds) -> tuple[Tensor, list[Tensor]]:
        """Whole pages `[n, 2, hkv, p, record]` and their digests, on the device."""
        ids = torch.from_numpy(pages).to(self.kv.device)
        return self.residency.read(pages), [field[ids] for field in self.summary]

    def write(self, pages: PageIds, content: Tensor, summary: list[Tensor]) -> None:
        """Puts what `read` gives in the place of other pages, each named once."""
        self.residency.write(pages, content)
        ids = torch.from_numpy(pages).to(self.kv.device)
        for field, fresh in zip(self.summary, summary, strict=True):
            field[ids] = fresh

    def copy_pages(self, copies: PageCopies) -> None:
        """Copies whole pages and their digests."""
        self.write(copies.target, *self.read(copies.source))

    def tokens(self, pages: PageIds, namespace: Any = None) -> tuple[Tensor, Tensor]:
        """Keys `[b, hkv, n * p, d]` and values `[b, hkv, n * p, dv]` of pages `[b, n]`; what no token was written to
        is arbitrary.

        Args:
            namespace: of the ops; None: whatever serves the device.
        """
        like, read = self.no_tokens, (namespace or ops.for_backend("auto")).read_pages
        content = self.residency.read(pages.reshape(-1)).contiguous()
        found = read(content, pages.shape[0], like.shape[3], like.dtype, self.format_name)
        return found[KEYS], found[-1][..., : self.value_dim]
