"""Tiny random models of many families, prompts for them, and what it means that two runs are the same.

The weights are drawn wide (std 0.2) so that the models decode varied tokens and logits spread over several units: a
wrong page would show by orders of magnitude more than rounding does.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from tools.tiny_models import smallest

VOCAB = 100
ROUNDING = 1e-4  # float32 logits of the same arithmetic in another order differ by about 1e-5

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
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
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_MLA, "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "moe_intermediate_size": 32},
    "diffllama": {},
    "doge": {},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 2},
    "gemma3n_text": {**_GEMMA, "num_hidden_layers": 6, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 8}
    | {"layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": VOCAB}
    | {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": {**_GEMMA, "num_hidden_layers": 6, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 8}
    | {"layer_types": ["sliding_attention", "full_attention"] * 3, "vocab_size_per_layer_input": VOCAB}
    | {"global_head_dim": 16},
    "glm4": {},
    "gpt2": {"num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},
    "llama": {},
    "llama4_text": {"attention_chunk_size": 8, "no_rope_layers": [1, 0, 1, 0], "num_local_experts": 4}
    | {"intermediate_size_mlp": 96, "floor_scale": 16},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4},
    "olmo2": {},
    "opt": {"num_key_value_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "smollm3": {},
    "starcoder2": {},
}

Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="package")
def _small_and_quiet() -> Iterator[None]:
    """Models this small only lose by threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny("llama", num_hidden_layers=3)`: a model of that type with the same random weights at every call."""

    def build(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        implementation = {k: settings.pop(k) for k in ("attn_implementation",) if k in settings}
        config = CONFIG_MAPPING[family](**COMMON | FAMILIES.get(family, {}) | settings)
        return AutoModelForCausalLM.from_config(config, **implementation).eval()

    return build


@pytest.fixture
def hybrid() -> Callable[[str], PreTrainedModel]:
    """`hybrid("qwen3_next")`: a small model of a type with states, the same at every call."""
    return lambda family: copy.deepcopy(_smallest(family))


_smallest = functools.cache(smallest)


@pytest.fixture
def prompt() -> Callable[..., Inputs]:
    """`prompt(40, 33)`: a row of random tokens per length, padded on the left; the same at every call."""

    def make(*lengths: int) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
        ids = torch.randint(3, VOCAB, mask.shape, generator=generator)
        return {"input_ids": ids * mask, "attention_mask": mask.long()}

    return make


@pytest.fixture
def decode() -> Callable[..., Any]:
    """Greedy decoding of 8 tokens with raw logits: `decode(model, inputs).sequences` and `.logits`."""

    def run(model: PreTrainedModel, inputs: Inputs, **settings: Any) -> Any:
        torch.manual_seed(5)  # for those who ask for samples
        wanted = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
        return model.generate(**inputs, **wanted | settings)

    return run


@pytest.fixture
def distance() -> Callable[[Any, Any], float]:
    """The largest absolute difference of any logit between two decodings of as many steps."""

    def largest(ours: Any, theirs: Any) -> float:
        pairs = zip(ours.logits, theirs.logits, strict=True)
        return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)

    return largest


@pytest.fixture
def assert_same(distance: Callable[[Any, Any], float]) -> Callable[[Any, Any], None]:
    """Same tokens, and the same logits but for rounding."""

    def check(ours: Any, theirs: Any) -> None:
        assert torch.equal(ours.sequences, theirs.sequences)
        assert distance(ours, theirs) < ROUNDING

    return check


@pytest.fixture
def state_of() -> Callable[[PreTrainedModel], dict[str, Any]]:
    """What a patch might leave behind: attributes, hooks and configs of every module, comparable with ==."""

    def snapshot(model: PreTrainedModel) -> dict[str, Any]:
        modules = dict(model.named_modules())
        configs = {name: m.config for name, m in modules.items() if hasattr(m, "config")}
        return {
            "modules": {name: _comparable({**vars(m), "config": None}) for name, m in modules.items()},
            "configs": {name: copy.deepcopy(vars(config)) for name, config in configs.items()},
            "attention": {name: config._attn_implementation for name, config in configs.items()},
            "attention_types": {name: type(config._attn_implementation) for name, config in configs.items()},
        }

    return snapshot


def _comparable(value: Any) -> Any:
    """Containers are copied, as they change in place; tensors, modules and functions are compared by identity."""
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, set)):
        return copy.copy(value)
    return value if isinstance(value, (str, int, float, tuple, type(None))) else id(value)


@pytest.fixture
def naive_sparse() -> Iterator[Callable[..., None]]:
    """`naive_sparse(model, budget=16, ...)`: makes a model decode sparsely by a mask over all keys, page by page.

    It shares nothing with sparsekv, and knows `minmax` digests, `top_k` and whole-number budgets, one or a list with
    one for each layer.
    """
    name = "naive_sparse"

    def install(
        model: PreTrainedModel, budget: int | list[int], dense_layers: tuple[int, ...] = (), **settings: int
    ) -> None:
        original = model.config._attn_implementation

        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            is_sliding = kwargs.get("sliding_window") is not None
            if query.shape[2] == 1 and not is_sliding and module.layer_idx not in dense_layers:
                visible = _visible(mask, key)
                tokens = budget[module.layer_idx] if isinstance(budget, list) else budget
                rows = [_pages_as_mask(*row, tokens, **settings) for row in zip(query, key, visible, strict=True)]
                mask = torch.stack(rows)
                mask = mask if original == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, -1e9)
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            implementation = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
            return implementation(module, query, key, value, mask, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
        model.set_attn_implementation(name)

    yield install
    for mapping in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        mapping.pop(name, None)


def _visible(mask: Tensor | None, key: Tensor) -> Tensor:
    """Which columns the newest query may see, `[b, n]`."""
    if mask is None:
        return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
    row = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] > -1
    return row.expand(key.shape[0], -1)


def _pages_as_mask(
    query: Tensor, key: Tensor, visible: Tensor, budget: int, page_size: int, sinks: int, recent: int
) -> Tensor:
    """What one sequence reads, `[hq, 1, n]`: query `[hq, 1, d]`, key `[hkv, n, d]`, visible `[n]`."""
    if not visible.any():
        return torch.ones(query.shape[0], 1, key.shape[1], dtype=torch.bool)  # padding only: whatever it is
    pages = visible.nonzero().flatten().split(page_size)  # columns of each page, padding left out
    seen = torch.zeros(query.shape[0], 1, key.shape[1], dtype=torch.bool)
    for heads, keys in zip(torch.arange(query.shape[0]).chunk(key.shape[0]), key, strict=True):
        scores = [_bound(query[heads, 0], keys[page]) for page in pages]
        for i in range(len(pages)):
            if i * page_size < sinks or (i + 1) * page_size > int(visible.sum()) - recent:
                scores[i] = float("inf")
        best = sorted(range(len(pages)), key=lambda i: -scores[i])  # stable: of equals the earlier
        for page in best[: budget // page_size]:
            seen[heads[:, None], 0, pages[page]] = True
    return seen


def _bound(query: Tensor, keys: Tensor) -> float:
    """Quest's bound of a page, the best of the query heads: `[g, d]`, `[p, d]`."""
    return torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum(-1).max().item()
