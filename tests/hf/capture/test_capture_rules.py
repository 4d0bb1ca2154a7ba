"""What keeps a decode step from being captured: said before anything is tried, on any machine."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import sparsekv
from sparsekv.hf.capture.decoder import CapturedDecoder
from sparsekv.hf.support import CACHE
from sparsekv.policies import POLICIES, DecodeStep, Policy


class Asking(Policy):
    """A policy that a graph cannot hold."""

    capturable = False

    def select(self, step: DecodeStep) -> None:
        return None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "CUDA graphs need a GPU"),
        ({CACHE: None}, "not a decode step of a PagedCache"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, "not a decode step of a PagedCache"),
    ],
)
def test_obstacles(change: dict[str, Any], reason: str, tiny, prompt) -> None:
    model = tiny("llama")
    with sparsekv.patch(model, budget=64, page_size=4, recent=8) as patch:
        cache = patch.new_cache()
        model(**prompt(20), **{CACHE: cache})
        inputs = {"input_ids": torch.ones(1, 1, dtype=torch.long), CACHE: cache} | change
        assert reason in str(patch.decoder.obstacle(inputs))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"attention_mask": torch.ones(1, 1, 1, 21)}, "a mask of its own"),
        ({"output_hidden_states": True}, "inner states"),
        ({"policy": "asking"}, r"the policy's steps cannot be captured \(Policy.capturable\)"),
        ({"observed": True}, "the cache is observed"),
        ({"empty": True}, "not every layer is in pages, or a state"),
    ],
)
def test_obstacles_on_a_gpu(change: dict[str, Any], reason: str | None, tiny, prompt, monkeypatch) -> None:
    """As it would be said there: the tokens claim to be on one."""
    monkeypatch.setitem(POLICIES._classes, "asking", Asking)
    settings = {name: x for name, x in change.items() if name == "policy"}
    rest = {name: x for name, x in change.items() if name not in ("policy", "observed", "empty")}

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    model = tiny("llama")
    with sparsekv.patch(model, budget=64, page_size=4, recent=8, **settings) as patch:
        cache = patch.new_cache()
        if not change.get("empty"):
            model(**prompt(20), **{CACHE: cache})
        if change.get("observed"):
            cache.observers.append(lambda step, slots: None)
        tokens = torch.ones(1, 1, dtype=torch.long).as_subclass(OnGpu)
        found = patch.decoder.obstacle({"input_ids": tokens, CACHE: cache} | rest)
    assert found is None if reason is None else re.search(reason, str(found))


@pytest.mark.parametrize(
    ("family", "settings", "device_map", "reason"),
    [
        ("llama", {}, {}, None),
        ("llama", {"capture": False}, {}, "capture=False"),
        ("llama", {}, {"model": 0, "lm_head": 1}, "the model lies on several devices"),
        ("gemma3n_text", {}, {}, None),
        ("diffllama", {}, {}, "not in pages: layers 0, 1, 2, 3"),
    ],
)
def test_the_report_and_the_decode_step_give_the_same_reason(family, settings, device_map, reason, tiny) -> None:
    """What holds for every step of a model on a GPU, and before that what holds on a CPU."""
    model = tiny(family)
    model.hf_device_map = device_map
    with sparsekv.patch(model, **settings) as patch:
        assert patch.decoder.why_eager(torch.device("cuda", 0)) == reason
        first = reason if reason == "capture=False" else "CUDA graphs need a GPU, and the device is cpu"
        assert patch.decoder.why_eager(torch.device("cpu")) == first
        assert str(patch).endswith(f"  decode loop of generate: eager ({first})")
        patch.decoder.refusal = "a test"
        assert patch.decoder.why_eager(torch.device("cuda", 0)) == (reason or "a test")


def test_the_report_says_why_the_last_step_was_eager(tiny, prompt, monkeypatch) -> None:
    """What belongs to one call: another may be captured."""
    monkeypatch.setattr(CapturedDecoder, "why_eager", lambda self, device: None)  # as on a GPU
    model = tiny("llama")
    with sparsekv.patch(model, budget=64, page_size=4, recent=8) as patch:
        assert str(patch).endswith("CUDA graphs (0 captured, 0 replays)")
        model.generate(**prompt(20), max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
        told = "CUDA graphs (0 captured, 0 replays; the last step was eager: inner states are asked for)"
        assert str(patch).endswith(told)
        model.generate(**prompt(20), max_new_tokens=2)  # its only step warms up
        assert str(patch).endswith("CUDA graphs (0 captured, 0 replays)")
        patch.decoder.last_obstacle = "a test"
        patch.free_memory()
        assert str(patch).endswith("CUDA graphs (0 captured, 0 replays)")
