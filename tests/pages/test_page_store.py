"""PageStore and BlockTable against a model made of Python lists, under any sequence of operations and forks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from sparsekv.config import SparseConfig
from sparsekv.errors import CacheFullError
from sparsekv.pages.formats import page_format
from sparsekv.pages.page_store import PageStore
from sparsekv.testing.consistency import assert_consistent

HKV, D = 2, 8
LAYERS = (0, 1)  # the first leads: the table moves when it appends
TOKENS = torch.randn(2, 5000, 2, HKV, D, generator=torch.Generator().manual_seed(0))  # [layer, token, k or v, hkv, d]

Rows = list[list["int | None"]]  # a token's number, or None for padding


def tokens(layer: int, rows: Rows, padding: float, format: str = "plain") -> tuple[Tensor, Tensor]:
    """Keys and values `[b, hkv, n, d]` of rows of token numbers; what a format leaves of them."""
    b, n = len(rows), len(rows[0])
    kv = torch.full((2, b, HKV, n, D), padding)
    for row, numbers in enumerate(rows):
        for column, number in enumerate(numbers):
            if number is not None:
                kv[:, row, :, column] = TOKENS[layer, number]
    kind = page_format(format)
    key, value = (kind.decode(kind.encode(x, None, which), D, x.dtype, which) for which, x in enumerate(kv))
    return key, value


class Modelled:
    """A store and the rows of token numbers that it must hold."""

    def __init__(self, store: PageStore, rows: Rows) -> None:
        self.store, self.rows = store, rows

    @property
    def length(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    def append(self, new: Rows, ended: list[int] | None = None) -> None:
        """Every layer gets the tokens; padding among them is NaN. The rows change only if the store takes them.

        `ended`: the mask hides so many columns at the end of each row, whatever they are, that it has shown before.
        """
        past = self.rows or [[] for _ in new]
        past = [row[: len(row) - n] + [None] * n for row, n in zip(past, ended or [0] * len(past), strict=True)]
        after = [old + added for old, added in zip(past, new, strict=True)]
        visible = torch.tensor([[number is not None for number in row] for row in after])
        length = self.length
        for layer in LAYERS:
            key, value = tokens(layer, new, padding=float("nan"))
            seen = None if bool(visible.all()) else visible
            self.store.write(layer, *self.store.accept(layer, length, key, value, seen, scored=True))
        self.rows = after

    def crop(self, count: int) -> None:
        self.store.crop(count)
        self.rows = [row[: len(row) - count] for row in self.rows]

    def select(self, rows: list[int]) -> None:
        self.store.select(np.array(rows))
        self.rows = [list(self.rows[row]) for row in rows]

    def fork(self) -> Modelled:
        return Modelled(self.store.fork(self.store.config), [list(row) for row in self.rows])

    def check(self) -> None:
        table = self.store.table
        assert table.num_tokens == self.length
        assert table.lengths.tolist() == [sum(number is not None for number in row) for row in self.rows]
        for layer in LAYERS if self.rows else ():
            held = tokens(layer, self.rows, 0.0, self.store.config.page_format)
            for stored, expected in zip(self.store.dense(layer), held, strict=True):
                assert torch.equal(stored, expected)


class Forks(RuleBasedStateMachine):
    """Several stores over one pool, each doing as it likes; what one writes, no other may see."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4, 8]),
        digest=st.sampled_from(["minmax", "sign_sketch"]),
        max_pages=st.none() | st.integers(6, 40),
        kv=st.sampled_from(["plain", "int8", "int8-int4"]),
    )
    def start(self, page_size: int, digest: str, max_pages: int | None, kv: str) -> None:
        limit = None if max_pages is None else max_pages * page_size
        pages = {"page_size": page_size, "kv": kv, "max_tokens": limit}
        config = SparseConfig(digest=digest, sinks=0, recent=1, budget=1.0, **pages)
        self.next_number = 0
        self.all = [Modelled(PageStore(config), [])]

    def pick(self, data: st.DataObject) -> Modelled:
        return self.all[data.draw(st.integers(0, len(self.all) - 1), label="store")]

    def numbered(self, mask: list[list[bool]]) -> Rows:
        rows: Rows = []
        for row in mask:
            rows.append([self.next_number + i if real else None for i, real in enumerate(row)])
            self.next_number += len(row)
        return rows

    @rule(data=st.data(), t=st.integers(1, 9), padded=st.booleans(), some_ended=st.booleans())
    def append(self, data: st.DataObject, t: int, padded: bool, some_ended: bool) -> None:
        """A prompt, a chunk or one token, with or without padding, also after rows that ended early; a refusal
        leaves everything as it was."""
        one = self.pick(data)
        b = len(one.rows) or data.draw(st.integers(1, 3), label="batch")
        real = st.booleans() if padded else st.just(True)
        mask = data.draw(st.lists(st.lists(real, min_size=t, max_size=t), min_size=b, max_size=b), label="mask")
        counts = st.lists(st.integers(0, one.length), min_size=b, max_size=b)
        ended = data.draw(counts, label="ended") if some_ended else None
        self.unless_full(lambda: one.append(self.numbered(mask), ended))

    @rule(data=st.data(), count=st.integers(1, 12))
    def crop(self, data: st.DataObject, count: int) -> None:
        one = self.pick(data)
        if one.length:
            self.unless_full(lambda: one.crop(min(count, one.length)))

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """Reorders, drops and repeats rows."""
        one = self.pick(data)
        if one.rows:
            row = st.integers(0, len(one.rows) - 1)
            one.select(data.draw(st.lists(row, min_size=1, max_size=4), label="rows"))

    @precondition(lambda self: len(self.all) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        one = self.pick(data)
        if one.rows:
            self.all.append(one.fork())

    @precondition(lambda self: len(self.all) > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.all.remove(self.pick(data))

    def unless_full(self, operation: object) -> None:
        pool = self.all[0].store.table.pool
        before = pool.references(np.arange(pool.num_pages, dtype=np.int32)).tolist()
        try:
            operation()
        except CacheFullError:
            assert pool.max_pages is not None
            after = pool.references(np.arange(pool.num_pages, dtype=np.int32)).tolist()
            assert after == before

    @invariant()
    def all_hold_what_the_model_holds(self) -> None:
        for one in self.all:
            one.check()

    @invariant()
    def pages_and_digests_are_consistent(self) -> None:
        assert_consistent(*(one.store for one in self.all))
        pool = self.all[0].store.table.pool
        assert pool.max_pages is None or pool.num_pages <= pool.max_pages


TestForks = Forks.TestCase
TestForks.settings = settings(max_examples=60, stateful_step_count=25)


def modelled(rows: list[str], page_size: int = 4, **limits: int) -> Modelled:
    """A store that holds rows like "..xx": padding and tokens, numbered in order."""
    config = SparseConfig(page_size=page_size, sinks=0, recent=1, budget=1.0, **limits)
    one = Modelled(PageStore(config), [])
    one.append(numbers(rows))
    return one


def numbers(rows: list[str], start: int = 0) -> Rows:
    width = len(rows[0])
    return [[start + i * width + j if c == "x" else None for j, c in enumerate(row)] for i, row in enumerate(rows)]


def test_padding_takes_no_memory() -> None:
    one = modelled(["...........x", "xxxxxxxxxxxx"])
    assert one.store.table.num_pages.tolist() == [1, 3]
    assert one.store.table.pool.num_pages == 4


def test_a_fork_shares_full_pages_and_copies_the_one_it_writes_to() -> None:
    one = modelled(["xxxxxx"])
    two = one.fork()
    assert one.store.table.pool.num_pages == 2
    two.append(numbers(["x"], start=100))
    assert two.store.table.pages_of(0).tolist() == [0, 2]
    one.append(numbers(["x"], start=200))
    assert one.store.table.pages_of(0).tolist() == [0, 1]  # it was the last who held page 1: no second copy
    for each in (one, two):
        each.check()
    assert_consistent(one.store, two.store)


def test_repeated_rows_share_until_they_differ() -> None:
    one = modelled(["xxxxxx"])
    one.select([0, 0, 0])
    assert one.store.table.pool.num_pages == 2
    one.append(numbers(["x", "x", "x"], start=100))
    assert one.store.table.pool.num_pages == 4  # two copies; the last row keeps the original
    one.check()
    assert_consistent(one.store)


def test_a_crop_into_a_shared_page_leaves_the_others_digest_alone() -> None:
    one = modelled(["xxxxxxxx"])
    two = one.fork()
    two.crop(2)
    one.check()
    two.check()
    assert_consistent(one.store, two.store)
    assert two.store.table.pages_of(0).tolist() == [0, 2]


def test_rows_that_ended_early_give_their_last_tokens_back() -> None:
    """A fork keeps them, and nothing is lost where there is no room for what comes next."""
    one = modelled(["xxxxxxxx", ".xxxxxxx"], max_tokens=24)
    two = one.fork()
    with pytest.raises(CacheFullError):  # the page that is cut is the fork's, too
        one.append(numbers(["xxxxx", "xxxxx"], start=100), ended=[0, 3])
    two.check()
    one.append(numbers(["....", "xxxx"], start=100), ended=[0, 3])
    for each in (one, two):
        each.check()
    assert one.store.table.lengths.tolist() == [8, 8]
    assert_consistent(one.store, two.store)


def test_dropping_a_fork_frees_its_pages() -> None:
    one = modelled(["xxxxxx", "xxxxxx"])
    two = one.fork()
    two.append(numbers(["xxxx", "xxxx"], start=50))
    pool = one.store.table.pool
    used = pool.num_pages - pool.num_free
    del two
    assert pool.num_pages - pool.num_free == 4 < used
    assert_consistent(one.store)
    one.store.select(np.arange(0))
    assert pool.num_free == pool.num_pages


def test_a_deep_copy_is_on_its_own() -> None:
    """Also when only one of two forks is copied: the other must not hold pages in the copy's pool."""
    one = modelled(["xxxxxx"])
    two = one.fork()
    twin = copy.deepcopy(one)
    assert_consistent(twin.store)
    both = copy.deepcopy([one, two])
    assert_consistent(*(each.store for each in both))
    for each in (twin, *both):
        each.append(numbers(["xxxxx"], start=100))
        each.check()
    assert_consistent(twin.store)
    assert_consistent(*(each.store for each in both))
    one.check()
    assert_consistent(one.store, two.store)


def test_the_limit_counts_all_forks_and_refusals_change_nothing() -> None:
    one = modelled(["xxxxxx"], max_tokens=12)
    two = one.fork()
    two.append(numbers(["x"], start=100))
    for each in (one, two):
        with pytest.raises(CacheFullError, match="leaves 0 of 3"):
            each.append(numbers(["xxxx"], start=200))
        each.check()
    assert_consistent(one.store, two.store)
    two.append(numbers(["x"], start=300))
    two.check()


def test_a_crop_works_in_a_full_pool() -> None:
    """It may have to copy a shared page; the pages it drops are room for that. Without any, nothing changes."""
    one = modelled(["xxxxxx"], max_tokens=16)
    two = one.fork()
    two.append(numbers(["xxxxx"], start=100))
    assert one.store.table.pool.num_pages == 4  # one: 0 1, two: 0 2 3
    two.crop(9)
    assert_consistent(one.store, two.store)
    two.append(numbers(["xxxx"], start=200))
    three = one.fork()
    assert one.store.table.pool.num_free == 0
    with pytest.raises(CacheFullError):
        three.store.crop(1)
    for each in (one, two, three):
        each.check()
    assert_consistent(one.store, two.store, three.store)


def test_no_room_is_asked_for_what_is_not_written() -> None:
    """Rows of nothing but padding need no page, in an empty store and in a full one."""
    one = modelled(["....", "...."])
    assert one.store.table.pool.num_pages == 0
    one.append(numbers(["...x", "...."], start=10))
    one.check()
    assert_consistent(one.store)


def test_reserved_pages_are_allocated_at_once() -> None:
    config = SparseConfig(page_size=4, sinks=0, recent=1, budget=1.0)
    one = Modelled(PageStore(config, reserve_pages=10), [])
    one.append(numbers(["xxxx"]))
    kv = one.store.layers[0].kv
    assert kv.shape[0] >= 10
    for start in range(100, 136, 4):
        one.append(numbers(["xxxx"], start=start))
    assert one.store.layers[0].kv is kv
