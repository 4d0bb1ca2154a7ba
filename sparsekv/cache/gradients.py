"""Where gradients end: keys and values in pages carry no history, and what would have to go on there is an error."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
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
    asks = torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True)
    passed: tuple[Tensor, ...] = _Barrier.apply(asks, *tensors)
    return passed


def untracked_copy(layer: Any) -> Any:
    """A deep copy of a layer, of which no tensor waits for a gradient that has to pass through it."""
    return copy.deepcopy(layer, untracked_tensors([layer]))


def untracked_tensors(layers: Iterable[Any]) -> dict[int, Any]:
    """What `copy.deepcopy` needs as its memo to copy layers: tensors with a history, which it refuses, without it."""
    tensors = (tensor for layer in layers for tensor in _tensors(vars(layer)))
    return {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
