"""What must hold between the pages, the tables and the digests of caches that share a pool, after any operation."""

from __future__ import annotations

import numpy as np
import torch

from sparsekv.pages.page_store import PageStore
from sparsekv.pages.store_part import StorePart


def assert_consistent(*stores: PageStore) -> None:
    """Checks all stores of one pool: every page has as many references as tables that hold it, and every digest is
    the one that the page's tokens give."""
    assert_references(*stores)
    for window in stores[0].windows:
        assert_references(*(store.windows[window] for store in stores))
    for store in stores:
        assert_digests_fresh(store)


def assert_references(*stores: StorePart) -> None:
    """A page counts the sequences that hold it, no more and no fewer; these stores are all that use the pool."""
    pool = stores[0].table.pool
    held = [store.table.pages_of(row) for store in stores for row in range(store.table.batch_size)]
    counts = np.bincount(np.concatenate([np.zeros(0, np.int32), *held]), minlength=pool.num_pages)
    references = pool.references(np.arange(pool.num_pages, dtype=np.int32))
    assert (counts == references).all(), f"pages are held {counts.tolist()} times, counted {references.tolist()}"
    assert pool.num_free == int((counts == 0).sum())
    for store in stores:
        for row in range(store.table.batch_size):
            pages = store.table.pages_of(row)
            assert len(set(pages.tolist())) == len(pages), "a sequence holds a page twice"


def assert_digests_fresh(store: StorePart) -> None:
    """The digest of every page in the tables equals one made anew from the tokens that the table says are there; on a
    GPU, of every full page: `sparse_decode` leaves the digest of a last page for when it is full."""
    page_size = store.config.page_size
    for layer in store.layers.values():
        for row in range(store.table.batch_size if layer.summary else 0):
            pages = torch.from_numpy(store.table.pages_of(row).copy()).long()
            if layer.kv.is_cuda:
                pages = pages[: int(store.table.lengths[row]) // page_size]
            if not len(pages):
                continue
            positions = torch.arange(len(pages) * page_size, device="cpu").view(-1, page_size)
            valid = positions < int(store.table.lengths[row])
            keys = layer.tokens(pages.int().numpy()[:, None])[0]
            fresh = store.digest.summarize(keys, valid.to(layer.kv.device), layer.state)
            stored = [field[pages] for field in layer.summary]
            fresh = [x.to(field.dtype) for x, field in zip(fresh, stored, strict=True)]
            if store.digest.why_unlike(stored, fresh, page_size, keys.shape[-1]):
                torch.testing.assert_close(stored, fresh, equal_nan=True, rtol=1e-6, atol=1e-6)
