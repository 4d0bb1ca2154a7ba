"""One decode step of a paged layer: attention over the pages the policy selects, and counters that tell the truth."""

import pytest
import torch
from torch import Tensor

from sparsekv.cache import DecodeStats
from sparsekv.policies import POLICIES, DecodeStep
from sparsekv.testing import naive
from sparsekv.testing.cache_pair import CachePair
from sparsekv.testing.pages import Pages

SMALL = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0, "digest": "minmax"}


class Recorder:
    """An observer that keeps what it is shown, by layer."""

    def __init__(self, pair: CachePair) -> None:
        self.steps: dict[int, DecodeStep] = {}
        self.slots: dict[int, Tensor | None] = {}
        pair.paged.observers.append(self)

    def __call__(self, step: DecodeStep, slots: Tensor | None) -> None:
        self.steps[step.layer_idx] = step
        self.slots[step.layer_idx] = None if slots is None else slots.clone()


def left_padded(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]


def decoded(
    steps: int = 1, valid: Tensor | None = None, t: int = 40, **options: object
) -> tuple[CachePair, Recorder]:
    """A prefilled pair after some decode steps, every step's output checked against float64."""
    pair = CachePair(**{**SMALL, **options})
    pair.forward(t if valid is None else valid.shape[1], 2 if valid is None else len(valid), valid)
    recorder = Recorder(pair)
    for _ in range(steps):
        for i, out in enumerate(pair.forward(1)):
            expected = pair.attention(i, recorder.slots[i])
            torch.testing.assert_close(out, expected.to(out.dtype), rtol=2e-5, atol=2e-6)
    return pair, recorder


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attends_to_the_selected_pages(policy: str, digest: str, padded: bool, backend: str) -> None:
    valid = left_padded(40, 23, 3) if padded else None
    decoded(6, valid, policy=policy, digest=digest, backend=backend)


@pytest.mark.parametrize("budget", [16, 0.3])
def test_top_k_selects_by_the_bound(budget: int | float) -> None:
    """The slots are those that loops over the stored keys and a sort give."""
    pair, recorder = decoded(5, left_padded(40, 23, 3), budget=budget)
    for i, step in recorder.steps.items():
        pages = Pages(step.kv_pool, step.block_table, step.seq_lens)
        assert step.k == step.config.budget_pages(max(pages.lengths))
        scores = naive.pool_group(naive.page_bounds(pair.queries[i][:, :, 0], pages), 2, "max")
        limits = torch.tensor([step.config.budget_pages(n) for n in pages.lengths])
        expected = naive.select_pages(scores, step.seq_lens, 4, step.k, 1, 4, limits)
        assert torch.equal(recorder.slots[i], expected)


def test_observers_see_the_step_as_it_is() -> None:
    pair, recorder = decoded(1, t=40)
    assert sorted(recorder.steps) == [0, 1]
    step = recorder.steps[1]
    assert step.seq_lens.tolist() == [41, 41]
    assert tuple(step.block_table.shape) == (2, 11)
    assert (step.block_table.dtype, step.seq_lens.dtype) == (torch.int32, torch.int32)
    assert torch.equal(step.query, pair.queries[1][:, :, 0])
    assert (step.k, step.scaling, step.config) == (4, 8**-0.5, pair.paged.config)
    slots = recorder.slots[1]
    assert slots is not None
    assert tuple(slots.shape) == (2, 2, 4)
    assert step.kv_pool.shape[1:] == (2, 2, 4, 8)


def test_observers_can_be_assigned() -> None:
    """The layers see them; a fork has its own."""
    pair = CachePair(**SMALL)
    pair.forward(40)
    seen: list[int] = []
    pair.paged.observers = [lambda step, slots: seen.append(step.layer_idx)]
    fork = pair.fork()
    pair.forward(1)
    assert seen == [0, 1]
    fork.forward(1)
    assert (seen, fork.paged.observers) == ([0, 1], [])
    pair.paged.observers = ()
    pair.forward(1)
    assert seen == [0, 1]


@pytest.mark.parametrize(("t", "is_sparse"), [(14, False), (15, False), (16, True), (40, True)])
def test_dense_while_the_context_fits_the_budget(t: int, is_sparse: bool) -> None:
    """Four pages of four are read in any case; only the fifth leaves something to choose."""
    pair, recorder = decoded(1, t=t)
    assert all((slots is not None) == is_sparse for slots in recorder.slots.values())
    assert (pair.paged.stats.sparse_steps, pair.paged.stats.dense_steps) == ((1, 0) if is_sparse else (0, 1))


@pytest.mark.parametrize(("dense_layers", "dense"), [(0, set()), (1, {0}), ((1,), {1}), (2, {0, 1})])
def test_dense_layers_read_everything_and_keep_no_digest(
    dense_layers: int | tuple[int, ...], dense: set[int]
) -> None:
    pair, recorder = decoded(2, dense_layers=dense_layers)
    assert {i for i, slots in recorder.slots.items() if slots is None} == dense
    assert {i for i, pages in pair.paged._store.layers.items() if not pages.summary} == dense


@pytest.mark.parametrize("policy", ["recent", "oracle", "all"])
def test_policies_that_read_no_digests_keep_none(policy: str) -> None:
    pair, _ = decoded(1, policy=policy)
    assert all(not pages.summary for pages in pair.paged._store.layers.values())


def test_scaling_softcap_and_sinks_reach_the_op() -> None:
    pair = CachePair(**SMALL)
    pair.forward(40)
    key, value = torch.randn(2, 1, 2, 1, 8)
    query, sinks = torch.randn(1, 4, 1, 8), torch.randn(4)
    layer = pair.paged.layers[0]
    layer.update(key, value)
    layer.commit(None)
    out = layer.decode(query, 0.7, 3.0, sinks)
    step = layer._step(query[:, :, 0], 0.7)
    pages = Pages(step.kv_pool, step.block_table, step.seq_lens)
    exact, _ = naive.attend_pages(query[:, :, 0], pages, layer.policy.select(step), 0.7, 3.0, sinks)
    torch.testing.assert_close(out[:, :, 0].double(), exact, rtol=1e-5, atol=1e-6)


# -- counters


def pages_of(lengths: list[int], page_size: int = 4) -> list[int]:
    return [-(-n // page_size) for n in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("policy", "per_page"), [("top_k", 2 * 8), ("recent", 0), ("oracle", 4 * 8)])
def test_pages_and_bytes_read(dtype: torch.dtype, policy: str, per_page: int) -> None:
    """Counted here from the lengths alone; `per_page` numbers are read of every page to choose (two per channel).

    Two layers, two kv heads, a budget of four pages, rows of 41 to 43, 24 to 26 and 4 to 6 tokens.
    """
    pair = CachePair(dtype=dtype, policy=policy, **SMALL)
    pair.forward(40, 3, left_padded(40, 23, 3))
    total = read = 0
    for step in range(1, 4):
        pair.forward(1)
        pages = pages_of([40 + step, 23 + step, 3 + step])
        total += 2 * 2 * sum(pages)
        read += 2 * 2 * sum(min(n, 4) for n in pages)
    stats, itemsize = pair.paged.stats, dtype.itemsize
    page_bytes = 2 * 4 * 8 * itemsize
    assert (stats.sparse_steps, stats.dense_steps, stats.dense_passes) == (3, 0, 1)
    assert (stats.pages_total, stats.bytes_total) == (total, total * page_bytes)
    assert (stats.pages_read, stats.bytes_read) == (read, read * page_bytes + total * per_page * itemsize)
    assert stats.share == stats.bytes_read / stats.bytes_total


def test_sign_sketch_bytes() -> None:
    pair = CachePair(**SMALL | {"digest": "sign_sketch"})
    pair.forward(40)
    pair.forward(1)
    scored = 2 * 2 * 11 * (4 * (8 // 8) + 4 * 2 + 4 + 16)  # layers, heads, pages, bytes of signs, factors, mean, unit
    read = 2 * 2 * 4 * (2 * 4 * 8 * 4)
    assert pair.paged.stats.bytes_read == read + scored


def test_dense_steps_and_passes_are_told_apart() -> None:
    """A step counts as sparse when any layer chose; the dense layer does not make it a dense step."""
    pair = CachePair(**{**SMALL, "dense_layers": 1})
    for t in (6, 1, 1, 3, 1, 1, 8, 1):  # dense up to 16 tokens
        pair.forward(t)
    stats = pair.paged.stats
    assert (stats.sparse_steps, stats.dense_steps, stats.dense_passes) == (1, 4, 3)


def test_the_policy_all_reads_all() -> None:
    pair, _ = decoded(3, policy="all")
    stats = pair.paged.stats
    assert (stats.sparse_steps, stats.dense_steps) == (0, 3)
    assert (stats.pages_read, stats.bytes_read, stats.share) == (stats.pages_total, stats.bytes_total, 1.0)


def test_a_second_module_on_the_same_cache_is_no_second_step() -> None:
    """Models that share keys and values between layers read the cache twice: more bytes, the same step."""
    pair = CachePair(num_layers=1, **SMALL)
    pair.forward(40)
    pair.forward(1)
    stats = pair.paged.stats
    once = stats.pages_read
    pair.paged.layers[0].decode(torch.randn(1, 4, 1, 8), 0.3, 0.0, None)
    assert (stats.sparse_steps, stats.pages_read) == (1, 2 * once)


def test_stats_can_be_shared_reset_and_reported() -> None:
    stats = DecodeStats()
    for _ in range(2):
        pair = CachePair(stats=stats, **SMALL)
        pair.forward(40)
        pair.forward(1)
    assert (stats.sparse_steps, stats.dense_passes) == (2, 2)
    report = stats.as_dict()
    assert report["pages_read"] == stats.pages_read
    assert report["share"] == stats.share
    assert "2 sparse and 0 dense steps, 2 dense passes" in repr(stats)
    stats.reset()
    assert set(stats.as_dict().values()) == {0}
