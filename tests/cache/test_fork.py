"""Forks: the same pages read under other settings, and nothing that one does is seen by the other."""

import gc

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.testing.cache_pair import CachePair

SMALL = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0, "digest": "minmax"}


def prefilled(t: int = 41, batch: int = 2, **options: object) -> CachePair:
    pair = CachePair(**{**SMALL, **options})
    pair.forward(t, batch)
    return pair


def used_pages(pair: CachePair) -> int:
    pool = pair.paged._store.table.pool
    return pool.num_pages - pool.num_free


def test_forks_go_their_own_ways() -> None:
    pair = prefilled()
    forks = [pair.fork(), pair.fork()]
    assert used_pages(pair) == 2 * 11
    pair.forward(3)
    forks[0].crop(6)
    forks[0].forward(1)
    forks[1].reorder(torch.tensor([1, 1]))
    forks.append(forks[1].fork())
    forks[1].forward(2)
    pair.check(*forks)


def test_a_fork_of_a_padded_batch() -> None:
    pair = CachePair(**SMALL)
    pair.forward(9, 3, torch.arange(9) >= torch.tensor([[0], [4], [7]]))
    fork = pair.fork()
    fork.forward(1)
    fork.crop(4)
    pair.forward(5)
    pair.check(fork)


@pytest.mark.parametrize(
    "changed",
    [
        {"budget": 24},
        {"budget": 0.5},
        {"policy": "recent"},
        {"policy": "oracle"},
        {"policy": "all"},
        {"group_pooling": "sum"},
        {"sinks": 5, "budget": 20},
        {"dense_layers": 1},
    ],
)
def test_settings_may_change(changed: dict[str, object]) -> None:
    """The fork decodes by its own settings, the original by its."""
    pair = prefilled()
    fork = pair.fork(**changed)
    assert fork.paged.config == pair.paged.config.with_(**changed)
    slots: dict[int, dict[int, object]] = {0: {}, 1: {}}
    for which, each in enumerate((pair, fork)):
        each.paged.observers.append(lambda step, chosen, which=which: slots[which].update({step.layer_idx: chosen}))
        for i, out in enumerate(each.forward(1)):
            torch.testing.assert_close(out.double(), each.attention(i, slots[which][i]), rtol=1e-5, atol=1e-6)
    assert all(chosen is not None for chosen in slots[0].values())
    dense = {i for i, chosen in slots[1].items() if chosen is None}
    assert dense == ({0, 1} if changed == {"policy": "all"} else {0} if "dense_layers" in changed else set())
    pair.check(fork)


def test_counters_and_observers_are_the_fork_s_own() -> None:
    pair = prefilled()
    pair.paged.observers.append(lambda step, slots: pytest.fail("an observer of the original was called"))
    fork = pair.fork()
    fork.forward(1)
    assert (fork.paged.stats.sparse_steps, pair.paged.stats.sparse_steps) == (1, 0)


@pytest.mark.parametrize(
    ("field", "value"), [("page_size", 8), ("digest", "sign_sketch"), ("backend", "reference"), ("max_tokens", 4096)]
)
def test_what_the_pages_depend_on_stays(field: str, value: object) -> None:
    pair = prefilled(backend="auto")
    with pytest.raises(ConfigError, match=f"A fork keeps the pages, so {field} must stay"):
        pair.paged.fork(**{"budget": 64, field: value})
    pair.check()


def test_digests_that_were_not_kept_cannot_be_used() -> None:
    pair = prefilled(dense_layers=1)
    with pytest.raises(
        ConfigError, match=r"policy='top_k' needs digests, and layer 0 kept none. Make the first cache"
    ):
        pair.paged.fork(dense_layers=0)
    pair.fork(dense_layers=0, policy="oracle").forward(1)
    with pytest.raises(ConfigError, match="layer 0 kept none"):
        prefilled(policy="recent").paged.fork(policy="top_k")
    pair.check()


def test_a_fork_of_an_empty_cache_keeps_what_it_needs_itself() -> None:
    """Nothing is shared yet, so neither decides what the other keeps."""
    pair = CachePair(**SMALL)
    pair.paged = pair.paged.fork(policy="recent")
    fork = pair.fork(policy="top_k")
    for each in (pair, fork):
        each.forward(41, batch=2)
        each.forward(1)
        each.check()


def test_dropping_a_fork_frees_its_pages() -> None:
    pair = prefilled()
    fork = pair.fork()
    fork.forward(9)
    assert used_pages(pair) == 22 + 2 * 3  # in each row a copy of the partly filled page, and two more
    del fork
    gc.collect()
    assert used_pages(pair) == 22
    pair.check()


def test_resetting_a_fork_leaves_the_original() -> None:
    pair = prefilled()
    fork = pair.fork()
    fork.paged.reset()
    assert fork.paged.get_seq_length() == 0
    pair.check()


def test_memory_is_shared() -> None:
    pair = prefilled(t=400)
    before = pair.paged.nbytes
    forks = [pair.fork() for _ in range(5)]
    for fork in forks:
        fork.forward(1)
    assert pair.paged.nbytes == forks[0].paged.nbytes <= 1.3 * before
    pair.check(*forks)


def test_layers_that_fell_back_fork_too() -> None:
    pair = CachePair(num_layers=2, on_fallback=lambda layer, reason: None, **SMALL)
    pair.paged.layers[1].refuse("a test")
    keys, values = torch.randn(2, 1, 2, 9, 8)
    pair.forward(9, up_to=1)
    pair.paged.update(keys, values, 1)
    fork = pair.paged.fork()
    fork.update(*torch.randn(2, 1, 2, 1, 8), 1)
    assert (pair.paged.get_seq_length(1), fork.get_seq_length(1)) == (9, 10)
    assert torch.equal(fork.layers[1].keys[:, :, :9], keys)
