"""What a case is, and the models that it is about: held by each rank alone, or by all together."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
OF_GPUS = {"num_attention_heads": 8, "num_key_value_heads": 4}  # for up to four
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_STATES = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},
    "qwen3_next": {**_EXPERTS, **_STATES, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "deepseek_v2": {**_MLA, "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32},
}
SMALL: dict[str, Any] = {"budget": 16, "page_size": 4, "sinks": 4, "recent": 4, "dense_layers": 0, "fuse": False}
FOLDER = Path(sys.argv[1])
PLAN = {"distributed_config": DistributedConfig(tp_plan="auto")}

CASES: dict[str, Callable[[], Any]] = {}
MODELS: dict[str, Any] = {}


def case(run: Callable[[], Any]) -> Callable[[], Any]:
    CASES[run.__name__] = run
    return run


def whole(family: str) -> Any:
    """A model that each rank holds alone."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES | FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval().to(device())


def shared(family: str) -> Any:
    """The same model, which both hold together."""
    if family not in MODELS:
        model = whole(family)
        config = copy.deepcopy(model.config)
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        MODELS[family] = type(model).from_pretrained(None, config=config, state_dict=weights, **PLAN).eval()
    return MODELS[family]


def device() -> torch.device:
    """This rank's."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def is_second() -> bool:
    return dist.get_rank() == 1


def generated(model: Any, new: int = 6, **settings: Any) -> Any:
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1)).to(device())
    wanted = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **wanted | settings)


def tokens(model: Any, **settings: Any) -> list[list[int]]:
    found: list[list[int]] = generated(model, **settings).sequences[:, 40:].tolist()
    return found


def failure(model: Any, **settings: Any) -> str:
    try:
        return f"nothing: {tokens(model, **settings)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
