"""What is measured on a GPU: the shapes of one layer's decode step, and the bytes that each has to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from sparsekv import SparseConfig
from sparsekv.digests import DIGESTS, Digest
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation.models import pretrained

K, M = 1 << 10, 1 << 20

# A step is timed over so many layers, each with its own cache, that what it reads comes from memory and not from the
# L2 cache: a layer's lines are gone when its turn comes again.
MIN_LAYERS, MAX_LAYERS = 2, 32
STEP_OVER_L2, PART_OVER_L2 = 4, 2
MEMORY_SHARE = 0.8  # of the free memory; the rest is for what competitors and checks allocate


@dataclass(frozen=True)
class Geometry:
    """One attention layer of a model: query heads, kv heads, head size, and whether it has sink logits."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_q_heads // self.num_kv_heads

    @classmethod
    def of(cls, model: str) -> Geometry:
        """Of a model on the hub or in a folder, whose config alone is read.

        Raises:
            ConfigError: there is no such model, or its config does not tell the heads.
        """
        others = f"A --geometry ({', '.join(GEOMETRIES)}) will do."
        try:
            config = pretrained(AutoConfig, model).get_text_config(decoder=True)
            heads = int(config.num_attention_heads)
            kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
            head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        except ConfigError as error:
            raise ConfigError(f"{error} {others}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"--model {model}: {error}. {others}") from error
        return cls(model, heads, kv_heads, head_dim)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("llama-3.1-8b", 32, 8, 128),
        Geometry("qwen3-32b", 64, 8, 128),
        Geometry("gpt-oss", 64, 8, 64, sinks=True),
        Geometry("gemma", 16, 8, 256),
        Geometry("mha", 32, 32, 128, torch.float16),
    )
}

# Quest's own score and sparse-attention kernels (mit-han-lab/Quest at 01c1623) built for sm_90, with FlashInfer's
# top-k in place of RAFT's, on an H200 on 2026-11-20: microseconds of kernel time, launches not counted. Their only
# geometry is `mha` at batch 1; budget 2048, page 16. Measured separately: they are not part of a run.
QUEST_US = {8 * K: 35.4, 32 * K: 64.9, 128 * K: 183.7}


@dataclass(frozen=True)
class Point:
    """One measurement: a geometry, `batch` sequences of `context` tokens (the new one counted), and the budget."""

    geometry: Geometry
    batch: int
    context: int
    config: SparseConfig

    @property
    def scaling(self) -> float:
        """Factor on dot products."""
        return float(self.geometry.head_dim**-0.5)

    @property
    def digest(self) -> Digest:
        """What is kept of every page."""
        return DIGESTS.get(self.config.digest)()

    @property
    def num_pages(self) -> int:
        """Pages of one sequence."""
        return self.config.pages_for(self.context)

    @property
    def k(self) -> int:
        """Pages that the step reads of each sequence and kv head."""
        return min(self.config.budget_pages(self.context), self.num_pages)

    @property
    def fits(self) -> bool:
        """Whether the budget holds the whole context: then a step reads everything and chooses nothing."""
        return self.k >= self.num_pages

    @property
    def _row_bytes(self) -> int:
        """A key and a value of every kv head of every sequence."""
        return 2 * self.batch * self.geometry.num_kv_heads * self.geometry.head_dim * self.geometry.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """All keys and values."""
        return self._row_bytes * self.context

    @property
    def digest_bytes(self) -> int:
        """Of every page and kv head: min/max takes as much as a key and a value."""
        fields = self.digest.fields(self.config.page_size, self.geometry.head_dim)
        a_page = sum(math.prod(f.shape) * (f.dtype or self.geometry.dtype).itemsize for f in fields)
        return self.batch * self.geometry.num_kv_heads * self.num_pages * a_page

    @property
    def attend_bytes(self) -> int:
        """Keys and values of the pages read."""
        return self._row_bytes * min(self.k * self.config.page_size, self.context)

    @property
    def sparse_bytes(self) -> int:
        """The least that a step reads by Quest's policy."""
        return self.dense_bytes if self.fits else self.digest_bytes + self.attend_bytes

    @property
    def quest_us(self) -> float | None:
        """What Quest's own kernels took at this point, measured separately."""
        theirs = self.geometry.name == "mha" and self.batch == 1 and self.config.budget == 2 * K
        theirs = theirs and self.config.digest == "minmax"
        return QUEST_US.get(self.context) if theirs and self.config.page_size == 16 else None

    def num_layers(self, l2_bytes: int, free_bytes: int) -> int:
        """Layers to time a step over: past the L2 cache, within the free memory."""
        cold = max(STEP_OVER_L2 * l2_bytes / self.sparse_bytes, PART_OVER_L2 * l2_bytes / self.digest_bytes)
        a_layer = 2 * (self.dense_bytes + self.digest_bytes)  # the competitors have their own layouts of both
        room = int(MEMORY_SHARE * free_bytes) // a_layer
        return max(MIN_LAYERS, min(math.ceil(cold), room, MAX_LAYERS))

    def describe(self) -> dict[str, Any]:
        """The point as keys of a result row."""
        return {
            "geometry": self.geometry.name,
            "batch": self.batch,
            "context": self.context,
            "digest": self.config.digest,
            "budget": self.config.budget,
            "pages_read": self.k,
            "fits": self.fits,
            "share": self.sparse_bytes / self.dense_bytes,  # of the cache's bytes that the sparse step reads
        }


def grid(
    layers: Sequence[Geometry],
    batches: Sequence[int],
    contexts: Sequence[int],
    budgets: Sequence[int],
    page_size: int = 16,
    digest: str = "minmax",
) -> list[Point]:
    """Every combination.

    Raises:
        ConfigError: a budget is too small. UnknownNameError: there is no such digest.
    """
    return [
        Point(geometry, batch, context, SparseConfig(budget=budget, page_size=page_size, digest=digest))
        for geometry in layers
        for budget in budgets
        for batch in batches
        for context in contexts
    ]


def geometries(names: Sequence[str]) -> list[Geometry]:
    """Those of these names.

    Raises:
        UnknownNameError: there is none of a name.
    """
    for name in names:
        if name not in GEOMETRIES:
            raise UnknownNameError("--geometry", name, GEOMETRIES)
    return [GEOMETRIES[name] for name in names]


# (geometries, pairs of batch and context, budgets)
_LLAMA = ["llama-3.1-8b"]
_MANY = [*((1, n) for n in (K, 2 * K, 8 * K, 32 * K, 128 * K, M)), *((4, n) for n in (32 * K, 128 * K)),
         (16, 32 * K), (16, 128 * K), (64, 32 * K)]  # fmt: skip
PRESETS: dict[str, list[tuple[list[str], list[tuple[int, int]], list[int]]]] = {
    "quick": [(_LLAMA, [(1, 32 * K), (1, 128 * K), (16, 32 * K)], [2 * K])],
    "full": [
        (_LLAMA, _MANY, [2 * K]),
        (_LLAMA, [(1, 32 * K), (1, 128 * K), (16, 32 * K)], [512, K, 4 * K]),
        (list(GEOMETRIES)[1:], [(1, 32 * K), (1, 128 * K), (4, 32 * K)], [2 * K]),
    ],
}


def preset_points(name: str, page_size: int = 16, digest: str = "minmax") -> list[Point]:
    """The points of a preset."""
    return [
        point
        for names, pairs, budgets in PRESETS[name]
        for geometry in geometries(names)
        for budget in budgets
        for batch, context in pairs
        for point in grid([geometry], [batch], [context], [budget], page_size, digest)
    ]
