"""What is remembered between the decode steps of a cache beside its pages, in tensors that stay where they are."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekv.pages.arena import Loan, Tensors
from sparsekv.policies import Policy

Kinds = list[tuple[torch.dtype, torch.device]]


class Memory:
    """The tensors that a policy declares (`Policy.memory`), a set for each layer that keeps one, and their phase; and
    the states of layers that keep no tokens.

    Args:
        policy: which is asked what is remembered.
        loan: has the layers' pages, and the tensors of caches that are gone; gets these when this one is.
        dense_layers: those that the policy does not decide for.

    Attributes:
        is_used: whether the policy remembers anything.
    """

    def __init__(self, policy: Policy, loan: Loan, dense_layers: Collection[int] = ()) -> None:
        self.policy, self.is_used = policy, bool(policy.memory(1, 1))
        self._loan, self._dense_layers = loan, dense_layers
        self._kept: Tensors = {}
        self._sizes: dict[int, tuple[int, int, int]] = {}  # batch size, k, width, for which each set is made
        self._began = self._newest = 0  # tokens at the last step of phase 0, and at the last of all
        self._goes_on = False

    # -- the phase

    def begin(self, num_tokens: int, is_step: bool) -> None:
        """There is room for the tokens of a pass. To begin one again that has failed changes nothing.

        Args:
            num_tokens: columns of the cache with them.
            is_step: whether it is one token of every sequence. Any other pass is in phase 0, as is the next.
        """
        if not (is_step and self._goes_on):
            self._began = num_tokens
        self._newest, self._goes_on = num_tokens, is_step

    @property
    def phase(self) -> int:
        """The phase of the pass that there is room for."""
        return (self._newest - self._began) % self.policy.period

    def forget(self) -> None:
        """The next step is of phase 0."""
        self._goes_on = False

    # -- the tensors

    @property
    def addresses(self) -> list[int]:
        """Where the tensors lie."""
        return [tensor.data_ptr() for layer_idx in self._sizes for tensor in self._kept[layer_idx]]

    def place_of(self, layer_idx: int) -> tuple[int, int | None]:
        """A layer's ordinal among those that the policy decides for, and the layer that keeps its memory, if it has
        one. Layers count when they have stored something: some turn out to be unfit for pages."""
        deciding = [i for i in sorted(self._loan.layers) if i not in self._dense_layers]
        ordinal = bisect_left(deciding, layer_idx)
        has_none = not self.is_used or layer_idx in self._dense_layers
        return ordinal, None if has_none else deciding[self.policy.keeper(ordinal)]

    def of(self, layer_idx: int, batch_size: int, k: int, width: int) -> list[Tensor]:
        """The tensors that a layer keeps, `[b, hkv, *shape]`, for a selection and a table of these widths. They move
        only where there must be more room."""
        if self._sizes.get(layer_idx) != (batch_size, k, width):
            like, fields = self._loan.layers[layer_idx].no_tokens, self.policy.memory(k, width)
            room = self._room(layer_idx, [(field.dtype or like.dtype, like.device) for field in fields])
            for tensor, field in zip(room, fields, strict=True):
                _reshape(tensor, (batch_size, like.shape[1], *field.shape), field.fill)
            self._sizes[layer_idx] = batch_size, k, width
        return self._kept[layer_idx]

    def put(self, name: Hashable, state: Tensor) -> Tensor:
        """The same content where this cache keeps the state of that name: it moves only where there must be more
        room."""
        (tensor,) = self._room(name, [(state.dtype, state.device)])
        _overwrite(tensor, state)
        return tensor.detach()  # what is done to it outside of `no_grad` leaves no history here

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes the batch these rows, in this order; states are their layers' own business."""
        goes_on, self._goes_on = self._goes_on, False  # should memory run out on the way
        for layer_idx in list(self._sizes) if goes_on else ():
            _, *widths = self._sizes.pop(layer_idx)
            for tensor in self._kept[layer_idx]:
                _overwrite(tensor, tensor[torch.from_numpy(rows).to(tensor.device)])
            self._sizes[layer_idx] = len(rows), widths[0], widths[1]
        self._goes_on = goes_on

    def fork(self) -> Memory:
        """One that goes on from here by itself, with the same policy."""
        twin = Memory(self.policy, self._loan, self._dense_layers)
        for layer_idx in self._sizes if self._goes_on else ():
            kept = self._kept[layer_idx]
            for tensor, source in zip(twin._room(layer_idx, [(t.dtype, t.device) for t in kept]), kept, strict=True):
                _overwrite(tensor, source)
            twin._sizes[layer_idx] = self._sizes[layer_idx]
        twin._began, twin._newest, twin._goes_on = self._began, self._newest, self._goes_on
        return twin

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file gets: what a fork would hold."""
        sizes = {str(layer_idx): list(size) for layer_idx, size in self._sizes.items() if self._goes_on}
        facts = {"began": self._began, "newest": self._newest, "goes_on": self._goes_on, "sizes": sizes}
        return facts, {f"memory.{i}.{j}": x for i in sizes for j, x in enumerate(self._kept[int(i)])}

    def restored(self, facts: dict[str, Any]) -> dict[str, Tensor]:
        """Makes the memory that one of the same policy has described: the tensors that are to be filled."""
        found: dict[str, Tensor] = {}
        for layer_idx, (batch_size, k, width) in facts["sizes"].items():
            kept = self.of(int(layer_idx), batch_size, k, width)
            found |= {f"memory.{layer_idx}.{j}": tensor for j, tensor in enumerate(kept)}
        self._began, self._newest, self._goes_on = facts["began"], facts["newest"], facts["goes_on"]
        return found

    def __del__(self) -> None:
        if vars(self).get("_kept"):
            self._loan.memories.append(self._kept)

    def _room(self, name: Hashable, kinds: Kinds) -> list[Tensor]:
        """The tensors of that name, if they are of these dtypes and devices; else new ones, of no size yet."""
        self._loan.draw()
        if not self._kept and self._loan.memories:
            self._kept = self._loan.memories.pop()
        room = self._kept.get(name, [])
        if [(tensor.dtype, tensor.device) for tensor in room] != kinds:
            with torch.inference_mode(False):  # else nothing could be written outside of it later
                room = self._kept[name] = [torch.empty(0, dtype=dtype, device=device) for dtype, device in kinds]
        return room


@torch.no_grad()
def _overwrite(tensor: Tensor, source: Tensor) -> None:
    tensor.resize_(source.shape).copy_(source)


@torch.no_grad()
def _reshape(tensor: Tensor, shape: Sequence[int], fill: float) -> None:
    """Gives a tensor another shape. What both have of it stays, unless it is another policy's."""
    old = tensor.clone()
    tensor.resize_(shape).fill_(fill)
    if old.ndim == tensor.ndim:
        both = tuple(slice(min(before, after)) for before, after in zip(old.shape, shape, strict=True))
        tensor[both] = old[both]
