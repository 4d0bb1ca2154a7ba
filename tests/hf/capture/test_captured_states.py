"""Captured steps of layers that hold states, on any machine: a step that runs twice finds them as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekv
from sparsekv import PagedCache
from sparsekv.cache import StateLayer
from sparsekv.hf.capture.decoder import Run
from sparsekv.hf.support import CACHE
from sparsekv.pages import window_table
from sparsekv.testing.playing import Played, decoded, played

SMALL: dict[str, Any] = {"budget": 48, "page_size": 16, "sinks": 2, "recent": 4, "dense_layers": 1, "fuse": False}
HYBRIDS = """
    qwen3_next qwen3_5_text olmo_hybrid bamba granitemoehybrid nemotron_h jamba lfm2_moe falcon_h1 zamba zamba2 zaya
""".split()


@pytest.fixture(autouse=True)
def _played(monkeypatch) -> Iterator[None]:
    """As on a GPU: memory goes from cache to cache, and windows have tables of one width."""
    monkeypatch.setattr(sparsekv.Patch, "_captures", True)
    monkeypatch.setattr(window_table, "_width", lambda num_pages, device, ring: max(num_pages, ring))
    with played():
        yield


@pytest.fixture
def prefilled(prompt) -> Callable[..., PagedCache]:
    """A cache with a prompt of 65 tokens in every row, and memory for more."""

    @torch.no_grad()
    def make(patch: sparsekv.Patch, rows: int = 1) -> PagedCache:
        cache: PagedCache = patch.new_cache(reserve_tokens=512)
        patch.model(**prompt(*[65] * rows), **{CACHE: cache})
        return cache

    return make


def loop(patch: sparsekv.Patch, cache: PagedCache, tokens: range) -> list[Tensor]:
    return decoded(partial(patch.decoder, Run()), cache, tokens)


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def states_of(cache: PagedCache) -> list[Tensor]:
    return [state for part in cache._parts if isinstance(part, StateLayer) for state in part.states]


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_step_leaves_the_states_where_they_are(family, hybrid, prefilled) -> None:
    """One graph serves the next cache, too; another batch has its own, and finds the first one again."""
    with sparsekv.patch(hybrid(family), **SMALL) as patch:
        for rows, captures in ((3, 1), (1, 2), (3, 2)):
            theirs = prefilled(patch, rows).fork()
            patch.stats.reset()
            expected = decoded(patch.model, theirs, range(5, 13))
            left, wanted = [state.clone() for state in states_of(theirs)], theirs.stats.as_dict()
            del theirs
            ours = prefilled(patch, rows)
            patch.stats.reset()
            where = [state.data_ptr() for state in states_of(ours)]
            assert same(loop(patch, ours, range(5, 13)), expected)
            assert where == [state.data_ptr() for state in states_of(ours)] != []
            assert same(states_of(ours), left)
            assert patch.stats.as_dict() == wanted
            assert (patch.decoder.captures, patch.decoder.refusal) == (captures, None)
            del ours


def test_keys_and_values_that_layers_share_are_captured(tiny, prefilled) -> None:
    model = tiny("gemma3n_text")
    with sparsekv.patch(model, **SMALL) as patch:
        ours, theirs = prefilled(patch), prefilled(patch)
        patch.stats.reset()
        expected, wanted = decoded(model, theirs, range(5, 20)), patch.stats.as_dict()
        patch.stats.reset()
        assert same(loop(patch, ours, range(5, 20)), expected)
        assert patch.stats.as_dict() == wanted
        assert (patch.decoder.captures, patch.decoder.replays) == (1, 13)


def test_forks_and_reordered_rows_go_on_captured(hybrid, prefilled) -> None:
    with sparsekv.patch(hybrid("qwen3_next"), **SMALL) as patch:
        ours, theirs = prefilled(patch, 2), prefilled(patch, 2)
        for order in ([1, 0], [0, 0]):
            pairs = [(ours, theirs), (ours.fork(), theirs.fork())]
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor(order))
            for one, other in pairs:
                assert same(loop(patch, one, range(5, 9)), decoded(patch.model, other, range(5, 9)))
                assert same(states_of(one), states_of(other))
        assert patch.decoder.replays == 11


def test_a_stale_graph_leaves_nothing_in_the_states(hybrid, prefilled) -> None:
    model = hybrid("qwen3_next")
    with sparsekv.patch(model, **SMALL) as patch:
        ours, theirs = prefilled(patch), prefilled(patch)
        loop(patch, ours, range(5, 9)), decoded(model, theirs, range(5, 9))
        mlp = model.model.layers[0].mlp
        forward = mlp.forward
        mlp.forward = lambda hidden_states: forward(hidden_states) * 2
        assert same(loop(patch, ours, range(9, 14)), decoded(model, theirs, range(9, 14)))
        assert same(states_of(ours), states_of(theirs))
        assert (patch.decoder.captures, patch.decoder.refusal) == (2, None)


def test_a_step_that_could_not_be_captured_is_run_eagerly_from_the_same_states(
    hybrid, prefilled, monkeypatch
) -> None:
    monkeypatch.setattr(Played, "failure", RuntimeError("a test"))
    with sparsekv.patch(hybrid("bamba"), **SMALL) as patch:
        ours, theirs = prefilled(patch), prefilled(patch)
        with pytest.warns(UserWarning, match="its forward cannot be captured"):
            assert same(loop(patch, ours, range(5, 9)), decoded(patch.model, theirs, range(5, 9)))


@pytest.mark.parametrize("token", [5, 6, 7], ids=["warming", "capturing", "comparing"])
def test_a_step_that_fails_before_its_token_is_stored_puts_the_states_back(token, hybrid, prefilled) -> None:
    """The first layer has a state, and the second, which fails, the pages."""
    with sparsekv.patch(hybrid("qwen3_next"), **SMALL) as patch:
        ours, theirs, run = prefilled(patch), prefilled(patch), Run()
        found = decoded(partial(patch.decoder, run), ours, range(5, token))
        layer = patch.model.model.layers[1]
        layer.forward = lambda *args, **kwargs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            decoded(partial(patch.decoder, run), ours, range(token, token + 1))
        del layer.forward
        found += decoded(partial(patch.decoder, run), ours, range(token, 10))
        assert same(found, decoded(patch.model, theirs, range(5, 10)))


class Waits(TorchDispatchMode):
    """Notes the operators at which a host waits for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        words = ("_local_scalar", "nonzero", "unique", "equal.default")
        self.found |= {str(function) for word in words if word in str(function)}
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("family", HYBRIDS)
def test_no_step_waits_for_the_device(family, hybrid, prefilled) -> None:
    """What no graph can hold, as far as a CPU can tell."""
    with sparsekv.patch(hybrid(family), **SMALL) as patch, Waits() as waits:
        cache = prefilled(patch)
        waits.found.clear()
        decoded(patch.model, cache, range(5, 7))
    assert waits.found == set()
