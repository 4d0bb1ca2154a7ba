"""append_kv: tokens land where a loop would put them, digests are those of a fresh build, nothing else is touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsekv.digests import DIGESTS
from sparsekv.testing import naive
from sparsekv.testing.pages import NAN, Pages, edge_lengths, empty_summary, fitted_state, fresh_summary, random_pages

APPEND = torch.ops.sparsekv.append_kv
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def equal(a: Tensor, b: Tensor) -> bool:
    """Bitwise but for NaN, which equals NaN."""
    return torch.equal(a.nan_to_num(nan=-1234.0), b.nan_to_num(nan=-1234.0))


def before_append(after: Pages, num_new: list[int]) -> Pages:
    """The same sequences without their last tokens: memory of those is NaN again."""
    lens = after.seq_lens - torch.tensor(num_new, dtype=torch.int32)
    pool = after.kv_pool.clone()
    for row, n in enumerate(after.lengths):
        for position in range(int(lens[row]), n):
            page = int(after.block_table[row, position // after.page_size])
            pool[page, :, :, position % after.page_size] = NAN
    return Pages(pool, after.block_table, lens)


def new_tokens(after: Pages, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The last tokens of every sequence in the columns that are valid, NaN in the padding: each `[b, hkv, t, d]`."""
    b, t = valid.shape
    _, _, hkv, _, d = after.kv_pool.shape
    kv = torch.full((2, b, hkv, t, d), NAN, dtype=after.kv_pool.dtype)
    for row in range(b):
        columns = valid[row].nonzero().flatten()
        keys, values = after.tokens(row)
        for new, tokens in zip(kv, (keys, values), strict=True):
            new[row][:, columns] = tokens[len(tokens) - len(columns) :].transpose(0, 1)
    return kv[0], kv[1]


def check_append(after: Pages, valid: Tensor, digest: str = "minmax", pass_valid: bool = True) -> None:
    """Appends the last `valid.sum(1)` tokens of every sequence and compares with the pages that hold them already."""
    pages = before_append(after, valid.sum(1).tolist())
    key, value = new_tokens(after, valid)
    state = fitted_state(DIGESTS.get(digest)(), after)
    summary = fresh_summary(digest, pages, state)
    APPEND(
        key,
        value,
        valid if pass_valid else None,
        after.block_table,
        after.seq_lens,
        pages.kv_pool,
        summary,
        state,
        digest,
    )
    assert equal(pages.kv_pool, after.kv_pool)
    for stored, fresh in zip(summary, fresh_summary(digest, after, state), strict=True):
        torch.testing.assert_close(stored, fresh, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "hkv", "d"), [(1, 2, 8), (3, 1, 24), (16, 2, 16), (64, 4, 8)])
@pytest.mark.parametrize("num_new", [1, 2, 17])
def test_new_tokens_follow_the_old_ones(dtype: torch.dtype, page_size: int, hkv: int, d: int, num_new: int) -> None:
    lengths = [n + num_new for n in edge_lengths(page_size)]
    after = random_pages(lengths, hkv, d, page_size, dtype)
    check_append(after, torch.ones(len(lengths), num_new, dtype=torch.bool), pass_valid=False)


@pytest.mark.parametrize("digest", list(DIGESTS))
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_padding_is_left_out(digest: str, page_size: int) -> None:
    """Left padding, holes, right padding, a row of nothing but padding, and a full one."""
    t = 9
    valid = torch.ones(5, t, dtype=torch.bool)
    valid[0, :5], valid[1, 2::3], valid[2, 4:], valid[3] = False, False, False, False
    lengths = [n + past for n, past in zip(valid.sum(1).tolist(), [0, 5, 16, 6, 3], strict=True)]
    check_append(random_pages(lengths, page_size=page_size), valid, digest)


@given(
    page_size=st.sampled_from([1, 2, 5, 16]),
    rows=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2**10 - 1)), min_size=1, max_size=4),
    t=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_any_mask(page_size: int, rows: list[tuple[int, int]], t: int, seed: int) -> None:
    valid = torch.tensor([[bool(bits >> c & 1) for c in range(t)] for _, bits in rows])
    lengths = [past + int(valid[row].sum()) for row, (past, _) in enumerate(rows)]
    check_append(random_pages(lengths, 1, 8, page_size, seed=seed), valid)


@pytest.mark.parametrize("digest", list(DIGESTS))
def test_naive_loop_agrees(digest: str) -> None:
    """From an empty pool, in two chunks, the second padded: the pool equals the one that the loop fills."""
    after = random_pages([13, 5, 0], page_size=4)
    mine, naives = after.emptied(), after.emptied()
    state = fitted_state(DIGESTS.get(digest)(), after)
    summary = empty_summary(DIGESTS.get(digest)(), after)
    first = torch.tensor([[True] * 8, [False] * 3 + [True] * 5, [False] * 8])
    second = torch.tensor([[True] * 5, [False] * 5, [False] * 5])
    halfway = torch.tensor([8, 5, 0], dtype=torch.int32)
    for valid, lens in ((first, halfway), (second, after.seq_lens)):
        # `new_tokens` takes the last tokens, so it is shown the sequences as they are after this chunk
        key, value = new_tokens(Pages(after.kv_pool, after.block_table, lens), valid)
        APPEND(key, value, valid, after.block_table, lens, mine.kv_pool, summary, state, digest)
        naive.append_kv(key, value, valid, Pages(naives.kv_pool, after.block_table, lens))
    assert equal(mine.kv_pool, naives.kv_pool)
    assert equal(mine.kv_pool, after.kv_pool)


@pytest.mark.parametrize("digest", list(DIGESTS))
@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_no_new_tokens_refresh_the_digest_of_the_last_page(digest: str, page_size: int) -> None:
    """What a crop needs: the tokens past the new end no longer count, though they still lie in the page."""
    long = random_pages([n + 3 for n in edge_lengths(page_size)], page_size=page_size)
    state = fitted_state(DIGESTS.get(digest)(), long)
    summary = fresh_summary(digest, long, state)
    short = Pages(long.kv_pool, long.block_table, long.seq_lens - 3)
    untouched = long.kv_pool.clone()
    nothing = torch.empty(len(long.lengths), 2, 0, 16)
    APPEND(nothing, nothing, None, short.block_table, short.seq_lens, short.kv_pool, summary, state, digest)
    assert equal(short.kv_pool, untouched)
    expected = fresh_summary(digest, short, state)
    for row, slot, _ in short.used():
        page = int(short.block_table[row, slot])
        for stored, fresh in zip(summary, expected, strict=True):
            torch.testing.assert_close(stored[page], fresh[page], equal_nan=True, rtol=1e-6, atol=1e-6)


def test_other_pages_are_not_touched() -> None:
    """Pages and digests of sequences that are not in the table, with which the pool is shared, stay bit for bit."""
    both = random_pages([21, 37, 16], page_size=8, seed=3)
    summary = fresh_summary("minmax", both, [])
    others = [int(page) for row in (1, 2) for page in both.block_table[row, : -(-both.lengths[row] // 8)]]
    kv, digests = both.kv_pool[others].clone(), summary[0][others].clone()
    token = torch.randn(1, 2, 1, 16)
    table, lens = both.block_table[:1], torch.tensor([22], dtype=torch.int32)
    APPEND(token, token, None, table, lens, both.kv_pool, summary, [], "minmax")
    assert equal(both.kv_pool[others], kv)
    assert equal(summary[0][others], digests)


def test_no_digest_is_kept_without_a_summary() -> None:
    after = random_pages([5, 3], page_size=4)
    pages = after.emptied()
    for row, n in enumerate(after.lengths):
        keys, values = (x.transpose(0, 1)[None] for x in after.tokens(row))
        table, lens = after.block_table[row, None], torch.tensor([n], dtype=torch.int32)
        APPEND(keys, values, None, table, lens, pages.kv_pool, [], [], "minmax")
    assert equal(pages.kv_pool, after.kv_pool)
