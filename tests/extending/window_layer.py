"""A layer kind of its own, as a user would write it: sliding windows, kept and attended to in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv.cache import AttentionLayer


class Window(AttentionLayer):
    """Keeps what the next token may still see: a window less one."""

    layer_types = ("sliding_attention",)
    understands = ("sliding_window",)
    is_sliding = True
    is_croppable = False  # what has left the window does not come back

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.is_served:  # nothing has been forgotten yet
            return super().get_mask_sizes(query_length)
        num_kept = self.keys.shape[2]
        return num_kept + query_length, self.length - num_kept

    def prefill(self, *args: Any) -> Tensor | tuple[Tensor, Tensor]:
        held = super().prefill(*args)
        self._forget()
        return held

    def decode(
        self, query: Tensor, scaling: float, softcap: float, sinks: Tensor | None, visible: Tensor | None = None
    ) -> Tensor:
        self.commit(visible)
        grouped = query.unflatten(1, (self.keys.shape[1], -1))  # [b, hkv, g, 1, d]
        scores = grouped @ self.keys[:, :, None].mT * scaling
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None, None], -torch.inf)
        out = (scores.softmax(-1) @ self.values[:, :, None]).flatten(1, 2)
        self._forget()
        return out

    def _forget(self) -> None:
        num_kept = self.layer_config.sliding_window - 1
        self.keys, self.values = self.keys[:, :, -num_kept:], self.values[:, :, -num_kept:]
