"""Dense attention of a prompt's newest tokens: its formula, by kernels and block by block."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.cache import attention_blocks, prefill
from sparsekv.cache.masks import columns_only, padded_columns, window_of

SIZES = [(1, 1), (9, 9), (1, 9), (2, 9), (8, 9), (5, 50), (33, 70)]


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    window: int | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """In float64, whole."""
    t, n, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    logits = query.double() @ key.mT * scaling
    logits = (logits / softcap).tanh() * softcap if softcap else logits
    mask = torch.ones(t, n, dtype=torch.bool).tril(n - t).triu(n - t - (window or n) + 1)
    mask = mask if visible is None else mask & visible[:, None, None]
    logits = logits.masked_fill(~mask, -1e30)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(-1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    return logits.softmax(-1)[..., :n] @ value


def tensors(t: int, n: int, group: int, dv: int = 16) -> list[Tensor]:
    return [torch.randn(2, 2 * group, t, 16), torch.randn(2, 2, n, 16), torch.randn(2, 2, n, dv)]


def padding(t: int, n: int) -> Tensor:
    """`[2, n]`: none in the first row; in the second to the middle of the newest, and a hole."""
    visible = torch.arange(n) >= torch.tensor([[0], [n - t + t // 2]])
    visible[1, : n // 3] = n > t
    return visible


@pytest.mark.parametrize(
    ("softcap", "has_sinks", "dv"), [(0, False, 16), (2.0, False, 8), (0, True, 16), (2.0, True, 8)]
)
@pytest.mark.parametrize(("t", "n"), SIZES)
@pytest.mark.parametrize("block_elements", [1, 500, 1 << 24])
def test_attention_is_what_its_formula_says(t, n, softcap, has_sinks, dv, block_elements, monkeypatch) -> None:
    """Over blocks of a single query, of some, and of all, and over kernels where there are such."""
    monkeypatch.setattr(attention_blocks, "BLOCK_ELEMENTS", block_elements)
    for group, window, is_padded in itertools.product((1, 3), (None, 1, 7, 100), (False, True)):
        sinks = torch.randn(2 * group) if has_sinks else None
        of, visible = tensors(t, n, group, dv), padding(t, n) if is_padded else torch.ones(2, n, dtype=torch.bool)
        expected = naive(*of, 0.3, softcap, sinks, window, visible).float()
        real = visible[:, None, n - t :, None]
        mask = columns_only(visible, window)
        for out in (
            attention_blocks.attend(*of, 0.3, softcap, sinks, window, visible if is_padded else None),
            prefill.attend_all(*of, mask, 0.3, softcap, sinks),
        ):
            assert out.isfinite().all()
            torch.testing.assert_close(out * real, expected * real, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("is_padded", [False, True])
def test_what_a_mask_left_out_says(window, is_padded) -> None:
    """The same of a copy of it, which has to ask its device."""
    visible = padding(5, 9) if is_padded else torch.ones(2, 9, dtype=torch.bool)
    for mask in (columns_only(visible, window), columns_only(visible, window).clone()):
        assert window_of(mask) == window
        columns = padded_columns(mask)
        assert torch.equal(columns, visible) if is_padded else columns is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "n"), SIZES)
def test_causal_attention_by_log_sum_exps(t, n, dtype, monkeypatch) -> None:
    """Of the tokens before, of the newest, and the sinks, to rounding in that dtype; no block is made."""
    monkeypatch.setattr(attention_blocks, "attend", None)
    for group, scaling in itertools.product((1, 2, 3), (0.25, 0.6)):
        of, sinks = [x.to(dtype) for x in tensors(t, n, group)], torch.randn(2 * group).to(dtype)
        for given in (None, sinks):
            out, expected = prefill.causal(*of, scaling, given), naive(*of, scaling, sinks=given)
            assert out.dtype == dtype
            assert float((out - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(of[2].abs().max())


def test_few_queries_wait_for_no_plan(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels = [prefill._kernels.__wrapped__(torch.device("cuda"), torch.bfloat16, few) for few in (True, False)]
    assert kernels == [[prefill._flash, prefill._cudnn], [prefill._cudnn, prefill._flash]]


@pytest.mark.parametrize("gives_out", [RuntimeError("no such head size"), torch.OutOfMemoryError("a test")])
def test_where_no_kernel_serves_it_goes_block_by_block(gives_out, monkeypatch) -> None:
    """But out of memory is out of memory."""

    def kernel(*args: Any) -> Any:
        raise gives_out

    monkeypatch.setattr(prefill, "_kernels", lambda *asked: [kernel])
    of = tensors(5, 9, 2)
    if isinstance(gives_out, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            prefill.causal(*of, 0.3)
    else:
        torch.testing.assert_close(prefill.causal(*of, 0.3), naive(*of, 0.3).float(), rtol=1e-5, atol=1e-6)


def test_gradients_of_a_chunk() -> None:
    """Log-sum-exps have none, so that kernels are left aside."""
    of, sinks = [x.double().requires_grad_() for x in tensors(5, 9, 2)], torch.randn(4).double().requires_grad_()
    for given in (None, sinks):
        wanted = of if given is None else [*of, given]
        ours = torch.autograd.grad(prefill.causal(*of, 0.3, given).sin().sum(), wanted)
        theirs = torch.autograd.grad(naive(*of, 0.3, sinks=given).sin().sum(), wanted)
        torch.testing.assert_close(ours, theirs)


def test_the_masks_of_blocks_stay_small(monkeypatch) -> None:
    """None has more elements than was asked for, and every query is in one of them."""
    monkeypatch.setattr(attention_blocks, "BLOCK_ELEMENTS", 3000)
    masks: list[Tensor] = []
    original = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return original(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for window in (None, 40):
        masks.clear()
        attention_blocks.attend(*tensors(100, 300, 2), 0.3, window=window)
        assert all(mask.numel() <= 3000 for mask in masks)
        assert sum(len(mask) for mask in masks) == 2 * 100  # both heads of a group
