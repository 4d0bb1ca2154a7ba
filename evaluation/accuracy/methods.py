"""Ways to decode, by name: which pages a step reads, and what they are chosen by."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from sparsekv import DIGESTS, POLICIES, SparseConfig
from sparsekv.errors import UnknownNameError
from sparsekv.policies import Reads

DENSE = "dense"
_PAIR = "/"


@dataclass(frozen=True)
class Method:
    """A policy, and the digest that it chooses by.

    Attributes:
        digest: None if the policy reads none, or only true keys.
    """

    name: str
    policy: str
    digest: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it reads everything, whatever the budget."""
        return POLICIES.get(self.policy).reads_all

    def config(self, base: SparseConfig, budget: int | None) -> SparseConfig:
        """The settings at a budget. Small ones keep fewer recent tokens: at most a quarter of them, so that there is
        something left to choose.

        Raises:
            ConfigError: the budget is too small for what is always read.
        """
        digest = self.digest or base.digest
        if budget is None:
            return base.with_(policy=self.policy, digest=digest)
        recent = min(base.recent_tokens, max(budget // 4, 1))
        return base.with_(policy=self.policy, digest=digest, budget=budget, recent=recent)

    def own_code(self) -> str | None:
        """SHA-256 of the digest's and the policy's code, as far as they are not those that ship: who tries a digest
        changes it between runs. One that ships has a revision; None if both ship, in their first."""
        sources = "".join(self._own_sources())
        return hashlib.sha256(sources.encode()).hexdigest() if sources else None

    def _own_sources(self) -> Iterator[str]:
        classes = [POLICIES.get(self.policy), *([DIGESTS.get(self.digest)] if self.digest else [])]
        for made in classes:
            if made.__module__.partition(".")[0] != __name__.partition(".")[0]:
                yield _source(made)
            elif (revision := getattr(made, "revision", 1)) > 1:
                yield f"{made.__name__} {revision}"


def _source(made: type) -> str:
    try:
        return inspect.getsource(made)
    except (OSError, TypeError):  # typed into a shell
        functions = (x for x in vars(made).values() if inspect.isfunction(x))
        return "".join(f"{f.__name__} {f.__code__.co_code.hex()} {f.__code__.co_consts}" for f in functions)


METHODS = {
    method.name: method
    for method in (
        Method(DENSE, "all"),
        Method("quest", "top_k", "minmax"),
        Method("sketch", "top_k", "sign_sketch"),
        Method("recent", "recent"),
        Method("oracle", "oracle"),
        Method("random", "random"),
    )
}


def method(name: str) -> Method:
    """The method called so; `DIGEST/POLICY` names any pair of the registries, as `sign_sketch/top_k`.

    Raises:
        UnknownNameError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    if _PAIR not in name:
        raise UnknownNameError("method", name, [*METHODS, *pairs()])
    digest, policy = name.split(_PAIR, 1)
    DIGESTS.get(digest)
    reads = POLICIES.get(policy).reads
    return Method(name, policy, digest if reads is Reads.DIGESTS else None)


def pairs() -> list[str]:
    """`DIGEST/POLICY` for every digest and every policy that chooses by digests."""
    policies = [name for name in POLICIES if POLICIES.get(name).reads is Reads.DIGESTS]
    return [f"{digest}{_PAIR}{policy}" for digest in DIGESTS for policy in policies]
