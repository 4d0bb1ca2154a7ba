"""A forward outside of no_grad is allowed; a gradient that would have to pass through the pages is an error."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sparsekv.cache import PagedCache, PagedLayer
from sparsekv.errors import CacheStateError
from sparsekv.testing.cache_pair import tiny_config

SMALL = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0}
REFUSED = r"Gradients do not flow through a PagedCache.*use_cache=False"


def states(t: int, heads: int = 2, needs_grad: bool = True) -> Tensor:
    return torch.randn(1, heads, t, 8, requires_grad=needs_grad)


def forward(cache: PagedCache, t: int, needs_grad: bool = True) -> Tensor:
    """What comes out of a layer's attention, or of the keys and values that it attends to."""
    key, value = states(t, needs_grad=needs_grad), states(t, needs_grad=needs_grad)
    keys, values = cache.update(key, value, 0)
    layer = cache.layers[0]
    if t > 1 or not layer.is_paged:
        layer.commit(None)
    if t == 1:
        return layer.decode(states(1, 4, needs_grad), 0.3, 0.0, None).sum()
    keys, values = layer.with_past(keys, values)
    return (keys + values).sum()


def made(backend: str = "auto") -> PagedCache:
    return PagedCache(tiny_config(num_layers=1), backend=backend, **SMALL)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("t", [1, 3])
def test_a_gradient_through_the_pages_is_refused(t: int, backend: str) -> None:
    cache = made(backend)
    forward(cache, 30)
    out = forward(cache, t)
    with pytest.raises(CacheStateError, match=REFUSED):
        out.backward()
    assert forward(cache, t).requires_grad  # the cache goes on


@pytest.mark.parametrize("t", [1, 3])
def test_it_is_refused_if_only_earlier_tokens_need_one(t: int) -> None:
    """A soft prompt in front of a frozen model: what comes later needs no gradient of its own."""
    cache = made()
    forward(cache, 30)
    out = forward(cache, t, needs_grad=False)
    with pytest.raises(CacheStateError, match=REFUSED):
        out.backward()


def test_gradients_of_new_tokens_pass_over_a_context_without() -> None:
    """As unpatched: what was read under no_grad is constant."""
    cache = made()
    with torch.no_grad():
        forward(cache, 30)
    key, value = states(3), states(3)
    handed_out = cache.update(key, value, 0)
    layer = cache.layers[0]
    layer.commit(None)
    keys, values = layer.with_past(*handed_out)
    assert keys.shape[2] == 33
    (2 * keys + values).sum().backward()
    assert torch.equal(key.grad, torch.full_like(key, 2))
    assert torch.equal(value.grad, torch.ones_like(value))


def test_what_was_cropped_away_is_forgotten() -> None:
    cache = made()
    with torch.no_grad():
        forward(cache, 30)
    forward(cache, 3)
    cache.crop(-3)
    assert not forward(cache, 1, needs_grad=False).requires_grad


def test_a_fork_and_a_sequence_know_it_too() -> None:
    cache = made()
    forward(cache, 30)
    fork = cache.fork()
    with pytest.raises(CacheStateError, match=REFUSED):
        forward(fork, 1, needs_grad=False).backward()
    keys, _ = fork.layers[0].sequences(slice(0, 1))
    with pytest.raises(CacheStateError, match=REFUSED):
        keys.sum().backward()


def test_the_first_pass_has_all_its_gradients() -> None:
    """Nothing lies before it, so nothing is lost."""
    cache = made()
    key, value = states(9), states(9)
    handed_out = cache.update(key, value, 0)
    layer = cache.layers[0]
    layer.commit(None)
    keys, values = layer.with_past(*handed_out)
    (2 * keys + values).sum().backward()
    assert torch.equal(key.grad, torch.full_like(key, 2))
    assert torch.equal(value.grad, torch.ones_like(value))


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_added_where_no_gradients_are_kept(mode: type, t: int) -> None:
    cache = made()
    forward(cache, 30)
    with mode():
        assert not forward(cache, t).requires_grad


@pytest.mark.parametrize("t", [1, 3])
def test_what_needs_no_gradients_stays_without(t: int) -> None:
    cache = made()
    with torch.no_grad():
        forward(cache, 30)
    assert not forward(cache, t, needs_grad=False).requires_grad
    assert forward(cache, t).requires_grad


def test_a_reset_cache_has_forgotten() -> None:
    cache = made()
    forward(cache, 30)
    cache.reset()
    forward(cache, 9, needs_grad=False)
    assert not forward(cache, 1, needs_grad=False).requires_grad


def _with_other_layers() -> PagedCache:
    """Linear, crossing, in pages, and fallen back, each filled outside of `no_grad`."""
    config = tiny_config(num_layers=4)
    config.layer_types = ["linear_attention"] + ["full_attention"] * 3
    config.cross_attention_layers = [1]
    cache = PagedCache(config, on_fallback=lambda layer, why: None, **SMALL)
    cache.update_conv_state(torch.ones(1, 8, 4, requires_grad=True) * 2, 0)
    for i in (1, 2, 3):
        cache.update(states(5) * 1, states(5) * 1, i)
    cache.layers[2].commit(None)
    cache.layers[3].refuse("a test")
    return cache


@pytest.mark.parametrize("copied", [copy.deepcopy, PagedCache.fork, PagedCache.to_dynamic])
def test_copies_of_layers_that_wait_for_gradients(copied: Callable[[PagedCache], DynamicCache]) -> None:
    """Layers that are transformers' own hold tensors with a history, which cannot be copied as they are."""
    cache = _with_other_layers()
    twin = copied(cache)
    assert torch.equal(twin.layers[0].conv_states[0], cache.layers[0].conv_states[0])
    assert not twin.layers[0].conv_states[0].requires_grad
    twin.layers[0].conv_states[0].zero_()
    assert cache.layers[0].conv_states[0].any()
    for i in (1, 2, 3):
        assert torch.equal(twin.layers[i].keys, cache.layers[i].keys)
    assert cache.layers[1].keys.requires_grad
    assert not twin.layers[1].keys.requires_grad


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_pages_keep_no_history(backend: str) -> None:
    """Also the token that is stored on the way of a decode step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = made(backend)
        for t in (30, 1, 4, 1):
            forward(cache, t)
    pages = cache._store.layers[0]
    assert all(not x.requires_grad and x.grad_fn is None for x in (pages.kv, *pages.summary))
    assert isinstance(cache.layers[0], PagedLayer)
