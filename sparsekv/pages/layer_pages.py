"""One layer's tensors: the keys and values of its pages, and their digests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv.digests import Digest
from sparsekv.pages.block_table import PageCopies
from sparsekv.policies import Reads

GROWTH_SLACK = 8  # a pool that must grow gets an eighth more than it needs, so that it grows seldom
RESERVE_SLACK = 64  # pages more than reserved, at most


class LayerPages:
    """Tensors of one layer, indexed by page id; caches forked from one another share them.

    Attributes:
        kv: `[capacity, 2, hkv, p, d]`, keys at 0 and values at 1. Tokens not written yet hold arbitrary memory.
        summary: the digest's fields, each `[capacity, hkv, ...]`; empty if the layer is never scored.
        state: the digest's fixed per-head tensors `[hkv, ...]`.
        addresses: where all of these lie.
        page_nbytes, digest_nbytes: bytes of one page's keys and values, and of its digest, of one kv head.
    """

    def __init__(self, key: Tensor, valid: Tensor | None, page_size: int, digest: Digest | None) -> None:
        num_kv_heads, head_dim = key.shape[1], key.shape[3]
        fields = digest.fields(page_size, head_dim) if digest is not None else []
        with torch.inference_mode(False), torch.no_grad():  # else a later call outside inference mode cannot write
            self.kv = key.new_empty(0, 2, num_kv_heads, page_size, head_dim)
            self.summary = [key.new_empty(0, num_kv_heads, *f.shape, dtype=f.dtype or key.dtype) for f in fields]
            self.state = [s.clone() for s in digest.fit(key.detach(), valid)] if digest is not None else []
        self._note()

    @property
    def capacity(self) -> int:
        """Pages there is memory for."""
        return self.kv.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and digests, growth slack counted."""
        return sum(t.nbytes for t in (self.kv, *self.summary, *self.state))

    def nbytes_to_choose(self, reads: Reads) -> int:
        """Bytes of a page, in one kv head, that a policy reads to decide whether to read all of it."""
        return {Reads.NOTHING: 0, Reads.DIGESTS: self.digest_nbytes, Reads.KEYS: self.page_nbytes // 2}[reads]

    def _note(self) -> None:
        """Notes what every decode step asks for, after the tensors were made or moved."""
        tensors = (self.kv, *self.summary, *self.state)
        self.addresses = tuple(tensor.data_ptr() for tensor in tensors)
        self.page_nbytes = self.kv[0, :, 0].nbytes if self.capacity else 0
        self.digest_nbytes = sum(field[0, 0].nbytes for field in self.summary) if self.capacity else 0

    def __getstate__(self) -> dict[str, Any]:
        return {"kv": self.kv, "summary": self.summary, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._note()

    def is_like(self, other: LayerPages) -> bool:
        """Whether pages of both hold the same, in the same places."""
        mine, theirs = ((p.kv, *p.summary, *p.state) for p in (self, other))
        return [(t.shape[1:], t.dtype, t.device) for t in mine] == [(t.shape[1:], t.dtype, t.device) for t in theirs]

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
                self.summary[i] = _grown(self.summary[i], capacity)
            self.kv = _grown(self.kv, capacity)  # last, as it says how much room there is
        finally:  # memory may have run out on the way
            self._note()

    def copy_pages(self, copies: PageCopies) -> None:
        """Copies whole pages and their digests."""
        source = torch.from_numpy(copies.source).to(self.kv.device)
        target = torch.from_numpy(copies.target).to(self.kv.device)
        for tensor in (self.kv, *self.summary):
            tensor[target] = tensor[source]


def _grown(old: Tensor, capacity: int) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        new = old.new_empty(capacity, *old.shape[1:])
        new[: old.shape[0]] = old
        return new
