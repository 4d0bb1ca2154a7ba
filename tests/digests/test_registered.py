"""What every registered digest must do, whatever it keeps: a new one is tested here by being registered."""

import ast
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from sparsekv import PagedCache, digests
from sparsekv.digests import DIGESTS, Digest, Field, register
from sparsekv.testing.cache_pair import CachePair
from sparsekv.testing.pages import NAN, empty_summary, fitted_state, fresh_summary, random_pages

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HKV, D, P = 3, 16, 8

each_digest = pytest.mark.parametrize("name", list(DIGESTS))


def make(name: str) -> Digest:
    return DIGESTS.get(name)()


def page_batch(dtype: torch.dtype = torch.float32, m: int = 7) -> tuple[Tensor, Tensor]:
    """Keys `[m, hkv, p, d]` of pages of which 1 to p tokens are valid."""
    valid = torch.arange(P) < (torch.arange(m) % P + 1)[:, None]
    return torch.randn(m, HKV, P, D).to(dtype), valid


@each_digest
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_summaries_have_the_declared_shapes(name: str, dtype: torch.dtype, page_size: int) -> None:
    digest = make(name)
    keys, valid = torch.randn(5, HKV, page_size, D).to(dtype), torch.ones(5, page_size, dtype=torch.bool)
    state = digest.fit(keys, None)
    summary = digest.summarize(keys, valid, state)
    fields = digest.fields(page_size, D)
    assert [tuple(x.shape) for x in summary] == [(5, HKV, *field.shape) for field in fields]
    for computed, field in zip(summary, fields, strict=True):
        assert computed.dtype.is_floating_point == (field.dtype or dtype).is_floating_point
    assert all(x.shape[0] == HKV for x in state)


@each_digest
@pytest.mark.parametrize("trap", [NAN, float("inf"), -1e4, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_do_not_exist_have_no_influence(name: str, trap: float, dtype: torch.dtype) -> None:
    digest, (keys, valid) = make(name), page_batch(dtype)
    state = digest.fit(keys[-1:], None)
    other = keys.masked_fill(~valid[:, None, :, None], trap)
    clean, trapped = digest.summarize(keys, valid, state), digest.summarize(other, valid, state)
    query = torch.randn(1, HKV, 2, D)
    one, two = (digest.score(query, [x[None].to(_stored(x, dtype)) for x in s], state) for s in (clean, trapped))
    assert bool(one.isfinite().all())
    assert torch.equal(one, two)


def _stored(computed: Tensor, dtype: torch.dtype) -> torch.dtype:
    """A dtype that keeps what was computed: whole numbers stay what they are."""
    return dtype if computed.dtype.is_floating_point else computed.dtype


@each_digest
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_has_no_influence_on_the_state(name: str, dtype: torch.dtype) -> None:
    keys = torch.randn(2, HKV, 12, D).to(dtype)
    valid = torch.ones(2, 12, dtype=torch.bool)
    digest = make(name)
    for one, other in zip(digest.fit(keys, None), digest.fit(keys, valid), strict=True):
        torch.testing.assert_close(one, other)
    valid[0, :5] = valid[1, 7] = False
    clean = digest.fit(keys.masked_fill(~valid[:, None, :, None], 0.0), valid)
    trapped = digest.fit(keys.masked_fill(~valid[:, None, :, None], NAN), valid)
    assert all(bool(x.isfinite().all()) for x in trapped)
    torch.testing.assert_close(trapped, clean)


@each_digest
def test_fit_is_deterministic(name: str) -> None:
    keys = torch.randn(2, HKV, 12, D)
    assert all(torch.equal(a, b) for a, b in zip(make(name).fit(keys, None), make(name).fit(keys, None), strict=True))


@each_digest
def test_a_prompt_of_nothing_but_padding_fits_to_something_finite(name: str) -> None:
    state = make(name).fit(torch.full((1, HKV, 4, D), NAN), torch.zeros(1, 4, dtype=torch.bool))
    assert all(bool(x.isfinite().all()) for x in state)


@each_digest
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_of_each_page_and_query_head_alone(name: str, dtype: torch.dtype) -> None:
    """`[b, hkv, g, pages]` float32; other pages and heads in the call make no difference."""
    digest = make(name)
    pages = random_pages([37, 16], HKV, D, P, dtype, spare=0)
    state = fitted_state(digest, pages)
    summary = [x[pages.block_table] for x in fresh_summary(name, pages, state)]
    query = torch.randn(2, HKV, 4, D)
    scores = digest.score(query, summary, state)
    assert (scores.dtype, tuple(scores.shape)) == (torch.float32, (2, HKV, 4, pages.block_table.shape[1]))
    few = digest.score(query[:, :, 1:3], [x[:, 1:2] for x in summary], state)
    torch.testing.assert_close(few, scores[:, :, 1:3, 1:2], rtol=1e-5, atol=1e-5)


@each_digest
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_page_that_holds_the_answer_scores_best(name: str, dtype: torch.dtype) -> None:
    """A key that points along the query, far from all others, wherever it lies in its page."""
    digest = make(name)
    keys, valid = page_batch(dtype, m=8)
    query = torch.randn(1, HKV, 1, D)
    keys[5, :, 3] = 4 * query[0, :, 0].to(dtype)
    state = digest.fit(keys, valid)
    summary = [x[None] for x in digest.summarize(keys, valid, state)]
    assert bool((digest.score(query, summary, state).argmax(-1) == 5).all())


@each_digest
@pytest.mark.parametrize("sizes", [[1] * 20, [7, 1, 1, 16, 3], [40, 1, 2]])
def test_incremental_appends_equal_a_fresh_build(name: str, sizes: list[int]) -> None:
    digest = make(name)
    after = random_pages([sum(sizes), sum(sizes) + 3], HKV, D, P)
    state, pool = fitted_state(digest, after), after.emptied().kv_pool
    summary = empty_summary(digest, after)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    ends[-1] += 3
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        row = torch.full((1,), end, dtype=torch.int32)
        keys, values = (x[start:end].transpose(0, 1)[None] for x in after.tokens(1))
        torch.ops.sparsekv.append_kv(keys, values, None, after.block_table[1:], row, pool, summary, state, name)
    expected = fresh_summary(name, after, state)
    pages = after.block_table[1, : -(-ends[-1] // P)]
    for stored, fresh in zip(summary, expected, strict=True):
        torch.testing.assert_close(stored[pages], fresh[pages], equal_nan=True, rtol=1e-6, atol=1e-6)


def pages_chosen(name: str, tokens: Tensor, sizes: Sequence[int], query: Tensor) -> Tensor:
    """What the next step of a cache reads: tokens `[2, b, hkv, n + 1, d]`, the first n of them in chunks of these
    sizes, query `[b, hq, 1, d]` -> slots `[b, hkv, k]`."""
    slots: list[Tensor] = []
    settings = {"page_size": P, "budget": 4 * P, "sinks": 1, "recent": 1, "dense_layers": 0, "digest": name}
    cache = PagedCache(LlamaConfig(num_hidden_layers=1), **settings)
    cache.observers = [lambda step, chosen: slots.append(chosen.clone())]
    for part in tokens.split([*sizes, 1], dim=3):
        cache.update(part[0], part[1], 0)
        if part.shape[3] > 1:
            cache.layers[0].commit(None)
    cache.layers[0].decode(query, D**-0.5, 0.0, None)
    return slots[0]


@each_digest
def test_what_a_row_reads_depends_on_that_row_alone(name: str) -> None:
    """Not on its batch mates, which are of another kind here, nor on the chunks that it came in."""
    n = 40 * P + 3
    tokens = torch.randn(2, 3, HKV, n + 1, D) + 5 * torch.randn(2, 3, HKV, 1, D)
    query = torch.randn(3, 4 * HKV, 1, D)
    together = pages_chosen(name, tokens, [n], query)
    for sizes in ([n], [n - 2, 2], [P - 3, P, n - 2 * P + 3], [2, 5 * P, n - 5 * P - 2]):
        for row in range(3):
            alone = pages_chosen(name, tokens[:, row : row + 1], sizes, query[row : row + 1])
            assert torch.equal(alone[0], together[row])


class FirstKeys(Digest):
    """What a user might write: half-precision copies of the first two keys of a page, whole numbers, and a state."""

    def fields(self, page_size: int, head_dim: int) -> list[Field]:
        return [Field((min(2, page_size), head_dim), torch.float16), Field((), torch.int32)]

    def fit(self, keys: Tensor, valid: Tensor | None) -> list[Tensor]:
        return [torch.arange(keys.shape[1], dtype=torch.float32)]

    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        first = keys[:, :, :2].masked_fill(~valid[:, None, :2, None], 0.0)
        return [first.half(), valid.sum(1)[:, None].expand(-1, keys.shape[1])]

    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        first, count = summary
        products = torch.einsum("bhgd,bnhfd->bhgnf", query, first.float()).amax(-1)
        return products + count.float().transpose(1, 2)[:, :, None] + state[0][:, None, None]


@pytest.fixture
def own_digest() -> Iterator[str]:
    register("test.first_keys")(FirstKeys)
    yield "test.first_keys"
    DIGESTS.remove("test.first_keys")


def test_a_user_s_own_digest(own_digest: str) -> None:
    """Registered under a name, it is all that is needed: the cache keeps, copies and scores what it declares."""
    pair = CachePair(digest=own_digest, page_size=4, budget=16, sinks=1, recent=4, dense_layers=0)
    pair.forward(33, batch=2)
    fork = pair.fork()
    for each in (pair, fork):
        each.forward(1)
        each.crop(6)
        each.forward(1)
        each.forward(30)
    pair.check(fork)
    assert [x.dtype for x in pair.paged._store.layers[0].summary] == [torch.float16, torch.int32]
    assert pair.paged.stats.sparse_steps == 2


def test_every_module_is_registered() -> None:
    """A file in sparsekv/digests that is not imported, or whose digest has no name, is a mistake."""
    modules = {f"sparsekv.digests.{m.name}" for m in pkgutil.iter_modules(digests.__path__)} - {
        "sparsekv.digests.base"
    }
    registered = {DIGESTS.get(name).__module__ for name in DIGESTS}
    assert modules <= registered
    imported = {
        alias.name
        for node in ast.walk(ast.parse(Path(digests.__path__[0], "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {module.rsplit(".", 1)[1] for module in modules} <= imported
    assert all(DIGESTS.get(name).__doc__ for name in DIGESTS)
