"""Layers with states (linear attention, convolutions, state-space models), alone and beside keys and values: what
they give is what the unpatched model gives."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import sparsekv
from sparsekv.cache import BesideState, StateLayer
from sparsekv.errors import CacheStateError
from sparsekv.hf.support import CACHE

FULL: dict[str, Any] = {"budget": 4096, "page_size": 4, "dense_layers": 0}
# Gated delta rule, both state-space models, convolutions, and the three ways to have keys and values beside a state.
FAMILIES = ["qwen3_next", "bamba", "jamba", "nemotron_h", "lfm2_moe", "falcon_h1", "zamba", "zaya"]


@pytest.fixture
def turns(prompt, decode) -> Callable[..., list[Any]]:
    """Two turns of three padded rows. The first comes in chunks, of which some rows have nothing but padding; before
    the second, one row's answer has ended early."""

    def run(model: Any, cache: Any) -> list[Any]:
        inputs, more = prompt(31, 22, 1), prompt(9, 4, 6)
        first = decode(model, inputs, **{CACHE: cache}, prefill_chunk_size=15)
        answered = torch.ones(3, first.sequences.shape[1] - 31, dtype=torch.int64)
        answered[1, -2:] = 0
        ids = torch.cat([first.sequences, more["input_ids"].flip(1)], dim=1)
        mask = torch.cat([inputs["attention_mask"], answered, more["attention_mask"].flip(1)], dim=1)
        return [first, decode(model, {"input_ids": ids, "attention_mask": mask}, **{CACHE: cache})]

    return run


def states_of(cache: Any) -> list[Tensor]:
    return [state for part in cache._parts if isinstance(part, StateLayer) for state in part.states]


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_the_unpatched_model_s(family, hybrid, turns, assert_same) -> None:
    """And the states are those that transformers would hold."""
    model = hybrid(family)
    unpatched = turns(model, theirs := DynamicCache(config=model.config))
    with sparsekv.patch(model, **FULL) as patch:
        patched = turns(model, cache := patch.new_cache())
        assert any(status.is_sparse for status in patch.layers)
    for one, other in zip(patched, unpatched, strict=True):
        assert_same(one, other)
    exported = cache.to_dynamic()
    assert [type(layer) for layer in exported.layers] == [type(layer) for layer in theirs.layers]
    for one, other in zip(exported.layers, theirs.layers, strict=True):
        for i, state in getattr(other, "conv_states", {}).items():
            for ours, expected in (one.conv_states[i], state), (one.recurrent_states[i], other.recurrent_states[i]):
                torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family, hybrid, prompt, decode, assert_same) -> None:
    model = hybrid(family)
    unpatched = decode(model, prompt(33, 19), num_beams=3)
    with sparsekv.patch(model, **FULL):
        assert_same(decode(model, prompt(33, 19), num_beams=3), unpatched)


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    found: Tensor = model(ids, **{CACHE: cache}, use_cache=True).logits
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe", "falcon_h1"])
def test_forks_copies_exports_and_rows_go_on_by_themselves(family, hybrid) -> None:
    model, ids, more = hybrid(family), torch.randint(3, 100, (2, 30)), torch.randint(3, 100, (2, 6))
    logits(model, ids, theirs := DynamicCache(config=model.config))
    expected = torch.cat([logits(model, token, theirs) for token in more.split(1, 1)], 1)

    def go_on(cache: Any, rows: list[int]) -> None:
        ours = torch.cat([logits(model, token, cache) for token in more[rows].split(1, 1)], 1)
        torch.testing.assert_close(ours, expected[rows], rtol=0, atol=1e-4)

    with sparsekv.patch(model, **FULL) as patch:
        logits(model, ids, cache := patch.new_cache())
        exported, chosen, repeated = cache.to_dynamic(), cache.fork(), cache.fork()
        chosen.batch_select_indices([-1, 0, 1])
        repeated.batch_select_indices(torch.tensor([False, True]))
        repeated.batch_repeat_interleave(2)
        for each, rows in ((chosen, [1, 0, 1]), (repeated, [1, 1])):
            go_on(each, rows)
        for each in (cache.fork(), copy.deepcopy(cache), cache):
            go_on(each, [0, 1])
        cache.reset()
        assert not states_of(cache)
        logits(model, ids, cache)
        go_on(cache, [0, 1])
    go_on(exported, [0, 1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe", "falcon_h1"])
def test_a_state_cannot_go_back_and_says_so_before_anything_changes(family, hybrid) -> None:
    model, ids = hybrid(family), torch.randint(3, 100, (1, 21))
    with sparsekv.patch(model, **FULL) as patch:
        logits(model, ids, cache := patch.new_cache())
        fork, before = cache.fork(), [state.clone() for state in states_of(cache)]
        cache.crop(0)
        with pytest.raises(CacheStateError, match=r"Layer 0 of this cache keeps a state, .*\. Fork the cache before"):
            cache.crop(-1)
        assert cache.get_seq_length() == 21
        assert all(torch.equal(a, b) for a, b in zip(states_of(cache), before, strict=True))
        assert torch.equal(logits(model, ids[:, :1], cache), logits(model, ids[:, :1], fork))


@torch.no_grad()
def test_convolutions_drop_what_they_have_recorded_and_no_more(hybrid) -> None:
    """Their states are their last inputs; steps that record them move, and are not captured."""
    model, ids = hybrid("lfm2_moe"), torch.randint(3, 100, (1, 40))
    expected = logits(model, ids, None)
    with sparsekv.patch(model, **FULL) as patch:
        cache = patch.new_cache()
        cache.activate_past_recording()
        logits(model, ids[:, :20], cache)
        cache.crop(-9)
        torch.testing.assert_close(logits(model, ids[:, 11:20], cache), expected[:, 11:20], rtol=0, atol=1e-4)
        assert not cache.is_steady
        cache.crop(-9)
        with pytest.raises(CacheStateError, match="keeps a state"):
            cache.crop(-1)
        torch.testing.assert_close(logits(model, ids[:, 11:], cache), expected[:, 11:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_patched", [True, False], ids=["patched", "plain"])
@pytest.mark.parametrize("family", ["lfm2_moe", "qwen3_next"])
def test_drafts(family, is_patched, hybrid, tiny, prompt, decode, assert_same) -> None:
    """Convolutions drop what is rejected. Other states cannot, in no cache: such a draft decodes as unpatched."""
    draft = hybrid(family)
    model = hybrid(family) if family == "lfm2_moe" else tiny("llama")
    for parameter in draft.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    unpatched = decode(model, prompt(30), assistant_model=draft, max_new_tokens=20)
    made = sparsekv.patch(draft, **FULL) if is_patched else None
    with sparsekv.patch(model, **FULL), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(decode(model, prompt(30), assistant_model=draft, max_new_tokens=20), unpatched)
    is_told = made is not None and "states cannot drop a draft's tokens again" in made.notices.reasons
    assert is_told == (is_patched and family == "qwen3_next")


def test_a_model_with_states_takes_no_draft_as_without_a_patch(hybrid, prompt, decode) -> None:
    model = hybrid("qwen3_next")
    with sparsekv.patch(model, **FULL), pytest.raises(ValueError, match="not supported with stateful models"):
        decode(model, prompt(30), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("qwen3_next", {"a state, in place": False, "top_k over sign_sketch digests": True}),
        ("nemotron_h", {"a state, in place": False, "no attention": False, "top_k over sign_sketch digests": True}),
        ("falcon_h1", {"top_k over sign_sketch digests, beside a state": True}),
        ("inkling_text", {"its attention adds a bias by distance": False}),
    ],
)
def test_the_report_tells_of_states(family, told, hybrid) -> None:
    """And that a step with them is captured, if all of them are in place."""
    patch = sparsekv.patch(hybrid(family), **FULL)
    assert {status.reason: status.is_sparse for status in patch.layers} == told
    reason = patch.decoder.why_eager(torch.device("cuda", 0))
    assert reason == ("not in pages: layers 0, 1, 2, 3" if family == "inkling_text" else None)


def test_shared_keys_and_values_are_told_as_those_of_their_layer(tiny) -> None:
    """They turn dense with it, too."""
    patch = sparsekv.patch(tiny("gemma3n_text"), **FULL)
    reasons = [status.reason for status in patch.layers]
    if len(reasons) == 3:
        pytest.skip("this transformers has no layers for them")
    assert reasons[3:] == [f"{reasons[1]}, of layer 1", f"{reasons[2]}, of layer 2", f"{reasons[1]}, of layer 1"]
    assert [status.is_sparse for status in patch.layers] == [False, True] * 3
    with pytest.warns(UserWarning, match="a test"):
        patch.new_cache()._on_fallback(1, "a test")
    assert [status.is_in_place for status in patch.layers] == [True, False, True, False, True, False]


def test_windows_beside_states(hybrid, turns, assert_same) -> None:
    config = hybrid("zaya").config.to_dict() | {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["zaya"](**config)).eval()
    unpatched = turns(model, DynamicCache(config=model.config))
    with sparsekv.patch(model, **FULL) as patch:
        for one, other in zip(turns(model, cache := patch.new_cache()), unpatched, strict=True):
            assert_same(one, other)
    assert patch.layers[1].reason == "sliding window of 8, in pages, beside a state"
    assert cache.is_steady
    cache.activate_past_recording()
    assert [layer.record_past and layer.state.record_past for layer in cache.layers] == [True] * 4


def test_what_transformers_asks_a_layer_of_states_is_asked_beside_keys_and_values(hybrid) -> None:
    model = hybrid("falcon_h1")
    with sparsekv.patch(model, **FULL) as patch:
        logits(model, torch.randint(3, 100, (1, 9)), cache := patch.new_cache())
    layer = cache.layers[0]
    assert isinstance(layer, BesideState)
    assert cache.has_previous_state(0)
    assert layer.conv_states is layer.state.conv_states
    assert cache.is_linear == [False] * 4
    with pytest.raises(AttributeError, match="StateLayer"):
        _ = layer.nothing
