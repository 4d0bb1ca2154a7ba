"""mean +- std: what is kept is that of the valid keys, however far they lie from zero, and the score is of both."""

import pytest
import torch

from sparsekv.digests.mean_std import MeanStd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centre", [0.0, 300.0])
def test_the_summary_is_mean_less_and_plus_deviation(dtype: torch.dtype, centre: float) -> None:
    """Rounded once: next to what float64 says, in the keys' dtype."""
    keys, valid = (
        (torch.randn(5, 2, 16, 8) + centre).to(dtype),
        torch.arange(16) < torch.tensor([1, 2, 7, 15, 16])[:, None],
    )
    (summary,) = MeanStd().summarize(keys, valid, [])
    assert summary.dtype == dtype
    for page, stored, count in zip(keys.double(), summary, valid.sum(1).tolist(), strict=True):
        std, mean = torch.std_mean(page[:, :count], 1, correction=0)
        exact = torch.stack([mean - std, mean + std], 1)
        assert MeanStd().why_unlike([stored[None]], [exact.to(dtype)[None]], 16, 8) is None


def test_the_score_is_that_of_the_mean_and_the_deviation() -> None:
    keys, query = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 3, 8)
    summary = MeanStd().summarize(keys, torch.ones(1, 16, dtype=torch.bool), [])
    std, mean = torch.std_mean(keys[0], 1, correction=0)
    expected = torch.einsum("bhgd,hd->bhg", query, mean) + torch.einsum("bhgd,hd->bhg", query.abs(), std)
    torch.testing.assert_close(MeanStd().score(query, [x[None] for x in summary], [])[..., 0], expected)


def test_a_bit_more_than_the_last_is_another_summary() -> None:
    (summary,) = MeanStd().summarize(torch.randn(3, 2, 16, 8).bfloat16(), torch.ones(3, 16, dtype=torch.bool), [])
    other = summary.clone()
    other[1, 1, 0, 5] *= 1 + 2**-8
    assert MeanStd().why_unlike([other], [summary], 16, 8) is None
    other[1, 1, 0, 5] *= 1.02
    assert MeanStd().why_unlike([other], [summary], 16, 8) == "1 of 96 means or deviations are others"
