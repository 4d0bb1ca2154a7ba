"""Which parts of a model are replaced by one kernel each, that it computes the same, and that nobody else notices."""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsekv
from sparsekv import SparseConfig
from sparsekv.errors import KernelError
from sparsekv.hf.capture import decoder, fusion
from sparsekv.hf.capture.decoder import CapturedDecoder
from sparsekv.hf.support import CACHE


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that have run in the place of a model's own functions."""
    seen: list[str] = []
    ops = fusion._OPS

    class Counted:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            seen.append(name)
            op: Callable[..., Any] = getattr(ops, name)
            return op

    monkeypatch.setattr(fusion, "_OPS", Counted())
    return seen


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(**inputs, use_cache=False).logits
    return out


def in_another_thread(function: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


@pytest.mark.parametrize(
    ("family", "norms", "rotary"),
    [
        ("llama", ["LlamaRMSNorm"], 1),
        ("qwen3", ["Qwen3RMSNorm"], 1),
        ("olmo2", ["Olmo2RMSNorm"], 1),
        ("gemma2", ["Gemma2RMSNorm"], 1),  # they multiply by one plus the weight
        ("gemma3_text", ["Gemma3RMSNorm"], 1),
        ("gpt_oss", ["GptOssRMSNorm"], 1),  # it has cosines of half the channels
        ("gemma4_text", ["Gemma4RMSNorm"], 0),  # it turns queries and keys in separate calls
        ("glm4", ["Glm4RMSNorm"], 0),  # its channels turn with their neighbours
        ("opt", [], 0),
        ("gpt2", [], 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_replaced(family: str, norms: list[str], rotary: int, dtype: torch.dtype, tiny) -> None:
    """Every norm of those kinds that has a weight, by itself."""
    model = tiny(family).to(dtype)
    found = list(fusion.replacements(model))
    replaced = [owner for owner, name, _ in found if name == "forward"]
    assert replaced == [m for m in model.modules() if type(m).__name__ in norms and hasattr(m, "weight")]
    assert sorted({type(owner).__name__ for owner in replaced}) == norms
    assert len([owner for owner, name, _ in found if name == "apply_rotary_pos_emb"]) == rotary


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "gemma4_text"])
def test_the_same_logits_and_nothing_stays(family: str, tiny, prompt, state_of, calls) -> None:
    """Also after an error."""
    model = tiny(family)
    file = sys.modules[type(model).__module__]
    before, rotary = state_of(model), file.apply_rotary_pos_emb
    expected, state = logits(model, prompt(9)), torch.get_rng_state()
    with fusion.fused(model):
        assert state_of(model) != before or file.apply_rotary_pos_emb is not rotary
        calls.clear()
        torch.testing.assert_close(logits(model, prompt(9)), expected)
        assert calls
    assert state_of(model) == before
    assert file.apply_rotary_pos_emb is rotary
    with pytest.raises(TypeError), fusion.fused(model):
        model(input_ids="no tokens")
    assert state_of(model) == before
    assert file.apply_rotary_pos_emb is rotary
    assert torch.equal(torch.get_rng_state(), state)  # sampling goes on with the numbers it would have had


def test_channels_that_are_not_turned_stay(tiny, prompt, calls) -> None:
    """Cosines of half the channels: the other half has no positions, where gpt-oss turns all."""
    model = tiny("phi3", partial_rotary_factor=0.5)
    expected = logits(model, prompt(9))
    with fusion.fused(model):
        calls.clear()
        torch.testing.assert_close(logits(model, prompt(9)), expected)
    assert set(calls) == {"rms_norm"}


def test_norms_of_a_class_that_are_not_made_alike_are_told_apart(tiny, prompt) -> None:
    """One that computes something else does not keep the others from being replaced, nor is it replaced with them."""
    model = tiny("llama")
    odd, kind = model.model.layers[1].input_layernorm, type(model.model.norm)

    class Switched(kind):
        def forward(self, hidden_states: Tensor) -> Tensor:
            normal: Tensor = super().forward(hidden_states)
            return 2 * normal if self.doubles else normal

    Switched.__name__ = kind.__name__
    for module in [m for m in model.modules() if type(m) is kind]:
        module.__class__, module.doubles = Switched, module is odd
    expected, found = logits(model, prompt(9)), [owner for owner, _, _ in fusion.replacements(model)]
    assert model.model.norm in found
    assert odd not in found
    with fusion.fused(model):
        torch.testing.assert_close(logits(model, prompt(9)), expected)


def test_a_changed_part_is_left_alone(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user has put in the place of a norm is not what the replacement computes."""
    model = tiny("llama")
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: 2 * x)
    assert [name for _, name, _ in fusion.replacements(model)] == ["apply_rotary_pos_emb"]


def test_a_norm_with_a_forward_of_its_own_keeps_it(tiny, prompt) -> None:
    """accelerate puts one there that fetches the weights, also where the result is the same."""
    model, called = tiny("llama"), [0]
    norm = model.model.norm
    plain = norm.forward

    def own(hidden_states: Tensor) -> Tensor:
        called[0] += 1
        out: Tensor = plain(hidden_states)
        return out

    norm.forward = own
    assert norm not in [owner for owner, _, _ in fusion.replacements(model)]
    with fusion.fused(model):
        logits(model, prompt(9))
    assert called == [1]
    assert norm.forward is own


def test_hooks_of_a_norm_run_and_are_not_called_to_try_it(tiny, prompt) -> None:
    model, called = tiny("llama"), [0]

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        called[0] += 1
        return output * 2

    model.model.norm.register_forward_hook(hook)
    expected = logits(model, prompt(9))
    with fusion.fused(model):
        assert called == [1]
        torch.testing.assert_close(logits(model, prompt(9)), expected)
    assert called == [2]


def test_a_kernel_that_fails_is_heard(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a norm that computes something else."""

    def fail(module: object, original: object, offset: float) -> object:
        def forward(x: object) -> None:
            raise KernelError("a test")

        return forward

    monkeypatch.setattr(fusion, "_norm", fail)
    with pytest.raises(KernelError, match="a test"):
        list(fusion.replacements(tiny("llama")))


# -- nobody else


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "where", [in_another_thread, lambda function: function()], ids=["other thread", "this thread"]
)
def test_another_model_trains_while_a_step_is_captured(where, tiny, prompt, calls) -> None:
    """Also the same model does: what has no gradient is not in its way."""
    model, other = tiny("llama"), tiny("llama", seed=3).train()
    for trained in (other, model):
        theirs = gradients(trained, prompt(9))
        with fusion.fused(model):
            calls.clear()
            ours = where(lambda trained=trained: gradients(trained, prompt(9)))
        assert calls == []
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_other_threads_go_on_with_the_original(tiny, prompt, calls) -> None:
    model, other = tiny("llama"), tiny("llama", seed=3)
    with fusion.fused(model):
        calls.clear()
        for made in (model, other):
            in_another_thread(lambda made=made: logits(made, prompt(9)))
        assert calls == []
        logits(model, prompt(9))
        assert set(calls) == {"rms_norm", "rotate"}


def test_norms_of_other_models_are_not_touched(tiny, prompt, calls) -> None:
    model, other = tiny("llama"), tiny("llama", seed=3)
    with fusion.fused(model):
        calls.clear()
        logits(other, prompt(9))
        assert "rms_norm" not in calls


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("threads", [False, True])
def test_captures_that_overlap_are_left_in_any_order(order, threads, tiny, prompt, state_of, calls) -> None:
    """Of two models of a family, one of them twice."""
    models = [tiny("llama"), tiny("llama", seed=3)]
    file = sys.modules[type(models[0]).__module__]
    before, rotary = [state_of(model) for model in models], file.apply_rotary_pos_emb
    run = in_another_thread if threads else lambda function: function()
    entered = [fusion.fused(models[i]) for i in (0, 1, 0)]
    for context in entered:
        context.__enter__()
    for i in order:
        assert isinstance(file.apply_rotary_pos_emb, fusion.StandIn)
        run(lambda i=i: entered[i].__exit__(None, None, None))
    assert file.apply_rotary_pos_emb is rotary
    assert [state_of(model) for model in models] == before
    calls.clear()
    logits(models[0], prompt(9))
    assert calls == []


def test_what_was_exchanged_meanwhile_stays(tiny) -> None:
    model = tiny("llama")
    norm, mine = model.model.norm, lambda x: x
    with fusion.fused(model):
        norm.forward = mine
    assert norm.forward is mine


# -- prompts

FORWARD = {"rms_norm": 9, "rotate": 4}  # of a Llama of four layers, each tried once before


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 20 tokens or more are fused where there is no GPU, too."""
    monkeypatch.setattr(decoder, "MIN_FUSED", 20)
    monkeypatch.setattr(CapturedDecoder, "fuses_prompts", CapturedDecoder.fuse)


@pytest.mark.parametrize(
    ("settings", "forwards"), [({}, 1), ({"prefill_chunk_size": 8}, 5), ({"num_beams": 2}, 1)], ids=str
)
def test_a_long_prompt_is_fused(
    settings, forwards, tiny, prompt, decode, assert_same, state_of, calls, anywhere
) -> None:
    """By generate, and none of its steps; nothing stays."""
    model = tiny("llama")
    before = state_of(model)
    with sparsekv.patch(model, fuse=False):
        expected = decode(model, prompt(40, 33), **settings)
        assert calls == []
    with sparsekv.patch(model):
        during = state_of(model)
        assert_same(decode(model, prompt(40, 33), **settings), expected)
        assert Counter(calls) == {name: 1 + forwards * n for name, n in FORWARD.items()}
        assert state_of(model) == during
    assert state_of(model) == before


def test_a_short_prompt_is_not_though_much_was_before(tiny, prompt, decode, calls, anywhere) -> None:
    """Of several rows all are counted."""
    model = tiny("llama")
    with sparsekv.patch(model):
        decode(model, prompt(9))
        assert calls == []
        first = decode(model, prompt(40))
        calls.clear()
        ids = torch.cat((first.sequences, prompt(9)["input_ids"]), dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        decode(model, again, **{CACHE: first[CACHE]})
        assert calls == []
        decode(model, prompt(9, 9, 9))
        assert calls


def test_a_document_is_fused(tiny, prompt, calls, anywhere) -> None:
    with sparsekv.patch(tiny("llama")) as patch:
        patch.prefix(prompt(40)["input_ids"])
    assert Counter(calls) == {name: 1 + n for name, n in FORWARD.items()}


@pytest.mark.parametrize(
    ("given", "fuses"),
    [
        ({}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float32}, False),
        ({"fuse": False}, False),
        ({"ranks": 2}, False),
        ({"kernels": False}, False),
    ],
    ids=str,
)
def test_only_where_kernels_run_and_one_rank_holds_the_model(given, fuses, monkeypatch) -> None:
    known = {"device": "cuda:0", "dtype": torch.bfloat16, "fuse": True, "ranks": 1, "kernels": True} | given
    monkeypatch.setattr(decoder, "usable", lambda device: known["kernels"])
    model = SimpleNamespace(device=torch.device(known["device"]), dtype=known["dtype"])
    made = CapturedDecoder(model, SparseConfig(fuse=known["fuse"]), [])
    made.ranks = SimpleNamespace(size=known["ranks"])
    assert made.fuses_prompts is fuses


# -- settings


@pytest.mark.parametrize(
    ("settings", "fuses"), [({}, True), ({"fuse": False}, False), ({"backend": "reference"}, False)], ids=str
)
def test_kernels_run_only_if_the_backend_has_any(settings, fuses, tiny) -> None:
    with sparsekv.patch(tiny("llama"), **settings) as patch:
        assert patch.decoder.fuse is fuses
