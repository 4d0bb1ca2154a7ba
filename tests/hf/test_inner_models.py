"""Models whose `generate` is that of a model within them: that one is patched."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    PreTrainedModel,
)

import sparsekv
from sparsekv.hf import support

SMALL = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": 1}
IDS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 256}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 16, "patch_size": 8}
# Classes that call another model's generate, and which of theirs that is. None: refused, or no language model.
INNER = {
    "Blip2ForConditionalGeneration": "language_model",
    "InstructBlipForConditionalGeneration": "language_model",
    "InstructBlipVideoForConditionalGeneration": "language_model",
    "Kosmos2ForConditionalGeneration": "text_model",
    "Qwen2_5OmniForConditionalGeneration": "thinker",
    "Qwen3OmniMoeForConditionalGeneration": "thinker",
    "BlipForConditionalGeneration": "text_decoder",
    "BlipForQuestionAnswering": "text_decoder",
    "BarkModel": None,
    "ClvpModelForConditionalGeneration": None,
    "RagTokenForGeneration": None,
    "RagSequenceForGeneration": None,
}


def blip2() -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
    text = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    qformer = {**TOWER, "vocab_size": 100, "encoder_hidden_size": 32}
    config = Blip2Config(
        vision_config={**TOWER},
        qformer_config={name: x for name, x in qformer.items() if name not in ("image_size", "patch_size")},
        text_config={**IDS, **text, "word_embed_proj_dim": 64, "init_std": 0.2},
        num_query_tokens=4,
        image_token_index=99,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    return model, model.language_model, {"leading": [99] * 4}


def kosmos2() -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
    text = {"embed_dim": 64, "layers": 4, "ffn_dim": 96, "attention_heads": 4, "init_std": 0.2}
    config = Kosmos2Config(text_config={**IDS, **text}, vision_config={**TOWER}, latent_query_num=4)
    model = Kosmos2ForConditionalGeneration(config).eval()
    mask = torch.zeros(1, 44, dtype=torch.long)
    mask[:, :4] = 1
    return model, model.text_model, {"leading": [5] * 4, "image_embeds_position_mask": mask}


def answer(model: PreTrainedModel, ids: Tensor, leading: list[int], **more: Any) -> Tensor:
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.tensor([leading]), ids.clamp_max(98)], dim=1)
    inputs = {"pixel_values": image, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.generate(**inputs, **more, max_new_tokens=8, min_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("build", [blip2, kosmos2])
def test_the_model_that_generates_is_patched(build, prompt, state_of) -> None:
    torch.manual_seed(0)
    model, inner, more = build()
    ids = prompt(40)["input_ids"]
    theirs, before = answer(model, ids, **more), state_of(model)
    with sparsekv.patch(model, **SMALL | {"budget": 4096}) as patch:
        assert torch.equal(answer(model, ids, **more), theirs)
        assert patch.model is inner
        assert patch.stats.dense_steps == 7
    patch = sparsekv.patch(model, **SMALL)
    with pytest.raises(sparsekv.PatchError, match=f"{type(inner).__name__} is patched already"):
        sparsekv.patch(inner)
    answer(model, ids, **more)
    assert patch.stats.sparse_steps == 7
    sparsekv.unpatch(model)
    assert state_of(model) == before


def test_every_model_of_transformers_that_hands_its_generate_on_is_known() -> None:
    """Found in the sources: a `generate` that calls that of one of its parts, and not super's."""
    found = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if "def generate(" not in source or ".generate(" not in source:
            continue
        for cls in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
            generate = next((x for x in cls.body if isinstance(x, ast.FunctionDef) and x.name == "generate"), None)
            calls = [] if generate is None else [x.func for x in ast.walk(generate) if isinstance(x, ast.Call)]
            of = [ast.unparse(f.value) for f in calls if isinstance(f, ast.Attribute) and f.attr == "generate"]
            if of and "super()" not in of:
                found[cls.name] = of[0].removeprefix("self.")
    new = {name: part for name, part in found.items() if name not in INNER or INNER[name] not in (None, part)}
    assert not new, (
        f"Models of transformers hand their generate on in ways that nobody has looked at: {new}. See that "
        "support.generating finds the part that decodes, or that the model is refused, and add it to INNER."
    )


def test_a_model_that_calls_its_own_generate_stays_what_is_patched(tiny) -> None:
    model = tiny("llama")
    assert support.generating(model) is model
