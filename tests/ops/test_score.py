"""score_pages: Quest's bound as a loop computes it, pooled over query heads, -inf for pages that do not exist."""

import pytest
import torch
from torch import Tensor

from sparsekv.digests import DIGESTS
from sparsekv.ops.reference import pool_group
from sparsekv.testing import naive
from sparsekv.testing.pages import Pages, edge_lengths, fitted_state, fresh_summary, random_pages
from sparsekv.testing.tolerance import assert_as_good_as

POOLINGS = ["max", "sum", "mean_softmax", "share"]
SCALING = 0.25


def scores_of(
    query: Tensor,
    pages: Pages,
    digest: str = "minmax",
    pooling: str = "max",
    state: list[Tensor] | None = None,
    scaling: float = SCALING,
) -> Tensor:
    state = fitted_state(DIGESTS.get(digest)(), pages) if state is None else state
    return torch.ops.sparsekv.score_pages(
        query,
        fresh_summary(digest, pages, state),
        state,
        pages.block_table,
        pages.seq_lens,
        pages.page_size,
        digest,
        pooling,
        scaling,
    )


def plain_minmax(query: Tensor, pages: Pages, pooling: str) -> Tensor:
    """The formula of the paper, as logits, in plain torch, one page and head at a time, in the query's dtype."""
    b, hq, _ = query.shape
    hkv = pages.kv_pool.shape[2]
    bounds = query.new_full((b, hq, pages.block_table.shape[1]), float("-inf"))
    for row, slot, count in pages.used():
        keys = pages.kv_pool[int(pages.block_table[row, slot]), 0, :, :count].repeat_interleave(hq // hkv, 0)
        bounds[row, :, slot] = torch.maximum(query[row] * keys.amin(1), query[row] * keys.amax(1)).sum(-1)
    grouped = SCALING * bounds.view(b, hkv, hq // hkv, -1)
    if pooling == "mean_softmax":
        pooled = grouped.softmax(-1).mean(2)
        return pooled.masked_fill(bounds[:, :: (hq // hkv)] == float("-inf"), float("-inf"))
    if pooling == "share":
        newest = (torch.arange(grouped.shape[-1]) == (pages.seq_lens[:, None] - 1) // pages.page_size)[:, None]
        others = grouped.masked_fill(newest[:, None], float("-inf"))
        return others.log_softmax(-1).amax(2).masked_fill(newest, 0.0)
    return grouped.amax(2) if pooling == "max" else grouped.sum(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("hkv", "group", "d", "page_size"), [(2, 1, 8, 1), (1, 4, 20, 5), (2, 3, 16, 16)])
def test_minmax_is_the_bound_of_the_paper(
    dtype: torch.dtype, pooling: str, hkv: int, group: int, d: int, page_size: int
) -> None:
    pages = random_pages(edge_lengths(page_size), hkv, d, page_size, dtype)
    query = torch.randn(len(pages.lengths), hkv * group, d).to(dtype)
    scores = scores_of(query, pages, pooling=pooling)
    exact = naive.pool_group(naive.page_bounds(query.double() * SCALING, pages), hkv, pooling)
    assert scores.dtype == torch.float32
    assert_as_good_as(scores, plain_minmax(query, pages, pooling), exact)


@pytest.mark.parametrize("digest", list(DIGESTS))
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pages_past_the_end_score_minus_infinity_and_no_other(digest: str, pooling: str) -> None:
    pages = random_pages(edge_lengths(8), page_size=8)
    scores = scores_of(torch.randn(len(pages.lengths), 4, 16), pages, digest, pooling)
    slot = torch.arange(pages.block_table.shape[1])
    exists = (slot * 8 < pages.seq_lens[:, None])[:, None].expand_as(scores)
    assert bool(scores[exists].isfinite().all())
    assert bool((scores[~exists] == float("-inf")).all())


@pytest.mark.parametrize("digest", list(DIGESTS))
def test_a_sequence_scores_the_same_alone_and_in_a_batch(digest: str) -> None:
    """Other sequences, where the pages lie, and what unused table entries name make no difference."""
    batch = random_pages(edge_lengths(8), page_size=8, seed=5)
    state = fitted_state(DIGESTS.get(digest)(), batch)
    query = torch.randn(len(batch.lengths), 4, 16)
    together = scores_of(query, batch, digest, state=state)
    for row, n in enumerate(batch.lengths):
        alone = Pages(batch.kv_pool, batch.block_table[row, None, : -(-n // 8)], batch.seq_lens[row, None])
        expected = scores_of(query[row, None], alone, digest, state=state)
        torch.testing.assert_close(together[row, :, : expected.shape[2]], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_over_the_group(pooling: str) -> None:
    scores = torch.randn(3, 2, 4, 6)
    seq_lens = torch.tensor([0, 9, 24], dtype=torch.int32)
    exists = (torch.arange(6) * 4 < seq_lens[:, None])[:, None, None].expand_as(scores)
    per_head = scores.double().masked_fill(~exists, float("-inf")).flatten(1, 2)
    exact = naive.pool_group(per_head, 2, pooling)
    pooled = pool_group(scores, seq_lens, 4, pooling)
    torch.testing.assert_close(pooled.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("digest", list(DIGESTS))
@pytest.mark.parametrize("pooling", POOLINGS)
def test_scores_are_of_logits(digest: str, pooling: str) -> None:
    """The attention's factor might as well be in the query."""
    pages = random_pages([70, 33], page_size=8)
    query, state = torch.randn(2, 4, 16), fitted_state(DIGESTS.get(digest)(), pages)
    scores = scores_of(query, pages, digest, pooling, state, scaling=0.125)
    assert torch.equal(scores, scores_of(query / 8, pages, digest, pooling, state, scaling=1.0))
    assert not torch.equal(scores, scores_of(query, pages, digest, pooling, state, scaling=1.0))
