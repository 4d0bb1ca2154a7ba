"""The error bound itself: it must let plain torch pass, and nothing that is clearly worse."""

import pytest
import torch

from sparsekv.testing.tolerance import assert_as_good_as

EXACT = torch.linspace(-3, 3, 100, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_torch_passes_and_three_times_its_error_does_not(dtype: torch.dtype) -> None:
    rounded = EXACT.to(dtype)
    assert_as_good_as(rounded, rounded, EXACT)
    worse = (EXACT + 8 * torch.finfo(dtype).eps * EXACT.abs().max()).to(dtype)
    with pytest.raises(AssertionError, match=r"error .* against float64; plain torch in"):
        assert_as_good_as(worse, rounded, EXACT)


def test_infinities_must_agree_and_nan_never_passes() -> None:
    exact = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    good = exact.float()
    assert_as_good_as(good, good, exact)
    assert_as_good_as(good[1:], good[1:], exact[1:])
    for wrong in ([1.0, torch.inf], [1.0, 0.0], [torch.nan, -torch.inf], [1.0, torch.nan], [torch.inf, -torch.inf]):
        with pytest.raises(AssertionError):
            assert_as_good_as(torch.tensor(wrong), good, exact)
