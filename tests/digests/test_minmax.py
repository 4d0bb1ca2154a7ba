"""min/max: the score bounds every dot product in the page, and is reached where the page is one token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from sparsekv.digests.minmax import MinMax
from sparsekv.testing import naive
from sparsekv.testing.pages import fresh_summary, random_pages

FLOAT = st.floats(-1e3, 1e3, width=32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rounding(query: Tensor, keys: Tensor) -> Tensor:
    """What float32 may lose on a sum of d products: d eps |q| . |k|max to rounding (one a product, d - 1 additions),
    and where numbers or products are too small to be normal, all of them."""
    d, float32 = query.shape[-1], torch.finfo(torch.float32)
    q, k = query.double().abs(), keys.double().abs().amax(-2)  # [..., d]
    return d * float32.eps * (q * k).sum(-1) + d * float32.tiny * (1 + q.amax(-1) + k.amax(-1))


def score(query: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """One page: query `[g, d]`, keys `[p, d]` -> `[g]`."""
    summary = MinMax().summarize(keys[None, None], valid[None], [])
    return MinMax().score(query[None, None].float(), [x[None] for x in summary], [])[0, 0, :, 0]


@given(
    dtype=st.sampled_from(DTYPES),
    query=hnp.arrays(np.float32, (3, 8), elements=FLOAT),
    keys=hnp.arrays(np.float32, (5, 8), elements=FLOAT),
    count=st.integers(1, 5),
)
def test_bounds_every_valid_key(dtype: torch.dtype, query: np.ndarray, keys: np.ndarray, count: int) -> None:
    """In each dtype of the keys; the bound is computed in float32 and may miss by its rounding, no more."""
    q, k = torch.from_numpy(query), torch.from_numpy(keys).to(dtype)
    valid = torch.arange(5) < count
    exact = q.double() @ k[:count].double().T  # [g, count]
    bound = score(q, k, valid).double()
    assert bool((bound[:, None] + rounding(q, k[:count])[:, None] >= exact).all())


@given(
    keys=hnp.arrays(np.float32, (4, 8), elements=FLOAT),
    query=hnp.arrays(np.float32, (1, 8), elements=FLOAT),
)
def test_is_never_above_the_sum_of_the_channels_best(keys: np.ndarray, query: np.ndarray) -> None:
    """The bound is the tight one for a box: it is reached by the box's best corner."""
    q, k = torch.from_numpy(query), torch.from_numpy(keys)
    corner = torch.where(q[0] >= 0, k.amax(0), k.amin(0))
    reached = (q[0].double() * corner.double()).sum()
    bound = score(q, k, torch.ones(4, dtype=torch.bool))[0].double()
    assert abs(bound - reached) <= rounding(q, k)[0]


def test_one_token_is_scored_exactly() -> None:
    q, k = torch.randn(4, 32), torch.randn(1, 32)
    torch.testing.assert_close(score(q, k, torch.tensor([True])), q @ k[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_pooled_scores_bound_pooled_products(dtype: torch.dtype, seed: int) -> None:
    """`max` bounds the best product of any head of the group; `sum` bounds the group's summed products of any key."""
    pages = random_pages([70, 33, 1], page_size=8, dtype=dtype, seed=seed)
    query = torch.randn(3, 6, 16)
    summary = fresh_summary("minmax", pages, [])
    arguments = (query, summary, [], pages.block_table, pages.seq_lens, 8, "minmax")
    by_max, by_sum = (torch.ops.sparsekv.score_pages(*arguments, pooling, 1.0).double() for pooling in ("max", "sum"))
    best = naive.best_products(query, pages).view(3, 2, 3, -1)
    exists = best[:, :, 0].isfinite()
    assert bool((by_max >= best.amax(2) - 1e-5)[exists].all())
    assert bool((by_sum >= best.sum(2) - 1e-5)[exists].all())  # hence of any single key's sum, which is no larger


def test_the_summary_is_the_minimum_and_the_maximum() -> None:
    """Exact in the keys' dtype: nothing is rounded inwards."""
    for dtype in DTYPES:
        keys = torch.randn(3, 2, 8, 16).to(dtype)
        (summary,) = MinMax().summarize(keys, torch.ones(3, 8, dtype=torch.bool), [])
        assert summary.dtype == dtype
        assert torch.equal(summary[:, :, 0], keys.amin(2))
        assert torch.equal(summary[:, :, 1], keys.amax(2))


def test_keeps_a_sixteenth_of_the_cache_at_sixteen_tokens() -> None:
    (field,) = MinMax().fields(page_size=16, head_dim=128)
    assert field.dtype is None
    assert 16 * field.shape[0] * field.shape[1] == 2 * 16 * 128
