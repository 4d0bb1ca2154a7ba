"""What the ops need to know about a digest: how to summarise pages and how to score the summaries.

Digests live one floor up and register their formula here under their name, because an op's schema can carry a
name but not a callable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sparsekv.errors import UnknownNameError


class Formula(Protocol):
    """The two functions of a digest, in plain torch."""

    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """Summaries of m pages: keys `[m, hkv, p, d]`, valid `[m, p]` bool -> fields `[m, hkv, ...]`."""
        ...

    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        """Scores of pages: query `[b, hkv, g, d]` float32, fields `[b, pages, hkv, ...]` -> `[b, hkv, g, pages]`."""
        ...


_FORMULAS: dict[str, Formula] = {}


def register_formula(name: str, formula: Formula) -> None:
    """Makes `name` usable as the `digest` argument of `append_kv` and `score_pages`."""
    _FORMULAS[name] = formula


def formula(name: str) -> Formula:
    """The formula of a digest; raises UnknownNameError."""
    if name not in _FORMULAS:
        raise UnknownNameError("digest", name, _FORMULAS)
    return _FORMULAS[name]
