"""The layer kinds of linear attention, convolutions and state-space models: a state of fixed size that stays where it
is, alone or beside keys and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from sparsekv.cache.cache_layer import LAYER_KINDS, CacheLayer
from sparsekv.cache.paged_layer import PagedLayer
from sparsekv.cache.window_layer import WindowLayer
from sparsekv.errors import CacheStateError
from sparsekv.pages.page_store import PageStore

_STATES = ("conv_states", "recurrent_states")
# What transformers knows of them.
_KNOWN = "is_conv_states_initialized is_recurrent_states_initialized has_previous_state conv_kernel_size".split()
_KNOWN += ["device", "dtype", "record_past"]


@LAYER_KINDS.register("state")
class StateLayer(CacheLayer, LinearAttentionLayer):
    """transformers' own layer of states, which overwrites them where they are; here, where the last cache had them,
    so that a captured step finds them. Arguments as `CacheLayer`."""

    # The last two keep nothing; before transformers 5.21 they have such a layer all the same.
    layer_types = ("linear_attention", "conv", "moe", "mlp")
    attends = False
    is_in_place = True
    store: PageStore

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        CacheLayer.__init__(self, *args, **kwargs)
        self.reset()

    def is_steady(self, num_tokens: int) -> bool:
        """Whether its states stay where they are: while they record the past they grow."""
        return not self.record_past

    @property
    def states(self) -> list[Tensor]:
        """All of them: a step reads what it overwrites."""
        return [state for name in _STATES for state in getattr(self, name).values() if state is not None]

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        **kwargs: Any,
    ) -> None:
        """Makes room for states like these."""
        super().lazy_initialization(conv_states, recurrent_states, state_idx, **kwargs)
        for name, like in zip(_STATES, (conv_states, recurrent_states), strict=True):
            if like is not None:
                self._put(name, state_idx)

    def check_crop(self, count: int) -> None:
        """Raises CacheStateError if a state cannot go back by `count` tokens. That of a convolution can: it is its
        last inputs, of which there must be enough, or all."""
        is_lasting = any(self.is_recurrent_states_initialized.values()) or not self.record_past
        sizes = [(x.shape[-1], self.conv_kernel_size[i]) for i, x in self.conv_states.items() if x is not None]
        is_short = any(held - count < needed and held < self.store.newest.num_tokens for held, needed in sizes)
        if count and self.states and (is_lasting or is_short):
            raise CacheStateError(
                f"Layer {self.layer_idx} of this cache keeps a state, which cannot give back the tokens that it has "
                "taken in. Fork the cache before they come, and go on with the fork."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens, if `check_crop` allows it; their number is given as a negative one."""
        if self.record_past and self.states:
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps these rows, in this order."""
        dtype = getattr(indices, "dtype", torch.int64)  # a mask stays one
        self._change(lambda state: state[torch.as_tensor(indices, dtype=dtype, device=state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._change(lambda state: state.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forgets everything."""
        LinearAttentionLayer.__init__(self, getattr(self.layer_config, "number_of_conv_states", 1))

    def fork(self, twin: StateLayer) -> None:
        """Gives a layer of another cache the same state."""
        self.export(twin)
        twin._change(lambda state: state)

    def export(self, plain: Any) -> None:
        """Gives a copy of its state to a layer of transformers' own cache."""
        for name in _KNOWN:
            setattr(plain, name, copy.copy(getattr(self, name)))
        for name in _STATES:
            held = getattr(self, name).items()
            setattr(plain, name, {i: None if state is None else state.detach().clone() for i, state in held})

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its state, and what transformers knows of it."""
        known = {name: getattr(self, name) for name in _KNOWN if name not in ("device", "dtype")}
        held = [(name, i, state) for name in _STATES for i, state in getattr(self, name).items()]
        return known, {f"{name}.{i}": state.detach() for name, i, state in held if state is not None}

    def restored(self, facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """Goes on from a state."""
        for name in (name for name in _KNOWN if name in facts):
            known = facts[name]  # JSON's names are text
            setattr(self, name, {int(i): x for i, x in known.items()} if isinstance(known, dict) else known)
        for place, state in tensors.items():
            name, state_idx = place.split(".")
            getattr(self, name)[int(state_idx)] = state.to(device)
            self._put(name, int(state_idx))
            self.dtype, self.device = state.dtype, device

    # -- how

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in _STATES:
            for i, state in getattr(self, name).items():
                if state is not None:
                    getattr(self, name)[i] = change(state)
                    self._put(name, i)

    def _put(self, name: str, state_idx: int) -> None:
        """Moves a state to where this cache has it."""
        held = getattr(self, name)
        held[state_idx] = self.store.memory.put((self.layer_idx, name, state_idx), held[state_idx])


class BesideState:
    """What keys and values in pages are where there is a state in the same layer: the state is a layer by itself, and
    what transformers asks a layer of states is asked there."""

    state: StateLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state = StateLayer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "state":  # of a copy in the making
            raise AttributeError(name)
        return getattr(self.state, name)


LinearAttentionAndFullAttentionLayer.register(BesideState)


@LAYER_KINDS.register("pages_beside_state")
class PagedBesideState(BesideState, PagedLayer):
    """Full attention over pages, and a state."""

    layer_types = ("hybrid",)


@LAYER_KINDS.register("window_beside_state")
class WindowBesideState(BesideState, WindowLayer):
    """A sliding window in pages, and a state."""

    layer_types = ("hybrid_sliding",)

    def activate_past_recording(self) -> None:
        """Both keep more from now on."""
        super().activate_past_recording()
        self.state.activate_past_recording()
