"""Multimodal models: the language model decodes sparsely, the vision tower is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

import sparsekv

IMAGE_TOKEN = 99
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 16, "patch_size": 4, "projection_dim": 32}
TEXT = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "eos_token_id": None}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
        "image_token_index": IMAGE_TOKEN,
        "mm_tokens_per_image": 16,
    },
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**MODELS[name])
    return AutoModelForImageTextToText.from_config(config).eval()


def with_an_image(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompt with an image at its 10th token, which takes as many tokens as the tower makes of it."""
    num_tokens = {"llava": 17, "gemma3": 16}[name]
    ids = inputs["input_ids"].clamp_max(IMAGE_TOKEN - 1)
    ids[:, 10 : 10 + num_tokens] = IMAGE_TOKEN
    images = torch.randn(ids.shape[0], 3, 16, 16, generator=torch.Generator().manual_seed(2))
    extra = {"token_type_ids": (ids == IMAGE_TOKEN).long()} if name == "gemma3" else {}
    return {**inputs, "input_ids": ids, "pixel_values": images, **extra}


@pytest.mark.parametrize("has_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("name", MODELS)
def test_only_the_language_model_is_patched(name, has_image, prompt, decode, assert_same, distance, state_of) -> None:
    model, inputs = build(name), prompt(40)
    inputs = with_an_image(name, inputs) if has_image else inputs
    theirs, before = decode(model, inputs), state_of(model)

    with sparsekv.patch(model, budget=4096, page_size=4) as patch:
        kinds = state_of(model)["attention_types"]
        changed = [part for part, was in before["attention_types"].items() if kinds[part] != was]
        assert changed
        assert all("language_model" in part for part in changed)
        assert_same(decode(model, inputs), theirs)
    assert (patch.stats.dense_steps, patch.stats.dense_passes) == (7, 1)

    with sparsekv.patch(model, budget=16, page_size=4, sinks=2, recent=4, dense_layers=0) as patch:
        assert distance(decode(model, inputs), theirs) > 0.1
    assert patch.stats.sparse_steps == 7
    assert state_of(model) == before
