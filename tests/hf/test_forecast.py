"""`supports` says of a config, without weights, what a patch of the model then says."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
from transformers import BloomConfig, DbrxConfig, T5Config

import sparsekv
from sparsekv import ConfigError, UnsupportedModelError


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4_text", "deepseek_v3"])
@pytest.mark.parametrize("settings", [{}, {"policy": "all"}, {"dense_layers": 4}], ids=str)
def test_it_says_what_the_patch_says(tiny, family, settings) -> None:
    model = tiny(family)
    before = copy.deepcopy(model.config)
    told = sparsekv.supports(model.config, **settings)
    assert told == sparsekv.supports(model, **settings)
    assert vars(model.config) == vars(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of it may be dense
        patch = sparsekv.patch(model, **settings)
    counts = Counter()
    for layers in told.layers:
        counts[layers.decodes == "sparse", layers.reason] += layers.count
    assert counts == Counter((status.is_sparse, status.reason) for status in patch.layers)
    assert all(f"({layers.reason})" in repr(patch) for layers in told.layers)


@pytest.mark.parametrize(
    ("family", "settings", "verdict"),
    [
        ("llama", {}, "sparse"),
        ("llama", {"dense_layers": 4}, "sparse"),
        ("llama", {"policy": "all", "dense_layers": 0}, "dense"),
        ("gemma2", {}, "some"),
        ("deepseek_v3", {}, "sparse"),
        ("diffllama", {}, "dense"),
        ("doge", {}, "refused"),
    ],
)
def test_the_verdict_counts_layers_that_could_be_sparse(tiny, family, settings, verdict) -> None:
    told = sparsekv.supports(tiny(family).config, **settings)
    assert told.verdict == told.as_dict()["verdict"] == verdict


def test_whether_a_step_is_captured_on_a_gpu_is_known_without_one(tiny) -> None:
    config = tiny("llama").config
    assert str(sparsekv.supports(config)).endswith("decode loop of generate on a GPU: CUDA graphs")
    assert sparsekv.supports(config, capture=False).why_eager == "capture=False"


def test_a_refused_model_is_told_with_its_layers_and_the_reason() -> None:
    told = str(sparsekv.supports(BloomConfig(n_layer=3)))
    assert told.startswith("BloomForCausalLM (bloom): refused: its code does not use")
    assert told.endswith("  3 full_attention: refused")


def test_what_nothing_can_be_said_of_is_an_error(tiny) -> None:
    with pytest.raises(UnsupportedModelError, match="is not a transformers PreTrainedModel"):
        sparsekv.supports("llama")
    with pytest.raises(UnsupportedModelError, match="No model that generates can be built from a DbrxConfig"):
        sparsekv.supports(DbrxConfig())
    with pytest.raises(UnsupportedModelError, match="T5Config"):
        sparsekv.supports(T5Config())
    with pytest.raises(ConfigError, match="model has layers 0 to 3"):
        sparsekv.supports(tiny("llama").config, dense_layers=(7,))
