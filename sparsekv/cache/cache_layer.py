"""A layer of a paged cache, where it is not transformers' own: what the cache and a captured step ask every kind of
them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.stats import DecodeStats
from sparsekv.config import SparseConfig
from sparsekv.errors import CacheStateError
from sparsekv.pages.page_store import PageStore
from sparsekv.pages.store_part import StorePart
from sparsekv.policies import DecodeStep
from sparsekv.registry import Registry

# Called with a layer's decode step and the slots that it has read, `[b, hkv, k]` int32; None: all pages.
Observer = Callable[[DecodeStep, "Tensor | None"], None]
FallbackListener = Callable[[int, str], None]
NoticeListener = Callable[[str], None]


class CacheLayer:
    """What all kinds of layers have in common. A kind whose decode steps change nothing but tensors where they are
    says so (`is_in_place`, `is_steady`): then they can be captured.

    Args:
        store: the pages, shared by the layers of a cache.
        layer_idx: the layer.
        config: the settings in force.
        stats: counters to add to.
        observers: called after every decode step of the layer with the step and its slots, if it has such.
        on_fallback: called with (layer_idx, reason) if the layer turns out to be no layer of its kind.
        is_dense: whether it reads everything, whatever the policy.
        layer_config: the model's config; the layer's own, where layers differ.
        on_notice: told, in a sentence, of what is asked for and cannot be done.

    Attributes:
        layer_types: transformers' words for the layers that it serves: "full_attention", "sliding_attention", ...
        attends: whether it answers the attention of its model.
        in_pages: whether what it keeps lies in pages.
        is_in_place: whether its decode steps can be captured, once it is steady.
        is_sparse: whether the policy decides what it reads.
    """

    layer_types: tuple[str, ...] = ()
    attends = True
    in_pages = False
    is_in_place = False
    is_sparse = False

    def __init__(
        self,
        store: PageStore,
        layer_idx: int,
        config: SparseConfig,
        stats: DecodeStats,
        observers: list[Observer],
        on_fallback: FallbackListener | None = None,
        is_dense: bool = False,
        layer_config: Any = None,
        on_notice: NoticeListener | None = None,
    ) -> None:
        self.store: StorePart = store
        self.layer_idx, self.config = layer_idx, config
        self.stats, self.observers, self.on_fallback = stats, observers, on_fallback
        self.layer_config, self.on_notice = layer_config, on_notice

    @classmethod
    def reason_against(cls, layer_type: str, text_config: Any, layer_idx: int) -> str | None:
        """Why a layer of one of `layer_types` is not served, as half a sentence; None: it is.

        Args:
            text_config: the language model's config.
        """
        return None

    # -- what a cache asks for

    def join(self, store: PageStore) -> None:
        """Goes on with the store of a cache that has been emptied."""
        self.store = store

    def fork(self, twin: Any) -> None:
        """Gives a new layer of another cache the same content; what either takes from now on is its own."""
        raise NotImplementedError

    def export(self, plain: Any) -> None:
        """Gives a copy of its content to the layer that transformers' own cache has in its place."""
        raise NotImplementedError

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file gets of it beside pages: facts that JSON can hold, and tensors by name.

        Raises:
            CacheStateError: it keeps what cannot be saved.
        """
        raise CacheStateError(f"Layer {self.layer_idx} of this cache is a {type(self).__name__}, which is not saved.")

    def restored(self, facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        """Takes over what another of its kind has described, whose pages are there already. It is still empty.

        Args:
            tensors: on the CPU; device: where its tokens belong.
        """

    def check_crop(self, count: int) -> None:
        """Raises CacheStateError if the last `count` tokens cannot be dropped."""

    def settle(self) -> None:
        """Deals with tokens that are pending."""

    # -- what a step asks for, which may be captured

    def is_steady(self, num_tokens: int) -> bool:
        """Whether a decode step changes nothing but tensors where they are. `num_tokens`: columns of the cache."""
        return False

    @property
    def states(self) -> list[Tensor]:
        """What a step overwrites though it reads it: to be put back before the same step runs again. (What it writes
        behind what there is needs no such care.)"""
        return []

    def follow(self) -> None:
        """Goes on to where a step has left the tensors that was replayed."""

    def drop_pending(self) -> None:
        """Forgets tokens of a forward pass that was given up."""


LAYER_KINDS: Registry[CacheLayer] = Registry("layer kind")
