"""Page tables on a device: what a batch holds, after any operations, in tensors that stay where they are.

Forks share these tensors, so that a captured step of one is a step of the others: they hold what was looked at last.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

from sparsekv.config import SparseConfig
from sparsekv.errors import CacheFullError
from sparsekv.pages.block_table import MAX_TABLES, BlockTable, DeviceTables
from sparsekv.pages.device_table import FEW_CHANGES, WIDTH_STEP, DeviceTable, width_for
from sparsekv.pages.page_pool import PagePool
from sparsekv.pages.page_store import PageStore

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def in_steps(num_pages: int, device: torch.device, least: int = 6) -> int:
    """The widths of a GPU, for tables on the CPU."""
    return width_for(num_pages, GPU, [least])


def ragged(*lengths: int) -> dict[str, Any]:
    """What to append so that every row gets so many tokens, padded on the left."""
    n = max(lengths)
    return {
        "batch_size": len(lengths),
        "num_new": n,
        "valid": torch.arange(n) >= n - torch.tensor(lengths)[:, None],
    }


def place(table: BlockTable) -> tuple[int, int]:
    """Where a table's tensors are on the device."""
    pages, lengths = table.on(CPU)
    return pages.data_ptr(), lengths.data_ptr()


def check(table: BlockTable) -> tuple[Tensor, Tensor]:
    """Page ids and lengths on the device are those of the batch; where a sequence has ended there is some page."""
    pages, lengths = table.on(CPU)
    width = table.max_pages if table.width is None else table.width(table.max_pages, CPU)
    assert (pages.dtype, tuple(pages.shape)) == (torch.int32, (table.batch_size, width))
    assert (lengths.dtype, lengths.tolist()) == (torch.int32, table.lengths.tolist())
    for row in range(table.batch_size):
        expected = table.pages_of(row).tolist()
        assert pages[row, : len(expected)].tolist() == expected
    assert bool(((pages >= 0) & (pages < max(table.pool.num_pages, 1))).all())
    return pages, lengths


class Batches(RuleBasedStateMachine):
    """Several batches over one pool, looked at now and then: a look finds everything that has changed since."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        width=st.sampled_from([None, in_steps, partial(in_steps, least=2)]),
        max_pages=st.none() | st.integers(30, 90),
    )
    def start(self, page_size: int, width: Any, max_pages: int | None) -> None:
        pool = PagePool(page_size, None if max_pages is None else max_pages * page_size)
        self.all = [BlockTable(pool, width)]
        self.seen: dict[torch.Size, tuple[int, int]] = {}

    def pick(self, data: st.DataObject) -> BlockTable:
        return self.all[data.draw(st.integers(0, len(self.all) - 1), label="table")]

    @rule(data=st.data(), t=st.integers(1, 24), padded=st.booleans())
    def append(self, data: st.DataObject, t: int, padded: bool) -> None:
        table = self.pick(data)
        b = table.batch_size or data.draw(st.integers(1, 4), label="batch")
        rows = st.lists(st.booleans(), min_size=t, max_size=t)
        valid = torch.tensor(data.draw(st.lists(rows, min_size=b, max_size=b), label="valid")) if padded else None
        self.unless_full(lambda: table.append(b, t, valid))

    @rule(data=st.data(), count=st.integers(1, 30))
    def crop(self, data: st.DataObject, count: int) -> None:
        table = self.pick(data)
        if table.num_tokens:
            self.unless_full(lambda: table.crop(min(count, table.num_tokens)))

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        table = self.pick(data)
        if table.batch_size:
            row = st.integers(0, table.batch_size - 1)
            table.select(np.array(data.draw(st.lists(row, min_size=1, max_size=4), label="rows")))

    @precondition(lambda self: len(self.all) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.all.append(self.pick(data).fork())

    @precondition(lambda self: len(self.all) > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.all.remove(self.pick(data))

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        """With the widths of a GPU, the tensors are where any look at such a batch has found them."""
        table = self.pick(data)
        pages, _ = check(table)
        if table.batch_size and table.width is not None:
            assert self.seen.setdefault(pages.shape, place(table)) == place(table)

    def unless_full(self, operation: Any) -> None:
        try:
            operation()
        except CacheFullError:
            assert self.all[0].pool.max_pages is not None

    def teardown(self) -> None:
        """In the end all are right in turn: forks share their tensors, which follow whoever looks."""
        tables = [table for table in getattr(self, "all", []) if table.batch_size]
        for table in tables * 2:
            check(table)


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=80, stateful_step_count=40)


@pytest.mark.parametrize(
    ("num_pages", "least", "expected"),
    [
        (1, 1, 1),
        (2, 1, 512),
        (1, 128, 128),
        (128, 128, 128),
        (129, 128, 512),
        (512, 128, 512),
        (513, 128, 1024),
        (1024, 128, 1024),
        (600, 700, 700),
        (701, 700, 1024),
        (8192, 128, 8192),
    ],
)
def test_widths_on_a_gpu_grow_in_steps(num_pages: int, least: int, expected: int) -> None:
    """Up to the budget, where nothing is chosen, one width; from there in steps."""
    assert WIDTH_STEP == 512
    assert width_for(num_pages, GPU, [least]) == expected


@pytest.mark.parametrize("num_pages", [1, 2, 127, 513])
def test_elsewhere_a_table_is_as_wide_as_it_must_be(num_pages: int) -> None:
    assert width_for(num_pages, CPU, [128]) == num_pages


@pytest.mark.parametrize(("budget", "least"), [(96, 24), (0.3, 1)])
def test_the_first_width_is_the_budget(budget: int | float, least: int) -> None:
    """A fraction is of no width in particular."""
    store = PageStore(SparseConfig(page_size=4, sinks=1, recent=4, budget=budget))
    assert store.table.width is not None
    assert store.table.width(1, GPU) == least
    assert store.table.width(least + 1, GPU) == 512


def test_tables_of_a_gpu_stay_where_they_are() -> None:
    """Whatever happens to a batch of that size within that width: steps, chunks, crops, reordering, other rows."""
    table = BlockTable(PagePool(2), in_steps)
    table.append(**ragged(40, 7, 19))
    where = place(table)
    for _ in range(9):
        table.append(3, 1)
        check(table)
    table.append(3, 300, torch.rand(3, 300) < 0.7)
    check(table)
    table.crop(123)
    check(table)
    table.select(np.array([2, 0, 0]))
    check(table)
    fork = table.fork()
    table.append(3, 1)
    for each in (table, fork, table):  # forks share them, so that they share captured steps
        check(each)
        assert place(each) == where


def test_what_was_handed_out_follows() -> None:
    """The same tensors, changed in place: a captured step reads them where it has always read them."""
    table = BlockTable(PagePool(2), in_steps)
    table.append(2, 13)
    pages, lengths = table.on(CPU)
    table.append(2, 5)
    table.on(CPU)
    assert lengths.tolist() == [18, 18]
    assert pages[1, :9].tolist() == table.pages_of(1).tolist()


def test_forks_take_turns() -> None:
    """In the same tensors, which hold the batch of who used them last, and all of it."""
    table = BlockTable(PagePool(2), in_steps)
    table.append(**ragged(40, 7))
    where = place(table)
    fork = table.fork()
    for _ in range(5):
        table.append(2, 1)
        fork.append(2, 3)
        for each in (table, fork, fork, table):
            check(each)
            assert place(each) == where
    table.append(2, 1)
    table.select(np.array([1, 0]))
    fork.append(2, 1)
    check(fork)
    del fork, each
    table.append(2, 1)
    check(table)
    assert place(table) == where


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_have_tensors_of_their_own(copied: Any) -> None:
    table = BlockTable(PagePool(2), in_steps)
    table.append(**ragged(40, 7))
    where = place(table)
    twin = copied(table)
    table.append(2, 1)
    for each in (twin, table, twin):
        check(each)
        each.append(2, 5)
        check(each)
    assert place(twin) != place(table) == where


def test_a_width_that_comes_back_finds_its_tensors() -> None:
    """Also a batch size; in between, others were looked at, and everything has changed."""
    table = BlockTable(PagePool(2), in_steps)
    table.append(2, 8)
    narrow = place(table)
    table.append(2, 200)
    wide = place(table)
    assert wide != narrow
    table.select(np.array([1, 0, 1]))
    other_batch = place(table)
    table.select(np.array([2, 1]))
    assert place(table) == wide
    check(table)
    table.crop(204)
    assert place(table) == narrow
    check(table)
    table.select(np.array([1, 1, 0]))
    table.append(3, 300)
    assert place(table) == other_batch
    check(table)


def test_only_so_many_tables_are_kept() -> None:
    tables: DeviceTables = {}
    table = BlockTable(PagePool(1), tables=tables)  # as wide as it must be: another table at every step
    table.append(2, 3)
    for _ in range(2 * MAX_TABLES + 3):
        table.append(2, 1)
        check(table)
        assert len(tables) <= MAX_TABLES


@pytest.mark.parametrize(
    "appended",
    [
        [FEW_CHANGES - 1],
        [FEW_CHANGES],
        [FEW_CHANGES + 1],
        [5 * FEW_CHANGES],
        [FEW_CHANGES // 2] * 2,
        [FEW_CHANGES // 2] * 2 + [1],
        [FEW_CHANGES // 2, 5 * FEW_CHANGES, 3],
    ],
)
def test_few_and_many_changes_between_two_looks(appended: list[int]) -> None:
    """Single entries are sent, or the whole table; one page for each token here."""
    table = BlockTable(PagePool(1), lambda num_pages, device: 8192)
    table.append(1, 20)
    where = place(table)
    for t in appended:
        table.append(1, t)
    check(table)
    assert place(table) == where
    table.append(1, 1)  # and from there in single ones again
    check(table)


def test_a_shared_page_that_is_copied_is_sent() -> None:
    table = BlockTable(PagePool(4), in_steps)
    table.append(**ragged(6, 9))
    check(table)
    fork = table.fork()
    before = check(table)[0].clone()
    table.append(2, 1)
    assert not torch.equal(check(table)[0], before)
    check(fork)
    fork.crop(1)
    check(fork)
    check(table)


def test_a_table_of_an_earlier_batch_holds_nothing_stale() -> None:
    """The next batch finds the tensors where they were, and in them its own few pages."""
    tables: DeviceTables = {}
    first = BlockTable(PagePool(1), in_steps, tables)
    first.append(2, 500)
    where = place(first)
    assert int(check(first)[0].max()) == 999
    first.append(2, 3)  # not looked at: it would still have to be sent
    del first
    second = BlockTable(PagePool(1), in_steps, tables)
    second.append(**ragged(9, 0))
    pages, lengths = check(second)
    assert place(second) == where
    assert (int(pages.max()), lengths.tolist()) == (8, [9, 0])
    second.append(2, 1)
    check(second)


def test_a_batch_of_nothing_but_padding() -> None:
    """It holds no page, and the table has a column all the same."""
    table = BlockTable(PagePool(4))
    table.append(**{**ragged(3, 3), "valid": torch.zeros(2, 3, dtype=torch.bool)})
    pages, lengths = check(table)
    assert (pages.tolist(), lengths.tolist()) == ([[0], [0]], [0, 0])
    table.append(2, 1)
    check(table)


def test_a_refused_append_changes_nothing() -> None:
    table = BlockTable(PagePool(4, max_tokens=40), in_steps)
    table.append(**ragged(11, 14))
    pages, lengths = (x.clone() for x in check(table))
    with pytest.raises(CacheFullError):
        table.append(2, 30)
    assert torch.equal(check(table)[0], pages)
    assert torch.equal(check(table)[1], lengths)
    table.append(2, 3)
    check(table)


def test_a_table_made_in_inference_mode_can_be_changed_outside() -> None:
    table = BlockTable(PagePool(2), in_steps)
    with torch.inference_mode():
        table.append(2, 9)
        where = place(table)
    for t in (1, 1, 20):
        table.append(2, t)
        check(table)
    with torch.inference_mode():
        table.append(2, 1)
        check(table)
    assert place(table) != where  # 31 tokens: 16 pages
    table.crop(25)
    assert place(table) == where


def test_a_table_alone() -> None:
    """Without a batch around it: what it has not been told of is not sent, until it forgets."""
    table = DeviceTable(2, 4, CPU)
    pages, lengths = np.arange(6, dtype=np.int32).reshape(2, 3), np.array([5, 6])
    table.sync(pages, lengths)
    assert table.shape == (2, 4)
    assert table.pages.tolist() == [[0, 1, 2, 0], [3, 4, 5, 0]]
    pages, lengths = pages + 10, lengths + 1
    table.sync(pages, lengths)
    assert table.pages.tolist() == [[0, 1, 2, 0], [3, 4, 5, 0]]
    assert table.lengths.tolist() == [5, 6]
    table.entries_changed(np.array([0, 1]), np.array([2, 0]))
    table.entries_changed(np.array([0]), np.array([2]))  # once more: it is sent as it is now, once
    table.lengths_changed()
    table.sync(pages, lengths)
    assert table.pages.tolist() == [[0, 1, 12, 0], [13, 4, 5, 0]]
    assert table.lengths.tolist() == [6, 7]
    table.forget()
    table.sync(pages, lengths)
    assert table.pages.tolist() == [[10, 11, 12, 0], [13, 14, 15, 0]]


@pytest.mark.parametrize(("changes", "whole"), [([0], False), ([5], False), ([1000, 24], False), ([1000, 25], True)])
def test_single_entries_are_sent_or_everything(changes: list[int], whole: bool) -> None:
    """Up to some number what has not changed is not sent; and nothing is sent twice."""
    assert FEW_CHANGES == 1024
    pages, lengths = np.arange(2048, dtype=np.int32)[None], np.array([2048])
    table = DeviceTable(1, 2048, CPU)
    table.sync(pages, lengths)
    table.pages.fill_(-1)
    first = 0
    for count in changes:
        columns = np.arange(first, first + count)
        table.entries_changed(np.zeros(count, np.int64), columns)
        first += count
    table.sync(pages, lengths)
    assert (table.pages[0] == torch.from_numpy(pages[0])).sum() == (2048 if whole else sum(changes))
    table.pages.fill_(-1)
    table.sync(pages, lengths)
    assert bool((table.pages == -1).all())
