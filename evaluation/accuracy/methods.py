"""Ways to decode, by name: which pages a step reads, and what they are chosen by.

`sketch`, `sign_sketch/top_k`, and with settings of its own `sketch+mean_softmax+dense0`, `dense+prefill.95`.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from sparsekv import DIGESTS, POLICIES, SparseConfig
from sparsekv.config import GROUP_POOLINGS
from sparsekv.errors import UnknownNameError
from sparsekv.pages import FORMATS
from sparsekv.policies import Reads

DENSE = "dense"
WITH = "+"  # goes before a setting of a method's own
_PAIR = "/"


@dataclass(frozen=True)
class Method:
    """A policy, and the digest that it chooses by.

    Attributes:
        digest: None if the policy reads none, or only true keys.
        group_pooling, dense_layers, min_share, kv: None: the run's.
        prefill_mass: of the attention of its prompts, which are read sparsely; None: they are dense.
    """

    name: str
    policy: str
    digest: str | None = None
    group_pooling: str | None = None
    dense_layers: int | None = None
    min_share: float | None = None
    kv: str | None = None
    prefill_mass: float | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it reads everything, whatever the budget."""
        return POLICIES.get(self.policy).reads_all

    @property
    def is_pooled(self) -> bool:
        """Whether it scores pages for every query head."""
        return POLICIES.get(self.policy).reads is not Reads.NOTHING

    def config(self, base: SparseConfig, budget: int | None) -> SparseConfig:
        """The settings at a budget. Small ones keep fewer recent tokens: at most a quarter of them, so that there is
        something left to choose.

        Raises:
            ConfigError: the budget is too small for what is always read.
        """
        own = {name: getattr(self, name) for name in _OWN if getattr(self, name) is not None}
        own["prefill"] = "dense" if self.prefill_mass is None else "sparse"
        if budget is None:
            return base.with_(**own)
        return base.with_(**own, budget=budget, recent=min(base.recent_tokens, max(budget // 4, 1)))

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


_OWN = ("policy", "digest", "group_pooling", "dense_layers", "min_share", "kv", "prefill_mass")
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
    """The method called so; `DIGEST/POLICY` names any pair of the registries, as `sign_sketch/top_k`. What follows on
    a `+` is a setting of its own: a pooling, `share.001` for that pooling and `min_share=0.001`, `dense0` for
    `dense_layers=0`, `prefill.95` for `prefill="sparse"` and `prefill_mass=0.95`, or a format of keys and values, as
    in `dense+int8`.

    Raises:
        UnknownNameError: there is none.
    """
    plain, *settings = name.split(WITH)
    found = METHODS.get(plain) or _pair(plain)
    return replace(found, name=name, **{key: value for text in settings for key, value in _setting(text).items()})


def known(name: str) -> Method | None:
    """The method called so; None if it is another program's, or not registered here."""
    try:
        return method(name)
    except UnknownNameError:
        return None


def _pair(name: str) -> Method:
    if _PAIR not in name:
        raise UnknownNameError("method", name, [*METHODS, *pairs()])
    digest, policy = name.split(_PAIR, 1)
    DIGESTS.get(digest)
    reads = POLICIES.get(policy).reads
    return Method(name, policy, digest if reads is Reads.DIGESTS else None)


def _setting(text: str) -> dict[str, Any]:
    if dense := re.fullmatch(r"dense(\d+)", text):
        return {"dense_layers": int(dense[1])}
    if share := re.fullmatch(r"share(0?\.\d+)", text):
        return {"group_pooling": "share", "min_share": float(share[1])}
    if mass := re.fullmatch(r"prefill(1|0?\.\d+)", text):
        return {"prefill_mass": float(mass[1])}
    if text in FORMATS:
        return {"kv": text}
    if text not in GROUP_POOLINGS:
        allowed = [*GROUP_POOLINGS, "share.001", "dense0", "prefill.95", *FORMATS]
        raise UnknownNameError("a method's setting", text, allowed)
    return {"group_pooling": text}


def variants(
    name: str,
    poolings: Sequence[str],
    dense_layers: Sequence[int],
    formats: Sequence[str],
    masses: Sequence[float] = (),
) -> list[Method]:
    """A method with every setting that makes a difference to it and that it does not name: poolings if it reads
    digests, dense layers unless it reads everything anyway, formats of keys and values. The first of each is the
    run's own, and is not named. Then all of them again after prompts that are read sparsely, by each of the masses.

    Raises:
        UnknownNameError: there is no such method.
    """
    found = method(name)
    more_poolings = poolings[1:] if found.digest is not None and found.group_pooling is None else ()
    more_layers = dense_layers[1:] if not found.is_dense and found.dense_layers is None else ()
    of_poolings = ["", *(f"{WITH}{pooling}" for pooling in more_poolings)]
    of_layers = ["", *(f"{WITH}dense{count}" for count in more_layers)]
    of_formats = ["", *(f"{WITH}{kv}" for kv in (formats[1:] if found.kv is None else ()))]
    of_prompts = ["", *(f"{WITH}prefill{mass:g}".replace("0.", ".") for mass in masses)]
    of_prompts = of_prompts if found.prefill_mass is None else [""]
    settings = product(of_prompts, of_poolings, of_layers, of_formats)
    return [method("".join([name, *own, mass])) for mass, *own in settings]


def pairs() -> list[str]:
    """`DIGEST/POLICY` for every digest and every policy that chooses by digests."""
    policies = [name for name in POLICIES if POLICIES.get(name).reads is Reads.DIGESTS]
    return [f"{digest}{_PAIR}{policy}" for digest in DIGESTS for policy in policies]
