"""The formats that ship and lose something: how little, and that it does not depend on how tokens came."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.ops import instances
from sparsekv.pages import codes
from sparsekv.pages.formats import FORMATS, KEYS, VALUES
from sparsekv.testing.cases import Case
from sparsekv.testing.pages import Pages, in_format, random_pages, stored_as
from sparsekv.testing.soak import Tally, check

OPS: Any = torch.ops.sparsekv
LOSSY = ["int8", "int4", "int8-int4", "int4-int8"]
ROTARY = torch.arange(512, 576)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def odd_states(dtype: torch.dtype) -> Tensor:
    """Tokens `[4, 2, 16, 64]` of any size, off zero, all alike, and nothing but zeros."""
    states = torch.randn(4, 2, 16, 64) * torch.logspace(-3, 2, 16)[:, None]
    states[1] += 100 * torch.randn(2, 16, 1)
    states[2, 0], states[2, 1, :8] = 0.0, 3.0
    states[3, :, :, 5] *= 50
    return states.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "bits"), [("int8", (8, 8)), ("int4", (6, 4)), ("int8-int4", (8, 4))])
def test_tokens_are_right_to_half_a_step(name: str, bits: tuple[int, int], dtype: torch.dtype) -> None:
    kind, states = FORMATS.get(name)(), odd_states(dtype)
    exact = states.float()
    for which in (KEYS, VALUES):
        records = kind.encode(states, None, which)
        back = kind.decode(records, 64, torch.float32, which)
        groups = (codes._ordered(x, which).split(64 if bits[which] == 8 else 32, -1) for x in (back, exact))
        for mine, group in zip(*groups, strict=True):
            spread, largest = group.amax(-1) - group.amin(-1), group.abs().amax(-1)
            step = torch.maximum(spread / (2 ** bits[which] - 1), largest / codes.MAX_ZERO[bits[which]])
            step = step * (1 + 2 ** (-7 if bits[which] == 8 else -3))  # it is rounded up
            assert bool(((mine - group).abs() <= 0.5 * step[..., None] + 2.0**-21).all())
        assert torch.equal(kind.decode(records, 64, dtype, which), back.to(dtype))


def test_bytes_of_a_token() -> None:
    """At a head size of 128, beside 16 bits."""
    for name, share in {"int8": 0.516, "int4": 0.344, "int8-int4": 0.399, "int4-int8": 0.461}.items():
        size, dtype = FORMATS.get(name)().mean_record(16, 128, torch.bfloat16)
        assert size * dtype.itemsize / (128 * 2) <= share
    with pytest.raises(ConfigError, match="head_dim=12: codes are packed for head sizes that are multiples of 8"):
        FORMATS.get("int4")().mean_record(16, 12, torch.bfloat16)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 96), (32, 64), (16, 256), (4, 8)])
def test_places_are_each_taken_once(name: str, page_size: int, head_dim: int) -> None:
    for which in (KEYS, VALUES):
        places = FORMATS.get(name)().places(page_size, head_dim, which)
        size, _ = FORMATS.get(name)().record(page_size, head_dim, torch.bfloat16, which)
        assert (places is None) == (page_size == 4)
        if places is not None:
            assert torch.equal(places.flatten().sort().values, torch.arange(page_size * size))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 96), (32, 64), (16, 256), (4, 8)])
def test_tokens_one_by_one_are_tokens_at_once(name: str, page_size: int, head_dim: int) -> None:
    """Bit for bit, pages and digests; beside tokens that are padding, too."""
    pages = random_pages([2 * page_size + 3, page_size, 5], head_dim=head_dim, page_size=page_size)
    pages = Pages(pages.kv_pool.bfloat16(), pages.block_table, pages.seq_lens)
    expected, held = in_format(name, pages)
    longest = max(pages.lengths)
    new = torch.zeros(2, 3, 2, longest, head_dim, dtype=torch.bfloat16)
    for row, count in enumerate(pages.lengths):
        new[:, row, :, :count] = torch.stack(pages.tokens(row)).transpose(1, 2)
    written = []
    for cuts in ([longest], [7, 1, longest - 8], [1] * longest):
        pool = stored_as(FORMATS.get(name)(), replace(pages, seq_lens=torch.zeros_like(pages.seq_lens)))
        summary, start = [torch.zeros(len(pool), 2, 2, head_dim, dtype=torch.bfloat16)], 0
        for t in cuts:
            valid = torch.arange(start, start + t) < pages.seq_lens[:, None]
            key, value = new[:, :, :, start : start + t]
            lens, start = pages.seq_lens.clamp_max(start + t), start + t
            OPS.append_kv(key, value, valid, pages.block_table, lens, pool, summary, [], "minmax", name)
        written.append((pool, summary[0]))
        assert torch.equal(pool, expected)
        assert torch.equal(summary[0], written[0][1])
    row, slot, count = next(pages.used())
    page = pages.block_table[row, slot]
    keys = held.kv_pool[page, KEYS, :, :count]
    assert torch.equal(summary[0][page], torch.stack([keys.amin(1), keys.amax(1)], 1))


@pytest.mark.parametrize("name", LOSSY)
def test_attention_is_that_to_what_is_held(name: str) -> None:
    pages = random_pages([70, 16, 5], head_dim=64, page_size=16)
    pool, held = in_format(name, pages)
    query, where = torch.randn(3, 4, 64), (pages.block_table, pages.seq_lens)
    slots = torch.tensor([[[0, 3], [2, 4]], [[0, -1], [-1, -1]], [[0, -1], [0, -1]]], dtype=torch.int32)
    first = torch.tensor([19, 0, 4], dtype=torch.int32)  # as a window has one
    for listed, start in ((None, None), (slots, None), (None, first)):
        mine = OPS.attend_pages(query, pool, *where, listed, 0.3, 3.0, None, name, start)
        expected = OPS.attend_pages(query, held.kv_pool, *where, listed, 0.3, 3.0, None, "plain", start)
        torch.testing.assert_close(mine, expected)
    plain = OPS.attend_pages(query, pages.kv_pool, *where, None, 0.3)[0]
    out = OPS.attend_pages(query, pool, *where, None, 0.3, 0.0, None, name)[0]
    assert 0 < (out - plain).norm() < (0.2 if name.endswith("4") else 0.05) * plain.norm()


@pytest.mark.parametrize(("name", "share", "step"), [("int8", 0.532, 0.04), ("int4", 0.41, 0.2)])
def test_latents_are_kept_once_and_what_is_rotary_in_them_has_its_own_factors(name, share, step) -> None:
    """576 channels, keys and values in one: however far the last ones reach, the others are as without them."""
    kind, states = FORMATS.get(name)(), torch.randn(1, 1, 40, 576)
    size, _ = kind.mean_record(16, 576, torch.bfloat16, num_halves=1)
    assert size / (576 * 2) <= share
    where, read = (torch.arange(3, dtype=torch.int32)[None], torch.tensor([40], dtype=torch.int32)), []
    for reach in (1, 100):
        pool, scale = torch.zeros(3, 1, 1, 16, size, dtype=torch.uint8), torch.ones(576).index_fill(0, ROTARY, reach)
        OPS.append_kv(states * scale, states * scale, None, *where, pool, [], [], "minmax", name)
        (held,) = OPS.read_pages(pool, 1, 576, torch.float32, name)
        read.append(held[:, :, :40] / scale)
        assert bool(((read[-1] - states).abs() <= step).all())
        query, plain = torch.randn(1, 4, 576), held.view(3, 1, 1, 16, 576)
        mine = OPS.attend_pages(query, pool, *where, None, 0.01, 0.0, None, name)
        torch.testing.assert_close(mine, OPS.attend_pages(query, plain, *where, None, 0.01))
    assert torch.equal(*(x[..., :512] for x in read))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", instances.HEAD_DIMS)
@pytest.mark.parametrize("name", LOSSY)
def test_kernels_do_what_the_class_says(name: str, head_dim: int) -> None:
    rng = random.Random(head_dim)
    for _ in range(20):
        case = replace(Case.draw(rng), format=name, head_dim=head_dim)
        check(case, torch.device("cuda", 0), Tally())


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSY)
def test_kernels_leave_out_tokens_before_a_window(name: str) -> None:
    pages = random_pages([5, 32, 60, 300, 700], head_dim=64, page_size=16, dtype=torch.bfloat16)
    first, query = torch.tensor([0, 16, 3, 90, 183], dtype=torch.int32), torch.randn(5, 8, 64).bfloat16()
    where = (in_format(name, pages)[0], pages.block_table, pages.seq_lens)
    expected, _ = OPS.attend_pages(query.float(), *where, None, 0.25, 0.0, None, name, first)
    query, *on_gpu = (x.cuda() for x in (query, *where))
    out, _ = OPS.attend_pages(query, *on_gpu, None, 0.25, 0.0, None, name, first.cuda())
    torch.testing.assert_close(out.float().cpu(), expected, rtol=0.02, atol=0.02)
