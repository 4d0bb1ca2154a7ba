"""A decode step out of random pages, for what selects pages without a cache or a model around it."""

from __future__ import annotations

from torch import Tensor

from sparsekv import ops
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.policies import DecodeStep
from sparsekv.testing.pages import Pages, fitted_state, fresh_summary


def decode_step(
    query: Tensor, pages: Pages, config: SparseConfig, scaling: float = 0.25, layer_idx: int = 0
) -> DecodeStep:
    """What a policy is told when the newest token of every sequence is in its pages.

    Args:
        query: `[b, hq, d]`.
        config: its page size must be that of the pages.
    """
    state = fitted_state(DIGESTS.get(config.digest)(), pages)
    return DecodeStep(
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
