"""What a model asks of a GPU's memory, told from its shapes: of its layers, their states, and a pass through them."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from sparsekv.cache import BesideState, StateLayer, heads_of, places, plain_layers
from sparsekv.cache.layer_kinds import Place, latent_dims
from sparsekv.cache.model_check import Heads
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.hf import forecast, support
from sparsekv.pages.formats import FORMATS
from sparsekv.policies import POLICIES, Reads


class LayerNeeds(NamedTuple):
    """Bytes of a page of one layer, all its kv heads counted, of the page's digest, and of what digests keep once for
    all pages; the window, if it has one."""

    page: int
    digest: int
    fitted: int
    window: int | None


class Needs(NamedTuple):
    """What memory a model asks for, in bytes.

    Attributes:
        weights: of the model.
        layers: those in pages.
        states: of a sequence, in all layers.
        not_counted: how many layers are neither.
        in_pass: of a token that goes through the model.
        expanded: of a token of a context whose latents are expanded in every pass but a decode step.
        read: of a token of one sequence that a chunk of a prompt is read against.
        logits: of a sequence.
    """

    weights: int
    layers: list[LayerNeeds]
    states: int
    not_counted: int
    in_pass: int
    expanded: int
    read: int
    logits: int


def needs_of(model: PreTrainedModel, config: SparseConfig, dtype: torch.dtype) -> Needs:
    """What a model asks for under settings that fit it, of which shapes alone are asked.

    Args:
        dtype: of weights, keys and values.
    """
    dense, layers, not_counted, with_states = config.dense_among(plain_layers(model.config)), [], 0, 0
    for i, place in enumerate(places(model.config)):
        heads = heads_of(place.config) or heads_of(model.config)
        with_states += place.kind is not None and issubclass(place.kind, StateLayer | BesideState)
        if place.kind is not None and place.kind.in_pages and heads is not None:
            layers.append(_layer(place, heads, config, i in dense, dtype))
        elif not place.is_empty and (place.kind is None or not issubclass(place.kind, StateLayer)):
            not_counted += 1
    states = _states(model, dtype) if with_states else 0
    not_counted += with_states if states is None else 0
    tensors = (*model.parameters(), *model.buffers())
    weights = sum(x.numel() * (dtype.itemsize if x.is_floating_point() else x.itemsize) for x in tensors)
    return Needs(weights, layers, states or 0, not_counted, *_beside(model, dtype))


def _layer(place: Place, heads: Heads, config: SparseConfig, is_dense: bool, dtype: torch.dtype) -> LayerNeeds:
    kind, shape = FORMATS.get(config.page_format)(), (config.page_size, heads.head_dim)
    record, stored = kind.mean_record(*shape, dtype, heads.num_halves)
    page = heads.num_kv_heads * heads.num_halves * config.page_size * record * stored.itemsize
    if place.kind is None or not place.kind.is_sparse:
        return LayerNeeds(page, 0, 0, getattr(place.plain, "sliding_window", None))
    if is_dense or POLICIES.get(config.policy).reads is not Reads.DIGESTS:
        return LayerNeeds(page, 0, 0, None)
    digest = DIGESTS.get(config.digest)()
    fields = [math.prod(field.shape) * (field.dtype or dtype).itemsize for field in digest.fields(*shape)]
    one_token = torch.zeros(1, heads.num_kv_heads, 1, heads.head_dim, dtype=dtype, device="cpu")
    return LayerNeeds(
        page, heads.num_kv_heads * sum(fields), sum(x.nbytes for x in digest.fit(one_token, None)), None
    )


def _states(model: PreTrainedModel, dtype: torch.dtype) -> int | None:
    """Bytes of a sequence's states, as the model's code makes them of tokens that are not there; None: it cannot."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    try:
        shapes: Any = support.generating(forecast.without_weights(config)).to(torch.bfloat16)
        with torch.device("meta"), torch.no_grad():
            cache = DynamicCache(config=config)
            shapes(torch.ones(1, 4, dtype=torch.int64, device="meta"), past_key_values=cache)
    except Exception:  # whatever it is that needs numbers
        return None
    kept = [getattr(layer, name, {}) for layer in cache.layers for name in ("conv_states", "recurrent_states")]
    states = [state for each in kept for state in each.values() if state is not None]
    return sum(x.numel() * (dtype.itemsize if x.dtype is torch.bfloat16 else x.itemsize) for x in states)


def _beside(model: PreTrainedModel, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """`in_pass`, `expanded`, `read` and `logits`."""
    text, heads = support.text_config(model), heads_of(model.config)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    widest = max(inner) if isinstance(inner, list | tuple) else inner
    in_pass = (6 * text.hidden_size + 3 * widest) * dtype.itemsize
    expanded = read = 0
    if latent_dims(text) is not None:
        channels = text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim
        expanded = text.num_attention_heads * channels * dtype.itemsize
    elif heads is not None:
        read = 2 * heads.num_kv_heads * heads.head_dim * dtype.itemsize
    return in_pass, expanded, read, 2 * text.vocab_size * 4
