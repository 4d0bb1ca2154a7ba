"""What decoding meets beside the plain modes: assistants, shared keys, hand-made caches, other dtypes and caches."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

import sparsekv
from sparsekv import PagedCache
from sparsekv.errors import CacheFullError, CacheStateError
from sparsekv.hf.support import CACHE
from tools.tiny_models import smallest

NEW = 8  # tokens that `decode` generates
FULL = {"budget": 4096, "page_size": 4}
SMALL = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": (0,)}


def draft_four_tokens(assistant: PreTrainedModel) -> None:
    """However unsure it is (the default stops at the first token below a confidence of 0.4)."""
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0


@pytest.mark.parametrize("patched_assistant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_assisted_decoding(family, patched_assistant, tiny, prompt, decode, assert_same) -> None:
    """The target verifies over its pages; an assistant, patched or not, drafts and rolls back."""
    model, assistant = tiny(family), tiny("llama", num_hidden_layers=3)
    draft_four_tokens(assistant)
    theirs = decode(model, prompt(40), assistant_model=assistant)
    with sparsekv.patch(model, **FULL) as patch:
        draft = sparsekv.patch(assistant, **FULL) if patched_assistant else None
        ours = decode(model, prompt(40), assistant_model=assistant)
    assert_same(ours, theirs)
    assert patch.stats.dense_passes > 1
    if draft is not None:
        assert draft.stats.dense_steps > 1


def test_an_assistant_may_be_sparse(tiny, prompt, decode) -> None:
    """The target decides: the tokens are its own, however little the assistant reads."""
    model, assistant = tiny("llama"), tiny("llama")
    draft_four_tokens(assistant)
    theirs = decode(model, prompt(40))
    with sparsekv.patch(assistant, **SMALL) as patch:
        ours = decode(model, prompt(40), assistant_model=assistant)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert patch.stats.sparse_steps > 1


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_and_values(family, tiny, prompt, decode, assert_same, naive_sparse) -> None:
    """A layer that reuses the keys of an earlier one reads the earlier one's pages, and picks its own of them."""
    model, naive = tiny(family), tiny(family)
    theirs = decode(model, prompt(40, 33))
    with sparsekv.patch(model, **FULL) as patch:
        assert_same(decode(model, prompt(40, 33)), theirs)
    assert (patch.stats.dense_steps, patch.stats.dense_passes) == (NEW - 1, 1)

    naive_sparse(naive, **SMALL)
    with sparsekv.patch(model, **SMALL, digest="minmax") as patch:
        assert_same(decode(model, prompt(40, 33)), decode(naive, prompt(40, 33)))
    assert (patch.stats.sparse_steps, patch.stats.dense_steps) == (NEW - 1, 0)


@pytest.mark.parametrize("policy", ["top_k", "recent", "oracle"])
@pytest.mark.parametrize("budget", [16, 0.4])
def test_a_sequence_does_not_depend_on_its_batch(budget, policy, tiny, prompt, decode) -> None:
    """A padded row decodes as it does alone; a fraction is one of its own length, not of the longest."""
    model, batch = tiny("llama"), prompt(40, 33, 19)
    with sparsekv.patch(model, **SMALL | {"budget": budget, "policy": policy}) as patch:
        together = decode(model, batch)
        for row, length in enumerate((40, 33, 19)):
            alone = decode(model, {"input_ids": batch["input_ids"][row : row + 1, -length:]})
            assert torch.equal(alone.sequences[0, -NEW:], together.sequences[row, -NEW:])
            for ours, theirs in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(ours[0], theirs[row], atol=1e-4, rtol=0)
    assert patch.stats.share < 1


def test_output_attentions(tiny, prompt, decode, assert_same) -> None:
    """Weights exist where attention is dense; a step that reads pages has none, which is said once."""
    model = tiny("llama", attn_implementation="eager")
    theirs = decode(model, prompt(40, 33), output_attentions=True)
    with (
        sparsekv.patch(model, **FULL) as patch,
        pytest.warns(UserWarning, match="output_attentions: a decode step that reads pages has no") as warned,
    ):
        both = [decode(model, prompt(40, 33), output_attentions=True) for _ in range(2)]
    assert len(warned) == 1
    for ours in both:
        assert_same(ours, theirs)
        torch.testing.assert_close(ours.attentions[0], theirs.attentions[0])
        assert all(weights is None for step in ours.attentions[1:] for weights in step)
    assert patch.stats.dense_steps == 2 * (NEW - 1)


def test_attention_weights_of_every_step_from_a_cache_without_pages(tiny, prompt, decode, assert_same) -> None:
    """The way out that the warning names."""
    model = tiny("llama", attn_implementation="eager")
    theirs = decode(model, prompt(40, 33), output_attentions=True)
    with sparsekv.patch(model, **SMALL), warnings.catch_warnings():
        warnings.simplefilter("error")
        own = {CACHE: DynamicCache(config=model.config)}
        ours = decode(model, prompt(40, 33), output_attentions=True, **own)
    assert_same(ours, theirs)
    torch.testing.assert_close(ours.attentions, theirs.attentions)


def test_attention_weights_asked_for_in_the_config(tiny, prompt) -> None:
    """transformers lets only a model with eager attention set it, and a patched one has that."""
    model = tiny("llama", attn_implementation="eager")
    with sparsekv.patch(model, **FULL):
        model.config.output_attentions = True
        ours = model(**prompt(40))
    torch.testing.assert_close(ours.attentions, model(**prompt(40)).attentions)


def test_attention_weights_in_assisted_decoding(tiny, prompt, decode, assert_same) -> None:
    """A verification of one token would have none: the call decodes densely, which it says."""
    model, assistant = tiny("llama", attn_implementation="eager"), tiny("llama", num_hidden_layers=3)
    draft_four_tokens(assistant)
    theirs = decode(model, prompt(40), assistant_model=assistant, output_attentions=True)
    with (
        sparsekv.patch(model, **SMALL),
        pytest.warns(UserWarning, match="output_attentions in assisted decoding: this call decodes densely"),
    ):
        ours = decode(model, prompt(40), assistant_model=assistant, output_attentions=True)
    assert_same(ours, theirs)
    torch.testing.assert_close(ours.attentions, theirs.attentions)


def test_drafts_by_early_exit_with_dense_layers_beyond_it(tiny, prompt, decode, assert_same) -> None:
    """While they are made, the config names fewer layers than the patch does."""
    model = tiny("llama")
    theirs = decode(model, prompt(40), assistant_early_exit=2)
    with sparsekv.patch(model, **FULL | {"dense_layers": (0, 3), "budget": {3: 0.5, "rest": 1.0}}):
        assert_same(decode(model, prompt(40), assistant_early_exit=2), theirs)
    assert model.config.num_hidden_layers == 4


def test_drafts_by_early_exit_without_room_are_refused_before_the_model_is_cut_short(tiny, prompt, decode) -> None:
    model = tiny("llama")
    with sparsekv.patch(model, **FULL, max_tokens=44), pytest.raises(CacheFullError):
        decode(model, prompt(40), assistant_early_exit=2)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("wrap", [lambda f: lambda *a, **k: f(*a, **k), lambda f: lambda ids=None, **k: f(ids, **k)])
def test_a_forward_that_was_replaced_before_the_patch(wrap, tiny, prompt) -> None:
    model = tiny("llama")
    theirs = model(**prompt(40)).logits
    model.model.forward = wrap(model.model.forward)
    with sparsekv.patch(model, **FULL) as patch:
        ours = model.lm_head(model.model(prompt(40)["input_ids"]).last_hidden_state)
    torch.testing.assert_close(ours, theirs)
    assert patch.stats.dense_passes == 1


def test_no_warning_of_attention_weights_that_there_would_not_be_unpatched(tiny, prompt, decode) -> None:
    with sparsekv.patch(tiny("llama"), **SMALL) as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(patch.model, prompt(40, 33), output_attentions=True)


def test_output_scores_and_hidden_states(tiny, prompt, decode, assert_same) -> None:
    model = tiny("llama")
    wanted = {"output_scores": True, "output_hidden_states": True, "do_sample": True, "top_k": 10}
    theirs = decode(model, prompt(40, 33), **wanted)
    with sparsekv.patch(model, **FULL) as patch:
        ours = decode(model, prompt(40, 33), **wanted)
    assert_same(ours, theirs)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states, atol=1e-4, rtol=1e-4)
    assert patch.stats.dense_steps == NEW - 1


def test_a_paged_cache_made_by_hand(tiny, prompt, decode, assert_same) -> None:
    """It keeps its own settings and counters; one made by the patch has the patch's."""
    model = tiny("llama")
    theirs = decode(model, prompt(40, 33))
    with sparsekv.patch(model, **SMALL) as patch:
        cache = PagedCache(model.config, budget=4096, page_size=8)
        assert_same(decode(model, prompt(40, 33), past_key_values=cache), theirs)
        assert cache.stats.dense_steps == NEW - 1
        assert patch.stats.dense_steps == patch.stats.sparse_steps == 0
        cache = patch.new_cache()
        decode(model, prompt(40, 33), past_key_values=cache)
    assert cache.stats is patch.stats
    assert patch.stats.sparse_steps == NEW - 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_prompt_prefilled_once_serves_many_answers(copied, tiny, prompt, decode, assert_same) -> None:
    """transformers' recipe for prefix caching: every question gets a copy of the cache, and no copy of the model."""
    model, ids = tiny("llama"), prompt(60)["input_ids"]
    with sparsekv.patch(model, **SMALL) as patch:
        prefix = patch.new_cache()
        model(ids[:, :40], past_key_values=prefix)
        assert len(pickle.dumps(prefix)) < sum(p.nbytes for p in model.parameters()) / 2
        for length in (60, 50):
            theirs = decode(model, {"input_ids": ids[:, :length]})
            ours = decode(model, {"input_ids": ids[:, :length]}, past_key_values=copied(prefix))
            assert_same(ours, theirs)
            forked = decode(model, {"input_ids": ids[:, :length]}, past_key_values=prefix.fork())
            assert_same(forked, theirs)
        assert prefix.get_seq_length() == 40


def test_a_paged_cache_in_an_unpatched_model_runs_dense_and_warns(tiny, prompt, decode, assert_same) -> None:
    model = tiny("llama")
    theirs = decode(model, prompt(40, 33))
    cache = PagedCache(model.config, **SMALL)
    with pytest.warns(UserWarning, match=r"PagedCache runs dense.*the model is not patched"):
        assert_same(decode(model, prompt(40, 33), past_key_values=cache), theirs)
    assert cache.stats.sparse_steps == cache.stats.dense_steps == 0


@pytest.mark.parametrize("settings", [FULL, SMALL], ids=["full", "small"])
def test_bfloat16(settings, tiny, prompt, naive_sparse) -> None:
    """No further from the float32 result than twice what plain torch in bfloat16 is (flash-attention's bound)."""
    exact, plain, model = tiny("llama"), tiny("llama").to(torch.bfloat16), tiny("llama").to(torch.bfloat16)
    if settings is SMALL:
        for reference in (exact, plain):
            naive_sparse(reference, **SMALL)
    ids = prompt(40 + NEW)["input_ids"]
    truth, theirs = (teacher_forced(reference, ids) for reference in (exact, plain))
    with sparsekv.patch(model, **settings, digest="minmax") as patch:
        ours = teacher_forced(model, ids)
    assert ours.dtype == torch.bfloat16
    assert float((ours - truth).norm()) <= 2 * float((theirs - truth).norm())
    assert patch.stats.sparse_steps + patch.stats.dense_steps == NEW


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tokens_that_a_prompt_hid_stay_hidden(attention, tiny, prompt) -> None:
    """Of two documents in one prompt pages hold the last. A step that would see both is an error."""
    model = tiny("llama", attn_implementation=attention)
    ids = prompt(41)["input_ids"]
    first = torch.arange(40) < 15
    packed = (torch.ones(40, 40).tril().bool() & (first[:, None] == first))[None, None]
    packed = packed if attention == "sdpa" else torch.zeros(packed.shape).masked_fill(~packed, -1e9)
    last = torch.cat([~first, torch.tensor([True])])[None].long()

    def step(**mask: Tensor) -> Tensor:
        past = model(ids[:, :40], attention_mask=packed, use_cache=True).past_key_values
        return model(ids[:, 40:], position_ids=torch.tensor([[40]]), past_key_values=past, **mask).logits

    theirs = step(attention_mask=last)
    with sparsekv.patch(model, **FULL):
        assert torch.allclose(step(attention_mask=last), theirs, atol=1e-4)
        with pytest.raises(CacheStateError, match="has changed"):
            step()


def test_a_refused_mask_leaves_no_trace(tiny, prompt) -> None:
    """Not in the layers either that are transformers' own and come before those in pages."""
    model, inputs = tiny("gemma3_text"), prompt(40, 33)
    token, mask = torch.tensor([[5], [6]]), torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], dim=1)

    def prefilled() -> Any:
        return model(**inputs, use_cache=True).past_key_values

    theirs = model(token, attention_mask=mask, past_key_values=prefilled()).logits
    with sparsekv.patch(model, **FULL):
        past = prefilled()
        with pytest.raises(CacheStateError, match="has changed"):
            model(token, past_key_values=past)
        assert torch.allclose(model(token, attention_mask=mask, past_key_values=past).logits, theirs, atol=1e-4)


def test_float64(tiny, prompt) -> None:
    """All of it; transformers' eager attention takes its softmax in float32."""
    model = tiny("llama").double()
    ids = prompt(40 + NEW)["input_ids"]
    theirs = teacher_forced(model, ids)
    with sparsekv.patch(model, **FULL) as patch:
        ours = teacher_forced(model, ids)
    assert float((ours - theirs).abs().max()) < 1e-10
    with sparsekv.patch(model, **SMALL) as patch:
        assert teacher_forced(model, ids).dtype == torch.float64
    assert patch.stats.sparse_steps == NEW


@pytest.mark.parametrize("settings", [FULL, SMALL], ids=["full", "small"])
def test_autocast(settings, tiny, prompt, naive_sparse) -> None:
    """Keys arrive in float32 (rotated) and values in bfloat16: pages hold both as they are, the ops stay float32."""
    exact, plain, model = tiny("llama"), tiny("llama"), tiny("llama")
    if settings is SMALL:
        for reference in (exact, plain):
            naive_sparse(reference, **SMALL)
    ids = prompt(40 + NEW)["input_ids"]
    truth = teacher_forced(exact, ids)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = teacher_forced(plain, ids)
        with sparsekv.patch(model, **settings, digest="minmax") as patch:
            ours = teacher_forced(model, ids)
    assert float((ours.float() - truth).norm()) <= 2 * float((theirs.float() - truth).norm())
    assert patch.stats.sparse_steps + patch.stats.dense_steps == NEW


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the last tokens, decoded one by one with the given ids."""
    past, logits = model(ids[:, :-NEW], use_cache=True).past_key_values, []
    for token in ids[:, -NEW:].split(1, dim=1):
        logits.append(model(token, past_key_values=past).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a CUDA build of torch makes no offloading stream without a GPU: use a CPU build or a GPU machine",
)
@pytest.mark.parametrize(("name", "expected"), [("offloaded", DynamicCache), ("offloaded_static", StaticCache)])
def test_other_cache_implementations_are_transformers_own_and_warn(name, expected, tiny) -> None:
    """Asked for directly, since offloading needs a GPU."""
    model = tiny("llama")
    settings = GenerationConfig(cache_implementation=name, is_assistant=False, num_beams=1, num_return_sequences=1)
    for is_patched in (False, True):
        warns = pytest.warns(UserWarning, match=f"{name}.* is transformers' own cache: this call decodes densely")
        arguments: dict[str, Any] = {}
        if is_patched:
            sparsekv.patch(model)
        with warns if is_patched else contextlib.nullcontext():
            model._prepare_cache_for_generation(settings, arguments, None, 1, 16)
        assert type(arguments[CACHE]) is expected
        assert arguments[CACHE].offloading


@pytest.mark.parametrize("num_layers", [1, 4])
def test_a_used_cache_in_a_model_that_is_no_longer_patched_is_refused(num_layers, tiny, prompt) -> None:
    """Its attention would see the new token alone: an error before it answers."""
    model = tiny("llama", num_hidden_layers=num_layers)
    with sparsekv.patch(model, budget=64, page_size=4, recent=8) as patch:
        cache = patch.new_cache()
        model(**prompt(40), past_key_values=cache)
    with pytest.raises(CacheStateError, match=r"Layer 0 of this cache lives in pages.*to_dynamic"):
        model(prompt(40)["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}], ids=str)
def test_values_narrower_than_keys(settings, prompt, decode, assert_same, naive_sparse) -> None:
    """In layers that choose their pages, and in windows."""
    model, inputs, small = smallest("mimo_v2_flash"), prompt(40, 33, 3), SMALL | {"dense_layers": ()}
    inputs["input_ids"] %= model.config.vocab_size
    assert model.config.head_dim > model.config.v_head_dim
    unpatched = decode(model, inputs, **settings)
    with sparsekv.patch(model, **FULL):
        patched = decode(model, inputs, **settings)
    assert_same(patched, unpatched)
    assert [tuple(x.shape[3] for x in layer.content()) for layer in patched.past_key_values.layers] == [(16, 8)] * 4
    with sparsekv.patch(model, **small, digest="minmax"):
        patched = decode(model, inputs, **settings)
    naive_sparse(model, **small)
    assert_same(patched, decode(model, inputs, **settings))
