"""Counters over caches of different kinds: a page's bytes are those it had when it was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsekv.cache import DecodeStats
from sparsekv.policies import POLICIES
from sparsekv.testing.cache_pair import CachePair
from sparsekv.testing.steps import Unsteady

SMALL: dict[str, Any] = {"sinks": 1, "recent": 4, "budget": 0.5, "dense_layers": 0, "num_layers": 3}
KINDS: list[dict[str, Any]] = [
    {"page_size": 4},
    {"page_size": 4, "dtype": torch.bfloat16},
    {"page_size": 2},
    {"page_size": 4, "d": 16},
]


def decoded(stats: DecodeStats, policy: str, **options: Any) -> None:
    torch.manual_seed(0)
    pair = CachePair(stats=stats, policy=policy, **{**SMALL, **options})
    pair.forward(40, 2)
    for _ in range(3):
        pair.forward(1)


@pytest.mark.parametrize("policy", ["recent", "top_k", "unsteady"])
def test_bytes_of_several_kinds_of_pages_add_up(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, page sizes and head sizes, as after `model.to(...)`: what was read before stays what it was."""
    monkeypatch.setitem(POLICIES._classes, "unsteady", Unsteady)
    together, apart = DecodeStats(), [DecodeStats() for _ in KINDS]
    for stats, kind in zip(apart, KINDS, strict=True):
        before = together.bytes_read
        decoded(together, policy, **kind)
        decoded(stats, policy, **kind)
        assert together.bytes_read - before == stats.bytes_read > 0
    for name in ("pages_read", "pages_total", "bytes_read", "bytes_total", "sparse_steps"):
        assert getattr(together, name) == sum(getattr(stats, name) for stats in apart)
    assert together.sparse_share == together.share == together.bytes_read / together.bytes_total
