"""The kernels against the reference and against float64, on a GPU. Run by `make test-gpu`."""

import itertools
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv import ops
from sparsekv.digests import DIGESTS
from sparsekv.errors import KernelError
from sparsekv.ops import cuda, instances, launch, plans, reference
from sparsekv.ops.formulas import with_kernels
from sparsekv.ops.plans import Split
from sparsekv.testing import naive
from sparsekv.testing.cases import Case
from sparsekv.testing.pages import Pages, edge_lengths, fitted_state, fresh_summary, random_pages
from sparsekv.testing.soak import Tally, check, same_slots, same_summary, soak
from sparsekv.testing.tolerance import assert_as_good_as, plain_attention

pytestmark = pytest.mark.gpu
OPS: Any = torch.ops.sparsekv
DTYPES = [torch.bfloat16, torch.float16]
CUDA = torch.device("cuda", 0)


def lengths(page_size: int) -> list[int]:
    return [n for n in edge_lengths(page_size) if n] + [9 * page_size + 5]


@pytest.mark.parametrize("page_size", instances.PAGE_SIZES)
@pytest.mark.parametrize("group", [1, 4, 8, 12, 16])
@pytest.mark.parametrize("head_dim", instances.HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid(dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> None:
    """All ops; every feature meets every shape, as the features take turns."""
    rng = random.Random(f"{dtype} {head_dim} {group} {page_size}")
    for digest, pooling in itertools.product(with_kernels(), ["max", "share", rng.choice(["sum", "mean_softmax"])]):
        drawn = Case.draw(rng)
        geometry = {"dtype": dtype, "head_dim": head_dim, "group": group, "page_size": page_size}
        geometry["min_score"] = rng.choice([None, -4.0]) if pooling == "share" else None
        geometry["whole_tokens"] = rng.choice([0, 4 * page_size])
        case = Case(**vars(drawn) | geometry | {"lengths": lengths(page_size), "pooling": pooling, "digest": digest})
        check(case, CUDA, Tally())


@pytest.mark.parametrize("page_size", instances.PAGE_SIZES)
@pytest.mark.parametrize("group", [1, 8, 16, 20, 128])
@pytest.mark.parametrize("head_dim", instances.LATENT_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid_of_latents(dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> None:
    """The same of keys that are the values, too. Of these min/max are made and scored in plain torch."""
    rng = random.Random(f"{dtype} {head_dim} {group} {page_size}")
    for digest, k in (("sign_sketch", 3), ("sketch2", 128), ("minmax", 7)):
        geometry = {"dtype": dtype, "head_dim": head_dim, "group": group, "page_size": page_size, "k": k}
        geometry |= {"num_kv_heads": rng.choice([1, 1, 2]), "format": "plain", "digest": digest}
        check(Case(**vars(Case.draw(rng)) | geometry | {"lengths": lengths(page_size)}), CUDA, Tally())


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("split", [Split(1, False, 4), Split(7, False, 4), Split(200, False, 4)], ids=str)
def test_any_split_gives_the_same_attention_to_latents(
    split: Split, with_sinks: bool, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tokens before the first one are not seen."""
    pages = random_pages([300, 33, 16, 500], num_kv_heads=1, head_dim=576, dtype=torch.bfloat16, num_halves=1)
    query, sinks = torch.randn(4, 20, 576).bfloat16(), torch.randn(20) if with_sinks else None
    first = torch.tensor([0, 16, 3, 200], dtype=torch.int32)
    monkeypatch.setattr(cuda, "attend_plan", lambda *args: plans.planned_latents(split, torch.bfloat16, 576, 10))
    plain, _ = plain_attention(query, pages, None, 0.05, softcap, sinks, first)
    exact, exact_lse = naive.attend_pages(query, pages, None, 0.05, softcap, sinks, first)
    out, lse = on_gpu(OPS.attend_pages, query, pages, None, 0.05, softcap, sinks, "plain", first)
    assert_as_good_as(out, plain, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_soak() -> None:
    assert soak(200, seed=1).shapes == 200


@pytest.mark.parametrize("sinks", [None, torch.float32, "same"], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_as_exact_as_plain_torch(dtype: torch.dtype, softcap: float, sinks: Any) -> None:
    """Against float64; plain torch in the same dtype says how exact one may be."""
    pages = random_pages([1, 16, 33, 200], head_dim=64, dtype=dtype)
    query = torch.randn(4, 8, 64).to(dtype)
    logits = None if sinks is None else torch.randn(8).to(dtype if sinks == "same" else sinks)
    for slots in (None, torch.tensor([[[0, -1]] * 2, [[0, -1]] * 2, [[1, 2]] * 2, [[3, 12]] * 2], dtype=torch.int32)):
        plain, _ = plain_attention(query, pages, slots, 0.25, softcap, logits)
        exact, exact_lse = naive.attend_pages(query, pages, slots, 0.25, softcap, logits)
        out, lse = on_gpu(OPS.attend_pages, query, pages, slots, 0.25, softcap, logits)
        assert_as_good_as(out, plain, exact)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_tokens_before_the_first_one_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a unit of sixteen tokens, at its edge, units before, and past a sequence's end; by one launch or two."""
    pages = random_pages([5, 32, 60, 60, 300, 17, 700], head_dim=64, dtype=torch.bfloat16)
    query, first = torch.randn(7, 8, 64).bfloat16(), torch.tensor([0, 16, 3, 29, 90, 17, 183], dtype=torch.int32)
    plain, _ = plain_attention(query, pages, None, 0.25, first=first)
    exact, exact_lse = naive.attend_pages(query, pages, None, 0.25, first=first)
    for split in (Split(1, True, 8), Split(4, True, 8), Split(5, False, 8)):
        monkeypatch.setattr(
            cuda, "attend_plan", lambda *args, split=split: plans.planned_attention(split, *args[1:2], 64, 4)
        )
        out, lse = on_gpu(OPS.attend_pages, query, pages, None, 0.25, 0.0, None, "plain", first)
        assert_as_good_as(out, plain, exact)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def on_gpu(op: Any, query: Tensor, pages: Pages, slots: Tensor | None, *args: Any) -> list[Tensor]:
    moved = pages.to(CUDA)
    slots = None if slots is None else slots.cuda()
    args = tuple(x.cuda() if isinstance(x, Tensor) else x for x in args)
    return [x.cpu() for x in op(query.cuda(), moved.kv_pool, moved.block_table, moved.seq_lens, slots, *args)]


@pytest.mark.parametrize(
    "split", [Split(1, True, 4), Split(3, True, 8), Split(8, True, 8), Split(5, False, 8)], ids=str
)
def test_any_split_gives_the_same_attention(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = random_pages([700, 33], head_dim=128, dtype=torch.bfloat16)
    query = torch.randn(2, 8, 128).bfloat16()
    expected, expected_lse = reference.attend_pages(
        query, pages.kv_pool, pages.block_table, pages.seq_lens, None, 0.1
    )

    def plan(device: int, dtype: torch.dtype, rows: int, head_dim: int, group: int, *rest: Any) -> plans.Plan:
        return plans.planned_attention(split, dtype, head_dim, group)

    monkeypatch.setattr(cuda, "attend_plan", plan)
    out, lse = on_gpu(OPS.attend_pages, query, pages, None, 0.1)
    assert (out - expected).float().norm() < 1e-2 * expected.float().norm()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ctas", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("direct", [True, False])
def test_any_cluster_gives_the_same_step(ctas: int, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that become shares lie in shared memory beside the priorities of all pages, else both elsewhere."""

    def plan(device: int, dtype: torch.dtype, rows: int, head_dim: int, *rest: Any) -> plans.Plan:
        group, kernel, width, k, kind, shares, _ = rest
        kept = direct and shares
        made = plans.planned_step(Split(ctas, True, 8), dtype, head_dim, group, kernel, width, k, direct, kind, kept)
        return replace(made, spills=shares and not kept)

    monkeypatch.setattr(cuda, "step_plan", plan)
    rng = random.Random(ctas)
    for _ in range(10):
        check(Case.draw(rng), CUDA, Tally())


@pytest.mark.parametrize("num_pages", [40, 2000, 9000, 65536])
@pytest.mark.parametrize("k", [1, 37, 128, 1024])
@pytest.mark.parametrize("kind", ["normal", "rounded", "odd", "equal"])
def test_selection_is_exact_for_any_scores(num_pages: int, k: int, kind: str) -> None:
    scores = 10 * torch.randn(2, 3, num_pages, device=CUDA)
    if kind == "rounded":
        scores = scores.round()
    elif kind == "odd":
        odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38], device=CUDA)
        scores = odd[torch.randint(len(odd), scores.shape, device=CUDA)]
    elif kind == "equal":
        scores.fill_(2.0)
    seq_lens = torch.tensor([num_pages * 16 - 3, max(1, num_pages * 5)], dtype=torch.int32, device=CUDA)
    few = torch.tensor([k, max(1, k // 3)], dtype=torch.int32, device=CUDA)
    for limits, (min_score, whole) in itertools.product((None, few), ((None, 0), (-5.0, 0), (20.0, num_pages * 8))):
        arguments = (scores, seq_lens, 16, k, 4, 64, limits, min_score, whole)
        assert torch.equal(OPS.select_pages(*arguments), reference.select_pages(*arguments))


def test_what_no_kernel_serves_runs_in_plain_torch() -> None:
    """float32, other head sizes, pages and latents, other digests: the same results as on the CPU."""
    for dtype, head_dim, page_size, digest, num_halves in [
        (torch.float32, 64, 16, "minmax", 2),
        (torch.bfloat16, 40, 16, "minmax", 2),
        (torch.bfloat16, 64, 8, "minmax", 2),
        (torch.bfloat16, 40, 16, "sign_sketch", 2),
        (torch.bfloat16, 24, 16, "sign_sketch", 1),
        (torch.bfloat16, 64, 16, "minmax", 1),
        (torch.bfloat16, 576, 16, "minmax", 1),
        (torch.bfloat16, 576, 8, "sign_sketch", 1),
    ]:
        pages = random_pages([70, 9], 2, head_dim, page_size, dtype, num_halves=num_halves)
        query = torch.randn(2, 4, head_dim).to(dtype)
        state = [] if digest == "minmax" else None
        if state is None:
            state = fitted_state(DIGESTS.get(digest)(), pages)
        summary = fresh_summary(digest, pages, state)
        results = []
        for device in ("cpu", "cuda"):
            p, s, t = pages.to(device), [x.to(device) for x in summary], [x.to(device) for x in state]
            results.append(
                OPS.sparse_decode(
                    query.to(device), None, None, p.block_table, p.seq_lens, p.kv_pool, s, t, None,
                    digest, "max", 2, 1, 1, 0.2, 0.0, None,
                )
            )  # fmt: skip
        assert torch.equal(results[0][2], results[1][2].cpu())
        torch.testing.assert_close(results[0][0], results[1][0].cpu(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["append_kv", "score_pages", "select_pages", "attend_pages", "sparse_decode"])
def test_opcheck(name: str) -> None:
    pages = random_pages([70, 9], head_dim=64, dtype=torch.bfloat16).to(CUDA)
    pages.kv_pool.nan_to_num_(nan=0.5)  # opcheck compares with ==
    summary = [x.nan_to_num(nan=0.5).cuda() for x in fresh_summary("minmax", pages.to("cpu"), [])]
    query, new = torch.randn(2, 4, 64, device=CUDA).bfloat16(), torch.randn(2, 2, 1, 64, device=CUDA).bfloat16()
    where = (pages.block_table, pages.seq_lens)
    slots = torch.zeros(2, 2, 1, dtype=torch.int32, device=CUDA)
    arguments: dict[str, tuple[Any, ...]] = {
        "append_kv": (new, new, None, *where, pages.kv_pool, summary, [], "minmax"),
        "score_pages": (query, summary, [], *where, 16, "minmax", "max", 0.1),
        "select_pages": (torch.randn(2, 2, 7, device=CUDA), pages.seq_lens, 16, 2, 4, 4, None),
        "attend_pages": (query, pages.kv_pool, *where, slots, 0.1, 0.0, None),
        "sparse_decode": (query, new, new, *where, pages.kv_pool, summary, [], None, "minmax", "max", 2, 4, 4, 0.1),
    }
    # A functionalized graph writes into copies, so what the op leaves in its page depends on the run before: test the
    # schema, the shapes and the autograd registration.
    torch.library.opcheck(getattr(OPS, name).default, arguments[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["sign_sketch", "sketch2"])
@pytest.mark.parametrize("head_dim", instances.HEAD_DIMS + instances.LATENT_DIMS)
def test_a_sketchs_scores_are_exact_but_where_a_channel_is_half_way(head_dim: int, name: str) -> None:
    """Beyond what a soak may ask: most heads have no channel that could be rounded either way."""
    pages = random_pages([900] * 8, num_kv_heads=4, head_dim=head_dim, dtype=torch.bfloat16, device=CUDA)
    state = fitted_state(DIGESTS.get(name)(), pages)
    summary, query = fresh_summary(name, pages, state), torch.randn(8, 4, head_dim, device=CUDA).bfloat16()
    score = (query, summary, state, pages.block_table, pages.seq_lens, 16, name, "max", 0.1)
    scores, expected = (op(*score)[..., :57] for op in (OPS.score_pages, reference.score_pages))
    error = (scores - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.flatten().quantile(0.75) < 2e-6
    assert error.max() < 2e-2


@pytest.mark.parametrize(("halves", "heads", "head_dim"), [(2, 4, 128), (1, 1, 576)], ids=["128", "latents"])
@pytest.mark.parametrize("digest", with_kernels())
def test_a_captured_step_follows_growing_lengths(digest: str, halves: int, heads: int, head_dim: int) -> None:
    """Captured once; lengths then change in place, and every replay equals the reference."""
    num_pages, table = 48, torch.randperm(48, device=CUDA).int().view(2, 24)
    pool = torch.randn(num_pages, halves, heads, 16, head_dim, device=CUDA).bfloat16()
    seq_lens = torch.tensor([1, 1], dtype=torch.int32, device=CUDA)
    pages = Pages(pool, table, torch.full_like(seq_lens, 16 * 24))
    state = fitted_state(DIGESTS.get(digest)(), pages)
    summary = fresh_summary(digest, pages, state)  # of full pages; what it says of tokens yet to come is not read
    query, key, value = (torch.randn(2, n, 1, head_dim, device=CUDA).bfloat16() for n in (16, heads, heads))

    def step(namespace: Any, pool: Tensor, summary: list[Tensor]) -> tuple[Tensor, ...]:
        settings = (None, digest, "max", 4, 4, 16, 0.1)
        result: tuple[Tensor, ...] = namespace.sparse_decode(
            query[:, :, 0], key, value, table, seq_lens, pool, summary, state, *settings
        )
        return result

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(OPS, pool.clone(), [x.clone() for x in summary])
    torch.cuda.current_stream().wait_stream(side)
    expected_pool, expected_summary = pool.clone(), [x.clone() for x in summary]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, slots = step(OPS, pool, summary)
    for length in range(1, 16 * table.shape[1]):
        seq_lens.copy_(torch.tensor([length, max(1, length // 3)]))
        for tensor in (query, key, value):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        _, _, expected_slots = step(ops.for_backend("reference"), expected_pool, expected_summary)
        assert torch.equal(pool, expected_pool)
        full = table[:, : length // 16].flatten()[: length // 16].long()  # the first row's, which is the longer
        same_summary(
            digest, [x[full] for x in summary], [x[full] for x in expected_summary], pool.shape, "digests", length
        )
        score = (query[:, :, 0], summary, state, table, seq_lens, 16, digest, "max", 0.1)
        same_slots("slots", slots, expected_slots, reference.score_pages(*score), length, digest)
        attended, expected_lse = reference.attend_pages(query[:, :, 0], pool, table, seq_lens, slots, 0.1)
        assert (out - attended).float().norm() < 1e-2 * attended.float().norm()
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_a_missing_compiler_is_one_warning_and_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = random_pages([70], head_dim=64, dtype=torch.bfloat16)
    query = torch.randn(1, 4, 64).bfloat16()
    expected = on_gpu(reference.attend_pages, query, pages, None, 0.1)
    launch.usable.cache_clear()
    monkeypatch.setattr(launch.compiler, "unavailable", lambda device=None: "no NVRTC. Remedy: pip install it.")
    with pytest.warns(UserWarning, match="plain torch does their work, slowly: no NVRTC. Remedy"):
        out = on_gpu(OPS.attend_pages, query, pages, None, 0.1)
    torch.testing.assert_close(out[0], expected[0])
    launch.usable.cache_clear()


def test_another_thread_and_another_stream() -> None:
    """A thread has no CUDA context of its own yet, and a side stream is the current one only there."""
    pages = random_pages([70], head_dim=64, dtype=torch.bfloat16)
    query = torch.randn(1, 4, 64).bfloat16()
    expected = on_gpu(OPS.attend_pages, query, pages, None, 0.1)[0]
    results = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(on_gpu(OPS.attend_pages, query, pages, None, 0.1)[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


def test_launches_say_what_was_wrong() -> None:
    with pytest.raises(KernelError, match="select_pages"):
        launch.launch(instances.SELECT_PAGES, torch.zeros(1, device=CUDA), (1, 1, 1), 64, [], 0)


COUNTED_WRONGLY = """
from sparsekv.ops import rooms
counted = rooms.select_bytes
rooms.select_bytes = lambda *shape: counted(*shape) + 16
from sparsekv.testing.soak import main
main(["--shapes", "1"])
"""


def test_kernels_lay_out_the_shared_memory_that_was_counted() -> None:
    """A debug build stops where they do not; it is other code, so it runs in other processes."""
    for program, fails in (
        ("from sparsekv.testing.soak import main; main(['--shapes', '12'])", False),
        (COUNTED_WRONGLY, True),
    ):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env={**os.environ, "SPARSEKV_DEBUG": "1"}, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stderr[-2000:]
