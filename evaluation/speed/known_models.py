"""Models whose `generate` is timed with random weights: real widths, and fewer layers or experts where a GPU of 80 GB
would not hold them. What a model of each has beside its attention layers (experts, states, latents) is as in the
source's published config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers

MAX_POSITIONS = 1 << 20


@dataclass(frozen=True)
class KnownModel:
    """A model in the sizes of a published one.

    Attributes:
        source: the published model's name on the hub, and what of it is left out.
        make: its config; single settings may be given by name.
    """

    source: str
    make: Callable[..., Any]


def _known(source: str, family: str, **settings: Any) -> KnownModel:
    """Positions go on for as long as anybody measures: that changes what is said, and not how long it takes."""
    return KnownModel(source, partial(_made, family, **{"max_position_embeddings": MAX_POSITIONS} | settings))


def _made(family: str, **settings: Any) -> Any:
    return getattr(transformers, family)(**settings)


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default"}


def _granite_layer_types(num_layers: int) -> list[str]:
    return ["full_attention" if i % 10 == 5 else "linear_attention" for i in range(num_layers)]


# The first is measured on a GPU, the last on a CPU, if no other is asked for.
MODELS = {
    "llama-3.1-8b": _known(
        "meta-llama/Llama-3.1-8B", "LlamaConfig",
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_parameters=_rope(5e5),
    ),
    "qwen3-32b": _known(
        "Qwen/Qwen3-32B", "Qwen3Config",
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, vocab_size=151936,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, rope_parameters=_rope(1e6),
    ),
    "qwen3-30b-a3b": _known(
        "Qwen/Qwen3-30B-A3B, 24 of its 48 layers", "Qwen3MoeConfig",
        hidden_size=2048, num_hidden_layers=24, vocab_size=151936,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, rope_parameters=_rope(1e6),
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "gemma-3-12b": _known(
        "google/gemma-3-12b-it, its language model, 24 of 48 layers", "Gemma3TextConfig",
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=24, vocab_size=262208,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, sliding_window=1024,
    ),
    "gpt-oss-20b": _known(
        "openai/gpt-oss-20b, its experts in the dtype of the rest", "GptOssConfig",
        hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, vocab_size=201088,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128,
        num_local_experts=32, num_experts_per_tok=4, max_position_embeddings=131072,  # its factor goes with them
    ),
    "qwen3-next": _known(
        "Qwen/Qwen3-Next-80B-A3B-Instruct, 12 of its 48 layers, 64 of its 512 experts", "Qwen3NextConfig",
        hidden_size=2048, num_hidden_layers=12, vocab_size=151936,
        num_attention_heads=16, num_key_value_heads=2, head_dim=256,
        rope_parameters=_rope(1e7) | {"partial_rotary_factor": 0.25},
        num_experts=64, num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    ),
    # transformers multiplies every token with every expert: of 16, a prompt of 32k tokens would take 45 GB.
    "llama-4-scout": _known(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct, its language model, 16 of 48 layers, 4 of 16 experts",
        "Llama4TextConfig",
        hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384, num_hidden_layers=16,
        vocab_size=202048, num_attention_heads=40, num_key_value_heads=8, head_dim=128, rope_parameters=_rope(5e5),
        attention_chunk_size=8192, num_local_experts=4, num_experts_per_tok=1,
    ),
    "granite-4-h-tiny": _known(
        "ibm-granite/granite-4.0-h-tiny", "GraniteMoeHybridConfig",
        hidden_size=1536, intermediate_size=512, shared_intermediate_size=1024, num_hidden_layers=40,
        vocab_size=100352, num_attention_heads=12, num_key_value_heads=4, layer_types=_granite_layer_types(40),
        num_local_experts=64, num_experts_per_tok=6, tie_word_embeddings=True, position_embedding_type="nope",
        mamba_n_heads=48, mamba_d_head=64, mamba_d_state=128, mamba_expand=2, mamba_n_groups=1,
        embedding_multiplier=12, attention_multiplier=1 / 128, logits_scaling=6, residual_multiplier=0.22,
    ),
    # Whole: 31 GB of weights, and 4 GB of latents at 128k tokens (36 GB where they are cached as keys and values).
    "deepseek-v2-lite": _known(
        "deepseek-ai/DeepSeek-V2-Lite", "DeepseekV2Config",
        hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, vocab_size=102400,
        num_attention_heads=16, num_key_value_heads=16, rope_parameters=_rope(1e4),
        kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
        first_k_dense_replace=1,
    ),
    "tiny": _known(
        "nobody's: to try a command on a CPU", "LlamaConfig",
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, vocab_size=512,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, rope_parameters=_rope(5e5),
    ),
}  # fmt: skip
