"""attend_pages: attention over the listed pages against token-by-token float64; dense is a special case."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.ops import reference
from sparsekv.testing import naive
from sparsekv.testing.pages import NAN, Pages, edge_lengths, random_pages
from sparsekv.testing.tolerance import assert_as_good_as, plain_attention

ATTEND = torch.ops.sparsekv.attend_pages
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attend(
    query: Tensor, pages: Pages, slots: Tensor | None, *options: object, **more: object
) -> tuple[Tensor, Tensor]:
    out, lse = ATTEND(query, pages.kv_pool, pages.block_table, pages.seq_lens, slots, *options, **more)
    return out, lse


def random_slots(pages: Pages, k: int, seed: int = 0) -> Tensor:
    """Any k pages of each sequence and kv head, ascending, -1 where there are not so many."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.full((len(pages.lengths), pages.kv_pool.shape[2], k), -1, dtype=torch.int32)
    for row, n in enumerate(pages.lengths):
        for head in range(slots.shape[1]):
            some = torch.randperm(-(-n // pages.page_size), generator=generator)[:k].sort().values
            slots[row, head, : len(some)] = some.int()
    return slots


def check(query: Tensor, pages: Pages, slots: Tensor | None, *options: object, **more: object) -> None:
    out, lse = attend(query, pages, slots, *options, **more)
    exact_out, exact_lse = naive.attend_pages(query, pages, slots, *options, **more)
    plain_out, plain_lse = plain_attention(query, pages, slots, *options, **more)
    assert (out.dtype, lse.dtype) == (query.dtype, torch.float32)
    assert_as_good_as(out, plain_out, exact_out)
    assert_as_good_as(lse, plain_lse, exact_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hkv", "group", "d", "page_size"), [(2, 1, 8, 1), (1, 4, 20, 5), (2, 3, 16, 16), (1, 2, 64, 32)]
)
@pytest.mark.parametrize("k", [None, 1, 3])
def test_against_float64(dtype: torch.dtype, hkv: int, group: int, d: int, page_size: int, k: int | None) -> None:
    """Ragged lengths around the page size, shuffled pages, NaN in all memory that was not written."""
    pages = random_pages(edge_lengths(page_size), hkv, d, page_size, dtype)
    query = torch.randn(len(pages.lengths), hkv * group, d).to(dtype)
    check(query, pages, None if k is None else random_slots(pages, k), d**-0.5)


@pytest.mark.parametrize("k", [None, 2])
def test_float64_stays_float64(k: int | None) -> None:
    pages = random_pages(edge_lengths(8), page_size=8, dtype=torch.float64)
    query, sinks = torch.randn(len(pages.lengths), 4, 16, dtype=torch.float64), torch.randn(4)
    options = (None if k is None else random_slots(pages, k), 0.3, 3.0, sinks)
    for ours, exact in zip(attend(query, pages, *options), naive.attend_pages(query, pages, *options), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("k", [None, 2])
def test_softcap_and_sinks(dtype: torch.dtype, softcap: float, with_sinks: bool, k: int | None) -> None:
    pages = random_pages(edge_lengths(8), page_size=8, dtype=dtype)
    query = (3 * torch.randn(len(pages.lengths), 4, 16)).to(dtype)
    sinks = torch.tensor([-1.0, 0.0, 2.0, 9.0], dtype=dtype) if with_sinks else None
    check(query, pages, None if k is None else random_slots(pages, k), 0.5, softcap, sinks)


@pytest.mark.parametrize("k", [None, 3])
def test_tokens_before_the_first_one_are_not_seen(k: int | None) -> None:
    """Of a sliding window: within a page, at its edge, pages before, and past a sequence's end."""
    pages = random_pages([5, 16, 30, 30, 61, 9], page_size=8)
    first = torch.tensor([0, 8, 3, 13, 40, 9], dtype=torch.int32)
    slots = None if k is None else random_slots(pages, k)
    check(torch.randn(6, 4, 16), pages, slots, 0.3, 3.0, torch.randn(4), first=first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_elements", [1, 2000])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_many_chunks(
    dtype: torch.dtype, chunk_elements: int, with_sinks: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page, or a few, at a time give the same; also where one chunk, or the sink, holds all of the mass."""
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk_elements)
    pages = random_pages([0, 1, 7, 8, 9, 70, 150], page_size=8, dtype=dtype)
    query = torch.randn(7, 4, 16).to(dtype)
    sinks = torch.tensor([-90.0, 0.0, 2.0, 90.0], dtype=dtype) if with_sinks else None
    check(query, pages, None, scale, 0.0, sinks)
    check(query, pages, random_slots(pages, 5), scale, 0.0, sinks)


def test_no_slots_means_all_slots() -> None:
    pages = random_pages(edge_lengths(8), page_size=8)
    query = torch.randn(len(pages.lengths), 4, 16)
    every = random_slots(pages, pages.block_table.shape[1])
    for dense, listed in zip(attend(query, pages, None, 0.25), attend(query, pages, every, 0.25), strict=True):
        torch.testing.assert_close(dense, listed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", ["end", "front", "between"])
def test_padding_among_the_slots_changes_nothing(place: str) -> None:
    pages = random_pages([61, 40], page_size=8)
    query, slots = torch.randn(2, 4, 16), random_slots(pages, 3)
    padded = torch.full((2, 2, 7), -1, dtype=torch.int32)
    padded[..., {"end": slice(3), "front": slice(4, 7), "between": slice(1, 6, 2)}[place]] = slots
    for one, other in zip(attend(query, pages, slots, 0.25), attend(query, pages, padded, 0.25), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_nothing_to_read_gives_zeros(with_sinks: bool) -> None:
    """An empty sequence, and a full one of which no page is listed; the log-sum-exp is the sink's, or -inf."""
    pages = random_pages([0, 20], page_size=8)
    sinks = torch.tensor([0.5, 1.0, -2.0, 0.0]) if with_sinks else None
    slots = torch.full((2, 2, 3), -1, dtype=torch.int32)
    out, lse = attend(torch.randn(2, 4, 16), pages, slots, 0.25, 0.0, sinks)
    assert torch.equal(out, torch.zeros(2, 4, 16))
    assert torch.equal(lse, torch.full((2, 4), float("-inf")) if sinks is None else sinks.expand(2, 4))


def test_log_sum_exps_merge_disjoint_pages() -> None:
    """What split kernels rely on: two halves, weighted by their log-sum-exps, are the whole."""
    pages = random_pages([64, 50], page_size=8)
    query = torch.randn(2, 4, 16)
    even, odd = (torch.arange(start, 8, 2, dtype=torch.int32).expand(2, 2, 4) for start in (0, 1))
    odd = torch.where(odd * 8 < pages.seq_lens[:, None, None], odd, -1)
    (out_a, lse_a), (out_b, lse_b) = (attend(query, pages, half, 0.25) for half in (even, odd))
    out, lse = attend(query, pages, None, 0.25)
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse)
    merged = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_decode_is_as_good_as_torch_sdpa(dtype: torch.dtype) -> None:
    pages = random_pages([70] * 16, page_size=16, dtype=dtype)  # enough outputs for their largest error to say much
    query = torch.randn(16, 4, 16).to(dtype)
    tokens = [pages.tokens(row) for row in range(16)]
    keys, values = (torch.stack([kv[i].transpose(0, 1) for kv in tokens]) for i in range(2))
    sdpa = F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True, scale=0.25)[:, :, 0]
    exact, _ = naive.attend_pages(query, pages, None, 0.25)
    assert_as_good_as(attend(query, pages, None, 0.25)[0], sdpa, exact)


def test_large_logits_do_not_overflow() -> None:
    pages = random_pages([33], page_size=16)
    check(1e4 * torch.randn(1, 4, 16), pages, None, 1.0)


@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_nan_in_a_real_token_is_not_hidden(what: str) -> None:
    """Traps in unwritten memory stay out, but a model that computes NaN must see NaN, as with dense attention."""
    pages = random_pages([20], page_size=8)
    query = torch.randn(1, 4, 16)
    spoiled = query if what == "query" else pages.kv_pool[pages.block_table[0, 1], 0 if what == "key" else 1]
    spoiled[..., 0] = NAN
    assert bool(attend(query, pages, None, 0.25)[0].isnan().any())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_the_values_too(dtype: torch.dtype, device: str) -> None:
    """Pages of one half: a new token is written there and attended to as in pages that hold it twice."""
    pages = random_pages([1, 33, 48, 64], 1, 64, 16, dtype).to(device)
    both = pages.kv_pool[:, :1].repeat(1, 2, 1, 1, 1)
    one = both[:, :1].contiguous()
    query, key = torch.randn(4, 8, 64).to(device, dtype), torch.randn(4, 1, 1, 64).to(device, dtype)
    where, slots = (pages.block_table, pages.seq_lens), random_slots(pages, 2).to(device)
    for pool in (one, both):
        torch.ops.sparsekv.append_kv(key, key, None, *where, pool, [], [], "minmax")
    assert torch.equal(one[:, 0].nan_to_num(), both[:, 1].nan_to_num())
    for found, expected in zip(
        ATTEND(query, one, *where, slots, 0.1), reference.attend_pages(query, both, *where, slots, 0.1), strict=True
    ):
        torch.testing.assert_close(found, expected)
