"""prompt_attention: attention to listed blocks against masked attention in float64, FlexAttention and the kernel;
score_blocks: the same against single logits."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv.ops import flex, prompt_cuda
from sparsekv.ops.prompt import lists_of, prompt_attention

SCALING = 0.3
# batch, query heads, kv heads, heads that have lists, new tokens, all tokens, tokens of a block
SHAPES = {
    "whole": (1, 4, 2, 4, 96, 96, 32),
    "ragged, by group": (2, 4, 2, 2, 45, 141, 32),
    "by head": (2, 6, 2, 6, 70, 135, 16),
    "less than a block": (1, 2, 2, 2, 7, 7, 16),
}


def inputs(
    b: int, hq: int, hkv: int, h: int, t: int, n: int, size: int, dtype: torch.dtype = torch.float32, dim: int = 16
) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments with random lists, and the blocks that they list."""
    query, key, value = torch.randn(b, hq, t, dim), torch.randn(b, hkv, n, dim), torch.randn(b, hkv, n, dim)
    first, num_blocks = (n - t) // size, -(-n // size)
    blocks = torch.rand(b, h, num_blocks - first, num_blocks) < 0.4
    blocks &= torch.arange(num_blocks) % 5 != 1  # which nobody lists but the block itself
    causal = torch.ones_like(blocks).tril(first)
    blocks = blocks & causal | causal.triu(first)
    return (query.to(dtype), key.to(dtype), value.to(dtype), *lists_of(blocks), size, SCALING), blocks


def masked(arguments: tuple[Any, ...], blocks: Tensor) -> Tensor:
    """The same by a mask of all tokens, in float64."""
    (query, key, value), size = (x.double() for x in arguments[:3]), arguments[5]
    (hq, t), (hkv, n), h = query.shape[1:3], key.shape[1:3], blocks.shape[1]
    seen = blocks.repeat_interleave(hq // h, 1).repeat_interleave(size, 2).repeat_interleave(size, 3)
    seen = seen[:, :, (n - t) % size :][:, :, :t, :n].tril(n - t)
    key, value = (x.repeat_interleave(hq // hkv, 1) for x in (key, value))
    return (query @ key.mT * SCALING).masked_fill(~seen, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_attention_to_the_listed_blocks(shape: tuple[int, ...]) -> None:
    """What lists hold behind their ends is never looked at."""
    arguments, blocks = inputs(*shape)
    counts, indices = arguments[3:5]
    indices[torch.arange(indices.shape[-1]) >= counts[..., None]] = -7
    found = torch.ops.sparsekv.prompt_attention(*arguments)
    torch.testing.assert_close(found, masked(arguments, blocks).float(), rtol=0, atol=1e-5)


def test_lists_are_the_blocks_in_order() -> None:
    blocks = torch.tensor([[True, False, True, True], [False, False, False, True]])[None, None]
    counts, indices = lists_of(blocks)
    assert counts.tolist() == [[[3, 1]]]
    assert indices[0, 0, 0, :3].tolist() == [0, 2, 3]
    assert indices[0, 0, 1, :1].tolist() == [3]
    assert counts.dtype == indices.dtype == torch.int32


def test_flex_attention_gets_the_same_blocks() -> None:
    (query, key, _, counts, indices, size, _), blocks = inputs(2, 4, 2, 2, 45, 141, 32)
    found = flex.block_mask(counts, indices, query.shape[1], key.shape[2], (141 - 45) // size, size)
    assert torch.equal(found.to_dense().bool(), blocks.repeat_interleave(2, 1))
    assert bool((found.kv_num_blocks == 1).all())  # of each block of queries one, its own, needs a mask


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles it for a CPU with g++")
def test_flex_attention_does_the_same() -> None:
    """Slow to compile, but all that is run of it without a GPU: ragged, in groups, then with other lengths."""
    for t, n in ((45, 141), (64, 256)):
        arguments, _ = inputs(2, 4, 2, 2, t, n, 32)
        expected = prompt_attention(*arguments)
        torch.testing.assert_close(flex.by_flex(*arguments), expected, rtol=0, atol=1e-5)


def test_where_flex_attention_fails_plain_torch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> Tensor:
        raise RuntimeError("no such\ncompiler")

    monkeypatch.setattr(flex, "by_flex", broken)
    monkeypatch.setattr(flex, "_failures", {})
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: name)
    (arguments, _), cpu = inputs(*SHAPES["whole"]), torch.device("cpu")
    assert flex.why_plain(cpu, 32) is None
    assert flex.why_plain(cpu, 40) == "blocks of 40 tokens do not divide by 16"
    torch.testing.assert_close(flex.prompt_attention(*arguments), prompt_attention(*arguments), rtol=0, atol=0)
    assert flex.why_plain(cpu, 32) == "PyTorch cannot compile it (no such compiler)"
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert flex.why_plain(torch.device("cuda"), 32) == "Triton is not installed"


def scored(query: Tensor, key: Tensor, positions: list[int], size: int) -> Tensor:
    """Scores of blocks by all logits, in float64."""
    logits = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * SCALING
    logits.masked_fill_(torch.arange(key.shape[2]) > torch.tensor(positions)[:, None], float("-inf"))
    return torch.stack([part.logsumexp(-1) for part in logits.split(size, dim=-1)], dim=-1).float()


def test_scores_of_blocks() -> None:
    query, key, positions = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 75, 16), [5, 40, 74]
    found = torch.ops.sparsekv.score_blocks(query, key, positions, 32, SCALING)
    torch.testing.assert_close(found, scored(query, key, positions, 32), rtol=0, atol=1e-5)


# batch, query heads, kv heads, queries, all tokens, tokens behind the last query, tokens of a block
SCORED = {
    "by blocks": (1, 8, 2, 128, 4096, 0, 128),
    "ragged": (2, 6, 2, 37, 1111, 400, 128),
    "without groups": (2, 3, 3, 70, 333, 1, 64),
    "a large group": (1, 40, 1, 5, 5000, 3000, 192),
    "one query": (2, 4, 1, 1, 7, 2, 64),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SCORED.values(), ids=SCORED)
def test_the_kernel_gives_the_same_scores(shape: tuple[int, ...], dtype: torch.dtype, dim: int) -> None:
    """Of views of `[b, t, h, d]`, with NaN in all keys that are later than every query."""
    b, hq, hkv, m, n, behind, size = shape
    query, key = torch.randn(b, m, hq, dim, dtype=dtype), torch.randn(b, n, hkv, dim, dtype=dtype)
    positions = sorted([*torch.randperm(n - behind - 1)[: m - 1].tolist(), n - behind - 1])
    expected = scored(query.transpose(1, 2), key.transpose(1, 2), positions, size)
    key[:, n - behind :] = float("nan")
    on_gpu = [x.cuda().transpose(1, 2) for x in (query, key)]
    assert prompt_cuda.why_not(on_gpu[0], dim, size) is None
    found = torch.ops.sparsekv.score_blocks(*on_gpu, positions, size, SCALING)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_scores_that_no_kernel_serves_are_the_same_on_a_gpu() -> None:
    query, key, positions = torch.randn(2, 4, 3, 80), torch.randn(2, 2, 75, 80), [5, 40, 74]
    found = torch.ops.sparsekv.score_blocks(query.cuda(), key.cuda(), positions, 32, SCALING)
    torch.testing.assert_close(found.cpu(), scored(query, key, positions, 32), rtol=0, atol=2e-2)


def poisoned(arguments: tuple[Any, ...], blocks: Tensor) -> list[Any]:
    """The same on a GPU, as views of `[b, t, h, d]`, with NaN in the blocks that no list of a kv head has, and block
    numbers that do not exist behind the lists' ends."""
    query, key, value, counts, indices, size, scaling = arguments
    listed = blocks.unflatten(1, (key.shape[1], -1)).any(2).any(2)
    unseen = ~listed.repeat_interleave(size, 2)[:, :, : key.shape[2], None]
    tensors = [query, key.masked_fill(unseen, float("nan")), value.masked_fill(unseen, float("nan"))]
    indices = indices.masked_fill(torch.arange(indices.shape[-1]) >= counts[..., None], 1 << 20)
    views = [x.transpose(1, 2).contiguous().cuda().transpose(1, 2) for x in tensors]
    return [*views, counts.cuda(), indices.cuda(), size, scaling]


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "size"), [(64, 128), (96, 128), (128, 128), (256, 128), (64, 64), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_does_the_same(dtype: torch.dtype, dim: int, size: int) -> None:
    """Chunks of a prompt and whole ones, ragged or not, of heads with lists of their own and in groups."""
    for shape in ((1, 8, 2, 8, 512, 2048, size), (2, 8, 2, 2, 300, 1111, size), (2, 3, 3, 3, 70, 70, size)):
        arguments, blocks = inputs(*shape, dtype=dtype, dim=dim)
        on_gpu = poisoned(arguments, blocks)
        assert prompt_cuda.why_not(on_gpu[0], dim, size) is None
        assert bool(on_gpu[1].isnan().any()) == (shape[4] < shape[5])
        found = torch.ops.sparsekv.prompt_attention(*on_gpu)
        assert found.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(found.cpu().double(), masked(arguments, blocks), rtol=0, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "size"), [(128, 128), (80, 32)])
def test_flex_attention_does_the_same_on_a_gpu(dim: int, size: int) -> None:
    """Where the kernel serves a call, and where it does not."""
    arguments, blocks = inputs(2, 8, 2, 2, 300, 1111, size, dtype=torch.bfloat16, dim=dim)
    on_gpu = [x.cuda() if isinstance(x, Tensor) else x for x in arguments]
    found = [flex.prompt_attention(*on_gpu), torch.ops.sparsekv.prompt_attention(*on_gpu)]
    assert flex.why_plain(on_gpu[0].device, size) is None
    for one in found:
        torch.testing.assert_close(one.cpu().double(), masked(arguments, blocks), rtol=0, atol=3e-2)


@pytest.mark.parametrize(
    ("dtype", "dims", "size", "said"),
    [
        (torch.float32, (128, 128), 128, "float32"),
        (torch.bfloat16, (80, 80), 128, "head_dim 80"),
        (torch.bfloat16, (576, 576), 128, "head_dim 576 (kernels: 64, 96, 128, 256)"),
        (torch.bfloat16, (128, 64), 128, "values of 64 channels"),
        (torch.float16, (128, 128), 96, "blocks of 96 tokens"),
    ],
)
def test_what_the_kernel_does_not_serve_has_a_reason(
    dtype: torch.dtype, dims: tuple[int, int], size: int, said: str
) -> None:
    assert said in str(prompt_cuda.why_not(torch.empty(1, 1, 1, dims[0], dtype=dtype), dims[1], size))
