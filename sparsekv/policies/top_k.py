"""Quest's policy: the pages whose digests promise most for this query.

Source: Tang et al., "Quest" (ICML 2024), section 3.4.
"""

from __future__ import annotations

from torch import Tensor

from sparsekv.policies.base import DecodeStep, Policy, Reads, register


@register("top_k")
class TopK(Policy):
    """Forced pages, then the best digest scores, up to the budget."""

    reads = Reads.DIGESTS

    def select(self, step: DecodeStep) -> Tensor:
        return step.select(step.digest_scores(), step.config.min_score)

    def decode(self, step: DecodeStep, softcap: float, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return step.attend_best(softcap, sinks)
