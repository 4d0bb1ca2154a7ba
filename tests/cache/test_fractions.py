"""A budget that is a fraction, and a least share: of each row by itself, whatever else is in the batch and however
wide the table is.

Tables on a GPU are wider than on a CPU; here a CPU's are made as wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sparsekv.cache import PagedCache
from sparsekv.policies import POLICIES, DecodeStep
from sparsekv.testing.cache_pair import tiny_config

LENGTHS = (90, 61, 33, 5)
HQ, HKV, D = 4, 2, 8


def decoded(
    rows: Sequence[int], width: int | None = None, **settings: object
) -> tuple[Tensor, list[int], PagedCache]:
    """Attention `[rows, hq, d]` of one more token of these rows, pages that each row's first head reads, cache."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randn(len(LENGTHS), 2, HKV, max(LENGTHS) + 1, D, generator=generator)[list(rows)]
    query = torch.randn(len(LENGTHS), HQ, 1, D, generator=generator)[list(rows)]
    lengths = torch.tensor(LENGTHS)[list(rows)]
    n = int(lengths.max())
    tokens = tokens[:, :, :, -n - 1 :]
    visible = torch.arange(n + 1) >= n - lengths[:, None]
    cache = PagedCache(tiny_config(1, HQ, HKV, D), dense_layers=0, sinks=1, recent=3, **settings)
    if width is not None:
        cache._store.table.width = lambda num_pages, device: width
    read: list[int] = []

    def note(step: DecodeStep, slots: Tensor | None) -> None:
        pages = -(-step.seq_lens // step.config.page_size)
        read.extend((pages if slots is None else (slots[:, 0] >= 0).sum(1)).tolist())

    cache.observers.append(note)
    cache.update(tokens[:, 0, :, :-1], tokens[:, 1, :, :-1], 0)
    layer = cache.layers[0]
    layer.commit(visible[:, :-1])
    cache.update(tokens[:, 0, :, -1:], tokens[:, 1, :, -1:], 0)
    return layer.decode(query, 0.5, 0.0, None, visible)[:, :, 0], read, cache


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("budget", [0.1, 0.5, 0.77, 0.95, 1.0])
@pytest.mark.parametrize("page_size", [3, 16])
def test_a_row_reads_the_same_alone_and_in_a_batch(policy: str, budget: float, page_size: int) -> None:
    """On tables as wide as they must be, and on wider ones."""
    settings = {"policy": policy, "budget": budget, "page_size": page_size}
    together, read, cache = decoded(range(len(LENGTHS)), **settings)
    expected = [
        cache.config.pages_for(n + 1)
        if policy == "all"
        else min(cache.config.pages_for(n + 1), cache.config.budget_pages(n + 1))
        for n in LENGTHS
    ]
    assert read == expected
    assert cache.stats.pages_read == HKV * sum(expected)
    for width in (None, 40, 512):
        for row in range(len(LENGTHS)):
            alone, read, _ = decoded([row], width, **settings)
            assert read == [expected[row]]
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)


def test_a_short_sequence_reads_a_fraction_of_its_own_pages() -> None:
    """0.77 of 62 tokens are 48: three pages of the four, not all because 0.77 of four pages are rounded up."""
    _, read, cache = decoded([1], policy="top_k", budget=0.77, page_size=16)
    assert read == [3]
    assert (cache.stats.sparse_steps, cache.stats.dense_steps) == (1, 0)


@pytest.mark.parametrize(("budget", "is_sparse"), [(1.0, False), (0.99, False), (0.89, False), (0.87, True)])
@pytest.mark.parametrize("width", [None, 512])
def test_all_of_the_context_is_nothing_to_choose(budget: float, is_sparse: bool, width: int | None) -> None:
    """Rounded up to pages, 0.88 of 91 tokens are all six: no digest is read."""
    _, _, cache = decoded([0], width, policy="top_k", budget=budget, page_size=16)
    assert (cache.stats.sparse_steps, cache.stats.dense_steps) == ((1, 0) if is_sparse else (0, 1))
    assert is_sparse or cache.stats.bytes_read == cache.stats.bytes_total


def test_digests_are_read_if_one_row_has_something_to_choose() -> None:
    _, read, cache = decoded([0, 3], policy="top_k", budget=0.87, page_size=16)
    assert read == [5, 1]
    assert cache.stats.sparse_steps == 1


def test_pages_that_are_always_read_are_nothing_to_choose() -> None:
    """Five tokens and the new one lie in one page of sixteen."""
    _, _, cache = decoded([3], policy="top_k", budget=0.1, page_size=16)
    assert (cache.stats.sparse_steps, cache.stats.dense_steps) == (0, 1)


SHARES = {"policy": "top_k", "group_pooling": "share", "min_share": 0.25}


@pytest.mark.parametrize("budget", [48, 96, 0.5, 1.0])
@pytest.mark.parametrize("page_size", [3, 16])
def test_a_row_has_its_own_least_share(budget: int | float, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, if it is short: then it reads what the budget allows, alone and beside longer ones."""
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 40)
    settings = SHARES | {"budget": budget, "page_size": page_size}
    together, read, cache = decoded(range(len(LENGTHS)), **settings)
    allowed = [min(cache.config.pages_for(n + 1), cache.config.budget_pages(n + 1)) for n in LENGTHS]
    assert read[2:] == allowed[2:]
    assert all(ours <= most for ours, most in zip(read, allowed, strict=True))
    assert budget != 1.0 or sum(read) < sum(allowed)
    for width in (None, 40, 512):
        for row in range(len(LENGTHS)):
            alone, its, _ = decoded([row], width, **settings)
            assert its == [read[row]]
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [96, 1.0])
@pytest.mark.parametrize(("row", "is_sparse"), [(1, True), (2, False)])
def test_short_sequences_alone_are_nothing_to_choose(
    budget: int | float, row: int, is_sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """62 tokens are chosen from even where the budget covers them; 34 are not, and no digest is read."""
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 48)
    _, _, cache = decoded([row], **SHARES, budget=budget, page_size=16)
    assert (cache.stats.sparse_steps, cache.stats.dense_steps) == ((1, 0) if is_sparse else (0, 1))
    assert is_sparse or cache.stats.bytes_read == cache.stats.bytes_total


@pytest.mark.parametrize(("budget", "width"), [(4096, 128), (1024, 64), (0.1, 1)])
def test_the_narrowest_table_of_a_gpu_is_one_of_which_nothing_is_chosen(budget: int | float, width: int) -> None:
    cache = PagedCache(tiny_config(1, HQ, HKV, D), **SHARES, budget=budget)
    assert cache._store.table.width(1, torch.device("cuda", 0)) == width
