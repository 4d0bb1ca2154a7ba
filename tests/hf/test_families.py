"""Every family decodes as it does unpatched while the context fits the budget, sparsely beyond, or is refused."""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MllamaForCausalLM,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import sparsekv
from sparsekv import UnsupportedModelError
from sparsekv.cache import layer_kinds
from sparsekv.hf import support

SERVED = """
    llama qwen2 qwen3 qwen3_moe mixtral mistral gemma2 gemma3_text phi3 gpt_oss glm4 olmo2 smollm3 starcoder2 gpt2 opt
""".split()
PADDED = (40, 33, 19)
NEW_TOKENS = 8  # as many as `decode` generates


def full_attention_layers(model: Any) -> list[int]:
    """The layers that hold everything in an unpatched model's own cache."""
    layers = DynamicCache(config=model.config).layers
    return [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]


def pages_of_decoding(model: Any, lengths: tuple[int, ...], page_size: int) -> int:
    """Pages that dense decoding reads: no padding in them, one read per step, sequence, kv head and layer."""
    per_head = sum(math.ceil((n + step) / page_size) for n in lengths for step in range(1, NEW_TOKENS))
    full = per_head * model.config.num_key_value_heads * len(full_attention_layers(model))
    return full + pages_of_windows(model, lengths, page_size)


def pages_of_windows(model: Any, lengths: tuple[int, ...], page_size: int) -> int:
    """Those of layers with sliding windows: from where the window begins."""
    layers, window = DynamicCache(config=model.config).layers, getattr(model.config, "sliding_window", None)
    num_windows = sum(type(layer) is DynamicSlidingWindowLayer for layer in layers)
    steps = [n + step for n in lengths for step in range(1, NEW_TOKENS)] if num_windows else []
    passed = [max(n - window, 0) // page_size for n in steps]
    per_head = sum(math.ceil(n / page_size) - first for n, first in zip(steps, passed, strict=True))
    return per_head * model.config.num_key_value_heads * num_windows


@pytest.mark.parametrize("lengths", [(40,), PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("family", SERVED)
def test_a_budget_beyond_the_context_changes_nothing(
    family, page_size, lengths, tiny, prompt, decode, assert_same
) -> None:
    """Tokens and logits are the unpatched model's, and every decode step read exactly the pages there are."""
    model, inputs = tiny(family), prompt(*lengths)
    unpatched = decode(model, inputs)
    assert unpatched.sequences[:, -NEW_TOKENS:].unique().numel() >= 3, "a model that repeats itself proves little"

    with sparsekv.patch(model, budget=4096, page_size=page_size, dense_layers=1) as patch:
        patched = decode(model, inputs)

    assert_same(patched, unpatched)
    assert [x.layer_idx for x in patched.past_key_values.paged_layers if x.is_paged] == full_attention_layers(model)
    assert (patch.stats.dense_steps, patch.stats.sparse_steps) == (NEW_TOKENS - 1, 0)
    assert patch.stats.dense_passes == 1
    assert patch.stats.pages_read == patch.stats.pages_total == pages_of_decoding(model, lengths, page_size)


@pytest.mark.parametrize("family", SERVED)
def test_a_small_budget_reads_the_pages_quest_would(
    family, tiny, prompt, decode, distance, assert_same, naive_sparse
) -> None:
    """Every step of every full-attention layer chooses pages, and computes what masking all others computes."""
    settings = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4}
    model, naive, inputs = tiny(family), tiny(family), prompt(*PADDED)
    unpatched = decode(model, inputs)
    with sparsekv.patch(model, dense_layers=0, digest="minmax", **settings) as patch:
        patched = decode(model, inputs)

    naive_sparse(naive, **settings)
    assert_same(patched, decode(naive, inputs))
    assert distance(patched, unpatched) > 0.1
    assert torch.equal(patched.logits[0], unpatched.logits[0]), "prefill is the model's own"
    assert [status.layer_idx for status in patch.layers if status.is_sparse] == full_attention_layers(model)
    assert (patch.stats.sparse_steps, patch.stats.dense_steps) == (NEW_TOKENS - 1, 0)
    assert patch.stats.pages_total == pages_of_decoding(model, PADDED, page_size=4)
    steps = (NEW_TOKENS - 1) * len(full_attention_layers(model))
    chosen = 16 // 4 * steps * model.config.num_key_value_heads * len(PADDED)
    assert patch.stats.pages_read == chosen + pages_of_windows(model, PADDED, page_size=4)
    assert patch.stats.share < 1


TRANSFORMED = {"diffllama": "differential attention"}


@pytest.mark.parametrize("lengths", [(40,), PADDED], ids=["single", "padded"])
@pytest.mark.parametrize(("family", "reason"), TRANSFORMED.items(), ids=TRANSFORMED)
def test_layers_that_transform_their_keys_run_dense_and_say_so(
    family, reason, lengths, tiny, prompt, decode, assert_same
) -> None:
    """Differential attention changes values after the cache: known before the first token."""
    model, inputs = tiny(family), prompt(*lengths)
    unpatched = decode(model, inputs)
    with pytest.warns(UserWarning, match=f"decodes as densely as it does unpatched: {reason}") as warned:
        patch = sparsekv.patch(model, budget=16, page_size=4, sinks=2, recent=4, dense_layers=0)
    assert f"layers 0-3: dense ({reason}: " in str(patch)
    assert not any(status.is_sparse for status in patch.layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(decode(model, inputs), unpatched)
    assert len(warned) == 1
    assert patch.stats.sparse_steps == patch.stats.dense_steps == patch.stats.pages_total == 0


def test_layers_that_nobody_knew_to_transform_their_keys_are_noticed_at_their_first_use(
    tiny, prompt, decode, assert_same, monkeypatch
) -> None:
    monkeypatch.setattr(layer_kinds, "_reason_for_all", lambda text: None)
    model = tiny("diffllama")
    unpatched = decode(model, prompt(40))
    with sparsekv.patch(model, budget=16, page_size=4, sinks=2, recent=4, dense_layers=0) as patch:
        with pytest.warns(
            UserWarning, match="layer 0, if not others too, decodes densely: its keys or val"
        ) as warned:
            both = [decode(model, prompt(40)) for _ in range(2)]
        assert "layers 0-3: dense (its keys or values are transformed between the cache and the attention" in str(
            patch
        )
    assert len(warned) == 1
    for patched in both:
        assert_same(patched, unpatched)


@pytest.mark.parametrize("has_image", [False, True], ids=["text", "image"])
def test_cross_attention_layers_stay_as_they_are(has_image, prompt, decode, assert_same) -> None:
    """Mllama's: passed by without an image, and with one they hold nothing else."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"vocab_size": 100, "num_key_value_heads": 2, "initializer_range": 0.2, "eos_token_id": None}
    model = MllamaForCausalLM(MllamaTextConfig(**sizes, cross_attention_layers=[1, 3], pad_token_id=0)).eval()
    inputs = prompt(40, 33) | ({"cross_attention_states": torch.randn(2, 5, 64)} if has_image else {})
    unpatched = decode(model, inputs)
    with sparsekv.patch(model, budget=4096, dense_layers=0) as patch:
        assert_same(decode(model, inputs), unpatched)
        assert "layer 1: dense (cross-attention, to what is no token)" in str(patch)
    assert [status.is_sparse for status in patch.layers] == [True, False] * 2
    assert patch.stats.dense_steps == NEW_TOKENS - 1


REFUSED = {
    "t5": "it is an encoder-decoder",
    "bart": "it is an encoder-decoder",
    "doge": "its attention reads the values again",
    "bloom": "does not use transformers' attention interface",
    "falcon": "does not use transformers' attention interface",
    "mpt": "does not use transformers' attention interface",
    "git": "does not use transformers' attention interface",
    "mamba": "no plain full-attention layer",
    "bert": "cannot generate",
}
SMALL = {"vocab_size": 100, "num_hidden_layers": 2, "num_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
SMALL |= {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
SMALL |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "intermediate_size": 96, "rotary_dim": 16}


@pytest.mark.parametrize(("family", "reason"), REFUSED.items(), ids=REFUSED)
def test_refused_with_the_reason(family, reason, state_of) -> None:
    """A model that cannot be served rightly raises, names itself, the reason and the way out, and is as it was."""
    config = CONFIG_MAPPING[family](**SMALL)
    auto = AutoModel if family in ("t5", "bart", "bert") else AutoModelForCausalLM
    model = auto.from_config(config)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        sparsekv.patch(model)
    assert type(model).__name__ in str(error.value)
    assert "Run it unpatched" in str(error.value)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("family", "setting", "reason"),
    [
        ("llama", {"is_causal": False}, "its attention is not causal"),
        ("camembert", {"is_decoder": False}, "its attention is not causal"),
        ("llama", {"layer_types": ["linear_attention"] * 4}, "it has no plain full-attention layer"),
    ],
)
def test_a_served_family_may_have_a_config_that_is_refused(family, setting, reason, tiny, state_of) -> None:
    model = tiny(family, **setting)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        sparsekv.patch(model)
    assert state_of(model) == before


@pytest.mark.skipif("deepseek_v32" not in CONFIG_MAPPING, reason="transformers has no DeepSeek-V3.2 yet")
@pytest.mark.parametrize(("family", "cache"), [("deepseek_v32", "Indexed"), ("deepseek_v4", "DeepseekV4")])
def test_a_sparse_attention_of_ones_own_is_refused_as_such(family, cache, monkeypatch) -> None:
    """Of a config alone: DeepSeek-V4's layers look back over windows, too, which is not the reason."""
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")  # which brings the caches
    reason = support._reason_in_layers(CONFIG_MAPPING[family]())
    assert reason.startswith("it has a sparse attention of its own (its cache consists of ")
    assert cache in reason


def test_a_tower_without_the_attention_interface_is_no_obstacle(prompt, decode, assert_same) -> None:
    """GOT-OCR2's vision tower computes its attention itself, and its language model does not."""
    text = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "eos_token_id": None}
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 16}
    tower |= {"image_size": 32, "patch_size": 8, "mlp_dim": 48, "window_size": 2, "global_attn_indexes": [0]}
    config = CONFIG_MAPPING["got_ocr2"](text_config=text, vision_config=tower, image_token_index=99)
    torch.manual_seed(0)
    model, inputs = AutoModelForImageTextToText.from_config(config).eval(), prompt(40, 33)
    inputs["input_ids"].clamp_max_(98)
    unpatched = decode(model, inputs, pad_token_id=0)
    with sparsekv.patch(model, budget=4096, dense_layers=0) as patch:
        assert_same(decode(model, inputs, pad_token_id=0), unpatched)
    assert patch.stats.dense_steps == NEW_TOKENS - 1


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|eager", "of_a_user"])
def test_an_attention_implementation_that_is_not_served_is_refused(implementation, tiny, state_of) -> None:
    """Its masks are of another kind, or nobody knows what it computes. The message names what to set instead."""
    model = tiny("llama")
    model.config._attn_implementation_internal = implementation
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"'(\w|\|)+'; 'eager', 'sdpa' and flash attention are served"):
        sparsekv.patch(model)
    assert state_of(model) == before
    model.set_attn_implementation("sdpa")
    sparsekv.patch(model).undo()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2", "kernels-community/flash-attn2"])
def test_attention_implementations_that_are_served(implementation, tiny) -> None:
    model = tiny("llama")
    model.config._attn_implementation_internal = implementation
    sparsekv.patch(model).undo()
    assert model.config._attn_implementation == implementation


def test_a_model_without_a_head_is_refused(tiny) -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel cannot decode sparsely: it cannot generate"):
        sparsekv.patch(tiny("llama").model)


@pytest.mark.parametrize(
    "thing", [None, "meta-llama/Llama-3.1-8B", torch.nn.Linear(2, 2)], ids=lambda x: type(x).__name__
)
def test_what_is_no_model_is_refused(thing) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is not a transformers PreTrainedModel. Pass the model itself"):
        sparsekv.patch(thing)


def test_a_wrapped_model_is_refused_and_the_model_inside_is_not(tiny) -> None:
    """Wrappers delegate attributes, so a patch of one would half work: say what to patch instead."""
    model = tiny("llama")
    with pytest.raises(UnsupportedModelError, match="patch the model inside it"):
        sparsekv.patch(torch.compile(model, backend="eager"))
    sparsekv.patch(model).undo()
