"""Every CausalLM type of transformers, very small: the report knows from the start which layers stay dense."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsekv
from sparsekv import UnsupportedModelError
from sparsekv.cache import layer_kinds, own_layers

# Small sizes under the names that configs have for them: a config gets those that it knows.
SIZES: dict[int, str] = {
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
    100: "vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions max_seq_len",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | {"pad_token_id": 0}
# What some need beside, or instead.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "attn_rotary_emb": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_expert_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "mimo_v2_flash": {"v_head_dim": 8, "swa_v_head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
}
# Too large with these settings, in need of others or of a library; multimodal ones have their text model in the list.
LEFT_OUT = set(
    """
    blt cohere_compass_text dbrx dots3_note dots3_note_text emu3 falcon_h1 fuyu gemma3 gemma3n gemma3n_text gemma4
    gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 gpt_neo inkling2_loop_text inkling2_text
    llama4 mamba2 mllama moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe
    qwen4_exp qwen4_exp_text reformer roc_bert xlstm xmod zamba zamba2
    """.split()
)
FEWER = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
    ("layer_types", "head_dim"),
)


@torch.no_grad()
def smallest(family: str) -> PreTrainedModel | None:
    """A model of four layers; None: its config does not like the sizes above."""
    for left_out in FEWER:
        try:
            defaults = vars(CONFIG_MAPPING[family]())
            known = set(defaults) | set(CONFIG_MAPPING[family].attribute_map)
            sizes = {name: size for name, size in SMALL.items() if name in known}
            if defaults.get("layer_types"):
                sizes["layer_types"] = (list(dict.fromkeys(defaults["layer_types"])) * 4)[:4]
            sizes |= MORE.get(family, {})
            config = CONFIG_MAPPING[family](**{k: v for k, v in sizes.items() if k not in left_out})
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            if model.num_parameters() < 10**7:
                model = AutoModelForCausalLM.from_config(config).eval()
                model(torch.tensor([[5, 6, 7]]))
                return model
        except Exception:  # whatever a config or a forward has against such sizes
            continue
    return None


@torch.no_grad()
def left_dense_at_first_use(model: PreTrainedModel) -> set[int]:
    """The layers that the patch says it serves, and that a prompt and a token show not to be served."""
    patch = sparsekv.patch(model, budget=4096, page_size=4, dense_layers=0)
    before = {status.layer_idx for status in patch.layers if status.kind is not None}
    cache = patch.new_cache()
    for ids in ([[5, 6, 7]], [[8]]):
        model(torch.tensor(ids), past_key_values=cache, use_cache=True)
    return before - {status.layer_idx for status in patch.layers if status.kind is not None}


@pytest.mark.wide
def test_the_layers_that_never_turn_sparse_are_those_that_the_report_knows(monkeypatch) -> None:
    """A layer that turns dense at its first use must be known before (`sparsekv.cache.layer_kinds`), and the others
    must not."""
    models = {family: smallest(family) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    too_large = {family for family, model in models.items() if model is None} - LEFT_OUT
    assert not too_large, f"give {too_large} sizes of their own in MORE, or leave them out and try them by hand"
    known = {family: set(own_layers(model.config)) for family, model in models.items() if model is not None}
    monkeypatch.setattr(layer_kinds, "_reason_for_all", lambda text: None)
    found = {}
    for family in known:
        with contextlib.suppress(UnsupportedModelError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[family] = left_dense_at_first_use(models[family])
    assert len(found) > 80
    assert {family: known[family] for family in found} == found
