"""Budgets that differ by layer: every layer reads what it would read if its budget were that of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from sparsekv.cache import DecodeStats, PagedCache
from sparsekv.errors import ConfigError
from sparsekv.policies import POLICIES, DecodeStep
from sparsekv.testing.cache_pair import CachePair, tiny_config

SMALL: dict[str, Any] = {"page_size": 4, "sinks": 1, "recent": 4, "dense_layers": 0, "num_layers": 5}
BUDGETS = {0: 12, 1: 0.5, 2: 1.0, "rest": 24}
RAGGED = torch.arange(60) >= torch.tensor([[0], [21], [55]])

Seen = list[tuple[Tensor, Tensor | None]]  # by layer, output `[b, hq, d]` and slots


def decoded(stats: DecodeStats, **settings: Any) -> tuple[Seen, CachePair]:
    torch.manual_seed(0)
    pair, slots = CachePair(stats=stats, **SMALL | settings), {}

    def note(step: DecodeStep, read: Tensor | None) -> None:
        slots[step.layer_idx] = read

    pair.paged.observers.append(note)
    pair.forward(60, 3, RAGGED)
    return [(out, slots[i]) for i, out in enumerate(pair.forward(1))], pair


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_layer_reads_what_it_would_if_its_budget_were_that_of_all(policy: str) -> None:
    """The same pages, the same output, and the same share in the counters."""
    stats = DecodeStats()
    found, pair = decoded(stats, budget=BUDGETS, policy=policy)
    num_pages = [-(-n // 4) for n in (61, 40, 6)]
    pages = 0
    for i in range(5):
        alone = DecodeStats()
        expected, _ = decoded(alone, budget=BUDGETS.get(i, 24), policy=policy)
        torch.testing.assert_close(found[i], expected[i], rtol=0, atol=0)
        assert stats.shares[i] == alone.shares[i]
        one, slots = pair.paged.config.at(i), found[i][1]
        if slots is not None:
            listed = [min(n, one.budget_pages(length)) for n, length in zip(num_pages, (61, 40, 6), strict=True)]
            assert (slots >= 0).sum(-1).tolist() == [[n, n] for n in listed]
        pages += sum(num_pages) * 2 if slots is None else int((slots >= 0).sum())
    assert stats.pages_read == pages
    assert [slots is None for _, slots in found] == [policy == "all" or i == 2 for i in range(5)]


def test_a_layer_that_may_read_everything_keeps_no_digest() -> None:
    """As one of `dense_layers`; a fork that would choose there is told so."""
    _, pair = decoded(DecodeStats(), budget=BUDGETS)
    assert pair.paged.dense_layers == {2}
    assert [i for i, pages in pair.paged._store.layers.items() if not pages.summary] == [2]
    with pytest.raises(ConfigError, match=r"layer 2 kept none.*no budget of 1\.0"):
        pair.paged.fork(budget=16)


def test_a_fork_has_budgets_of_its_own() -> None:
    _, pair = decoded(DecodeStats(), budget=BUDGETS)
    fork = pair.paged.fork(budget=lambda layer_idx: 1.0 if layer_idx == 2 else 16 + 4 * layer_idx)
    assert fork.config.budget == ((0, 16), (1, 20), (2, 1.0), (3, 28), (4, 32))
    assert [layer.config.plain_budget for layer in fork.paged_layers] == [16, 20, 1.0, 28, 32]
    assert [layer.config.plain_budget for layer in pair.paged.paged_layers] == [12, 0.5, 1.0, 24, 24]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({0: 512, "rest": 256}, "names 0, and of the model's layers 0 to 5 only 1, 3-5 can be sparse"),
        ({7: 512, "rest": 256}, "names 7, and"),
        ({1: 512}, "budget has none for 3-5"),
        (lambda layer_idx: 2, r"budget\[1\]: budget=2 is below"),
    ],
)
def test_what_the_layers_of_a_model_cannot_have_is_refused(budget: object, message: str) -> None:
    """Also by a fork, which then has changed nothing."""
    window = ["sliding_attention", "full_attention", "sliding_attention", *["full_attention"] * 3]
    config: LlamaConfig = tiny_config(num_layers=6)
    config.layer_types, config.sliding_window = window, 8
    with pytest.raises(ConfigError, match=message):
        PagedCache(config, budget=budget)
    cache = PagedCache(config, budget={1: 512, "rest": 256})
    with pytest.raises(ConfigError, match=message):
        cache.fork(budget=budget)
    assert cache.config.budget == ((1, 512), ("rest", 256))
