"""Which layers of a model can live in pages, and which stay transformers' own although their cache is a plain one:
what lies there is not what their attention gets, and there is nothing to choose by."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

# Families whose config does not tell, and what becomes of their keys and values after the cache.
_TRANSFORMED = {
    "diffllama": "differential attention: it halves and repeats its values after the cache",
    "jetmoe": "it repeats its keys and values for its experts after the cache",
}


def plain_layers(model_config: PretrainedConfig) -> list[int]:
    """The indices of the layers of plain full attention, which can live in pages.

    Args:
        model_config: the model's; of a multimodal model its text part is used.
    """
    own = own_layers(model_config)
    return [i for i in _dynamic_layers(model_config) if i not in own]


def own_layers(model_config: PretrainedConfig) -> dict[int, str]:
    """The indices of layers that stay transformers' own although their cache is a plain one, each with the reason.

    Args:
        model_config: the model's; of a multimodal model its text part is used.
    """
    text: Any = model_config.get_text_config(decoder=True)
    reason, layers = _reason_for_all(text), _dynamic_layers(model_config)
    if reason is not None:
        return dict.fromkeys(layers, reason)
    crossing = getattr(text, "cross_attention_layers", None) or ()
    return {i: "cross-attention, to what is no token" for i in layers if i in crossing}


def _dynamic_layers(model_config: PretrainedConfig) -> list[int]:
    return [i for i, layer in enumerate(DynamicCache(config=model_config).layers) if type(layer) is DynamicLayer]


def _reason_for_all(text: Any) -> str | None:
    if _setting(text, "kv_lora_rank"):
        return "latent attention: what it stores becomes keys and values after the cache"
    if text.model_type in _TRANSFORMED:
        return _TRANSFORMED[text.model_type]
    if _setting(text, "reorder_and_upcast_attn") and text._attn_implementation == "eager":
        return "reorder_and_upcast_attn: it attends without the attention interface"
    head_dim, value_dim = _setting(text, "head_dim"), _setting(text, "v_head_dim")
    if head_dim and value_dim and head_dim != value_dim:
        return f"its keys have {head_dim} channels and its values {value_dim}"
    return None


def _setting(text: Any, name: str) -> Any:
    """None where the config does not say, or the layers differ."""
    try:
        return getattr(text, name, None)
    except RuntimeError:  # transformers refuses what differs per layer
        return None
