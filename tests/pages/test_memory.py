"""What a policy remembers: where it lies, when it holds, who has it next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.pages import memory
from sparsekv.pages.arena import Arena, Loan
from sparsekv.pages.memory import Memory
from sparsekv.policies import POLICIES, DecodeStep, Policy, Remembered
from sparsekv.testing.cache_pair import CachePair

SMALL: dict[str, Any] = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0}


class Counting(Policy):
    """The first pages; it remembers when it began, of every page and of every one listed."""

    period = 3

    def memory(self, k: int, max_pages: int) -> list[Remembered]:
        return [Remembered((max_pages,), torch.int32, -1), Remembered((k, 2))]

    def select(self, step: DecodeStep) -> Tensor:
        if step.phase == 0:
            step.memory[0].copy_(step.seq_lens[:, None, None].expand_as(step.memory[0]))
        return step.select(torch.zeros(step.memory[0].shape))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES._classes, "counting", Counting)


@pytest.fixture
def loan() -> Loan:
    """Of a cache with pages of a layer 0 and a layer 1."""
    made = Loan()
    made.layers = dict.fromkeys((0, 1), SimpleNamespace(no_tokens=torch.zeros(1, 3, 0, 8, dtype=torch.bfloat16)))
    return made


def places(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def test_a_wider_table_takes_along_what_is_known(loan: Loan) -> None:
    """In the places that it has, as long as there is room."""
    pages, listed = Memory(Counting(), loan).of(0, 2, 3, 5)
    assert [(x.shape, x.dtype) for x in (pages, listed)] == [
        ((2, 3, 5), torch.int32),
        ((2, 3, 3, 2), torch.bfloat16),
    ]
    kept = Memory(Counting(), loan)
    pages, listed = kept.of(0, 2, 3, 9)
    known, where = pages.copy_(torch.arange(2 * 3 * 9).view(2, 3, 9)).clone(), places([pages, listed])
    assert kept.of(0, 2, 3, 5) == [pages, listed]
    assert torch.equal(pages, known[:, :, :5])
    kept.of(0, 2, 4, 7)
    assert torch.equal(pages[:, :, :5], known[:, :, :5])
    assert (pages[:, :, 5:] == -1).all()
    assert listed.shape == (2, 3, 4, 2)
    assert places([pages]) == where[:1]


def test_the_next_memory_gets_the_tensors_of_the_last(loan: Loan) -> None:
    first = Memory(Counting(), loan)
    where = places(first.of(0, 2, 3, 5)), places(first.of(1, 2, 3, 5))
    other = Memory(Counting(), loan)
    assert not set(places(other.of(0, 2, 3, 5))) & set(where[0])
    del first
    third = Memory(Counting(), loan)
    assert (places(third.of(0, 1, 3, 5)), places(third.of(1, 2, 2, 4))) == where


def test_a_fork_has_a_copy_and_rows_move_in_place(loan: Loan) -> None:
    one = Memory(Counting(), loan)
    one.begin(8, is_step=True)
    (pages, _) = one.of(0, 2, 3, 5)
    pages.copy_(torch.arange(30).view(2, 3, 5))
    twin, where = one.fork(), places([pages])
    one.select(np.array([1, 0]))
    assert places(one.of(0, 2, 3, 5)[:1]) == where
    assert pages[:, 0, 0].tolist() == [15, 0]
    assert twin.of(0, 2, 3, 5)[0][:, 0, 0].tolist() == [0, 15]
    one.select(np.array([1, 1, 0]))
    assert one.of(0, 3, 3, 5)[0][:, 0, 0].tolist() == [0, 0, 15]


def test_rows_that_cannot_be_moved_are_forgotten(loan: Loan, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("a test")

    kept = Memory(Counting(), loan)
    for n in (8, 9):
        kept.begin(n, is_step=True)
    kept.of(0, 2, 3, 5)
    monkeypatch.setattr(memory, "_overwrite", fail)
    with pytest.raises(torch.OutOfMemoryError):
        kept.select(np.array([1, 0]))
    kept.begin(10, is_step=True)
    assert (kept.phase, kept.of(0, 2, 3, 5)[0].shape) == (0, (2, 3, 5))


def test_a_pass_that_is_begun_again_is_of_the_same_phase(loan: Loan) -> None:
    kept = Memory(Counting(), loan)
    seen = []
    for n in (8, 9, 9, 10, 11, 11, 12):
        kept.begin(n, is_step=True)
        seen.append(kept.phase)
    assert seen == [0, 1, 1, 2, 0, 0, 1]


def keys(pair: CachePair, steps: int) -> list[Any]:
    """What captured steps would be found by."""
    found = []
    for _ in range(steps):
        with pair.paged.step():
            found.append(pair.paged.step().key)
            pair.forward(1)
    return found


def test_a_captured_step_is_one_of_a_phase_and_a_memory() -> None:
    arena = Arena()
    pair = CachePair(**SMALL, policy="counting", arena=arena, reserve_tokens=64)
    pair.forward(41, 2)
    first = keys(pair, 3)
    assert len(set(first)) == 3
    pair.crop(3)
    assert keys(pair, 3) == first
    pair.crop(3)
    twin = pair.fork()
    twin.forward(1)
    others = keys(twin, 2)
    del twin, pair
    pair = CachePair(**SMALL, policy="counting", arena=arena, reserve_tokens=64)
    pair.forward(41, 2)
    again = keys(pair, 3)
    assert not set(others) & set(first)
    assert set(again) <= {*first, *others}


def test_layers_that_share_what_grows_with_the_budget_have_one_budget(monkeypatch) -> None:
    """A memory of pages alone may be shared by layers that read more or fewer of them."""
    settings = SMALL | {"policy": "counting", "budget": {1: 24, "rest": 16}}
    CachePair(3, **settings)
    monkeypatch.setattr(Counting, "keeper", lambda self, ordinal: ordinal - ordinal % 2)
    with pytest.raises(ConfigError, match=r"layer 1 shares what layer 0 remembers: give both the same budget"):
        CachePair(3, **settings)
    CachePair(4, **settings | {"budget": {0: 24, 1: 24, "rest": 16}})
    monkeypatch.setattr(Counting, "memory", lambda self, k, max_pages: [Remembered((max_pages,))])
    CachePair(3, **settings)


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ({"period": 0}, "period=0. Set it to the decode steps"),
        ({"period": True}, "period=True"),
        ({"memory": lambda self, k, max_pages: [Remembered((max_pages, k - 2))]}, r"memory\(k=1, max_pages=1\)"),
        ({"memory": lambda self, k, max_pages: Remembered((k,))}, "Return a list of Remembered"),
        ({"memory": lambda self, k, max_pages: [Remembered(k)]}, "whole numbers of at least 0"),
        ({"memory": lambda self, k, max_pages: [Remembered((k,), torch.int32, float("inf"))]}, "that the dtype can"),
        ({"keeper": lambda self, ordinal: ordinal + 1}, r"keeper\(0\) = 1. Return the ordinal of the layer itself"),
        (
            {"keeper": lambda self, ordinal: max(ordinal - 1, 0)},
            r"keeper\(2\) = 1.*one that keeps its own memory",
        ),
        ({"keeper": lambda self, ordinal: ordinal - ordinal % 2}, None),
        ({"keeper": lambda self, ordinal: None}, r"keeper\(0\) = None"),
    ],
)
def test_what_cannot_be_is_said_before_there_is_a_cache(declared: dict[str, Any], complaint, monkeypatch) -> None:
    for name, value in declared.items():
        monkeypatch.setattr(Counting, name, value)
    if complaint is None:
        CachePair(3, **SMALL, policy="counting")
        return
    with pytest.raises(ConfigError, match=rf"policy='counting' \(Counting\).*{complaint}"):
        CachePair(3, **SMALL, policy="counting")
