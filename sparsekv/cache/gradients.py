"""Where gradients end: keys and values in pages carry no history, and what would have to go on there is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv.errors import CacheStateError


class _Barrier(torch.autograd.Function):
    """Passes tensors on. The first input asks for a gradient, so that the others need not."""

    @staticmethod
    def forward(ctx: Any, asks: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise CacheStateError(
            "Gradients do not flow through a PagedCache: the tokens in its pages carry no history. Run the whole "
            "sequence in one forward with use_cache=False, give the forwards past_key_values=DynamicCache() of "
            "transformers, or undo the patch."
        )


def barrier(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, behind which a backward pass raises CacheStateError."""
    passed: tuple[Tensor, ...] = _Barrier.apply(torch.empty(0, requires_grad=True), *tensors)
    return passed
