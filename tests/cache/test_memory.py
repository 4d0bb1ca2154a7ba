"""What a paged cache costs: keys and values once, small digests, little slack, few and piecewise growths."""

import math
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor

from sparsekv.digests import DIGESTS
from sparsekv.pages import residency
from sparsekv.pages.layer_pages import LayerPages
from sparsekv.testing.cache_pair import CachePair

HKV, D, P = 2, 32, 16
SETTINGS = {"page_size": P, "dense_layers": 0, "budget": 96, "digest": "minmax"}


def grown(lengths: list[int], num_layers: int = 3, decode: int = 0, **settings: object) -> CachePair:
    """A pair after a left-padded prompt and some decode steps; its plain half is emptied to save time."""
    pair = CachePair(num_layers, 4, HKV, D, torch.bfloat16, **{**SETTINGS, **settings})
    n = max(lengths)
    pair.forward(n, len(lengths), torch.arange(n) >= n - torch.tensor(lengths)[:, None])
    for _ in range(decode):
        pair.forward(1)
    return pair


@pytest.mark.parametrize("lengths", [[500], [1, 1], [300, 20, 100], [16, 16, 16, 16], [0, 257]])
@pytest.mark.parametrize("decode", [0, 17])
def test_bytes_are_bounded(lengths: list[int], decode: int) -> None:
    """Keys and values once, a sixteenth for min/max at 16 tokens a page, a page per sequence, an eighth of slack."""
    pair = grown(lengths, decode=decode)
    tokens = sum(n + decode for n in lengths)
    per_token = 2 * HKV * D * 2
    pages_worth = 3 * (tokens + len(lengths) * P)  # layers x (tokens, and one page more per sequence)
    assert pair.paged.nbytes <= pages_worth * per_token * (1 + 1 / 16) * 1.125
    assert pair.paged.nbytes >= 3 * tokens * per_token * (1 + 1 / 16)


def test_capacity_has_at_most_an_eighth_of_slack() -> None:
    pair = grown([5, 3])
    for t in (1, 30, 1, 200, 1, 1, 90):
        pair.forward(t)
        used = pair.paged._store.table.pool.num_pages
        for pages in pair.paged._store.layers.values():
            assert used <= pages.capacity <= used * 1.125


def test_slack_never_goes_beyond_the_limit() -> None:
    pair = grown([150], max_tokens=160)
    assert all(pages.capacity == 10 for pages in pair.paged._store.layers.values())


def test_dense_layers_pay_for_no_digest() -> None:
    kept = {n: grown([640], dense_layers=n).paged.nbytes for n in (0, 1, 3)}
    kv = kept[3] / 3
    assert kept[0] == 3 * kv * (1 + 1 / 16)
    assert kept[1] == kv + 2 * kv * (1 + 1 / 16)


class Growths:
    """Counts how often and how far pools grow, and how many bytes of pools are alive at the worst moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[int] = Counter()  # by layer: layers grow in turn, so their first tensors tell them apart
        self.alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.peak = 0
        self._grow = residency.grown
        monkeypatch.setattr(residency, "grown", self)

    def __call__(self, old: Tensor, capacity: int) -> Tensor:
        new = self._grow(old, capacity)
        assert capacity > old.shape[0]
        self.count[new.ndim] += 1
        self.alive[len(self.alive)] = (weakref.ref(new), new.nbytes)
        self.peak = max(self.peak, self.bytes_alive)
        return new

    @property
    def bytes_alive(self) -> int:
        return sum(size for ref, size in self.alive.values() if ref() is not None)


def test_growing_holds_one_layer_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A growth copies tensor by tensor; the peak is all pools and, once more, the largest tensor of one layer."""
    growths = Growths(monkeypatch)
    pair = grown([300], num_layers=4)
    for t in (100, 1, 1, 300, 17):
        pair.forward(t)
        assert growths.bytes_alive <= pair.paged.nbytes
        largest = max(pages.kv.nbytes for pages in pair.paged._store.layers.values())
        assert growths.peak <= pair.paged.nbytes + largest
    del pair
    assert growths.bytes_alive == 0


def test_growths_are_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding n tokens copies a pool about log(n) times, not once a page, so that a token costs O(1) on average."""
    growths = Growths(monkeypatch)
    pages = LayerPages(torch.randn(1, HKV, 1, D), None, P, None)
    copied = 0
    for num_pages in range(1, 5001):
        before = pages.capacity
        pages.ensure(num_pages)
        copied += before if pages.capacity > before else 0
    assert sum(growths.count.values()) <= 16 + math.log(5000 / 8) / math.log(1.125)
    assert copied <= 9 * 5000 + 100  # 1 + 1/8 + ... : a geometric series with factor 8/9


def test_reserved_memory_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of known size (a static one) allocates once: no growth while it decodes up to its size."""
    growths = Growths(monkeypatch)
    pair = grown([3, 3], num_layers=2, decode=80, reserve_tokens=2 * 83)
    assert growths.count == {5: 2, 4: 2}  # kv and summary of each layer, once
    pair.check()


@pytest.mark.parametrize("digest", list(DIGESTS))
def test_growing_keeps_what_is_there(digest: str) -> None:
    pair = CachePair(2, 4, HKV, D, torch.bfloat16, **SETTINGS | {"digest": digest})
    for t in (5, 1, 40, 1, 90):
        pair.forward(t, batch=2)
        pair.check()


def test_sizes_of_a_page() -> None:
    pages = LayerPages(torch.randn(1, HKV, 1, D).bfloat16(), None, P, DIGESTS.get("minmax")())
    assert (pages.nbytes, pages.page_nbytes, pages.digest_nbytes) == (0, 0, 0)
    pages.ensure(8)
    assert pages.capacity == 9
    assert pages.page_nbytes == 2 * P * D * 2
    assert pages.digest_nbytes == 2 * D * 2
    assert pages.nbytes == 9 * HKV * (pages.page_nbytes + pages.digest_nbytes)
