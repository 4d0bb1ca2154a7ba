"""What the counters of a cache say of a method: what it read, and whether every layer did what the method claims."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from sparsekv import POLICIES, DecodeStats, PagedCache
from sparsekv.hf.support import LayerStatus

from .results import Line


class Counters:
    """Counts what a cache reads from now on, each layer by itself: one that reads everything is not hidden by another
    that does not.

    Args:
        cache: prefilled; what it has counted itself stays as it is.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.config, self._never_choosing = cache.config, cache.dense_layers
        self._is_dense = POLICIES.get(cache.config.policy).reads_all
        self._of_layers: dict[int, DecodeStats] = {}
        self._num_kv_heads: dict[int, int] = {}
        for layer in cache.paged_layers:
            if layer.is_paged:
                layer.stats = self._of_layers[layer.layer_idx] = DecodeStats()
                self._num_kv_heads[layer.layer_idx] = layer.store.layers[layer.layer_idx].kv.shape[2]

    def counts(self, num_steps: int, num_rows: int) -> Line:
        """What a token of one sequence read, over all layers; `tokens_read` per kv head, in the layers that chose at
        every step, None if none did."""
        layers, tokens = self._of_layers.values(), max(num_steps, 1) * num_rows
        telling = [self._of_layers[i] for i in self._choosing or self._of_layers]
        chose = [i for i in self._choosing if not self._of_layers[i].dense_steps]
        heads = sum(self._num_kv_heads[i] for i in chose)
        pages = sum(self._of_layers[i].pages_read for i in chose)
        return {
            "tokens_read": pages * self.config.page_size / (heads * tokens) if heads else None,
            "bytes_per_token": sum(stats.bytes_read for stats in layers) / tokens,
            "dense_bytes_per_token": sum(stats.bytes_total for stats in layers) / tokens,
            "pages_per_token": sum(stats.pages_read for stats in layers) / tokens,
            "sparse_steps": min((stats.sparse_steps for stats in telling), default=0),
            "dense_steps": max((stats.dense_steps for stats in telling), default=0),
        }

    def error(self, num_steps: int, longest: int) -> str | None:
        """What the counters say against the method's claim, or None.

        Args:
            longest: tokens of the longest document: the pages are chosen where it exceeds the layer's budget.
        """
        told = {i: (stats.sparse_steps, stats.dense_steps) for i, stats in self._of_layers.items()}
        lost = [i for i, steps in told.items() if sum(steps) != num_steps]
        if lost or not told:
            return f"of {num_steps} steps {_layers(lost)} counted {told[lost[0]] if lost else 'none'} (sparse, dense)"
        if self._is_dense:
            chose = [i for i, (sparse, _) in told.items() if sparse]
            return f"dense, and yet some steps chose pages in {_layers(chose)}" if chose else None
        num_pages = self.config.pages_for(longest)
        exceeded = [i for i in told if self.config.at(i).budget_pages(longest) < num_pages]
        if not exceeded:
            return None
        if not self._choosing:
            return f"all {num_steps} steps were dense, although the document exceeds the budget: no layer may choose"
        dense = [i for i in self._choosing if i in exceeded and told[i][1]]
        if not dense:
            return None
        most = max(told[i][1] for i in dense)
        return (
            f"{most} of {num_steps} steps were dense, although the document exceeds the budget, in {_layers(dense)}"
        )

    @property
    def _choosing(self) -> list[int]:
        """The layers that should choose their pages."""
        return [] if self._is_dense else [i for i in self._of_layers if i not in self._never_choosing]


def layers_not_sparse(layers: Sequence[LayerStatus]) -> list[Line]:
    """Runs of layers that choose no pages, and why, for the manifest; `is_asked_for` if `dense_layers` says so."""
    dense = [status for status in layers if not status.is_sparse]
    found = []
    for (reason, asked), group in groupby(dense, key=lambda x: (x.reason, x.is_asked_for)):
        numbers = [status.layer_idx for status in group]
        found.append({"layers": numbers, "reason": reason, "is_asked_for": asked})
    return found


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers))}" if numbers else "no layer"
