"""Steps that can be captured: room first, then the layers' work, then the lengths; and counters that ask no device.

A CPU captures nothing: within `capturing` the layers' work is done at once, as a replay would do it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekv.cache import DecodeStats, PagedCache
from sparsekv.digests import DIGESTS
from sparsekv.errors import CacheFullError, CacheStateError
from sparsekv.pages import Arena, residency
from sparsekv.pages.layer_pages import LayerPages
from sparsekv.policies import POLICIES, DecodeStep, Reads
from sparsekv.testing.cache_pair import CachePair, tiny_config
from sparsekv.testing.steps import Unsteady

SMALL: dict[str, Any] = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0, "digest": "minmax"}
RAGGED = torch.arange(18) >= torch.tensor([[0], [7], [15]])


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a policy whose slots alone tell how many it lists, for this test alone."""
    monkeypatch.setitem(POLICIES._classes, "unsteady", Unsteady)
    return "unsteady"


def prefilled(valid: Tensor | None = None, t: int = 18, batch: int = 2, **options: Any) -> CachePair:
    pair = CachePair(**{**SMALL, **options})
    pair.forward(t if valid is None else valid.shape[1], batch if valid is None else len(valid), valid)
    return pair


Work = Callable[[CachePair], list[Tensor]]


def layers(pair: CachePair) -> list[Tensor]:
    return pair.forward(1)


def layers_that_share(pair: CachePair) -> list[Tensor]:
    """The first layer's keys are read by two more modules, as in models that share them."""
    out = pair.forward(1)
    for _ in range(2):
        query = torch.randn(len(pair.mask), pair.hq, 1, pair.d).to(pair.dtype)
        out.append(pair.paged.layers[0].decode(query, 0.3, 0.0, None))
    return out


def captured(pair: CachePair, work: Work = layers) -> list[Tensor]:
    """A decode step as one that is replayed."""
    with pair.paged.step() as step:
        with step.capturing() as reads:
            out = work(pair)
        step.follow(reads)
    return out


def test_a_captured_step_asks_for_lengths_where_a_replay_finds_them() -> None:
    pair, asked = prefilled(), []

    def work(pair: CachePair) -> list[Tensor]:
        asked.append((pair.paged.get_seq_length(), pair.paged.get_seq_length(1)))
        return layers(pair)

    where = set()
    for expected in (18, 19):
        captured(pair, work)
        assert pair.paged.get_seq_length(1) == expected + 1
        assert asked[-1] == (expected, torch.tensor(expected))
        where.add(pair.paged._store.table.device_table(torch.device("cpu")).num_tokens.data_ptr())
    assert isinstance(asked[-1][1], Tensor)
    assert len(where) == 1


def state(pair: CachePair) -> dict[str, Any]:
    """Everything that a step changes."""
    cache, table = pair.paged, pair.paged._store.table
    pages = torch.cat([torch.from_numpy(table.pages_of(row).copy()) for row in range(table.batch_size)]).long()
    return {
        "lengths": [layer.length for layer in cache.layers],
        "seq_length": cache.get_seq_length(),
        "tokens": (table.num_tokens, table.lengths.tolist(), pages.tolist()),
        "shares": cache.stats.shares,
        "digests": [[field[pages] for field in layer.summary] for layer in cache._store.layers.values()],
        "stats": cache.stats.as_dict(),
        "layer_stats": [vars(cache.stats)[name] for name in ("_sparse_steps", "_dense_steps", "_dense_passes")],
        "modes": [layer.mode for layer in cache.layers],
    }


def same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ours:
        if name == "digests":
            assert_same(ours[name], theirs[name])
        else:
            assert ours[name] == theirs[name]


def assert_same(one: Any, other: Any) -> None:
    """To the bit, NaN (a sketch's factor where there is no token) included."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def same_caches(one: CachePair, other: CachePair) -> None:
    same_state(state(one), state(other))
    for pair in (one, other):
        pair.check()


def compare(steps: int, work: Work = layers, valid: Tensor | None = None, **options: Any) -> tuple[CachePair, ...]:
    """Two caches with the same tokens, one of which takes every step as a captured one."""
    pairs, outputs = [], []
    for take in (work, lambda pair: captured(pair, work)):
        torch.manual_seed(3)
        pair = prefilled(valid, **options)
        outputs.append([take(pair) for _ in range(steps)])
        pairs.append(pair)
    assert_same(outputs[0], outputs[1])
    same_caches(*pairs)
    return tuple(pairs)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("budget", [16, 32, 0.3])
@pytest.mark.parametrize("valid", [None, RAGGED], ids=["even", "ragged"])
def test_a_captured_step_leaves_what_an_ordinary_one_does(
    policy: str, budget: int | float, valid: Tensor | None
) -> None:
    """Output, content, digests, lengths and counters, over steps that begin pages and outgrow the budget."""
    ordinary, _ = compare(19, valid=valid, policy=policy, budget=budget)
    stats = ordinary.paged.stats
    assert stats.sparse_steps + stats.dense_steps == 19
    assert (stats.sparse_steps == 0) == (policy == "all")
    assert policy == "all" or (stats.dense_steps > 0) == (budget == 32)


def test_a_captured_step_with_a_least_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads fewer pages than the budget, which holds all of them; how many, the slots tell."""
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 20)
    ordinary, _ = compare(9, valid=RAGGED, budget=64, group_pooling="share", min_share=0.15)
    stats = ordinary.paged.stats
    assert (stats.dense_steps, stats.sparse_steps) == (2, 7)
    assert stats.pages_read < stats.pages_total


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("budget", [16, 0.3])
def test_a_layer_that_is_read_more_than_once(policy: str, budget: int | float) -> None:
    """More bytes, the same step."""
    ordinary, replayed = compare(7, layers_that_share, RAGGED, policy=policy, budget=budget)
    for pair in (ordinary, replayed):
        stats = pair.paged.stats
        assert stats.sparse_steps + stats.dense_steps == 7
        once = [layer for layer in pair.paged._store.layers if layer]
        assert stats.pages_total == sum(
            (3 + len(once)) * 2 * sum(-(-(n + step) // 4) for n in (18, 11, 3)) for step in range(1, 8)
        )


@pytest.mark.parametrize(
    "options",
    [
        {"digest": "sign_sketch"},
        {"dense_layers": 1},
        {"backend": "reference"},
        {"dtype": torch.bfloat16},
        {"page_size": 1, "budget": 5},
        {"budget": {0: 32, 1: 0.3, "rest": 1.0}, "num_layers": 3},
        {"num_layers": 3, "hq": 6, "hkv": 3},
        {"arena": Arena()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_the_settings(options: dict[str, Any]) -> None:
    compare(6, valid=RAGGED, **options)


def test_a_policy_that_does_not_fill_its_budget(unsteady: str) -> None:
    """Its pages are counted where it lists them, in a captured step as well."""
    for work in (layers, layers_that_share):
        ordinary, _ = compare(9, work, RAGGED, policy=unsteady, budget=0.5)
        stats = ordinary.paged.stats
        assert stats.sparse_steps == 9
        assert 0 < stats.pages_read < stats.pages_total


def test_captured_and_ordinary_steps_alternate() -> None:
    """With everything that happens to a cache in between."""
    pairs = []
    for replays in (False, True):
        torch.manual_seed(4)
        pair = prefilled(RAGGED)

        def step(pair: CachePair = pair, replays: bool = replays) -> None:
            (captured if replays else layers)(pair)

        step()
        pair.forward(1)
        step()
        pair.forward(6)
        step()
        pair.crop(7)
        step()
        step()
        pair.reorder(torch.tensor([2, 0, 0]))
        step()
        pair.repeat(2)
        step()
        pair.select([0, 3, 4])
        pair.forward(3, valid=torch.tensor([[True] * 3, [False, True, True], [False] * 3]))
        step()
        pair.check()
        pairs.append(pair)
    same_caches(*pairs)


def test_a_fork_is_not_touched_by_the_steps_of_the_other() -> None:
    """Both have the partly filled last page in common, which is copied before the step."""
    pair = prefilled(RAGGED)
    fork = pair.fork()
    captured(pair)
    fork.check(pair)
    captured(fork)
    captured(pair)
    pair.check(fork)
    assert fork.paged.stats.sparse_steps == 1


def test_in_inference_mode_and_out_of_it() -> None:
    pair = prefilled(RAGGED, digest="sign_sketch")
    with torch.inference_mode():
        captured(pair)
    captured(pair)
    with torch.inference_mode():
        pair.forward(1)
        captured(pair)
    pair.check()


# -- when a step can be captured, and which step it is


def test_steady_is_a_cache_whose_layers_are_all_in_pages() -> None:
    pair = CachePair(**SMALL)
    assert not pair.paged.is_steady
    pair.forward(9, 2)
    assert pair.paged.is_steady
    for step in (layers, captured, layers):
        step(pair)
        assert pair.paged.is_steady
    pair.crop(4)
    assert pair.paged.is_steady
    assert pair.fork().paged.is_steady
    with pair.paged.step():
        assert not pair.paged.is_steady
    pair.paged.reset()
    assert not pair.paged.is_steady


def test_a_pass_that_was_interrupted_is_not_steady() -> None:
    pair = prefilled()
    pair.forward(1, up_to=1)
    assert not pair.paged.is_steady


def test_a_layer_that_runs_dense_is_not_steady() -> None:
    pair = CachePair(on_fallback=lambda layer, why: None, **SMALL)
    pair.forward(9, up_to=1)
    pair.paged.update(*torch.randn(2, 1, 2, 9, 8), 1)
    pair.paged.layers[1].refuse("a test")
    assert not pair.paged.is_steady


def test_a_model_with_other_layers_is_not_steady() -> None:
    model_config = tiny_config()
    model_config.layer_types = ["full_attention", "sliding_attention"]
    model_config.sliding_window = 8
    cache = PagedCache(model_config, **SMALL)
    cache.update(*torch.randn(2, 1, 2, 5, 8), 0)
    cache.layers[0].commit(None)
    cache.update(*torch.randn(2, 1, 2, 5, 8), 1)
    assert (len(cache.paged_layers), cache.layers[0].is_paged) == (1, True)
    assert not cache.is_steady


def test_the_key_of_a_step_stays_while_nothing_moves() -> None:
    """On a CPU a table is as wide as it must be, so a step that begins a page is another one."""
    pair = prefilled(t=20, reserve_tokens=1000)
    pair.forward(1)
    key = pair.paged.step().key
    for _ in range(3):
        captured(pair)
        assert pair.paged.step().key == key
    assert pair.paged.step().shape == (2, 6, 0)
    captured(pair)
    assert pair.paged.step().key != key
    assert pair.paged.step().shape == (2, 7, 0)
    pair.crop(1)
    assert pair.paged.step().key == key
    pair.reorder(torch.tensor([1, 0]))
    assert pair.paged.step().key == key
    hash(key)


def test_the_key_of_a_step_knows_settings_batch_and_places() -> None:
    pair, other = prefilled(), prefilled()
    key = pair.paged.step().key
    others = [other.paged.step().key, pair.fork(policy="recent").paged.step().key]
    others += [pair.fork(budget={0: first, "rest": 16}).paged.step().key for first in (16, 32)]
    pair.select([1])
    others.append(pair.paged.step().key)
    pair.repeat(2)
    assert pair.paged.step().key == key
    pair.forward(400)
    pair.crop(400)
    others.append(pair.paged.step().key)  # the pool has grown
    assert len({key, *others}) == 7


def test_a_fork_takes_the_same_steps() -> None:
    """With the settings that it has in common."""
    pair = prefilled()
    assert pair.fork().paged.step().key == pair.paged.step().key
    assert pair.fork(budget=40).paged.step().key != pair.paged.step().key


@pytest.mark.parametrize("budget", [12, 40, 0.4])
def test_a_fork_has_the_widths_of_its_own_budget(budget: int | float) -> None:
    """On a GPU: up to the budget nothing is chosen, for the fork as for a cache made with that budget."""
    pair, gpu = prefilled(), torch.device("cuda", 0)
    fork, made = pair.fork(budget=budget), prefilled(budget=budget)
    for num_pages in (1, 2, 3, 4, 10, 11, 600):
        widths = [each.paged._store.table.width(num_pages, gpu) for each in (fork, made)]
        assert widths[0] == widths[1]


# -- steps that fail


def test_a_step_for_which_there_is_no_room_changes_nothing() -> None:
    pair = prefilled(t=12, batch=3, max_tokens=36)
    before = state(pair)
    for _ in range(2):
        with pytest.raises(CacheFullError, match="needs 3 more pages"), pair.paged.step():
            pytest.fail("there is no room")
        assert pair.paged.is_steady
        same_state(state(pair), before)
        pair.check()
    pair.crop(1)
    captured(pair)
    pair.check()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_step_for_which_there_is_no_memory_changes_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's pool may have grown by then; what it holds is the same."""
    pair = prefilled(t=12, batch=3)
    before = state(pair)
    ensure, calls = LayerPages.ensure, itertools.count(1)

    def fail(self: LayerPages, *args: Any) -> None:
        if next(calls) == failing:
            raise torch.OutOfMemoryError("a test")
        ensure(self, *args)

    monkeypatch.setattr(LayerPages, "ensure", fail)
    with pytest.raises(torch.OutOfMemoryError), pair.paged.step():
        pytest.fail("there is no memory")
    assert pair.paged.is_steady
    same_state(state(pair), before)
    pair.check()
    captured(pair)
    pair.check()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_pool_that_could_not_grow_grows_later(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values, or digests, have found memory, and the others have not."""
    pages = LayerPages(torch.randn(1, 2, 1, 8), None, 4, DIGESTS.get("minmax")())
    pages.ensure(4)
    before, grow, calls = pages.capacity, residency.grown, itertools.count(1)

    def fail(old: Tensor, capacity: int) -> Tensor:
        if next(calls) == failing:
            raise torch.OutOfMemoryError("a test")
        return grow(old, capacity)

    with monkeypatch.context() as patched:
        patched.setattr(residency, "grown", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pages.ensure(40)
    assert pages.capacity == before
    assert pages.addresses == tuple(tensor.data_ptr() for tensor in (pages.kv, *pages.summary))
    pages.ensure(40)
    assert len(pages.kv) == len(pages.summary[0]) == pages.capacity >= 40


@pytest.mark.parametrize("in_steps", [True, False])
def test_a_cache_that_could_not_copy_a_shared_page_is_never_used_again(
    in_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table refers to a page with nothing in it. The cache that it shares with is what it was."""
    pair = prefilled(t=11, batch=1)
    twin = pair.paged.fork()

    def fail(self: LayerPages, copies: Any) -> None:
        raise torch.OutOfMemoryError("a test")

    new = torch.randn(1, 2, 1, 16)
    with monkeypatch.context() as patched:
        patched.setattr(LayerPages, "copy_pages", fail)
        with pytest.raises(torch.OutOfMemoryError):
            twin._store.begin_step() if in_steps else twin._store.accept(0, 11, new, new, None, True)
    with pytest.raises(CacheStateError, match="not whole any more"):
        twin._store.begin_step()
    with pytest.raises(CacheStateError, match="not whole any more"):
        twin._store.accept(0, 11, new, new, None, True)
    del twin
    gc.collect()  # the errors' frames know it
    captured(pair)
    pair.check()


class Broken(Exception):
    """What a model raises in a test."""


def begin(pair: CachePair, up_to: int) -> None:
    """A forward that breaks off: some layers have done their work, the next has handed over its token."""
    for i, layer in enumerate(pair.paged.layers[: up_to + 1]):
        key, value = torch.randn(2, len(pair.mask), pair.hkv, 1, pair.d)
        pair.paged.update(key, value, i)
        if i < up_to:
            layer.decode(torch.randn(len(pair.mask), pair.hq, 1, pair.d), 0.3, 0.0, None)
    raise Broken


@pytest.mark.parametrize("up_to", [0, 1, 2])
@pytest.mark.parametrize("valid", [None, RAGGED], ids=["even", "ragged"])
def test_a_capture_that_fails_can_be_run_as_an_ordinary_step(up_to: int, valid: Tensor | None) -> None:
    """Within the same `step`; what the broken forward has written is written again."""
    for _ in range(3):  # also where the token begins a page
        pairs = []
        for breaks in (False, True):
            torch.manual_seed(6)
            pair = prefilled(valid)
            with pair.paged.step() as step:
                if breaks:
                    seed = torch.get_rng_state()
                    with pytest.raises(Broken), step.capturing():
                        begin(pair, up_to)
                    torch.set_rng_state(seed)
                pair.forward(1)
            assert pair.paged.is_steady
            pair.check()
            captured(pair)
            pairs.append(pair)
        same_caches(*pairs)


@pytest.mark.parametrize("up_to", [None, 0, 1, 2])
@pytest.mark.parametrize("next_pass", ["captured", "step", "chunk", "crop"])
def test_a_step_that_fails_leaves_the_cache_as_it_was(up_to: int | None, next_pass: str) -> None:
    """As long as no layer has counted its token, which within `capturing` none does: everything can follow."""
    pair = prefilled(RAGGED)
    before = state(pair)
    with contextlib.suppress(Broken), pair.paged.step() as step:
        if up_to is None:
            raise Broken
        with step.capturing():
            begin(pair, up_to)
    same_state(state(pair), before)
    pair.check()
    if next_pass == "crop":
        pair.crop(2)
    elif next_pass == "chunk":
        pair.forward(5)
    else:
        (captured if next_pass == "captured" else layers)(pair)
    pair.check()
    captured(pair)
    pair.check()


def test_a_step_that_fails_after_its_first_layer_is_an_interrupted_pass() -> None:
    """It is noticed, and can be cropped away."""
    pair = prefilled()
    with pytest.raises(Broken), pair.paged.step():
        begin(pair, 1)
    assert not pair.paged.is_steady
    with pytest.raises(CacheStateError, match="Layer 1 of this cache"):
        pair.forward(4)
    pair.paged.crop(-1)
    pair.check()
    captured(pair)
    pair.check()


def test_room_is_not_asked_for_twice() -> None:
    """The check before a forward knows that the step's token has its place."""
    pair = prefilled(t=11, batch=3, max_tokens=36)
    with pair.paged.step():
        pair.paged.check_room(3, 1)
        pair.forward(1)
    with pytest.raises(CacheFullError):
        pair.paged.check_room(3, 1)


# -- counters


def slots_of(pair: CachePair) -> Counter[int]:
    """By layer, the pages that selections list from now on; of a step that chooses nothing, all."""
    listed: Counter[int] = Counter()

    def observe(step: DecodeStep, slots: Tensor | None) -> None:
        pages = -(-step.seq_lens // step.config.page_size)
        everything = int(pages.sum()) * step.kv_pool.shape[2]
        listed[step.layer_idx] += everything if slots is None else int((slots >= 0).sum())

    pair.paged.observers.append(observe)
    return listed


@pytest.mark.parametrize("policy", [*POLICIES, "unsteady"])
@pytest.mark.parametrize("budget", [12, 24, 0.1, 0.37, 0.8, 1.0])
@pytest.mark.parametrize("page_size", [1, 4])
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_pages_read_are_the_slots_listed(
    policy: str, budget: int | float, page_size: int, lengths: list[int], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(POLICIES._classes, "unsteady", Unsteady)
        torch.manual_seed(seed)
        n = max(*lengths, 2)
        valid = torch.arange(n) >= n - torch.tensor(lengths)[:, None]
        options = SMALL | {"page_size": page_size, "recent": 2, "budget": budget, "policy": policy}
        pair = prefilled(valid, num_layers=1, **options)
        listed = slots_of(pair)
        pair.forward(1)
        pair.forward(1, valid=torch.rand(len(lengths), 1) < 0.5)  # some rows wait
        pair.forward(1)
        stats = pair.paged.stats
        assert stats.sparse_steps + stats.dense_steps == 3
        assert stats.pages_read == listed[0]
        scored = {Reads.NOTHING: 0, Reads.DIGESTS: 2 * 8 * 4, Reads.KEYS: page_size * 8 * 4}
        assert stats.bytes_read >= stats.pages_read * 2 * page_size * 8 * 4
        if stats.dense_steps == 0:
            cost = scored[POLICIES.get(policy).reads] * stats.pages_total
            assert stats.bytes_read == stats.pages_read * 2 * page_size * 8 * 4 + cost


def test_pages_counted_where_they_are_listed(unsteady: str) -> None:
    """By layer, with the bytes that choosing them cost."""
    pair = prefilled(RAGGED, policy=unsteady, budget=0.5, num_layers=3, dense_layers=1)
    listed = slots_of(pair)
    for _ in range(5):
        pair.forward(1)
    stats = pair.paged.stats
    assert stats.pages_read == sum(listed.values())
    page_nbytes, digest_nbytes, total = 2 * 4 * 8 * 4, 2 * 8 * 4, listed[0]  # the dense layer has read all
    chosen = (listed[1] + listed[2]) * page_nbytes + 2 * total * digest_nbytes
    assert stats.pages_total == 3 * total
    assert stats.bytes_read == total * page_nbytes + chosen
    assert stats.sparse_share == chosen / (2 * total * page_nbytes)


def test_counting_goes_on_after_a_reset(unsteady: str) -> None:
    pair = prefilled(RAGGED, policy=unsteady, budget=0.5)
    pair.forward(1)
    stats = pair.paged.stats
    stats.reset()
    assert set(stats.as_dict().values()) == {0}
    listed = slots_of(pair)
    captured(pair)
    pair.forward(1)
    assert stats.pages_read == sum(listed.values()) > 0


def test_counts_of_several_caches_add_up(unsteady: str) -> None:
    stats = DecodeStats()
    sums = []
    for policy in (unsteady, "top_k", unsteady):
        pair = prefilled(RAGGED, policy=policy, budget=0.5, stats=stats)
        sums.append(slots_of(pair))
        captured(pair)
        pair.forward(1)
    assert stats.pages_read == sum(sum(listed.values()) for listed in sums)
    assert stats.sparse_steps == 6


def test_what_is_counted_in_inference_mode_goes_on_outside(unsteady: str) -> None:
    pair = prefilled(RAGGED, policy=unsteady, budget=0.5)
    listed = slots_of(pair)
    with torch.inference_mode():
        pair.forward(1)
    pair.forward(1)
    assert pair.paged.stats.pages_read == sum(listed.values())
    pair.paged.stats.reset()
    with torch.inference_mode():
        pair.forward(1)
        assert pair.paged.stats.pages_read > 0
