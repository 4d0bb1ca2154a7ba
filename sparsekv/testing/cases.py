"""Random calls of every op, for the soak: shapes, lengths and settings, odd ones among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sparsekv.ops import instances
from sparsekv.ops.formats import formats_with_kernels
from sparsekv.ops.formulas import with_kernels
from sparsekv.testing.pages import Pages, random_pages


@dataclass(frozen=True)
class Case:
    """One random call of every op."""

    dtype: torch.dtype
    head_dim: int
    num_kv_heads: int
    group: int
    page_size: int
    lengths: list[int]
    k: int
    sink_tokens: int
    recent_tokens: int
    pooling: str
    min_score: float | None
    whole_tokens: int
    softcap: float
    with_sinks: bool
    with_limits: bool
    num_new: int
    padded: bool
    digest: str
    format: str
    seed: int

    @property
    def num_halves(self) -> int:
        """Of pages: 1 of latents, where keys are the values, too."""
        return 1 if self.head_dim in instances.LATENT_DIMS else 2

    @staticmethod
    def draw(rng: random.Random) -> Case:
        """Odd sizes are likely: empty, one token, around a page and around the budget."""
        page_size = rng.choice(instances.PAGE_SIZES)
        k = rng.choice([1, 2, 3, 7, 16, 33, 128])
        edges = [1, page_size - 1, page_size, page_size + 1, k * page_size, k * page_size + 1, 2 * k * page_size + 3]
        lengths = [rng.choice([rng.choice(edges), rng.randint(1, 3000)]) for _ in range(rng.choice([1, 1, 2, 3, 5]))]
        drawn = Case(
            dtype=rng.choice(list(instances.ELEMENTS)),
            head_dim=rng.choice(instances.HEAD_DIMS),
            num_kv_heads=rng.choice([1, 2, 3, 4, 8]),
            group=rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 16]),
            page_size=page_size,
            lengths=lengths,
            k=k,
            sink_tokens=rng.choice([0, 1, 4, page_size + 1]),
            recent_tokens=rng.choice([0, 1, 64, 3 * page_size]),
            pooling=(pooling := rng.choice(["max", "sum", "mean_softmax", "share", "share"])),
            min_score=rng.choice([None, -2.0, -4.0, -6.0, -8.0]) if pooling == "share" else None,
            whole_tokens=rng.choice([0, rng.choice(edges), 2048]),
            softcap=rng.choice([0.0, 0.0, 5.0, 50.0]),
            with_sinks=rng.random() < 0.3,
            with_limits=rng.random() < 0.2,
            num_new=rng.choice([1, 1, page_size, rng.randint(2, 100)]),
            padded=rng.random() < 0.5,
            digest=rng.choice(with_kernels()),
            format=rng.choice(formats_with_kernels()),
            seed=rng.randrange(1 << 31),
        )
        if rng.random() < 0.9:
            return drawn
        head_dim, group = rng.choice(instances.LATENT_DIMS), rng.choice([1, 5, 16, 20, 128])
        return replace(drawn, head_dim=head_dim, group=group, num_kv_heads=1, format="plain")

    def pages(self, lengths: Sequence[int], device: torch.device) -> Pages:
        """Shuffled pages of sequences with these lengths; what no token was written to is NaN."""
        shape = (self.num_kv_heads, self.head_dim, self.page_size)
        return random_pages(lengths, *shape, self.dtype, seed=self.seed, device=device, num_halves=self.num_halves)
