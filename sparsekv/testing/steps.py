"""A decode step out of random pages, for what selects pages without a cache or a model around it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsekv import ops
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.policies import POLICIES, DecodeStep, Policy, Reads
from sparsekv.testing.pages import Pages, fitted_state, fresh_summary


class Unsteady(Policy):
    """The first page, the last, and every third between: more or fewer than a budget, which only the slots tell."""

    reads = Reads.DIGESTS

    def select(self, step: DecodeStep) -> Tensor:
        device, num_slots = step.query.device, step.block_table.shape[1]
        slot = torch.arange(step.k, dtype=torch.int32, device=device) * 3 % num_slots
        last = (step.seq_lens - 1) // step.config.page_size  # [b]
        listed = slot.expand(len(last), -1).minimum(last[:, None]).sort(-1).values
        repeated = torch.cat([torch.zeros_like(last[:, None], dtype=torch.bool), listed.diff() == 0], dim=1)
        listed = listed.masked_fill(repeated, num_slots).sort(-1).values
        slots = listed.masked_fill(listed == num_slots, -1)
        return slots[:, None].repeat(1, step.kv_pool.shape[2], 1)


def decode_step(
    query: Tensor, pages: Pages, config: SparseConfig, scaling: float = 0.25, layer_idx: int = 0
) -> DecodeStep:
    """What a policy is told when the newest token of every sequence is in its pages, in phase 0.

    Args:
        query: `[b, hq, d]`.
        config: its page size must be that of the pages.
    """
    state = fitted_state(DIGESTS.get(config.digest)(), pages)
    step = DecodeStep(
        layer_idx=layer_idx,
        query=query,
        kv_pool=pages.kv_pool,
        summary=fresh_summary(config.digest, pages, state),
        state=state,
        block_table=pages.block_table,
        seq_lens=pages.seq_lens,
        k=min(config.budget_pages(max(pages.lengths)), pages.block_table.shape[1]),
        scaling=scaling,
        config=config,
        ops=ops.for_backend(config.backend),
    )
    return replace(step, memory=blank_memory(step))


def blank_memory(step: DecodeStep) -> list[Tensor]:
    """What the policy that a step's settings name remembers, before it has written anything."""
    (batch_size, width), pool = step.block_table.shape, step.kv_pool
    fields = POLICIES.get(step.config.policy)().memory(step.k, width)
    shapes = [(batch_size, pool.shape[2], *field.shape) for field in fields]
    return [
        torch.full(shape, field.fill, dtype=field.dtype or pool.dtype, device=pool.device)
        for shape, field in zip(shapes, fields, strict=True)
    ]
