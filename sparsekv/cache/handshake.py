"""How a layer and its attention function find each other: transformers does not hand the cache to the latter.

`update` hands out views of the keys and values that carry a tag, an attribute that leads back to the layer. A layer
is served when the tags of its first update arrive at the attention function (the handshake). A model that
transforms keys on the way loses them, and the layer stays a plain dynamic one. A model that expands latents is known
by what it makes of them: the layer of latents that was updated last in this thread says whether these are its own.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekv.errors import CacheStateError

if TYPE_CHECKING:
    from sparsekv.cache.attention_layer import AttentionLayer
    from sparsekv.cache.latent_layer import LatentLayer

_TAG = "_sparsekv_layer"
_THREAD = threading.local()  # `updated`: a weak reference to the layer of latents that was updated last


class Mode(Enum):
    """What a layer is: not known before the handshake, then one of the others."""

    NEW = "new"
    SERVED = "served"
    DENSE = "dense"


def tagged(states: Tensor, layer: AttentionLayer) -> Tensor:
    """The same keys or values, which lead back to the layer."""
    view = states.view_as(states)
    setattr(view, _TAG, layer)
    return view


def tagged_layer(key: Tensor, value: Tensor) -> AttentionLayer | None:
    """The layer that handed out both tensors, or None."""
    layer: AttentionLayer | None = getattr(key, _TAG, None)
    return layer if layer is not None and getattr(value, _TAG, None) is layer else None


def expects(layer: LatentLayer) -> None:
    """The next attention of the layer's module will bring what it has made of the layer's latents."""
    _THREAD.updated = weakref.ref(layer)


@torch.compiler.disable
def layer_of_latents(module: torch.nn.Module, key: Tensor, value: Tensor) -> LatentLayer | None:
    """The layer whose latents a module has just expanded to key `[b, hq, n, d]` and value `[b, hq, n, dv]`, or None.
    It has made sure of that, or runs dense.

    Raises:
        CacheStateError: they are others, and the layer gave the newest alone.
    """
    updated = getattr(_THREAD, "updated", None)
    layer: LatentLayer | None = None if updated is None else updated()
    if layer is None or layer.layer_idx != getattr(module, "layer_idx", None):
        return None
    _THREAD.updated = None
    return layer if layer.meet(module, key, value) else None


def warn_fallback(layer_idx: int, reason: str) -> None:
    """Warns that a layer stays a plain dynamic one."""
    warnings.warn(
        f"Layer {layer_idx} of this PagedCache runs dense: {reason}, or the model is not patched "
        "(sparsekv.patch(model) first).",
        stacklevel=4,
    )


def not_patched(layer: AttentionLayer) -> CacheStateError:
    """The error of a layer whose attention does not ask it any more."""
    home = "pages" if layer.in_pages else f"a {type(layer).__name__}"
    return CacheStateError(
        f"Layer {layer.layer_idx} of this cache lives in {home}, but its attention now runs without asking there: "
        "the model is not patched any more. Patch it again, or go on with cache.to_dynamic()."
    )


def attention_of(config: Any) -> tuple[type, str | None]:
    """The attention that a config names. A patched model's has the same text as its own, and another type."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return type(name), name
