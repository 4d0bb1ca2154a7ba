"""A very small random model of any type of transformers that generates text, multimodal ones included."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 100
_MAX_PARAMETERS = 5 * 10**7
# Small sizes under the names that configs have for them: a config gets those that it knows.
_SIZES: dict[int, str] = {
    1: "n_group topk_group first_k_dense_replace n_shared_experts mamba_n_groups n_groups zero_expert_num",
    2: "num_experts_per_tok moe_topk moe_k index_n_heads linear_num_key_heads encoder_layers swa_num_key_value_heads "
    "altup_num_inputs num_key_value_heads num_experts_per_token",
    4: "num_hidden_layers num_layers n_layer n_layers layers decoder_layers num_attention_heads n_head n_heads "
    "num_heads decoder_attention_heads encoder_attention_heads attention_heads n_routed_experts num_local_experts "
    "num_experts moe_num_experts num_routed_experts mamba_n_heads mamba_num_heads linear_num_value_heads "
    "swa_num_attention_heads",
    8: "qk_rope_head_dim qk_nope_head_dim sliding_window index_topk mamba_d_state ssm_state_size state_size "
    "laurel_rank hidden_size_per_layer_input",
    16: "head_dim q_lora_rank kv_lora_rank v_head_dim index_head_dim rotary_dim d_kv linear_key_head_dim kv_channels "
    "linear_value_head_dim global_head_dim query_pre_attn_scalar swa_head_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size mamba_d_head mamba_head_dim expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size",
    64: "hidden_size d_model n_embd word_embed_proj_dim embed_dim hidden_dim",
    96: "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "intermediate_size_mlp",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions max_seq_len",
}
_SMALL: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
_SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "is_decoder": True}
# Drawn wide, so that models decode varied tokens and a wrong page shows by far more than rounding does.
_SMALL |= {"initializer_range": 0.2, "init_std": 0.2}
# What some need beside, or instead.
_MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "attn_rotary_emb": 16},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "activation_sparsity_pattern": [0.0] * 6}
    | {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_expert_group": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "mamba2": {"head_dim": 32},
    "mistral": {"sliding_window": None},  # as its checkpoints since 0.2
    "mimo_v2_flash": {"v_head_dim": 8, "swa_v_head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_headdim": 32, "n_mamba_heads": 4}
    | {"attention_head_dim": 32, "num_key_value_heads": 4, "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1},
}
# Channels of a head that turn with time, height and width: 16 in all, or half of them.
for _names, _channels in (("qwen2_vl qwen2_5_vl qwen2_5_omni glm4v glm_ocr", [2, 3, 3]), ("glm4v_moe", [1, 1, 2])):
    _rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": _channels}
    _MORE |= {f"{name}_text": {"rope_parameters": _rope} for name in _names.split()}
_FEWER: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
    ("layer_types", "head_dim"),
    ("eos_token_id",),
)


@torch.no_grad()
def smallest(model_type: str) -> PreTrainedModel:
    """A model of four layers, with the same random weights at every call.

    Raises:
        ValueError: no config with such small sizes was found that the model takes; the message says why the last one
            was not taken.
    """
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    factory = AutoModelForCausalLM if is_causal else AutoModelForMultimodalLM
    why = ""
    for left_out in _FEWER:
        try:
            config = CONFIG_MAPPING[model_type](**_sizes(CONFIG_MAPPING[model_type], left_out))
            with torch.device("meta"):
                model = factory.from_config(config)
            if model.num_parameters() > _MAX_PARAMETERS:
                raise ValueError(f"{model.num_parameters() / 1e6:.0f} million parameters are left")
            torch.manual_seed(0)
            model = factory.from_config(config).eval()
            model(input_ids=torch.tensor([[5, 6, 7]]))
            return model
        except Exception as error:  # whatever a model has against such sizes
            why = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"no small {model_type} was found: {why}")


def _sizes(config_class: Any, left_out: Collection[str]) -> dict[str, Any]:
    """The small sizes that a config knows, and, under the names of the configs within it, those that these know."""
    default = config_class()
    known = {*vars(default), *config_class.attribute_map} - set(left_out)
    sizes = {name: size for name, size in _SMALL.items() if name in known}
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # what is compressed is so for all heads
    if getattr(default, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    if "layer_types" in known and getattr(default, "layer_types", None):
        sizes["layer_types"] = (list(dict.fromkeys(default.layer_types)) * 4)[:4]
    for name, inner in config_class.sub_configs.items():
        part = getattr(default, name, None)
        if part is not None:
            named = {"model_type": part.model_type} if inner is AutoConfig else {}
            sizes[name] = named | _sizes(type(part), left_out)
    return sizes | _MORE.get(config_class.model_type, {})
