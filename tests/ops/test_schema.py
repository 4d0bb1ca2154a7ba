"""The ops as PyTorch operators: what their schemas promise, and that torch.compile sees through them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sparsekv import ops
from sparsekv.digests import DIGESTS
from sparsekv.errors import UnknownNameError
from sparsekv.ops import reference, schema
from sparsekv.ops.formats import page_format
from sparsekv.ops.prompt import lists_of
from sparsekv.testing.pages import Pages, fitted_state, fresh_summary, random_pages, stored_as

OPS = torch.ops.sparsekv
LENGTHS = [21, 8, 1]


def layer(digest: str, dtype: torch.dtype = torch.float32, lengths: list[int] = LENGTHS) -> tuple[Pages, Any, Any]:
    """Pages without NaN (opcheck compares with ==), and the digest's summary and state."""
    pages = random_pages(lengths, page_size=8, dtype=dtype)
    pages.kv_pool.nan_to_num_(nan=0.5)
    state = fitted_state(DIGESTS.get(digest)(), pages)
    return pages, [x.nan_to_num(nan=0.5) for x in fresh_summary(digest, pages, state)], state


def append_arguments(digest: str, num_new: int, padded: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    pages, summary, state = layer(digest, dtype, [n + num_new for n in LENGTHS])
    key, value = torch.randn(2, 3, 2, num_new, 16, dtype=dtype)
    valid = None
    if padded:
        valid = torch.rand(3, num_new) < 0.5
    return key, value, valid, pages.block_table, pages.seq_lens, pages.kv_pool, summary, state, digest


def score_arguments(digest: str, pooling: str = "max", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    pages, summary, state = layer(digest, dtype)
    query = torch.randn(3, 4, 16, dtype=dtype)
    return query, summary, state, pages.block_table, pages.seq_lens, 8, digest, pooling, 0.25


def select_arguments(k: int, limited: bool) -> tuple[Any, ...]:
    limits = torch.tensor([2, 1, 3], dtype=torch.int32) if limited else None
    return torch.randn(3, 2, 5), torch.tensor(LENGTHS, dtype=torch.int32), 8, k, 4, 4, limits


def attend_arguments(
    k: int | None, softcap: float, sinks: bool, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    pages, _, _ = layer("minmax", dtype)
    slots = None if k is None else torch.arange(k, dtype=torch.int32).expand(3, 2, k).contiguous()
    query = torch.randn(3, 4, 16, dtype=dtype)
    extra = torch.randn(4, dtype=dtype) if sinks else None
    return query, pages.kv_pool, pages.block_table, pages.seq_lens, slots, 0.25, softcap, extra


def step_arguments(
    digest: str, k: int, appended: bool = True, limited: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    pages, summary, state = layer(digest, dtype)
    key, value = torch.randn(2, 3, 2, 1, 16, dtype=dtype) if appended else (None, None)
    limits = torch.tensor([2, 1, 3], dtype=torch.int32) if limited else None
    where = pages.block_table, pages.seq_lens, pages.kv_pool, summary, state
    query, sinks = torch.randn(3, 4, 16, dtype=dtype), torch.randn(4, dtype=dtype)
    return query, key, value, *where, limits, digest, "max", k, 4, 4, 0.25, 5.0, sinks


def prompt_arguments() -> tuple[Any, ...]:
    query, key, value = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 21, 16), torch.randn(2, 2, 21, 8)
    blocks = torch.tensor([[True, True, False], [True, False, True]]).expand(2, 4, 2, 3)
    return query, key, value, *lists_of(blocks), 8, 0.25


CASES: list[tuple[str, Callable[[], tuple[Any, ...]]]] = [
    ("append_kv", lambda: append_arguments("minmax", 3, padded=False)),
    ("append_kv", lambda: append_arguments("minmax", 9, padded=True, dtype=torch.bfloat16)),
    ("append_kv", lambda: append_arguments("minmax", 0, padded=False)),
    ("append_kv", lambda: append_arguments("sign_sketch", 1, padded=False)),
    ("read_pages", lambda: (layer("minmax")[0].kv_pool[:6], 3, 16, torch.bfloat16)),
    ("read_pages", lambda: (layer("minmax")[0].kv_pool[:6, :1], 3, 16, torch.bfloat16)),
    ("read_pages", lambda: (stored_as(page_format("int4"), layer("minmax")[0])[:6], 2, 16, torch.float32, "int4")),
    ("score_pages", lambda: score_arguments("minmax")),
    ("score_pages", lambda: score_arguments("sign_sketch", "sum")),
    ("score_pages", lambda: score_arguments("minmax", "mean_softmax", torch.bfloat16)),
    ("select_pages", lambda: select_arguments(2, limited=False)),
    ("select_pages", lambda: select_arguments(7, limited=True)),
    ("attend_pages", lambda: attend_arguments(None, 0.0, sinks=False)),
    ("attend_pages", lambda: attend_arguments(2, 5.0, sinks=True)),
    ("attend_pages", lambda: attend_arguments(3, 0.0, sinks=False, dtype=torch.bfloat16)),
    ("attend_pages", lambda: attend_arguments(2, 5.0, sinks=True, dtype=torch.float64)),
    ("attend_pages", lambda: (*attend_arguments(None, 5.0, sinks=True), "plain", torch.tensor([9, 0, 1]).int())),
    ("sparse_decode", lambda: step_arguments("minmax", 2)),
    ("sparse_decode", lambda: step_arguments("minmax", 9, dtype=torch.bfloat16)),
    ("sparse_decode", lambda: step_arguments("sign_sketch", 2, limited=True)),
    ("sparse_decode", lambda: step_arguments("minmax", 2, appended=False)),
    ("prompt_attention", prompt_arguments),
    ("score_blocks", lambda: (torch.randn(2, 4, 3, 16), torch.randn(2, 2, 21, 16), [3, 11, 20], 8, 0.25)),
    ("rotate", lambda: (torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), *torch.randn(2, 2, 1, 8))),
    ("rms_norm", lambda: (torch.randn(2, 3, 8), torch.randn(8), 1e-6)),
]
each_case = pytest.mark.parametrize(
    ("name", "arguments"), CASES, ids=[f"{name}{i}" for i, (name, _) in enumerate(CASES)]
)


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch._dynamo.reset()


def test_every_op_has_a_case() -> None:
    assert {name for name, _ in CASES} == set(schema.SCHEMAS), "add the new op's arguments to CASES above"


@each_case
def test_opcheck(name: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    """Mutations as declared, no aliasing, fake shapes and dtypes as the real ones, traceable with dynamic shapes."""
    torch.library.opcheck(getattr(OPS, name).default, arguments())


@each_case
def test_compiled_equals_eager(name: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    op, eager = getattr(OPS, name), arguments()
    compiled = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, eager)
    graph = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(*compiled), op(*eager), rtol=0, atol=0)
    written = [[x for x in tree_leaves(args) if isinstance(x, Tensor)] for args in (compiled, eager)]
    torch.testing.assert_close(*written, rtol=0, atol=0, equal_nan=True)


def decode_step(key: Tensor, value: Tensor, query: Tensor, pages: Any, summary: Any, state: Any, digest: str) -> Any:
    """One layer's decode step, as the cache composes it."""
    pool, table, lens = pages
    OPS.append_kv(key, value, None, table, lens, pool, summary, state, digest)
    scores = OPS.score_pages(query, summary, state, table, lens, 8, digest, "max", 0.25)
    slots = OPS.select_pages(scores, lens, 8, 2, 1, 1)
    return OPS.attend_pages(query, pool, table, lens, slots, 0.25)


@pytest.mark.parametrize("digest", list(DIGESTS))
def test_a_decode_step_compiles_to_one_graph(digest: str) -> None:
    """Several steps: the compiled one gives the same bits, in the output and in the pages and digests."""
    step = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    (pages, summary, state), (pages2, summary2, _) = (
        layer(digest, lengths=[30, 20, 9]),
        layer(digest, lengths=[30, 20, 9]),
    )
    start = torch.tensor([20, 10, 0], dtype=torch.int32)
    for new in range(1, 9):
        key, value, query = torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 16), torch.randn(3, 4, 16)
        lens = start + new
        expected = decode_step(key, value, query, (pages.kv_pool, pages.block_table, lens), summary, state, digest)
        got = step(key, value, query, (pages2.kv_pool, pages2.block_table, lens), summary2, state, digest)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close([pages2.kv_pool, *summary2], [pages.kv_pool, *summary], rtol=0, atol=0, equal_nan=True)


def test_backends() -> None:
    """`auto` is the dispatcher, `reference` plain torch; both know the same ops, and on the CPU they agree."""
    auto, plain = ops.for_backend("auto"), ops.for_backend("reference")
    assert auto is OPS
    assert plain.score_pages is reference.score_pages
    arguments = score_arguments("minmax")
    assert torch.equal(auto.score_pages(*arguments), plain.score_pages(*arguments))
    assert all(callable(getattr(plain, name)) and hasattr(auto, name) for name in schema.SCHEMAS)


def test_an_unknown_digest_is_named() -> None:
    arguments = list(score_arguments("minmax"))
    arguments[6] = "minmaxx"
    with pytest.raises(UnknownNameError, match=r"digest='minmaxx' is not known. Did you mean 'minmax'"):
        OPS.score_pages(*arguments)


def test_wrong_types_are_refused_by_the_schema() -> None:
    with pytest.raises(RuntimeError, match="select_pages"):
        OPS.select_pages(torch.randn(1, 1, 4), [4], 4, 2, 0, 0)
