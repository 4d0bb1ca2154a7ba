"""PagePool: pages are counted, never handed out twice, and refused before anything changes."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.errors import CacheFullError
from sparsekv.pages.page_pool import PagePool


def ids(*pages: int) -> np.ndarray:
    return np.array(pages, np.int32)


def test_hands_out_the_lowest_free_ids() -> None:
    pool = PagePool(16)
    assert pool.allocate(4).tolist() == [0, 1, 2, 3]
    pool.release(ids(2, 0))
    assert (pool.num_pages, pool.num_free) == (4, 2)
    assert pool.allocate(3).tolist() == [0, 2, 4]
    assert (pool.num_pages, pool.num_free) == (5, 0)
    assert pool.allocate(0).dtype == pool.allocate(1).dtype == np.int32


def test_counts_references() -> None:
    pool = PagePool(16)
    pages = pool.allocate(2)
    pool.share(ids(0, 0, 1))
    assert pool.references(pages).tolist() == [3, 2]
    pool.release(ids(0, 0, 1))
    assert pool.references(pages).tolist() == [1, 1]
    pool.release(pages)
    assert pool.num_free == 2


@pytest.mark.parametrize(("max_tokens", "pages"), [(16, 1), (31, 1), (32, 2), (100, 6)])
def test_the_limit_is_in_whole_pages(max_tokens: int, pages: int) -> None:
    pool = PagePool(16, max_tokens)
    assert pool.max_pages == pages
    pool.check_room(pages)
    with pytest.raises(CacheFullError):
        pool.check_room(pages + 1)


def test_a_full_pool_refuses_before_anything_changes() -> None:
    pool = PagePool(16, 64)
    pool.allocate(3)
    pool.release(ids(1))
    with pytest.raises(CacheFullError) as raised:
        pool.allocate(3)
    message = str(raised.value)
    assert "needs 3 more pages of 16 tokens" in message
    assert "leaves 2 of 4" in message
    assert "Nothing was written. Raise max_tokens" in message
    assert (pool.num_pages, pool.num_free) == (3, 1)
    assert pool.allocate(2).tolist() == [1, 3]


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=40))
def test_against_a_dictionary(steps: list[tuple[str, int]]) -> None:
    """Any sequence of calls: the counts are those of a plain dictionary, and no used page is handed out."""
    pool, counts = PagePool(4, 80), dict[int, int]()
    for what, n in steps:
        used = [page for page, count in counts.items() if count]
        if what == "allocate":
            if n > 20 - len(used):
                with pytest.raises(CacheFullError):
                    pool.allocate(n)
                continue
            free = [page for page in range(20) if not counts.get(page)]
            assert pool.allocate(n).tolist() == free[:n]
            counts |= dict.fromkeys(free[:n], 1)
        else:
            some = used[:n]
            getattr(pool, what)(ids(*some))
            counts |= {page: counts[page] + (1 if what == "share" else -1) for page in some}
    assert pool.references(np.arange(pool.num_pages, dtype=np.int32)).tolist() == list(counts.values())
    assert pool.num_free == list(counts.values()).count(0)


def test_a_copy_counts_only_what_comes_along() -> None:
    """Tables that are copied with the pool bring their references; those left behind must not hold pages in it."""
    pool = PagePool(16)
    pool.allocate(3)
    twin = copy.deepcopy(pool)
    assert (twin.num_pages, twin.num_free) == (3, 3)
    assert pool.num_free == 0
