"""Which kind serves each layer of a model, known before its first token; the others stay transformers' own."""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

from transformers import PretrainedConfig, cache_utils
from transformers.cache_utils import DynamicCache, get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from sparsekv.cache.cache_layer import LAYER_KINDS, CacheLayer

EMPTY: Any = getattr(cache_utils, "DummyLayer", ())  # of layers that keep nothing, since transformers 5.21
_WITHOUT_ATTENTION = ("moe", "mlp")
# Families whose config does not tell what their attention is more than one over what the cache holds.
_TRANSFORMED = {
    "diffllama": "differential attention: it halves and repeats its values after the cache",
    "jetmoe": "it repeats its keys and values for its experts after the cache",
} | dict.fromkeys(("inkling_text", "inkling2_text", "inkling2_loop_text"), "its attention adds a bias by distance")


class Place(NamedTuple):
    """A layer of a model.

    Attributes:
        layer_type: transformers' word for it.
        config: the model's, or the layer's own where layers differ.
        plain: the layer that transformers' own cache has there.
        kind: the class that serves it, of those for such layers the one registered last; None: it stays `plain`.
        reason: why none of the kinds that are for such layers serves it; None: one does, or there are none.
        shares: the layer before it whose keys and values it reads, keeping none; None: it has its own.
    """

    layer_type: str
    config: Any
    plain: Any
    kind: type[CacheLayer] | None
    reason: str | None
    shares: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it keeps nothing: it has no attention, or reads what another keeps."""
        return isinstance(self.plain, EMPTY) or self.layer_type in _WITHOUT_ATTENTION

    @property
    def attends(self) -> bool:
        """Whether a kind answers its attention."""
        return self.kind is not None and self.kind.attends


def places(model_config: PretrainedConfig) -> list[Place]:
    """All layers of a model.

    Args:
        model_config: the model's; of a multimodal model its text part is used.
    """
    text: Any = model_config.get_text_config(decoder=True)
    plain = DynamicCache(config=model_config).layers
    types, _ = get_layer_types_and_kwargs(text)
    configs = list(getattr(text, "per_layer_config", None) or [text] * len(plain))
    found: list[Place] = []
    for i, place in enumerate(zip(types, configs, plain, strict=False)):
        found.append(_place(i, *place, text, found))
    return found


def plain_layers(model_config: PretrainedConfig) -> list[int]:
    """The indices of the layers that can be sparse: of plain full attention. `model_config` is as in `places`."""
    return [i for i, place in enumerate(places(model_config)) if place.kind is not None and place.kind.is_sparse]


def own_layers(model_config: PretrainedConfig) -> dict[int, str]:
    """The indices of layers that stay transformers' own although there are kinds for such layers, each with the
    reason. `model_config` is as in `places`."""
    return {i: place.reason for i, place in enumerate(places(model_config)) if place.reason is not None}


def why_not_paged(text: Any, layer_idx: int) -> str | None:
    """Why a layer of full attention cannot live in pages: what lies there is not what its attention gets, and there
    is nothing to choose by. None: it can.

    Args:
        text: the language model's config.
    """
    reason = _reason_for_all(text)
    is_crossing = layer_idx in (getattr(text, "cross_attention_layers", None) or ())
    return reason or ("cross-attention, to what is no token" if is_crossing else None)


def latent_dims(text: Any) -> tuple[int, int] | None:
    """Channels of the latent and of the rotary part that a layer of latent attention keeps in the cache; None: it
    keeps none, as there are none, or as they are expanded before.

    Args:
        text: the language model's config.
    """
    dims, config_class = (_setting(text, "kv_lora_rank"), _setting(text, "qk_rope_head_dim")), text.__class__
    return dims if all(dims) and _keeps_latents(config_class) else None


@functools.cache
def _keeps_latents(config_class: type) -> bool:
    """Whether transformers' model code for a config expands what comes out of a cache. A checkpoint's own code, which
    is nowhere listed, seldom does."""
    name = getattr(MODEL_MAPPING.get(config_class, None), "__module__", "")
    return any(hasattr(x, "expand_kv") for x in vars(sys.modules.get(name, object)).values() if isinstance(x, type))


def _place(layer_idx: int, layer_type: str, config: Any, plain: Any, text: Any, before: list[Place]) -> Place:
    reason = None
    if isinstance(plain, EMPTY):
        layer_type = text.layer_types[layer_idx]
        return Place(layer_type, config, plain, None, None, _shared_by(layer_idx, layer_type, text, before))
    for kind in LAYER_KINDS.classes():
        if layer_type in kind.layer_types:
            reason = kind.reason_against(layer_type, text, layer_idx)
            if reason is None:
                return Place(layer_type, config, plain, kind, None)
    return Place(layer_type, config, plain, None, reason)


def _shared_by(layer_idx: int, layer_type: str, text: Any, before: list[Place]) -> int | None:
    """The layer whose keys and values one reads that keeps none: the last of the same type that keeps its own."""
    modes = getattr(text, "kv_sharing_modes", None)
    if modes is None or modes[layer_idx] != "reuse":
        return None
    return max(i for i, place in enumerate(before) if place.layer_type == layer_type and not place.is_empty)


def _reason_for_all(text: Any) -> str | None:
    if _setting(text, "kv_lora_rank"):
        when = "after" if latent_dims(text) else "before"
        return f"latent attention: its keys and values are expanded {when} the cache"
    if text.model_type in _TRANSFORMED:
        return _TRANSFORMED[text.model_type]
    if _setting(text, "reorder_and_upcast_attn") and text._attn_implementation == "eager":
        return "reorder_and_upcast_attn: it attends without the attention interface"
    head_dim, value_dim = _setting(text, "head_dim"), _setting(text, "v_head_dim")
    if head_dim and value_dim and head_dim < value_dim:
        return f"its keys have {head_dim} channels and its values {value_dim}, which are more"
    return None


def _setting(text: Any, name: str) -> Any:
    """None where the config does not say, or the layers differ."""
    try:
        return getattr(text, name, None)
    except RuntimeError:  # transformers refuses what differs per layer
        return None
