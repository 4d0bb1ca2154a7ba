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

from sparsekv import DecodeStep
from sparsekv.ops.reference import listed
from sparsekv.policies.oracle import exact_scores

MOST_ROWS = 8  # of a batch
NUM_STEPS = 4  # of a batch, spread over it


class Probe:
    """An observer of a cache: `cache.observers.append(probe)`. It looks at a few steps.

    Args:
        num_steps: so many may come.

    Attributes:
        mass: by layer, one entry per step looked at: `[hkv]`, the share of the attention weights that the pages read
            hold, averaged over rows and query heads.
        overlap: the same of the share of the oracle's pages that were read.
    """

    def __init__(self, num_steps: int) -> None:
        self._looks = {round((i + 1) * num_steps / (NUM_STEPS + 1)) for i in range(NUM_STEPS)}
        self.is_looking = False
        self.mass: dict[int, list[Tensor]] = defaultdict(list)
        self.overlap: dict[int, list[Tensor]] = defaultdict(list)

    def before_step(self, number: int) -> None:
        """To be told of every step."""
        self.is_looking = number in self._looks

    def __call__(self, step: DecodeStep, slots: Tensor | None) -> None:
        if not self.is_looking or slots is None:
            return
        step, slots = _first_rows(step), slots[:MOST_ROWS]
        read = listed(slots, step.block_table.shape[1])
        self.mass[step.layer_idx].append(_mass(step, read).mean((0, 2)).cpu())
        best = listed(step.select(exact_scores(step)), read.shape[2])
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
    table, lengths = step.block_table[:MOST_ROWS], step.seq_lens[:MOST_ROWS]
    return replace(step, query=step.query[:MOST_ROWS], key=None, value=None, block_table=table, seq_lens=lengths)


def _mass(step: DecodeStep, read: Tensor) -> Tensor:
    """Share of the attention weights in the pages read, `[b, hkv, g]`."""
    page_size = step.kv_pool.shape[3]
    keys = step.kv_pool[:, 0][step.block_table].float()
    keys = rearrange(keys, "b pages h p d -> b h (pages p) d")
    query = rearrange(step.query.float(), "b (h g) d -> b h g d", h=keys.shape[1])
    logits = query @ keys.transpose(-1, -2) * step.scaling
    missing = torch.arange(keys.shape[2], device=keys.device) >= step.seq_lens[:, None]
    # What no token was written to may hold NaN, and NaN times nothing is NaN.
    weights = logits.masked_fill(missing[:, None, None], float("-inf")).softmax(-1)
    by_page = rearrange(weights, "b h g (pages p) -> b h g pages p", p=page_size).sum(-1)
    return (by_page * read[:, :, None]).sum(-1)
