"""The tensors of a cache go to the next one: in the same places, for one cache at a time, with nothing of the old."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv.cache import DecodeStats
from sparsekv.digests import DIGESTS, register
from sparsekv.digests.minmax import MinMax
from sparsekv.pages import Arena
from sparsekv.testing.cache_pair import CachePair

SMALL: dict[str, Any] = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0, "digest": "minmax"}


@pytest.fixture(autouse=True)
def _by_reference_counts() -> Iterator[None]:
    """A cache is gone with its last name: nobody waits for the garbage collector."""
    gc.disable()
    yield
    gc.enable()


def used(arena: Arena | None, t: int = 41, batch: int = 2, **options: Any) -> CachePair:
    """A pair after a padded prompt and some steps, all checked."""
    pair = CachePair(**{**SMALL, "arena": arena, **options})
    pair.forward(t, batch, torch.arange(t) >= torch.arange(batch)[:, None] * (t // 3))
    for _ in range(3):
        pair.forward(1)
    pair.check()
    return pair


def tensors(pair: CachePair) -> dict[int, list[Tensor]]:
    return {i: [x.kv, *x.summary, *x.state] for i, x in pair.paged._store.layers.items()}


def places(pair: CachePair) -> dict[int, list[int]]:
    """Where the tensors of each layer are."""
    return {i: [x.data_ptr() for x in own] for i, own in tensors(pair).items()}


def kept(arena: Arena) -> int:
    """Bytes that are kept for the next cache."""
    return sum(pages.nbytes for pages in arena._kept.layers.values()) if arena._kept else 0


def flat(pair: CachePair) -> set[int]:
    return {place for own in places(pair).values() for place in own}


def table(pair: CachePair) -> set[int]:
    """Where its page table and lengths are."""
    return {x.data_ptr() for x in pair.paged._store.table.on(torch.device("cpu"))}


def spoil(pair: CachePair) -> None:
    """Fills a cache's tensors with what shows wherever it is read."""
    for tensor in (x for own in tensors(pair).values() for x in own):
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
@pytest.mark.parametrize(("t", "batch"), [(41, 2), (20, 1), (9, 4), (12, 2)])
def test_the_next_cache_gets_the_tensors_of_the_last(digest: str, t: int, batch: int) -> None:
    """Whatever its batch, as long as it has room in them; what was in them is not seen."""
    arena = Arena()
    pair = used(arena, digest=digest)
    before = places(pair)
    spoil(pair)
    del pair
    pair = used(arena, t, batch, digest=digest)
    assert places(pair) == before
    pair.crop(5)
    pair.forward(7)
    pair.check()


def test_a_cache_like_the_last_is_where_the_last_was() -> None:
    """Tables included: a captured step of the one is a step of the other."""
    arena, stats = Arena(), DecodeStats()
    pair = used(arena, stats=stats)
    key = pair.paged.step().key
    del pair
    pair = used(arena, stats=stats)
    assert pair.paged.step().key == key
    other = used(arena, stats=stats)
    assert other.paged.step().key != key


@pytest.mark.parametrize("policy", ["top_k", "recent", "oracle"])
@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
def test_it_answers_as_a_cache_with_new_tensors(policy: str, digest: str) -> None:
    """To the bit, and so do the counters."""
    arena = Arena()
    spoil(used(arena, policy=policy, digest=digest))
    answers = []
    for lender in (arena, None):
        torch.manual_seed(1)
        pair = used(lender, 30, policy=policy, digest=digest)
        answers.append((pair.forward(1), pair.forward(1), pair.paged.stats.as_dict()))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)


class Fitted(MinMax):
    """Learns the mean key of the first prompt."""

    def fit(self, keys: Tensor, valid: Tensor | None) -> list[Tensor]:
        return [keys.mean((0, 2))]


def test_digests_are_fitted_anew() -> None:
    """To the keys of the new cache's prompt, not to those of the last one's."""
    arena = Arena()
    register("test.fitted")(Fitted)
    try:
        pair = used(arena, digest="test.fitted")
        where = places(pair)
        del pair
        pair = CachePair(arena=arena, **SMALL | {"digest": "test.fitted"})
        pair.forward(30, 2)
    finally:
        DIGESTS.remove("test.fitted")
    for i, own in tensors(pair).items():
        keys, _ = pair.held(i)
        torch.testing.assert_close(own[-1], keys.mean((0, 2)))
    assert places(pair) == where


def test_a_longer_prompt_gets_new_tensors() -> None:
    """They are kept in turn."""
    arena = Arena()
    small = used(arena, 20)
    before = flat(small)
    kept = [x for own in tensors(small).values() for x in own]  # so that nothing else can be in their place
    del small
    large = used(arena, 300)
    assert not before & flat(large)
    after = places(large)
    del large, kept
    assert places(used(arena, 300)) == after


def test_two_caches_at_once_never_share() -> None:
    arena = Arena()
    one, two = used(arena), used(arena)
    assert not flat(one) & flat(two)
    assert not table(one) & table(two)
    where = places(one)
    del one
    three, four = used(arena), used(arena)
    assert places(three) == where
    assert len(flat(two) | flat(three) | flat(four)) == 3 * len(flat(two))
    assert len(table(two) | table(three) | table(four)) == 6
    for pair in (three, two, four):
        pair.forward(9)
        pair.forward(1)
    for pair in (two, three, four):
        pair.check()


def test_the_last_to_go_leaves_its_tensors() -> None:
    arena = Arena()
    one, two = used(arena), used(arena)
    where = places(two)
    del one, two
    assert places(used(arena)) == where


def test_tensors_are_taken_at_the_first_use() -> None:
    """Not when a cache is made: by then the one before it may still be there, and one never used takes nothing."""
    arena = Arena()
    pair = used(arena)
    where = places(pair)
    waiting, unused = (CachePair(arena=arena, **SMALL) for _ in range(2))
    del pair
    assert waiting.paged.nbytes == unused.paged.nbytes == 0
    del unused
    assert kept(arena) > 0
    waiting.forward(30, 2)
    assert places(waiting) == where
    assert kept(arena) == 0
    waiting.check()


def test_forks_keep_the_tensors_until_the_last_is_gone() -> None:
    arena = Arena()
    pair = used(arena)
    one, two = pair.fork(), pair.fork(budget=20)
    del pair
    assert kept(arena) == 0
    other = used(arena)
    assert not flat(other) & flat(one)
    one.forward(6)
    two.forward(6)
    one.check(two)
    where = places(two)
    del one
    assert kept(arena) == 0
    two.forward(1)
    two.check()
    del two
    assert places(used(arena)) == where
    other.check()


def test_a_fork_that_outlives_the_original_leaves_the_same_tensors() -> None:
    arena = Arena()
    pair = used(arena)
    where, fork = places(pair), pair.fork()
    del pair
    fork.forward(1)
    del fork
    pair = used(arena)
    assert places(pair) == where
    pair.forward(1)
    pair.check()


@pytest.mark.parametrize(
    "changed",
    [
        {"d": 16},
        {"hkv": 4},
        {"dtype": torch.bfloat16},
        {"page_size": 2, "budget": 8},
        {"digest": "sign_sketch"},
        {"policy": "recent"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_layers_of_another_kind_get_new_tensors(changed: dict[str, Any]) -> None:
    arena = Arena()
    pair = used(arena)
    kept = [x for own in tensors(pair).values() for x in own]
    before = flat(pair)
    del pair
    pair = used(arena, **changed)
    assert not before & flat(pair)
    del kept
    where = places(pair)
    del pair
    assert places(used(arena, **changed)) == where


def test_layers_that_are_alike_get_theirs_all_the_same() -> None:
    """Here the first layer has no digests any more; the second is what it was."""
    arena = Arena()
    pair = used(arena)
    first, second = places(pair).values()
    kept = tensors(pair)[0]
    del pair
    pair = used(arena, dense_layers=1)
    assert kept[0].data_ptr() == first[0] != places(pair)[0][0]
    assert places(pair)[1] == second


def test_what_a_cache_does_not_use_stays_kept() -> None:
    """A pass that was interrupted leaves layers unused; the next cache gets all."""
    arena = Arena()
    pair = used(arena, num_layers=3)
    where = places(pair)
    del pair
    pair = CachePair(num_layers=3, arena=arena, **SMALL)
    pair.forward(20, 2, up_to=1)
    assert places(pair) == {0: where[0]}
    del pair
    pair = used(arena, num_layers=3)
    assert places(pair) == where


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
def test_a_copy_is_on_its_own(copied: Any, digest: str) -> None:
    """It has the content, its own tensors, and no part in the arena."""
    arena = Arena()
    pair = used(arena, digest=digest)
    twin = copied(pair)
    assert not flat(pair) & flat(twin)
    for each in (pair, twin):
        each.forward(6)
        each.forward(1)
        each.check()
    where = places(pair)
    del twin, each
    assert kept(arena) == 0
    twin = copied(pair)
    del pair
    assert kept(arena) > 0
    pair = used(arena, digest=digest)
    assert places(pair) == where
    assert not flat(pair) & flat(twin)
    twin.forward(1)
    for each in (pair, twin):
        each.check()
    twin.paged.reset()
    assert twin.paged.get_seq_length() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copied_arena_keeps_nothing(copied: Any) -> None:
    arena = Arena()
    used(arena)
    twin = copied(arena)
    assert (kept(twin), kept(arena) > 0) == (0, True)
    where = places(used(arena))
    pair = used(twin)
    assert not flat(pair) & {place for own in where.values() for place in own}


def test_a_copy_of_forks_shares_as_they_do() -> None:
    arena = Arena()
    pair = used(arena)
    fork = pair.fork()
    twins = copy.deepcopy([pair, fork])
    for each in (pair, fork, *twins):
        each.forward(3)
    pair.check(fork)
    twins[0].check(twins[1])
    assert places(twins[0]) == places(twins[1])
    assert not flat(pair) & flat(twins[0])


def test_bytes_that_are_kept_and_given_back() -> None:
    arena = Arena()
    assert kept(arena) == 0
    arena.clear()
    pair = used(arena)
    assert kept(arena) == 0
    nbytes = pair.paged.nbytes
    arena.clear()  # what is lent stays lent
    pair.forward(1)
    pair.check()
    del pair
    assert kept(arena) == nbytes
    arena.clear()
    assert kept(arena) == 0
    used(arena).check()


def test_an_arena_may_be_gone_first() -> None:
    arena = Arena()
    pair = used(arena)
    del arena
    pair.forward(1)
    pair.check()
    pair.paged.reset()
    del pair


def test_a_cache_that_is_reset_gets_its_own_tensors_again() -> None:
    arena = Arena()
    pair = used(arena)
    where = places(pair)
    spoil(pair)
    pair.paged.reset()
    assert (pair.paged.nbytes, kept(arena) > 0) == (0, True)
    fresh = CachePair(**SMALL)
    pair.plain, pair.mask = fresh.plain, fresh.mask
    pair.forward(18, 3)
    pair.forward(1)
    assert places(pair) == where
    assert kept(arena) == 0
    pair.check()


def test_a_cache_that_is_reset_leaves_a_fork_its_tensors() -> None:
    arena = Arena()
    pair = used(arena)
    fork = pair.fork()
    pair.paged.reset()
    assert kept(arena) == 0
    fresh = CachePair(**SMALL)
    pair.plain, pair.mask = fresh.plain, fresh.mask
    pair.forward(33, 3)
    assert not flat(pair) & flat(fork)
    for each in (pair, fork):
        each.forward(1)
        each.check()


def test_pages_reserved_are_made_once() -> None:
    """A cache of known size after another: nothing is allocated, and nothing moves while it fills."""
    arena = Arena()
    where = places(used(arena, reserve_tokens=400))
    pair = used(arena, reserve_tokens=400)
    assert places(pair) == where
    pair.forward(100)
    assert places(pair) == where
    pair.check()


@pytest.mark.parametrize("reused", [False, True])
def test_tensors_made_in_inference_mode_serve_outside(reused: bool) -> None:
    arena = Arena()
    with torch.inference_mode():
        where = places(used(arena, digest="sign_sketch"))
        if reused:
            used(arena, digest="sign_sketch")
    pair = used(arena, digest="sign_sketch")
    assert places(pair) == where
    pair.check()


def test_caches_made_one_after_another_hold_no_more_memory_than_one() -> None:
    arena, most = Arena(), 0
    for t in (30, 50, 20, 50, 41):
        most = max(most, used(arena, t).paged.nbytes)
        assert kept(arena) <= most
