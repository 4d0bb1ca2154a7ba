"""Dense decoding over the same pages: the baseline that reads everything."""

from __future__ import annotations

from sparsekv.policies.base import DecodeStep, Policy, register


@register("all")
class AllPages(Policy):
    """Every page."""

    reads_all = True

    def select(self, step: DecodeStep) -> None:
        return None
