"""How a layer and its attention function find each other: transformers does not hand the cache to the latter.

`update` hands out views of the keys and values that carry a tag, an attribute that leads back to the layer. A layer
is served when the tags of its first update arrive at the attention function (the handshake). A model that
transforms keys on the way loses them, and the layer stays a plain dynamic one.
"""

from __future__ import annotations

import warnings
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsekv.errors import CacheStateError

if TYPE_CHECKING:
    from sparsekv.cache.attention_layer import AttentionLayer

_TAG = "_sparsekv_layer"


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
