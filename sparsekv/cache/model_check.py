"""Settings against the model that a cache is for: what can be known before the first token is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from sparsekv.cache.layer_kinds import latent_dims, plain_layers
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError
from sparsekv.pages import FORMATS, RESIDENCIES
from sparsekv.policies import POLICIES, Reads, check_declared


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model: query heads, kv heads, and channels of each; keys and values are two halves,
    and latents, which are both, one."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_halves: int = 2


def heads_of(model_config: Any) -> Heads | None:
    """The heads of a model with this config, as its cache has them, of its text part if it is multimodal; None where
    the config does not say, or the layers differ. Latents are one head for all."""
    text = model_config.get_text_config(decoder=True)
    latents = latent_dims(text)
    try:
        num_q_heads = int(text.num_attention_heads)
        if latents is not None:
            return Heads(num_q_heads, 1, sum(latents), num_halves=1)
        num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_q_heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // num_q_heads)
    except (AttributeError, RuntimeError, TypeError):  # transformers refuses what differs per layer; lists do, too
        return None
    return Heads(num_q_heads, num_kv_heads, head_dim)


def settings_for(config: SparseConfig, model_config: PretrainedConfig) -> SparseConfig:
    """The settings for a model, checked as a SparseConfig alone cannot be: a budget that is a function is asked.

    Args:
        model_config: the model's; of a multimodal model its text part is used.

    Raises:
        UnknownNameError: there is no such digest, policy, page format or residency.
        ConfigError: `dense_layers` names a layer that the model does not have, or `budget` one that cannot be sparse;
            there are no such pages or no such digests of heads of this size, or the policy declares what cannot be.
    """
    digest, policy, plain = DIGESTS.get(config.digest)(), POLICIES.get(config.policy), plain_layers(model_config)
    heads, pages = heads_of(model_config), FORMATS.get(config.page_format)()
    RESIDENCIES.get(config.residency)
    num_layers = len(DynamicCache(config=model_config).layers)
    _check_dense_layers(config, num_layers)
    config = config.for_layers(plain, num_layers)
    dense = config.dense_among(plain)
    deciding = [layer for layer in plain if layer not in dense]
    check_declared(config, policy, deciding)
    if heads is not None:
        pages.mean_record(config.page_size, heads.head_dim, torch.float16, heads.num_halves)
    if policy.reads is Reads.DIGESTS and deciding and heads is not None:
        digest.fields(config.page_size, heads.head_dim)
    return config


def check_digests(config: SparseConfig, dense: Collection[int], kept: Mapping[int, bool]) -> None:
    """Raises ConfigError if pages would be scored that have no digests.

    Args:
        dense: the layers that read everything.
        kept: of each layer that has pages, whether they have digests.
    """
    if POLICIES.get(config.policy).reads is not Reads.DIGESTS:
        return
    for layer_idx in (layer_idx for layer_idx, has_digests in kept.items() if not has_digests):
        if layer_idx not in dense:
            raise ConfigError(
                f"policy={config.policy!r} needs digests, and layer {layer_idx} kept none. Make the first cache "
                f"with policy={config.policy!r}, the fewest dense_layers and no budget of 1.0, then fork the others "
                "from it."
            )


def _check_dense_layers(config: SparseConfig, num_layers: int) -> None:
    named = config.dense_layers if isinstance(config.dense_layers, tuple) else ()
    missing = [layer for layer in named if layer >= num_layers]
    if missing:
        raise ConfigError(
            f"dense_layers={config.dense_layers} names {', '.join(map(str, missing))}, and the model has layers 0 to "
            f"{num_layers - 1}. Name some of these, or give a whole number for the first so many."
        )
