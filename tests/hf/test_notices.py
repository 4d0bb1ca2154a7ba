"""A patched model that decodes densely says so: once, with the way out, and in its report."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

import sparsekv
from sparsekv.hf.support import CACHE

SMALL = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": 1}
CASES = {  # what a call is given -> what it says, and the way out
    "dynamic": (r"a DynamicCache of your own", rf"Leave {CACHE} out, or pass patch.new_cache\(\)"),
    "static": (r"a StaticCache of your own", rf"Leave {CACHE} out, or pass patch.new_cache\(\)"),
    "no cache": (r"use_cache=False", r"Leave it out"),
    "training": (r"the model is in training mode", r"Call model.eval\(\)"),
    "attention": (r"the attention was set to 'eager'", r"patch the model again"),
}


def given(case: str, model) -> dict:
    if case == "dynamic":
        return {CACHE: DynamicCache(config=model.config)}
    if case == "static":
        return {CACHE: StaticCache(config=model.config, max_cache_len=64)}
    model.train(case == "training")
    if case == "attention":
        model.set_attn_implementation("eager")
    return {"use_cache": False} if case == "no cache" else {}


@pytest.mark.parametrize("case", CASES)
def test_a_dense_call_says_so_once(case, tiny, prompt, decode, assert_same) -> None:
    model, (said, way_out) = tiny("llama"), CASES[case]
    theirs = decode(model, prompt(40))
    with sparsekv.patch(model, **SMALL) as patch:
        with pytest.warns(UserWarning, match=f"{said}.*: this call decodes densely. .*{way_out}") as warned:
            both = [decode(model, prompt(40), **given(case, model)) for _ in range(2)]
        assert len([x for x in warned if x.category is UserWarning]) == 1
        assert [line for line in str(patch).splitlines() if line.startswith("  decoded densely: ")]
        assert ("sparse (" in str(patch)) == (case != "attention")
    for ours in both:
        assert_same(ours, theirs)
    assert patch.stats.sparse_steps == patch.stats.dense_steps == 0


def test_a_cache_that_arrives_after_generate_has_made_one(tiny, prompt, decode) -> None:
    """As with prefix tuning: what prepares the inputs puts its own cache in the place of generate's."""
    model = tiny("llama")
    prepare, caches = model.prepare_inputs_for_generation, [DynamicCache(config=model.config)]

    def with_a_prefix(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return inputs | {CACHE: caches.pop()} if caches else inputs

    with sparsekv.patch(model, **SMALL) as patch:
        model.prepare_inputs_for_generation = with_a_prefix
        with pytest.warns(UserWarning, match="a DynamicCache of your own") as warned:
            decode(model, prompt(40), max_new_tokens=4)
    assert len([x for x in warned if x.category is UserWarning]) == 1
    assert "decoded densely: a DynamicCache of your own" in str(patch)


def test_a_loop_of_ones_own_says_so_at_its_first_step(tiny, prompt) -> None:
    model, ids = tiny("llama"), prompt(40)["input_ids"]
    with sparsekv.patch(model, **SMALL), torch.no_grad():
        cache = DynamicCache(config=model.config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids[:, :-2], **{CACHE: cache})
        with pytest.warns(UserWarning, match="a DynamicCache of your own") as warned:
            _ = [model(token, **{CACHE: cache}) for token in ids[:, -2:].split(1, dim=1)]
    assert len([x for x in warned if x.category is UserWarning]) == 1


def test_continuous_batching_keeps_its_own_cache_and_says_so(tiny, prompt) -> None:
    model, ids = tiny("llama"), prompt(40)["input_ids"].tolist()
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default its masks and its cache fill most of the machine's memory.
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)

    def answers() -> list[list[int]]:
        outputs = model.generate_batch(ids, greedy, small, progress_bar=False)
        return [output.generated_tokens for output in outputs.values()]

    theirs = answers()
    with sparsekv.patch(model, **SMALL) as patch:
        with pytest.warns(UserWarning, match="generate_batch has a cache of its own: this call decodes densely"):
            ours = answers()
        assert ours == theirs
        assert model.generate(**prompt(40), max_new_tokens=4, pad_token_id=0).shape == (1, 44)
    assert patch.stats.sparse_steps == 3


def test_training_and_scoring_are_silent(tiny, prompt) -> None:
    model, inputs = tiny("llama"), prompt(40, 33)
    with sparsekv.patch(model, **SMALL) as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        for is_training in (True, False):
            model.train(is_training)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            model(**inputs, use_cache=False)
            model(inputs["input_ids"][:, :1], use_cache=False)
    assert "decoded densely" not in str(patch)


def test_the_cache_of_a_cross_attention_hides_no_pages(tiny, prompt) -> None:
    model, ids = tiny("gpt2", add_cross_attention=True), prompt(40)["input_ids"]
    states = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3))
    with sparsekv.patch(model, **SMALL) as patch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        cache = model(ids[:, :-1], encoder_hidden_states=states).past_key_values
        model(ids[:, -1:], encoder_hidden_states=states, **{CACHE: cache})
    assert patch.stats.sparse_steps == 1
