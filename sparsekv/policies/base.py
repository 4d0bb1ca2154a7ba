"""Which pages a decode step reads: the interface of a policy, and what it is told about the step.

A new policy is one file here: a subclass of `Policy` under `@register("name")`, imported in `__init__`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sparsekv.config import SparseConfig
from sparsekv.registry import Registry

POLICIES: Registry[Policy] = Registry("policy")


class Reads(Enum):
    """What a policy reads of the cache to decide, beside the pages it selects."""

    NOTHING = "nothing"
    DIGESTS = "digests"
    KEYS = "keys"


@dataclass(frozen=True)
class DecodeStep:
    """One layer's decode step, as a policy or an observer sees it.

    The tensors are the cache's own and change with the next token: copy what you keep.

    Attributes:
        layer_idx: the layer.
        query: `[b, hq, d]`.
        kv_pool: `[num_pages, 2, hkv, p, d]`.
        summary, state: the digest's tensors, `[num_pages, hkv, ...]` and `[hkv, ...]`.
        block_table: `[b, max_pages]` int32; seq_lens: `[b]` int32, the new token counted.
        k: the width of a selection, in pages: what the longest sequence may read.
        scaling: the attention's factor on dot products.
        config: the settings in force.
        ops: the namespace of the ops.
        key, value: `[b, hkv, 1, d]` of the new token while it is not in its page yet; None: it is.
    """

    layer_idx: int
    query: Tensor
    kv_pool: Tensor
    summary: list[Tensor]
    state: list[Tensor]
    block_table: Tensor
    seq_lens: Tensor
    k: int
    scaling: float
    config: SparseConfig
    ops: Any
    key: Tensor | None = None
    value: Tensor | None = None

    @property
    def fits(self) -> bool:
        """Whether every page may be read: there is nothing to choose."""
        return self.k >= self.block_table.shape[1]

    def append(self) -> None:
        """Puts the new token into its page, if it is not there yet. Before anything else is read."""
        if self.key is not None and self.value is not None:
            where = (self.block_table, self.seq_lens, self.kv_pool, self.summary, self.state)
            self.ops.append_kv(self.key, self.value, None, *where, self.config.digest)

    def digest_scores(self) -> Tensor:
        """The digest's score of every page, `[b, hkv, max_pages]` float32."""
        scores: Tensor = self.ops.score_pages(
            self.query,
            self.summary,
            self.state,
            self.block_table,
            self.seq_lens,
            self.config.page_size,
            self.config.digest,
            self.config.group_pooling,
            self.scaling,
        )
        return scores

    def select(self, scores: Tensor) -> Tensor:
        """The forced pages and the best of the others within the budget: slots `[b, hkv, k]` int32."""
        config = self.config
        slots: Tensor = self.ops.select_pages(
            scores, self.seq_lens, config.page_size, self.k, config.sinks, config.recent, self._limits()
        )
        return slots

    def attend(self, slots: Tensor | None, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
        """Attention over the listed pages, `[b, hq, d]`; None lists all."""
        out: Tensor = self.ops.attend_pages(
            self.query, self.kv_pool, self.block_table, self.seq_lens, slots, self.scaling, softcap, sinks
        )[0]
        return out

    def attend_best(self, softcap: float = 0.0, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`append`, `digest_scores`, `select`, `attend` in one op: output `[b, hq, d]`, slots `[b, hkv, k]` int32."""
        config = self.config
        out, _, slots = self.ops.sparse_decode(
            self.query,
            self.key,
            self.value,
            self.block_table,
            self.seq_lens,
            self.kv_pool,
            self.summary,
            self.state,
            None if self.fits else self._limits(),
            config.digest,
            config.group_pooling,
            self.k,
            config.sinks,
            config.recent,
            self.scaling,
            softcap,
            sinks,
        )
        return out, slots

    def _limits(self) -> Tensor | None:
        """Pages each sequence may read when the budget is a fraction of its own length, `[b]` int32."""
        if not self.config.is_fraction:
            return None
        pages = (self.seq_lens.double() * self.config.budget / self.config.page_size).ceil()
        return pages.clamp_min(self.config.forced_pages).to(torch.int32)


class Policy(ABC):
    """Chooses pages. Stateless.

    Attributes:
        reads: what it looks at.
        fills_budget: whether a selection always lists as many pages as the budget allows, so that their number is
            known without asking the device.
    """

    reads: Reads = Reads.NOTHING
    fills_budget: bool = False

    @abstractmethod
    def select(self, step: DecodeStep) -> Tensor | None:
        """Slots `[b, hkv, k]` int32 to read, ascending, -1 for none; None: every page."""

    def decode(self, step: DecodeStep, softcap: float, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Stores the new token; output `[b, hq, d]` and the slots that were read. To be overridden where one op does
        all of it."""
        step.append()
        slots = None if step.fits else self.select(step)
        return step.attend(slots, softcap, sinks), slots


def register(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """Class decorator: files a policy under `name` for `SparseConfig(policy=name)`."""
    return POLICIES.register(name)
