"""What is measured of one layer's decode step: shapes, settings, and the bytes that each has to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from sparsekv import SparseConfig
from sparsekv.digests import DIGESTS, Digest
from sparsekv.pages.formats import FORMATS, KEYS, VALUES, PageFormat
from sparsekv.policies import POLICIES, Reads

from .geometry import Geometry, named

K, M = 1 << 10, 1 << 20

# A step is timed over so many layers, each with its own cache, that what it reads comes from memory and not from the
# L2 cache: a layer's lines are gone when its turn comes again.
MIN_LAYERS, MAX_LAYERS = 2, 32
STEP_OVER_L2, PART_OVER_L2 = 4, 2
MEMORY_SHARE = 0.8  # of the free memory; the rest is for what competitors and checks allocate

# Quest's own score and sparse-attention kernels (mit-han-lab/Quest at 01c1623) built for sm_90, with FlashInfer's
# top-k in place of RAFT's, on an H200 on 2026-11-20: microseconds of kernel time, launches not counted. Their only
# geometry is `mha` at batch 1; budget 2048, page 16. Measured separately: they are not part of a run.
QUEST_US = {8 * K: 35.4, 32 * K: 64.9, 128 * K: 183.7}


@dataclass(frozen=True)
class LayerPoint:
    """One measurement: a geometry, `batch` sequences of `context` tokens (the new one counted), and the settings.

    Attributes:
        read: tokens that keys are planted for, as `min_share` leaves out pages that hold too little; None: none are.
        listed: pages that the policy was seen to list, on average over sequences and kv heads; None: as many as keys
            are planted for, or as the budget allows.
    """

    geometry: Geometry
    batch: int
    context: int
    config: SparseConfig
    read: int | None = None
    listed: int | None = None

    @property
    def scaling(self) -> float:
        """Factor on dot products."""
        return float(self.geometry.head_dim**-0.5)

    @property
    def reads(self) -> Reads:
        """What the policy looks at to choose."""
        return POLICIES.get(self.config.policy).reads

    @property
    def digest(self) -> Digest | None:
        """What is kept of every page; None where the policy does not look at it."""
        return DIGESTS.get(self.config.digest)() if self.reads is Reads.DIGESTS else None

    @property
    def num_pages(self) -> int:
        """Pages of one sequence."""
        return self.config.pages_for(self.context)

    @property
    def k(self) -> int:
        """Pages that the step reads of each sequence and kv head."""
        if self.listed is not None:
            return self.listed
        allowed = min(self.config.budget_pages(self.context), self.num_pages)
        return min(self.config.pages_for(self.read), allowed) if self.is_planted and self.read else allowed

    @property
    def is_planted(self) -> bool:
        """Whether keys say what the step reads: not where it reads everything."""
        return self.read is not None and not self.config.covers(self.num_pages)

    @property
    def tokens_read(self) -> int:
        """Tokens in these pages."""
        return min(self.k * self.config.page_size, self.context)

    @property
    def fits(self) -> bool:
        """Whether the step reads everything and chooses nothing, as where the budget holds the whole context."""
        return self.k >= self.num_pages

    @property
    def format(self) -> PageFormat:
        """What pages of keys and values look like."""
        return FORMATS.get(self.config.page_format)()

    def _row_bytes(self, *parts: int) -> int:
        """A key, a value, or both, of every kv head of every sequence."""
        size, a_head = self.config.page_size, (self.geometry.head_dim, self.geometry.dtype)
        records = [self.format.record(size, *a_head, which) for which in parts or (KEYS, VALUES)]
        return self.batch * self.geometry.num_kv_heads * sum(n * dtype.itemsize for n, dtype in records)

    @property
    def dense_bytes(self) -> int:
        """All keys and values."""
        return self._row_bytes() * self.context

    @property
    def score_bytes(self) -> int:
        """What the policy looks at: keys, or digests, of which min/max takes as much as a key and a value a page."""
        if self.digest is None:
            return self._row_bytes(KEYS) * self.context if self.reads is Reads.KEYS else 0
        fields = self.digest.fields(self.config.page_size, self.geometry.head_dim)
        a_page = sum(math.prod(f.shape) * (f.dtype or self.geometry.dtype).itemsize for f in fields)
        return self.batch * self.geometry.num_kv_heads * self.num_pages * a_page

    @property
    def attend_bytes(self) -> int:
        """Keys and values of the pages read."""
        return self._row_bytes() * self.tokens_read

    @property
    def sparse_bytes(self) -> int:
        """The least that a step reads by the policy."""
        return self.dense_bytes if self.fits else self.score_bytes + self.attend_bytes

    @property
    def quest_us(self) -> float | None:
        """What Quest's own kernels took at this point, measured separately."""
        config = self.config
        here = (self.geometry.name, self.batch, config.budget, config.page_size, config.digest, config.policy)
        return QUEST_US.get(self.context) if here == ("mha", 1, 2 * K, 16, "minmax", "top_k") else None

    def num_layers(self, l2_bytes: int, free_bytes: int) -> int:
        """Layers to time a step over: past the L2 cache, within the free memory."""
        part_bytes = self.score_bytes or self.sparse_bytes
        cold = max(STEP_OVER_L2 * l2_bytes / self.sparse_bytes, PART_OVER_L2 * l2_bytes / part_bytes)
        a_layer = 2 * (self.dense_bytes + self.score_bytes)  # the competitors have their own layouts of both
        room = int(MEMORY_SHARE * free_bytes) // a_layer
        return max(MIN_LAYERS, min(math.ceil(cold), room, MAX_LAYERS))

    def describe(self) -> dict[str, Any]:
        """The point as keys of a result row."""
        return {
            "geometry": self.geometry.name,
            "dtype": str(self.geometry.dtype).removeprefix("torch."),
            "batch": self.batch,
            "context": self.context,
            "policy": self.config.policy,
            "digest": self.config.digest,
            "budget": self.config.budget,
            "page_size": self.config.page_size,
            "kv": self.config.page_format,
            "group_pooling": self.config.group_pooling,
            "min_share": self.config.min_share,
            "planted": self.read if self.is_planted else None,  # tokens
            "pages_read": self.k,
            "tokens_read": self.tokens_read,
            "fits": self.fits,
            "share": self.sparse_bytes / self.dense_bytes,  # of the cache's bytes that the sparse step reads
        }


def grid(
    layers: Sequence[Geometry], batches: Sequence[int], contexts: Sequence[int], configs: Sequence[SparseConfig]
) -> list[LayerPoint]:
    """Every combination; those that differ in settings alone stand together."""
    return [LayerPoint(*point) for point in product(layers, batches, contexts, configs)]


# (geometries, pairs of batch and context, budgets: none for those of the settings)
_LLAMA = ["llama-3.1-8b"]
_MANY = [*((1, n) for n in (K, 2 * K, 8 * K, 32 * K, 128 * K, M)), *((4, n) for n in (32 * K, 128 * K)),
         (16, 32 * K), (16, 128 * K), (64, 32 * K)]  # fmt: skip
PRESETS: dict[str, list[tuple[list[str], list[tuple[int, int]], list[int]]]] = {
    "quick": [(_LLAMA, [(1, 32 * K), (1, 128 * K), (16, 32 * K)], [2 * K])],
    "full": [
        (_LLAMA, _MANY, [2 * K]),
        (_LLAMA, [(1, 32 * K), (1, 128 * K), (16, 32 * K)], [512, K, 4 * K]),
        (["qwen3-32b", "gpt-oss", "gemma", "mha"], [(1, 32 * K), (1, 128 * K), (4, 32 * K)], [2 * K]),
    ],
    # At which settings are compared, with 4 and with 8 query heads to a kv head.
    "bars": [
        (
            ["llama-3.1-8b", "qwen3-32b"],
            [*((1, n) for n in (K, 2 * K, 8 * K, 32 * K, 128 * K, M)), (4, 128 * K), (16, 32 * K), (16, 128 * K)],
            [],
        )
    ],
}


def preset_points(name: str, configs: Sequence[SparseConfig] = (SparseConfig(),)) -> list[LayerPoint]:
    """The points of a preset with these settings, but for its budgets if it has any."""
    return [
        LayerPoint(named(geometry), batch, context, config)
        for names, pairs, budgets in PRESETS[name]
        for geometry, (batch, context) in product(names, pairs)
        for config in ([configs[0].with_(budget=budget) for budget in budgets] or configs)
    ]
