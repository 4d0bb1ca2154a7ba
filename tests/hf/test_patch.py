"""A patch changes one model, in full and no other; it is undone in full, and says what is wrong before it begins."""

from __future__ import annotations

import copy
import io
import json
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsekv
from sparsekv import ConfigError, PatchError, SparseConfig, UnknownNameError
from sparsekv.hf import generation, support
from sparsekv.ops import compiler

SMALL = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": 1}
STEPS = 7  # single-token steps of `decode`, which generates 8 tokens


# -- in force, and undone


def test_only_the_patched_model_is_affected(tiny, prompt, decode, assert_same, state_of) -> None:
    first, second = tiny("llama"), tiny("llama")
    theirs, before = decode(second, prompt(40)), state_of(second)
    with sparsekv.patch(first, **SMALL) as patch:
        assert state_of(second) == before
        assert_same(decode(second, prompt(40)), theirs)
        assert patch.stats.sparse_steps == 0
        decode(first, prompt(40))
        assert patch.stats.sparse_steps == STEPS


def test_two_models_have_two_patches(tiny, prompt, decode, assert_same, distance) -> None:
    first, second = tiny("llama"), tiny("llama")
    theirs = decode(first, prompt(40))
    full, small = sparsekv.patch(first, budget=4096), sparsekv.patch(second, **SMALL)
    assert_same(decode(first, prompt(40)), theirs)
    assert distance(decode(second, prompt(40)), theirs) > 0.1
    assert (full.stats.dense_steps, full.stats.sparse_steps) == (STEPS, 0)
    assert (small.stats.dense_steps, small.stats.sparse_steps) == (0, STEPS)
    full.undo()
    decode(second, prompt(40))
    assert small.stats.sparse_steps == 2 * STEPS


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_undone_in_full(family, tiny, prompt, decode, state_of) -> None:
    """Attributes, methods, hooks, configs and outputs are what they were before."""
    model = tiny(family)
    theirs, before = decode(model, prompt(40, 33)), state_of(model)
    patch = sparsekv.patch(model, **SMALL)
    assert state_of(model) != before
    decode(model, prompt(40, 33))
    patch.undo()
    assert state_of(model) == before
    ours = decode(model, prompt(40, 33))
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert type(ours.past_key_values) is type(theirs.past_key_values)


def test_every_way_to_undo(tiny, state_of) -> None:
    model = tiny("llama")
    before = state_of(model)
    with sparsekv.patch(model) as patch:
        assert patch.is_active
    assert not patch.is_active
    assert state_of(model) == before
    sparsekv.patch(model)
    sparsekv.unpatch(model)
    assert state_of(model) == before
    with sparsekv.patch(model) as patch:
        patch.undo()
        assert state_of(model) == before
    patch.undo()  # once more: nothing
    assert state_of(model) == before
    with pytest.raises(KeyError), sparsekv.patch(model):
        raise KeyError
    assert state_of(model) == before


def test_an_old_patch_does_not_undo_a_new_one(tiny, prompt, decode) -> None:
    model = tiny("llama")
    old = sparsekv.patch(model)
    old.undo()
    new = sparsekv.patch(model, **SMALL)
    old.undo()
    decode(model, prompt(40))
    assert new.is_active
    assert new.stats.sparse_steps == STEPS


def test_unpatching_an_unpatched_model(tiny) -> None:
    with pytest.raises(PatchError, match="LlamaForCausalLM is not patched: nothing to undo"):
        sparsekv.unpatch(tiny("llama"))


def test_patching_twice_names_the_way_out(tiny, state_of) -> None:
    model = tiny("llama")
    patch = sparsekv.patch(model, budget=96)
    before = state_of(model)
    with pytest.raises(PatchError, match=r"is patched already: undo that first \(patch.undo\(\) or sparsekv.unpatch"):
        sparsekv.patch(model, budget=128)
    assert state_of(model) == before
    patch.undo()
    assert sparsekv.patch(model, budget=128).config.budget == 128


def test_a_model_made_with_a_patched_models_config(tiny) -> None:
    """Patching it would nest one patch in the other, and undoing the first would silently turn it dense."""
    model = tiny("llama")
    with sparsekv.patch(model):
        sharing = type(model)(model.config)
        with pytest.raises(PatchError, match="was made with the config of a patched model"):
            sparsekv.patch(sharing)
    sparsekv.patch(sharing).undo()


def test_an_implementation_set_by_the_user_stays(tiny, prompt, decode, assert_same) -> None:
    """`set_attn_implementation` wins: dense from then on, said in the report, and kept when the patch is undone."""
    model = tiny("llama")
    theirs = decode(model, prompt(40, 33))
    patch = sparsekv.patch(model, **SMALL)
    model.set_attn_implementation("eager")
    assert_same(decode(model, prompt(40, 33)), theirs)
    assert "sparse (" not in str(patch)
    patch.undo()
    assert model.config._attn_implementation == "eager"
    assert_same(decode(model, prompt(40, 33)), theirs)


def test_what_the_model_had_of_its_own_comes_back(tiny, prompt, decode, state_of) -> None:
    """A method set on the instance is still called for caches that are not the patch's, and is there afterwards."""
    model, called = tiny("llama"), []
    plain = model._prepare_cache_for_generation

    def own(self, *args, **kwargs):
        called.append(self)
        return plain(*args, **kwargs)

    model._prepare_cache_for_generation = MethodType(own, model)
    before = state_of(model)
    with sparsekv.patch(model, **SMALL) as patch:
        decode(model, prompt(40))
        assert (called, patch.stats.sparse_steps) == ([], STEPS)
        decode(model, prompt(40), use_cache=False)
        assert called == [model]
        twin = copy.deepcopy(model)
    assert state_of(model) == before
    sparsekv.unpatch(twin)
    decode(twin, prompt(40))
    assert called == [model, twin]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.nn.Module, "register_forward_pre_hook"),
        (AttentionMaskInterface, "register"),
        (generation, "ForwardHook"),
    ],
)
def test_an_error_while_patching_leaves_the_model_as_it_was(owner, name, tiny, state_of, monkeypatch) -> None:
    """And it can be patched afterwards."""

    def fail(*args, **kwargs):
        raise RuntimeError("a test")

    model = tiny("llama")
    before = state_of(model)
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="a test"):
            sparsekv.patch(model)
    assert state_of(model) == before
    with pytest.raises(PatchError, match="nothing to undo"):
        sparsekv.unpatch(model)
    sparsekv.patch(model).undo()
    assert state_of(model) == before


# -- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"digest": "min_max"}, "digest='min_max' is not known. Did you mean 'minmax'"),
        ({"policy": "topk"}, "policy='topk' is not known. Did you mean 'top_k'"),
        ({"bugdet": 64}, "setting='bugdet' is not known. Did you mean 'budget'"),
        ({"group_pooling": "mean"}, "group_pooling='mean' is not known. Did you mean 'max' or 'mean_softmax'"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(settings, message, tiny, state_of) -> None:
    model = tiny("llama")
    before = state_of(model)
    with pytest.raises(UnknownNameError) as error:
        sparsekv.patch(model, **settings)
    assert message in str(error.value)
    assert state_of(model) == before


@pytest.mark.parametrize(
    "settings",
    [{"budget": 16}, {"budget": 0}, {"budget": 1.5}, {"page_size": 0}, {"max_tokens": 3}, {"config": 2048}],
)
def test_settings_that_are_not_allowed(settings, tiny, state_of) -> None:
    model = tiny("llama")
    before = state_of(model)
    with pytest.raises(ConfigError):
        sparsekv.patch(model, **settings)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_layers": (0, 40)}, "the model has layers 0 to 3"),
        ({"budget": {40: 512, "rest": 64}}, "names 40, and of the model's layers 0 to 3 only 0-3 can be sparse"),
        ({"digest": "of_eights"}, "head_dim=12 must divide by 8"),
    ],
)
@pytest.mark.usefixtures("of_eights")
def test_settings_that_are_not_allowed_for_this_model(settings, message, tiny, state_of) -> None:
    """Its heads have 12 channels: said before the first token, not at it."""
    model = tiny("llama", head_dim=12, hidden_size=48)
    before = state_of(model)
    with pytest.raises(ConfigError, match=message):
        sparsekv.patch(model, **settings)
    assert state_of(model) == before


# -- the report


def test_the_report_says_what_each_layer_does(tiny, prompt, decode) -> None:
    model = tiny("gemma3_text", num_hidden_layers=6)
    patch = sparsekv.patch(model, **SMALL | {"dense_layers": 1})
    assert str(patch).splitlines() == [
        "sparsekv patch of Gemma3ForCausalLM (budget 16 tokens, page_size 4)",
        "  layer 0: dense (sliding window of 8, in pages)",
        "  layer 1: dense (dense_layers=1, in pages)",
        "  layer 2: dense (sliding window of 8, in pages)",
        "  layer 3: sparse (top_k over sign_sketch digests)",
        "  layer 4: dense (sliding window of 8, in pages)",
        "  layer 5: sparse (top_k over sign_sketch digests)",
        "  decode steps on cpu: plain torch (there are kernels for CUDA, and the device is cpu)",
        "  decode loop of generate: eager (CUDA graphs need a GPU, and the device is cpu)",
    ]
    decode(model, prompt(40))
    assert str(patch.stats).startswith("DecodeStats(7 sparse and 0 dense steps, 1 dense passes; read ")
    patch.undo()
    assert str(patch).startswith("sparsekv patch of Gemma3ForCausalLM (budget 16 tokens, page_size 4, undone)\n")


def test_the_report_of_a_fraction_and_of_the_dense_policy(tiny) -> None:
    with sparsekv.patch(tiny("llama"), budget=0.25, policy="all", dense_layers=2) as patch:
        assert "budget 25% of the context" in str(patch)
        assert "layers 0-1: dense (dense_layers=2, in pages)" in str(patch)
        assert "layers 2-3: dense (policy 'all', in pages)" in str(patch)


def test_the_report_of_budgets_by_layer(tiny) -> None:
    with sparsekv.patch(tiny("llama"), budget={1: 1.0, 2: 0.25, "rest": 512}, dense_layers=1) as patch:
        assert str(patch).splitlines()[:5] == [
            "sparsekv patch of LlamaForCausalLM (budget by layer, page_size 16)",
            "  layer 0: dense (dense_layers=1, in pages)",
            "  layer 1: dense (budget=1.0, in pages)",
            "  layer 2: sparse (top_k over sign_sketch digests, 25% of the context)",
            "  layer 3: sparse (top_k over sign_sketch digests, 512 tokens)",
        ]


# -- copies, files, processes


def test_a_deep_copy_is_a_patched_model_of_its_own(tiny, prompt, decode, assert_same) -> None:
    model = tiny("llama")
    theirs = decode(model, prompt(40))
    patch = sparsekv.patch(model, **SMALL)
    sparse = decode(model, prompt(40))
    twin = copy.deepcopy(model)
    patch.undo()
    assert_same(decode(model, prompt(40)), theirs)
    assert_same(decode(twin, prompt(40)), sparse)
    twins_patch = twin._sparsekv_patch
    assert twins_patch.model is twin
    assert twins_patch.layers is not patch.layers
    sparsekv.unpatch(twin)
    assert_same(decode(twin, prompt(40)), theirs)


def test_a_pickled_model_stays_patched(tiny, prompt, decode, assert_same) -> None:
    """Also where nothing was patched before, as in another process."""
    model = tiny("llama")
    sparsekv.patch(model, **SMALL)
    sparse = decode(model, prompt(40))
    content = pickle.dumps(model)
    for mapping in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        del mapping[model.config._attn_implementation]
    loaded = pickle.loads(content)
    assert_same(decode(loaded, prompt(40)), sparse)
    sparsekv.unpatch(loaded)
    assert loaded.config._attn_implementation == "sdpa"


def test_what_is_saved_knows_nothing_of_the_patch(tiny, prompt, decode, assert_same, tmp_path) -> None:
    model = tiny("llama")
    theirs = decode(model, prompt(40))
    model.save_pretrained(tmp_path / "plain")
    with sparsekv.patch(model, **SMALL):
        model.save_pretrained(tmp_path / "patched")
        state = io.BytesIO()
        torch.save(model.state_dict(), state)
    for name in ("config.json", "generation_config.json"):
        plain, patched = (json.loads((tmp_path / kind / name).read_text()) for kind in ("plain", "patched"))
        assert plain == patched
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert loaded.config._attn_implementation == "sdpa"
    assert_same(decode(loaded, prompt(40)), theirs)
    state.seek(0)
    assert list(torch.load(state)) == list(model.state_dict())


@pytest.mark.wide
def test_a_compiled_patched_forward(tiny, prompt) -> None:
    """Not one graph, but the right one: prefill and steps equal the forward that is not compiled."""
    model, ids = tiny("llama", num_hidden_layers=2), prompt(44)["input_ids"]
    with sparsekv.patch(model, **SMALL) as patch, torch.no_grad():
        results = []
        for forward in (model.forward, torch.compile(model.forward, backend="aot_eager")):
            cache = patch.new_cache()
            logits = [forward(ids[:, :40], past_key_values=cache).logits]
            logits += [forward(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 44)]
            results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
    assert patch.stats.sparse_steps == 8


@pytest.mark.parametrize(
    ("sizes", "digest", "status"),
    [
        ({"head_dim": 64}, "minmax", "CUDA kernels"),
        ({"head_dim": 40}, "minmax", "plain torch (head_dim 40 (kernels: 64, 96, 128, 256; of latents 288 and 576))"),
        ({"head_dim": 64}, "sign_sketch", "CUDA kernels"),
        ({"head_dim": 64}, "keys", "plain torch (digest 'keys' is appended and scored in plain torch (kernels: "),
        ({"num_key_value_heads": [8, 4]}, "minmax", "CUDA kernels, in layers whose head size they serve"),
    ],
)
def test_the_report_says_what_runs_in_kernels(sizes, digest, status, monkeypatch) -> None:
    """Of a config alone, as if the model were on a GPU: the model itself need not be."""
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512} | sizes
    model = SimpleNamespace(config=PretrainedConfig(**config), device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(compiler, "unavailable", lambda device=None: None)
    monkeypatch.setattr(SparseConfig, "__post_init__", lambda config: None)  # a digest of one's own
    assert support.kernel_status(model, SparseConfig(digest=digest)).startswith(status)


def test_every_family_of_transformers_gets_a_report() -> None:
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[family]()
        except Exception:  # needs arguments, or another library: nothing to report on
            continue
        model = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.bfloat16)
        assert "plain torch" in support.kernel_status(model, SparseConfig())
