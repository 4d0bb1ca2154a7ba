"""Which pages a decode step reads: the interface of a policy, and what it is told about the step.

A new policy is one file here: a subclass of `Policy` under `@register("name")`, imported in `__init__`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sparsekv.config import SparseConfig
from sparsekv.digests import Field
from sparsekv.errors import ConfigError
from sparsekv.ops import StepArguments
from sparsekv.ops.formats import KEYS, page_format
from sparsekv.ops.step import every_slot
from sparsekv.policies.prompt import PromptChunk
from sparsekv.policies.prompt_mass import blocks_of_mass
from sparsekv.registry import Registry

POLICIES: Registry[Policy] = Registry("policy")


class Reads(Enum):
    """What a policy reads of the cache to decide, beside the pages it selects."""

    NOTHING = "nothing"
    DIGESTS = "digests"
    KEYS = "keys"


@dataclass(frozen=True)
class Remembered(Field):
    """A tensor that a policy remembers: `[b, hkv, *shape]`; dtype None means the keys' dtype.

    Attributes:
        fill: what entries hold that a wider table adds. So that widths change nothing, it is what the policy itself
            would have written for pages that are not there.
    """

    fill: float = 0.0


@dataclass(frozen=True)
class DecodeStep:
    """One layer's decode step, as a policy or an observer sees it.

    The tensors are the cache's own and change with the next token: copy what you keep.

    Attributes:
        layer_idx: the layer.
        query: `[b, hq, d]`, in the model's dtype.
        kv_pool: `[num_pages, 2, hkv, p, record]`, as `config.page_format` stores it (`keys` reads it); tokens not
            written are arbitrary.
        summary, state: the digest's tensors, `[num_pages, hkv, ...]` and `[hkv, ...]`, in its dtypes; none where the
            policy does not read digests. A last page that is not full may have none yet: it is always read.
        block_table: `[b, max_pages]` int32; seq_lens: `[b]` int32, the new token counted.
        k: the width of a selection, in pages: what a sequence may read that fills the table.
        scaling: the attention's factor on dot products.
        config: the settings in force, with the layer's own budget.
        ops: the namespace of the ops.
        is_covered: whether the budget of every sequence covers all its pages, as far as the host knows lengths.
        key, value: `[b, hkv, 1, d]` of the new token, in the dtype that the first keys had, while it is not in its
            page; None: it is.
        view: where pages do not lie in `kv_pool`, how they come there: `Residency.view`; None: they do.
        ordinal: how many of the layers that the policy decides for come before this one.
        phase: decode steps since something could be remembered, modulo the policy's period.
        memory: the tensors that `Policy.memory` declares, to be written in place.
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
    is_covered: bool = False
    key: Tensor | None = None
    value: Tensor | None = None
    view: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ordinal: int = 0
    phase: int = 0
    memory: list[Tensor] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether every page may be read, and nothing is chosen: of these sequences, or of any within the table."""
        return self.is_covered or self.config.covers(self.block_table.shape[1])

    def append(self) -> None:
        """Puts the new token into its page, if it is not there yet. Before anything else is read."""
        if self.key is not None and self.value is not None:
            where = (self.block_table, self.seq_lens, self.kv_pool, self.summary, self.state)
            self.ops.append_kv(self.key, self.value, None, *where, self.config.digest, self.config.page_format)

    def keys(self) -> Tensor:
        """The keys of all pages, `[b, max_pages, hkv, p, d]` in the query's dtype; what no token was written to is
        arbitrary."""
        (pool, table), kind, head_dim = self._viewed(None), page_format(self.config.page_format), self.query.shape[2]
        return kind.read(kind.stored(pool, head_dim, KEYS)[table], head_dim, self.query.dtype, KEYS)

    def _viewed(self, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """The pool that has the listed pages (None: all), and the table that leads to them."""
        if self.view is None:
            return self.kv_pool, self.block_table
        if slots is None:
            slots = every_slot(self.block_table, self.seq_lens, self.kv_pool, self.block_table.shape[1])
        return self.view(self.block_table, slots)

    def digest_scores(self) -> Tensor:
        """The digest's score of every page, `[b, hkv, max_pages]` float32; -inf past a sequence's end.

        Raises:
            ConfigError: no digests are kept, as the policy does not say that it reads them.
        """
        self._check_digests()
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

    def select(self, scores: Tensor, min_score: float | None = None) -> Tensor:
        """The forced pages and the best of the others within the budget.

        Args:
            scores: `[b, hkv, max_pages]` float32, on the query's device; NaN counts as -inf.
            min_score: pages that score less are left out of sequences of more than `config.whole_tokens`, unless
                they are forced; of scores that are pooled as the settings say, `config.min_score`. None: none are.

        Returns:
            slots `[b, hkv, k]` int32, ascending, -1 at the end where a sequence reads fewer.
        """
        config = self.config
        forced, least = (config.sinks, config.recent_tokens), (min_score, config.whole_tokens)
        slots: Tensor = self.ops.select_pages(
            scores, self.seq_lens, config.page_size, self.k, *forced, self._limits(), *least
        )
        return slots

    def attend(self, slots: Tensor | None, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
        """Attention over the listed pages, `[b, hq, d]` in the query's dtype.

        Args:
            slots: `[b, hkv, k]` int32, -1 for none; None lists all.
            softcap: `softcap * tanh(x / softcap)` of the logits; 0: none.
            sinks: `[hq]`, a logit per head that takes mass and has no value; None: none.
        """
        where, kind = (*self._viewed(slots), self.seq_lens), self.config.page_format
        out: Tensor = self.ops.attend_pages(self.query, *where, slots, self.scaling, softcap, sinks, kind)[0]
        return out

    def attend_best(self, softcap: float = 0.0, sinks: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`append`, `digest_scores`, `select`, `attend` in one op: output `[b, hq, d]`, slots `[b, hkv, k]` int32.
        Where pages must be fetched, one after the other; then slots are None where all are read.

        Raises:
            ConfigError: as `digest_scores`.
        """
        config = self.config
        if self.view is not None:
            slots = None if self.fits else self.select(self.digest_scores(), config.min_score)
            return self.attend(slots, softcap, sinks), slots
        if not self.fits:
            self._check_digests()
        step = StepArguments(
            query=self.query,
            key=self.key,
            value=self.value,
            block_table=self.block_table,
            seq_lens=self.seq_lens,
            kv_pool=self.kv_pool,
            summary=self.summary,
            state=self.state,
            limits=None if self.fits else self._limits(),
            digest=config.digest,
            group_pooling=config.group_pooling,
            k=self.block_table.shape[1] if self.fits else self.k,
            sink_tokens=config.sinks,
            recent_tokens=config.recent_tokens,
            scaling=self.scaling,
            softcap=softcap,
            sinks=sinks,
            format=config.page_format,
            min_score=None if self.fits else config.min_score,
            whole_tokens=config.whole_tokens,
        )
        out, _, slots = self.ops.sparse_decode(*step)
        return out, slots

    def _limits(self) -> Tensor | None:
        """`config.budget_pages` of each sequence, `[b]` int32, if the budget is a fraction; None: k for all."""
        if not self.config.is_fraction:
            return None
        tokens = (self.seq_lens.double() * self.config.plain_budget).ceil().to(torch.int32)
        pages = (tokens + (self.config.page_size - 1)) // self.config.page_size
        return pages.clamp_min(self.config.forced_pages)

    def _check_digests(self) -> None:
        if not self.summary:
            raise ConfigError(
                f"policy={self.config.policy!r} asks for the digests' scores, and layer {self.layer_idx} keeps no "
                "digests. Set `reads = Reads.DIGESTS` in the policy's class (from sparsekv.policies import Reads), "
                "or choose pages without digests."
            )


class Policy(ABC):
    """Chooses pages. An instance holds nothing: what is to be known at the next step lies in `memory`.

    Attributes:
        reads: what it looks at.
        reads_all: whether every step reads every page: dense decoding.
        capturable: whether a step can be captured in a CUDA graph and replayed: it asks the device for nothing
            (`.item()`), and all that changes from step to step is in the tensors that it is given, and in the phase.
        period: decode steps, after which it begins anew. `step.phase` counts them from 0 to `period - 1`.
    """

    reads: Reads = Reads.NOTHING
    reads_all: bool = False
    capturable: bool = True
    period: int = 1

    def memory(self, k: int, max_pages: int) -> list[Remembered]:
        """What is remembered from step to step, per sequence and kv head (default: nothing).

        A step of phase 0 uses nothing that an earlier step has left, and writes; the steps of other phases only read.
        So a step that runs twice, as one that is captured does, gives the same. Phase 0 follows on a pass over
        several tokens, on a step in which some row's token is padding, and on a crop, and it is asked for (`select`)
        even where every page is read. Rows that are selected (beams) take along what is remembered of them; a fork
        with the same settings has its own copy, and one with others begins anew.

        Args:
            k, max_pages: the widths of a selection and of the block table, in pages. Either may grow from step to
                step: what is remembered is then in the first entries.
        """
        return []

    def keeper(self, ordinal: int) -> int:
        """The ordinal of the layer whose memory a layer shares (default: its own). In phase 0 that layer writes it,
        those behind only read it. Layers that share have as many kv heads, and where the memory's size depends on k,
        the same budget."""
        return ordinal

    @abstractmethod
    def select(self, step: DecodeStep) -> Tensor | None:
        """Which pages are read.

        What a row reads depends on that row alone: its query, its pages, its length. It depends neither on the other
        rows nor on the width of the table or of the selection (`k`), which grow with the longest row, and are larger
        on a GPU. So a budget that is a fraction is one of the row's own length; `step.select` sees to it.

        Returns:
            slots `[b, hkv, k]` int32 to read, ascending, -1 for none; None: every page.
        """

    def prompt_blocks(self, chunk: PromptChunk) -> Tensor | None:
        """Which blocks of keys each block of a prompt's queries sees (default: with `config.prefill == "sparse"`,
        those that hold `config.prefill_mass` of the estimated attention; else, and of less than a block, all).

        What a row sees depends on that row alone, and on nothing that another cut of its prompt would change: of the
        first block of queries, tokens may be in an earlier chunk. (The default asks the queries that there are, so a
        cut within a block changes that one; and the last tokens before a cut see all.) Layers that read everything
        are not asked. Where it cannot be honoured (a mask of the user's own, an attention that is more than
        softmax(q k^T) v, or not sdpa's), the prompt is read densely, and a notice says so.

        Returns:
            `[b, hkv or hq, chunk.num_query_blocks, chunk.num_key_blocks]` bool, True for blocks that are seen: later
            keys never are, and a block of queries always sees itself; None: every block.
        """
        if chunk.config.prefill == "dense" or chunk.query.shape[2] < chunk.block_size:
            return None
        return blocks_of_mass(chunk, chunk.config.prefill_mass)

    def chooses_blocks(self, config: SparseConfig) -> bool:
        """Whether `prompt_blocks` is to be asked: it is the policy's own, or the settings want sparse prompts."""
        return config.prefill == "sparse" or type(self).prompt_blocks is not Policy.prompt_blocks

    def decode(self, step: DecodeStep, softcap: float, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Stores the new token and attends. To be overridden where one op does all of it.

        Args:
            softcap: `softcap * tanh(x / softcap)` of the logits; 0: none.
            sinks: `[hq]`, a logit per head that takes mass and has no value; None: none.

        Returns:
            output `[b, hq, d]` in the query's dtype, and the slots that were read, `[b, hkv, k]` int32; None: all.
        """
        step.append()
        begins = bool(step.memory) and step.phase == 0  # to remember, also where nothing is to be chosen yet
        slots = self.select(step) if begins or not step.fits else None
        slots = None if step.fits else slots
        return step.attend(slots, softcap, sinks), slots


def register(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """Class decorator: files a policy under `name` for `SparseConfig(policy=name)`.

    Raises:
        ConfigError: another policy has that name.
    """
    return POLICIES.register(name)
