"""A layer kind of its own in a patched model: one class, which the cache makes and the attention asks."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import sparsekv
from sparsekv.cache import LAYER_KINDS, WindowLayer
from sparsekv.errors import CacheStateError, UnsupportedModelError

FULL: dict[str, Any] = {"budget": 4096, "page_size": 4, "dense_layers": 0}
WINDOW = 8
MASK = torch.arange(40) >= torch.tensor([[0], [7], [36]])  # the last row is shorter than a window


def load(path: Path) -> type:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Window


Window = load(Path(__file__).with_name("window_layer.py"))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """In front of the kind that ships."""
    LAYER_KINDS.register("window")(Window)
    yield
    LAYER_KINDS.remove("window")


def tiny(family: str) -> Any:
    """Four layers: of a Gemma 3 every second one slides, of a Mistral all do."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": WINDOW, "initializer_range": 0.2}
    if family == "gemma3_text":
        heads |= {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = CONFIG_MAPPING[family](**sizes, **heads, pad_token_id=0, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config).eval()


def answer(model: Any, **settings: Any) -> Any:
    ids = torch.randint(3, 100, MASK.shape, generator=torch.Generator().manual_seed(1)) * MASK
    wanted = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=MASK.long(), **wanted | settings)


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 11}, {"num_beams": 2}], ids=str)
def test_it_decodes_as_the_unpatched_model_does(family: str, settings: dict[str, Any]) -> None:
    model = tiny(family)
    theirs = answer(model, **settings)
    with sparsekv.patch(model, **FULL):
        ours = answer(model, **settings)
    assert_same(ours, theirs)
    windows = [layer for layer in ours.past_key_values.layers if isinstance(layer, Window)]
    assert len(windows) == (2 if family == "gemma3_text" else 4)
    assert all(layer.is_served and layer.keys.shape[2] == WINDOW - 1 for layer in windows)


def test_the_report_names_the_kind() -> None:
    with sparsekv.patch(tiny("gemma3_text"), **FULL) as patch:
        assert "layer 0: dense (Window, for sliding_attention)" in str(patch)
        assert [status.kind for status in patch.layers] == ["Window", "PagedLayer"] * 2


def test_out_of_the_registry_the_layers_are_transformers_own() -> None:
    model = tiny("gemma3_text")
    LAYER_KINDS.remove("window")
    LAYER_KINDS.remove("sliding_window")
    with sparsekv.patch(model, **FULL) as patch:
        assert "layer 0: dense (sliding window of 8)" in str(patch)
        layers = answer(model).past_key_values.layers
    with pytest.raises(UnsupportedModelError, match="it has no plain full-attention layer"):
        sparsekv.patch(tiny("mistral"), **FULL)
    LAYER_KINDS.register("sliding_window")(WindowLayer)
    LAYER_KINDS.register("window")(Window)
    assert [type(layer).__name__ for layer in layers] == ["DynamicSlidingWindowLayer", "PagedLayer"] * 2


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True).logits


def test_its_cache_can_be_forked_copied_and_exported() -> None:
    """All go on alike, and none sees the others' tokens."""
    model, ids, more = tiny("gemma3_text"), torch.randint(3, 100, (2, 20)), torch.randint(3, 100, (2, 5))
    expected = logits(model, torch.cat([ids, more], dim=1), None)[:, -5:]

    def go_on(cache: Any) -> None:
        ours = torch.cat([logits(model, token, cache) for token in more.split(1, 1)], 1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        assert [layer.get_seq_length() for layer in cache.layers] == [25] * 4

    with sparsekv.patch(model, **FULL) as patch:
        logits(model, ids, cache := patch.new_cache())
        exported = cache.to_dynamic()
        for each in (cache.fork(), copy.deepcopy(cache), cache):
            go_on(each)
    go_on(exported)


def test_what_it_cannot_do_changes_nothing() -> None:
    """Tokens that have left a window are gone: the pages keep theirs, too."""
    model = tiny("gemma3_text")
    with sparsekv.patch(model, **FULL) as patch:
        cache = patch.new_cache()
        logits(model, torch.randint(3, 100, (1, 20)), cache)
        with pytest.raises(CacheStateError, match="Layer 0 of this cache is a Window, which cannot drop"):
            cache.crop(-2)
        assert [layer.get_seq_length() for layer in cache.layers] == [20] * 4
        cache.reset()
        assert [layer.get_seq_length() for layer in cache.layers] == [0] * 4


def test_a_layer_whose_attention_never_asks_becomes_a_plain_one() -> None:
    """As in a model that is not patched: it gets everything, then."""
    model, ids = tiny("gemma3_text"), torch.randint(3, 100, (1, 20))
    expected = logits(model, ids, None)
    cache = sparsekv.PagedCache(model.config, **FULL)
    with pytest.warns(UserWarning, match="Layer [0-3] of this PagedCache runs dense"):
        ours = torch.cat([logits(model, part, cache) for part in ids.split([12, 8], 1)], 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
