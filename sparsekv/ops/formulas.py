"""What the ops need to know about a digest: how to summarise pages and how to score the summaries.

Digests live one floor up and are filed here under their name, because an op's schema can carry a name but not a
callable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from sparsekv.registry import Registry


class Formula(ABC):
    """The two functions of a digest, in plain torch. Stateless: what they need lies in the tensors handed to them."""

    @abstractmethod
    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """Summaries of m pages.

        Args:
            keys: `[m, hkv, p, d]`, in the pool's dtype.
            valid: `[m, p]` bool. Every page has at least one valid token; what lies in the others is arbitrary, NaN
                included.
            state: the digest's fixed tensors, `[hkv, ...]`.

        Returns:
            A tensor `[m, hkv, *shape]` for every field; stored in the field's dtype, whatever dtype it has here.
        """

    @abstractmethod
    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        """A score per query head and page, on the scale of `q . k`.

        The heads of a group are pooled, so their scores must be comparable: what is added to all pages of one head
        moves that head against the others.

        Args:
            query: `[b, hkv, g, d]` float32.
            summary: a tensor `[b, pages, hkv, *shape]` for every field, in its dtype.
            state: the digest's fixed tensors, `[hkv, ...]`.

        Returns:
            `[b, hkv, g, pages]` float32.
        """


FORMULAS: Registry[Formula] = Registry("digest")


def formula(name: str) -> Formula:
    """The formula of a digest; raises UnknownNameError."""
    return FORMULAS.get(name)()
