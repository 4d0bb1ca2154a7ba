"""Which models are served sparsely, which of their layers stay dense, and which models are refused, and why."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from sparsekv.cache import BesideState, heads_of, places, plain_layers, settings_for
from sparsekv.cache.layer_kinds import Place
from sparsekv.config import SparseConfig
from sparsekv.errors import UnsupportedModelError
from sparsekv.hf import attention
from sparsekv.layer_budgets import told
from sparsekv.ops import why_reference
from sparsekv.policies import POLICIES, Reads

# What transformers calls a cache among a model's arguments and in its output: from 5.24 on "cache", before, and for a
# while still understood, the other.
CACHE_NAMES = ("cache", "past_key_values")
_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next(name for name in CACHE_NAMES if name in _PARAMETERS)

# Families that came out wrong although everything the checks below look at is in order.
_REFUSED_FAMILIES = {
    "doge": "its attention reads the values again after the cache has been updated, beside the attention function",
    "moshi": "its layers slide, and the masks that it makes for them do not",
    "recurrent_gemma": "it keeps its states in its modules, not in its cache",
}
_WAY_OUT = "Run it unpatched, or use another model; `sparsekv models` lists what is served."


@dataclass
class LayerStatus:
    """What a layer of a patched model does when it decodes. It may turn dense at its first use (the handshake).
    `kind` names the class that answers its attention; None: there is none.

    Attributes:
        is_in_place: whether a step that it takes part in can be captured.
        is_asked_for: whether it is dense by `dense_layers`, or a budget of 1.0.
        shares: the layer whose keys and values it reads, if it keeps none.
    """

    layer_idx: int
    is_sparse: bool
    reason: str
    is_in_place: bool = True
    is_asked_for: bool = False
    kind: str | None = None
    shares: int | None = None


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module whose forward takes `past_key_values`: usually `model.get_decoder()`."""
    decoder: Any = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else cast(PreTrainedModel, model.base_model)


def generating(model: Any) -> Any:
    """The model whose `generate` runs when this one's is called: a part of it, if it hands its inputs on to one
    (BLIP-2, Kosmos-2, Qwen-Omni)."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return model
    used = names_in(type(model).generate)
    named = [part for name, part in model.named_children() if {name, "generate"} <= used and "super" not in used]
    return next((part for part in named if isinstance(part, PreTrainedModel) and part.can_generate()), model)


def names_in(function: Any) -> set[str]:
    """Attributes and globals that the code of a function, decorated or not, names."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else set(code.co_names)


def text_config(model: PreTrainedModel) -> Any:
    """The config of the language model, also within a multimodal one."""
    return model.config.get_text_config(decoder=True)


def has_sinks_or_softcaps(model: PreTrainedModel) -> bool:
    """Whether any attention of the language model has sink logits or a softcap, by their names in all families.
    transformers computes such with "eager" alone, unless an attention of another package is installed."""
    names = ("sinks", "attn_logit_softcapping")
    return any(getattr(x, name, None) is not None for x in decoder_of(model).modules() for name in names)


def context_of(config: Any) -> int | None:
    """Tokens that a model with this config was made for, if it says."""
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def examine(model: Any, config: SparseConfig) -> tuple[SparseConfig, list[LayerStatus]]:
    """The settings for a model, and what each of its layers will do.

    Raises:
        UnsupportedModelError: nothing could be served sparsely, or not rightly; the message says why.
        ConfigError, UnknownNameError: as `settings_for`.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers PreTrainedModel. Pass the model itself; of a wrapper "
            "(PEFT, DataParallel, torch.compile) patch the model inside it."
        )
    reason = reason_to_refuse(model)
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot decode sparsely: {reason}. {_WAY_OUT}")
    config = settings_for(config, model.config)
    dense = config.dense_among(plain_layers(model.config))
    found: list[LayerStatus] = []
    for i, place in enumerate(places(model.config)):
        if place.shares is None:
            found.append(_status(i, place, config, i in dense))
        else:
            shared, reason = found[place.shares], f"{found[place.shares].reason}, of layer {place.shares}"
            found.append(replace(shared, layer_idx=i, reason=reason, kind=None, shares=place.shares))
        if place.kind is not None and issubclass(place.kind, BesideState):
            found[i].reason += ", beside a state"
    return config, found


def reason_to_refuse(model: PreTrainedModel) -> str | None:
    """Why a model cannot be served, as half a sentence; None: it can."""
    config = text_config(model)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder, whose decoder also reads a cross-attention cache"
    if config.model_type in _REFUSED_FAMILIES:
        return _REFUSED_FAMILIES[config.model_type]
    if not model.can_generate():
        return "it cannot generate, as it has no language-model head (AutoModelForCausalLM loads one)"
    if not getattr(config, "is_causal", True):
        return "its attention is not causal, so it has nothing to decode"
    if not cast(Any, type(model))._supports_default_dynamic_cache():
        return "it does not use transformers' key/value cache"
    implementation = attention.original_implementation(config)
    if not attention.is_served(implementation):
        return (
            f"its attention implementation is {implementation!r}; 'eager', 'sdpa' and flash attention are served, so "
            "after model.set_attn_implementation('sdpa') it can"
        )
    return _reason_in_layers(config) or _reason_in_attention(decoder_of(model))


def _reason_in_attention(decoder: PreTrainedModel) -> str | None:
    """Why a decoder's attention cannot be exchanged. It can where code that updates a cache asks which attention it
    is. A tower beside it, or within, stays as it is."""
    wanted = {"ALL_ATTENTION_FUNCTIONS", "update"}
    asking = [module for module in decoder.modules() if wanted <= names_in(type(module).forward)]
    if not asking:
        return "its code does not use transformers' attention interface, so its attention cannot be exchanged"
    text: Any = decoder.config.get_text_config(decoder=True)
    if not getattr(text, "is_decoder", True) and not any(getattr(module, "is_causal", True) for module in asking):
        return "its attention is not causal, as is_decoder=False, so it has nothing to decode"
    return None


def _reason_in_layers(config: Any) -> str | None:
    try:
        served = places(config)
    except AttributeError as error:
        return f"transformers can make no cache from its config ({error})"
    if any(place.kind is not None and place.kind.is_sparse for place in served):
        return None
    layers = [place.plain for place in served]
    kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "nothing"
    if any(_is_sparse_of_its_own(layer) for layer in layers):
        return f"it has a sparse attention of its own (its cache consists of {kinds})"
    if any(place.attends or place.reason is not None for place in served):
        return None
    return f"it has no plain full-attention layer (its cache consists of {kinds})"


def _is_sparse_of_its_own(layer: Any) -> bool:
    """Whether a cache also holds what its model chooses tokens by, or a summary of them."""
    names = f"{type(layer).__name__} {getattr(layer, '_layer_type', '')}".lower()
    return any(word in names for word in ("index", "sparse", "compress"))


def _status(layer_idx: int, place: Place, config: SparseConfig, is_dense: bool) -> LayerStatus:
    size, is_chunked = getattr(place.plain, "sliding_window", None), place.layer_type == "chunked_attention"
    window = f"chunks of {size}" if is_chunked else f"sliding window of {size}"
    if place.is_empty:
        return LayerStatus(layer_idx, False, "no attention")
    if place.kind is None:
        reason = window if size else f"transformers' {type(place.plain).__name__}"
        return LayerStatus(layer_idx, False, place.reason or reason, is_in_place=False)
    kind, is_in_place = place.kind.__name__, place.kind.is_in_place
    if not place.kind.attends:
        return LayerStatus(layer_idx, False, "a state, in place", is_in_place)
    if not place.kind.in_pages:
        return LayerStatus(layer_idx, False, f"{kind}, for {place.layer_type}", is_in_place, kind=kind)
    if not place.kind.is_sparse:
        return LayerStatus(layer_idx, False, f"{window}, in pages", kind=kind)
    if is_dense:
        asked = "budget=1.0" if config.at(layer_idx).reads_all else f"dense_layers={config.dense_layers}"
        return LayerStatus(layer_idx, False, f"{asked}, in pages", is_asked_for=True, kind=kind)
    policy = POLICIES.get(config.policy)
    if policy.reads_all:
        return LayerStatus(layer_idx, False, f"policy {config.policy!r}, in pages", kind=kind)
    by_digests = f" over {config.digest} digests" if policy.reads is Reads.DIGESTS else ""
    anew = f", anew every {policy.period} steps" if policy.period > 1 else ""
    budget = f", {told(config.at(layer_idx).budget)}" if isinstance(config.budget, tuple) else ""
    return LayerStatus(layer_idx, True, f"{config.policy}{by_digests}{anew}{budget}", kind=kind)


def kernel_status(model: PreTrainedModel, config: SparseConfig) -> str:
    """Whether the decode steps run in kernels on the device the model is on now, and if not, why."""
    if config.backend == "reference":
        return "plain torch (backend='reference')"
    heads = heads_of(model.config)
    geometry = None if heads is None else (heads.head_dim, heads.num_q_heads // heads.num_kv_heads)
    reason = why_reference(model.device, model.dtype, geometry, config.page_size, config.digest, config.page_format)
    if reason is not None:
        return f"plain torch ({reason})"
    return "CUDA kernels" if geometry else "CUDA kernels, in layers whose head size they serve"
