"""`rotate` and `rms_norm`: the reference against float64 and transformers, the kernels against both."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from sparsekv.ops import around

OPS = torch.ops.sparsekv


def inputs(b: int, hq: int, hkv: int, t: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As a model makes them: heads are views of a projection whose channels lie head after head."""
    generator = torch.Generator().manual_seed(b * 7 + d)
    query, key = (torch.randn(b, t, h, d, generator=generator, dtype=dtype).transpose(1, 2) for h in (hq, hkv))
    angles = torch.rand(b, t, d // 2, generator=generator, dtype=torch.float64).mul(100).repeat(1, 1, 2)
    return [query, key, angles.cos().to(dtype), angles.sin().to(dtype)]


def for_both(tensors: list[Tensor]) -> list[Tensor]:
    """The same with the cosines and sines of one half of the channels."""
    return [*tensors[:2], *(x.chunk(2, dim=-1)[0].contiguous() for x in tensors[2:])]


@pytest.mark.parametrize("t", [1, 5])
def test_reference_turns_complex_numbers(t: int) -> None:
    query, key, cos, sin = inputs(2, 4, 2, t, 8)
    for x, turned in zip((query, key), OPS.rotate(query, key, cos, sin), strict=True):
        phase = torch.complex(cos, sin)[:, None, :, :4]
        expected = torch.complex(x[..., :4], x[..., 4:]) * phase
        torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_is_what_transformers_computes(dtype: torch.dtype) -> None:
    tensors = inputs(3, 4, 1, 2, 16, dtype)
    for ours, theirs in zip(around.rotate(*tensors), apply_rotary_pos_emb(*tensors), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
    query, key, *turns = tensors
    for ours, theirs in zip(
        around.rotate(query, key, *(x[..., :8] for x in turns)), apply_rotary_pos_emb(*tensors), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_opcheck() -> None:
    torch.library.opcheck(OPS.rotate.default, inputs(2, 4, 2, 1, 8, torch.float32))
    torch.library.opcheck(OPS.rms_norm.default, (torch.randn(2, 3, 8), torch.randn(8), 1e-6))


def test_norm_reference_in_float64() -> None:
    x, weight = torch.randn(2, 3, 40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    expected = x / (x.square().sum(-1, keepdim=True) / 40 + 0.1).sqrt() * weight
    torch.testing.assert_close(around.rms_norm(x, weight, 0.1), expected, rtol=1e-6, atol=1e-6)
    expected = expected / weight * (1 + weight)
    torch.testing.assert_close(around.rms_norm(x, weight, 0.1, 1.0), expected, rtol=1e-6, atol=1e-6)


NORMS = {LlamaRMSNorm: 0.0, Gemma3RMSNorm: 1.0}  # and what they add to their weights


def norm(kind: Any, d: int, dtype: torch.dtype) -> Any:
    made = kind(d, eps=1e-5).to(dtype)
    torch.nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_reference_is_what_transformers_computes(dtype: torch.dtype, kind: Any) -> None:
    made, x = norm(kind, 48, dtype), torch.randn(2, 3, 48, dtype=dtype)
    assert torch.equal(around.rms_norm(x, made.weight, 1e-5, NORMS[kind]), made(x))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("d", [8, 64, 100, 128, 1000, 4096, 20_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_kernel(d: int, dtype: torch.dtype, kind: Any) -> None:
    """As transformers rounds, but for the order in which squares are added: seldom the next number."""
    made, x = norm(kind, d, dtype).cuda(), torch.randn(3, 2, d, dtype=dtype, device="cuda") * 5
    for given in (x, x[:, :1], x[:0], torch.cat((x, x), dim=-1)[..., :d], torch.zeros_like(x)):
        ours, theirs = OPS.rms_norm(given, made.weight, 1e-5, NORMS[kind]), made(given)
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous()
        assert ours.dtype == theirs.dtype
        if ours.numel() and dtype != torch.float32:
            assert (ours == theirs).float().mean() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("d", [4, 8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("b", "hq", "hkv", "t"), [(1, 32, 8, 1), (3, 5, 1, 1), (2, 1, 1, 1), (2, 4, 2, 3), (3, 9, 4, 301)]
)
def test_kernel(b: int, hq: int, hkv: int, t: int, d: int, dtype: torch.dtype) -> None:
    """Rounded where plain torch rounds, so bit for bit; what is not served falls to the reference."""
    tensors = [x.cuda() for x in inputs(b, hq, hkv, t, d, dtype)]
    one_position = [*tensors[:2], *(x[:1] for x in tensors[2:])]
    for given in (for_both(tensors), [x.mT.contiguous().mT for x in for_both(tensors)]):  # the latter as gpt-oss's
        for ours, theirs in zip(OPS.rotate(*tensors[:2], *given[2:]), apply_rotary_pos_emb(*tensors), strict=True):
            assert torch.equal(ours, theirs)
    apart = [torch.cat((x, x), dim=-1)[..., :d] for x in tensors]  # strides that are not those of a projection
    for given in (tensors, one_position, apart):
        for ours, theirs in zip(OPS.rotate(*given), apply_rotary_pos_emb(*given), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.is_contiguous()


@pytest.mark.gpu
def test_the_end_of_what_no_32_bits_can_count() -> None:
    """More channels than 2^31, and more tokens than the smaller dimensions of a grid take; 13 GB."""
    t, h, d = 131_073, 128, 128
    query = torch.ones(1, t, h, d, dtype=torch.bfloat16, device="cuda")
    query[:, -2:].normal_()
    key, (cos, sin) = torch.randn_like(query[:, :, :1]), torch.randn(2, 1, t, d, device="cuda").bfloat16()
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    turned = [x[:, :, -2:].clone() for x in OPS.rotate(query, key, cos, sin)]
    theirs = apply_rotary_pos_emb(query[:, :, -2:], key[:, :, -2:], cos[:, -2:], sin[:, -2:])
    assert all(torch.equal(a, b) for a, b in zip(turned, theirs, strict=True))
    weight, rows = torch.randn(d, device="cuda").bfloat16(), query.transpose(1, 2)
    torch.testing.assert_close(OPS.rms_norm(rows, weight, 1e-5)[:, -2:], around.rms_norm(rows[:, -2:], weight, 1e-5))
