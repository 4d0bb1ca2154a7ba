"""What is left when a forward breaks off in the cache: all that was there, or an error at every later use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv.cache import PagedCache
from sparsekv.digests import DIGESTS
from sparsekv.errors import CacheStateError
from sparsekv.pages import residency
from sparsekv.pages.layer_pages import LayerPages
from sparsekv.testing.cache_pair import CachePair

SMALL: dict[str, Any] = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0}
NOT_WHOLE = "not whole any more"


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("a test")


# -- shared pages that could not be copied


@pytest.fixture
def torn(monkeypatch: pytest.MonkeyPatch) -> tuple[CachePair, PagedCache]:
    """A cache, and a fork of it whose table refers to a page that nothing was copied to."""
    pair = CachePair(**SMALL)
    pair.forward(11, 2)
    fork = pair.fork()
    with monkeypatch.context() as patched:
        patched.setattr(LayerPages, "copy_pages", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            fork.forward(1)
    return pair, fork.paged


USES: dict[str, Callable[[PagedCache], object]] = {
    "fork": lambda cache: cache.fork(),
    "to_dynamic": lambda cache: cache.to_dynamic(),
    "crop": lambda cache: cache.crop(-1),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices([0]),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "step": lambda cache: cache.step().__enter__(),
    "check_room": lambda cache: cache.check_room(2, 1),
    "append": lambda cache: cache.layers[0].store.accept(0, 11, *torch.randn(2, 2, 2, 1, 8), None, True),
    "dense": lambda cache: cache._store.dense(0),
    "sequence": lambda cache: cache.layers[0].sequences(slice(0, 1)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_torn_cache_cannot_be_used(use: Callable[[PagedCache], object], torn: tuple[CachePair, PagedCache]) -> None:
    pair, cache = torn
    for _ in range(2):
        with pytest.raises(CacheStateError, match=NOT_WHOLE):
            use(cache)
    assert NOT_WHOLE in repr(cache)
    pair.forward(1)
    pair.forward(5)
    assert pair.paged.get_seq_length() == 17


def test_a_torn_cache_can_be_emptied(torn: tuple[CachePair, PagedCache]) -> None:
    _, cache = torn
    cache.reset()
    fresh = CachePair(**SMALL)
    fresh.paged = cache
    fresh.forward(9, 3)
    fresh.forward(1)
    fresh.check()


# -- passes for which there is no memory


def failing_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)
    return lambda *args: (out_of_memory if next(calls) == number else function)(*args)


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_a_first_prompt_without_memory_leaves_an_empty_cache(
    failing: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another prompt can follow: shorter, of another batch size, with other padding."""
    pair = CachePair(**SMALL)
    valid = torch.arange(12) >= torch.tensor([[6], [0]]) if padded else None
    with monkeypatch.context() as patched:
        patched.setattr(residency, "grown", failing_at(failing, residency.grown))
        with pytest.raises(torch.OutOfMemoryError):
            pair.forward(12, 2, valid)
    table = pair.paged._store.table
    assert (table.num_tokens, table.batch_size, table.valid, table.total_pages) == (0, 0, None, 0)
    assert pair.paged.get_seq_length() == 0
    pair.paged.check_room(3, 8)
    pair.forward(8, 3, torch.arange(8) >= torch.tensor([[0], [3], [7]]))
    pair.forward(1)
    pair.check()


@pytest.mark.parametrize("t", [1, 30])
def test_a_later_pass_without_memory_changes_nothing(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = CachePair(**SMALL)
    pair.forward(12, 3, torch.arange(12) >= torch.tensor([[0], [5], [11]]))
    with monkeypatch.context() as patched:
        patched.setattr(residency, "grown", failing_at(1, residency.grown))
        with pytest.raises(torch.OutOfMemoryError):
            pair.forward(t)
    pair.plain.layers[0].crop(12 - pair.plain.get_seq_length())  # it may have taken its token already
    pair.check()
    pair.forward(t)
    pair.check()


def test_a_fork_without_memory_for_its_own_page_leaves_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = CachePair(**SMALL)
    pair.forward(11, 1)
    fork = pair.fork()
    with monkeypatch.context() as patched:
        patched.setattr(LayerPages, "ensure", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            fork.forward(1)
    del fork
    pair.forward(1)
    pair.check()


def test_a_digest_that_cannot_be_fitted_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is that goes wrong."""

    def broken(self: Any, keys: Tensor, valid: Tensor | None) -> list[Tensor]:
        raise ZeroDivisionError

    pair = CachePair(digest="sign_sketch", **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(DIGESTS.get("sign_sketch"), "fit", broken)
        with pytest.raises(ZeroDivisionError):
            pair.forward(20)
    assert [layer.length for layer in pair.paged.layers] == [0, 0]
    pair.forward(7, 2)
    pair.check()
