"""What a selection is worth: the share of the true attention that lies in the pages read, and of the oracle's pages.

It reads every key to know, so it looks at a few steps and rows only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sparsekv import DecodeStep, PagedCache
from sparsekv.ops.reference import listed
from sparsekv.policies.oracle import exact_scores

MAX_ROWS = 8  # of a batch
NUM_STEPS = 4  # of a batch, spread over it


class Probe:
    """An observer of a cache in a few steps only; between them the cache decodes as it would unobserved.

    Args:
        cache: it has no other observers.
        num_steps: so many may come.

    Attributes:
        mass: by layer, one entry per step looked at: `[hkv]`, the share of the attention weights that the pages read
            hold, averaged over rows and query heads.
        overlap: the same of the share of the oracle's pages that were read.
    """

    def __init__(self, cache: PagedCache, num_steps: int) -> None:
        self.cache = cache
        self._looks = {round((i + 1) * num_steps / (NUM_STEPS + 1)) for i in range(NUM_STEPS)}
        self.mass: dict[int, list[Tensor]] = defaultdict(list)
        self.overlap: dict[int, list[Tensor]] = defaultdict(list)

    def before_step(self, number: int) -> None:
        """Is to be told of every step."""
        self.cache.observers = [self] if number in self._looks else []

    def __call__(self, step: DecodeStep, slots: Tensor | None) -> None:
        if slots is None:
            return
        step, slots = _first_rows(step), slots[:MAX_ROWS]
        self.mass[step.layer_idx].append(_mass(step, slots).mean((0, 2)).cpu())
        num_pages = step.block_table.shape[1]
        read, best = listed(slots, num_pages), listed(step.select(exact_scores(step)), num_pages)
        self.overlap[step.layer_idx].append(((best & read).sum(2) / best.sum(2)).mean(0).cpu())

    def lines(self) -> list[dict[str, Any]]:
        """A line per layer, as in `probes.jsonl`, without what identifies the run."""
        return [
            {
                "layer": layer,
                "steps": len(self.mass[layer]),
                "mass": torch.stack(self.mass[layer]).mean(0).tolist(),
                "overlap": torch.stack(self.overlap[layer]).mean(0).tolist(),
            }
            for layer in sorted(self.mass)
        ]


def _first_rows(step: DecodeStep) -> DecodeStep:
    some = slice(MAX_ROWS)
    table, lengths = step.block_table[some], step.seq_lens[some]
    return replace(step, query=step.query[some], key=None, value=None, block_table=table, seq_lens=lengths)


def _mass(step: DecodeStep, slots: Tensor) -> Tensor:
    """Share of the attention weights in the pages read, `[b, hkv, g]`: by how much their log-sum-exp is smaller."""

    def log_sum_exp(slots: Tensor | None) -> Tensor:
        pages, kind = (step.kv_pool, step.block_table, step.seq_lens), step.config.page_format
        lse: Tensor = step.ops.attend_pages(step.query, *pages, slots, step.scaling, 0.0, None, kind)[1]
        return lse

    share = (log_sum_exp(slots) - log_sum_exp(None)).exp()
    return rearrange(share, "b (h g) -> b h g", h=slots.shape[1])
