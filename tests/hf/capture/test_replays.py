"""When decode steps are captured, replayed, compared and thrown away, on any machine.

Graphs are played (`sparsekv.testing.playing`); what CUDA does itself is left to `test_captured.py`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import sparsekv
from sparsekv import PagedCache
from sparsekv.hf.capture.decoder import CapturedDecoder, Run
from sparsekv.hf.support import CACHE
from sparsekv.pages import window_table
from sparsekv.policies import DecodeStep
from sparsekv.testing.consistency import assert_consistent
from sparsekv.testing.playing import Played, decoded, played

SMALL: dict[str, Any] = {"budget": 48, "page_size": 16, "sinks": 2, "recent": 4, "dense_layers": 1, "fuse": False}
OUT_OF_MEMORY = (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory\nmore"))


@pytest.fixture(autouse=True)
def _played() -> Iterator[None]:
    with played():
        yield


@pytest.fixture
def prefilled(prompt) -> Callable[..., PagedCache]:
    """A cache with a prompt of 65 tokens, and memory for more: 15 steps move nothing (without a GPU, tables grow with
    every page)."""

    @torch.no_grad()
    def make(patch: sparsekv.Patch) -> PagedCache:
        cache: PagedCache = patch.new_cache(reserve_tokens=128)
        patch.model(**prompt(65), **{CACHE: cache})
        return cache

    return make


def loop(decoder: CapturedDecoder, cache: PagedCache, tokens: range) -> list[Tensor]:
    """The same by a decode loop of its own."""
    return decoded(partial(decoder, Run()), cache, tokens)


def assert_same_pages(ours: PagedCache, theirs: PagedCache) -> None:
    for mine, yours in zip(ours.to_dynamic().layers, theirs.to_dynamic().layers, strict=True):
        assert torch.equal(mine.keys, yours.keys)
        assert torch.equal(mine.values, yours.values)
    assert_consistent(ours._store)


def put_another_weight(model: PreTrainedModel) -> None:
    """Changes what a graph has baked in, and with it the keys and values of all layers behind."""
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach() * 2)


def put_another_forward(model: PreTrainedModel) -> None:
    """The same change, which no address tells of."""
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden_states: forward(hidden_states) * 2


def move_the_weights(model: PreTrainedModel) -> None:
    """As `model.cpu().cuda()` does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("settings", [{}, {"budget": 96, "group_pooling": "share", "min_share": 0.2}], ids=str)
def test_a_loop_warms_up_captures_compares_and_replays(settings, tiny, prefilled, monkeypatch) -> None:
    """A second loop compares once more; a step counts once, however often it ran."""
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 32)
    model, read = tiny("llama"), [0]

    def observe(step: DecodeStep, slots: Tensor | None) -> None:
        pages = -(-step.seq_lens // 16).sum() * step.kv_pool.shape[2]
        read[0] += int(pages if slots is None else (slots >= 0).sum())

    with sparsekv.patch(model, **SMALL | settings) as patch:
        ours, theirs = prefilled(patch), prefilled(patch)
        theirs.observers.append(observe)
        patch.stats.reset()
        expected, wanted = decoded(model, theirs, range(5, 13)), patch.stats.as_dict()
        patch.stats.reset()
        found = loop(patch.decoder, ours, range(5, 11)) + loop(patch.decoder, ours, range(11, 13))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_same_pages(ours, theirs)
        assert (patch.decoder.captures, patch.decoder.replays) == (1, 5)
        assert patch.stats.as_dict() == wanted
        assert wanted["pages_read"] == read[0] < wanted["pages_total"]


@pytest.mark.parametrize(
    ("family", "window"),
    [("gemma3_text", 8), ("gemma3_text", 40), ("gpt_oss", 20), ("mistral", 20), ("llama4_text", 40)],
)
def test_sliding_windows_are_captured(family, window, tiny, prefilled, monkeypatch) -> None:
    """Also where they are all there is, and chunks. Pages change hands while a window moves on, and a graph stays."""
    as_on_a_gpu: Callable[..., int] = lambda num_pages, device, ring: max(num_pages, ring)  # noqa: E731
    monkeypatch.setattr(window_table, "_width", as_on_a_gpu)
    model = tiny(family, **{"attention_chunk_size" if family == "llama4_text" else "sliding_window": window})
    with sparsekv.patch(model, **SMALL) as patch:
        ours, theirs = prefilled(patch), prefilled(patch)
        patch.stats.reset()
        expected, wanted = decoded(model, theirs, range(5, 20)), patch.stats.as_dict()
        patch.stats.reset()
        found = loop(patch.decoder, ours, range(5, 20))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_same_pages(ours, theirs)
        assert (patch.decoder.captures, patch.decoder.replays) == (1, 13)
        assert patch.stats.as_dict() == wanted


def test_a_step_that_is_captured_makes_no_mask(tiny, prefilled, monkeypatch) -> None:
    """It would be that of one position, and nobody would read it; an eager step makes one beyond a window."""
    model, made = tiny("gemma3_text"), []
    with sparsekv.patch(model, **SMALL) as patch:
        cache, make = prefilled(patch), ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setitem(
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
            "sdpa",
            lambda *args, **kwargs: made.append(1) or make(*args, **kwargs),
        )
        loop(patch.decoder, cache, range(5, 6))
        assert made == []
        decoded(model, cache, range(6, 7))
        assert made


@pytest.mark.parametrize("change", [put_another_weight, put_another_forward])
@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
def test_a_stale_graph_leaves_nothing_in_the_pages(digest, change, tiny, prefilled) -> None:
    """Neither logits nor keys, values and digests of the model as it was: the next steps attend to them."""
    model = tiny("llama")
    with sparsekv.patch(model, **SMALL, digest=digest) as patch:
        ours, theirs = prefilled(patch), prefilled(patch)
        loop(patch.decoder, ours, range(5, 9))
        decoded(model, theirs, range(5, 9))
        change(model)
        for token in range(9, 14):
            found = loop(patch.decoder, ours, range(token, token + 1))
            expected = decoded(model, theirs, range(token, token + 1))
            assert torch.equal(found[0], expected[0])
            assert_same_pages(ours, theirs)
        assert (patch.decoder.captures, patch.decoder.refusal) == (2, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put_another_weight, "a captured step has its weights elsewhere than the next"),
        (put_another_forward, "a captured step gives other logits than an eager one"),
    ],
)
def test_a_forward_that_differs_from_step_to_step_is_not_replayed(change, reason, tiny, prefilled) -> None:
    """Its first replay follows its capture, and is right; at the next step the two are seen to differ."""
    model, run = tiny("llama"), Run()
    with sparsekv.patch(model, **SMALL) as patch:
        ours, theirs = prefilled(patch), prefilled(patch)
        for token in range(5, 10):
            change(model)
            differs = pytest.warns(UserWarning, match=reason)
            with differs if token == 7 else contextlib.nullcontext():
                found = decoded(partial(patch.decoder, run), ours, range(token, token + 1))
            assert torch.equal(found[0], decoded(model, theirs, range(token, token + 1))[0])
            assert_same_pages(ours, theirs)
        assert patch.decoder.replays == 1


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["of torch", "of CUDA"])
def test_out_of_memory_while_capturing_ends_with_the_loop(error, tiny, prefilled, monkeypatch) -> None:
    """That loop goes on eagerly, with one warning; the next one captures."""
    model = tiny("llama")
    monkeypatch.setattr(Played, "failure", error)
    with sparsekv.patch(model, **SMALL) as patch:
        ours, theirs = prefilled(patch), prefilled(patch)
        with pytest.warns(UserWarning, match="memory ran out while a step was captured; the next call") as warned:
            found = loop(patch.decoder, ours, range(5, 10))
        assert len(warned) == 1
        assert (patch.decoder.captures, patch.decoder.refusal) == (0, None)
        monkeypatch.setattr(Played, "failure", None)
        found += loop(patch.decoder, ours, range(10, 14))
        assert patch.decoder.replays == 3
        expected = decoded(model, theirs, range(5, 14))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_same_pages(ours, theirs)


def test_a_forward_that_cannot_be_captured_is_tried_again_after_free_memory(tiny, prefilled, monkeypatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(Played, "failure", RuntimeError("operation not permitted when stream is capturing\nmore"))
    with sparsekv.patch(model, **SMALL) as patch:
        cache = prefilled(patch)
        with pytest.warns(UserWarning, match=r"its forward cannot be captured \(operation not permitted when stream"):
            loop(patch.decoder, cache, range(5, 8))
        monkeypatch.setattr(Played, "failure", None)
        loop(patch.decoder, cache, range(8, 11))
        assert patch.decoder.captures == 0
        assert "operation not permitted" in str(patch)
        patch.free_memory()
        loop(patch.decoder, cache, range(11, 14))
        assert (patch.decoder.captures, patch.decoder.refusal) == (1, None)


@pytest.mark.parametrize("change", [put_another_weight, move_the_weights])
def test_a_graph_is_not_replayed_over_weights_that_have_moved(change, tiny, prefilled, monkeypatch) -> None:
    """Where they were there may be no memory any more."""
    model, replayed = tiny("llama"), []
    before = [parameter.data for parameter in model.parameters()]
    replay = Played.replay
    monkeypatch.setattr(Played, "replay", lambda step, *rest: replayed.append(step) or replay(step, *rest))
    with sparsekv.patch(model, **SMALL) as patch:
        cache = prefilled(patch)
        loop(patch.decoder, cache, range(5, 9))
        change(model)
        replayed.clear()
        loop(patch.decoder, cache, range(9, 10))
        assert replayed == []
        loop(patch.decoder, cache, range(10, 13))
        assert (patch.decoder.captures, patch.decoder.refusal) == (2, None)
    assert before  # kept, so that nothing is put back to where it was


def test_graphs_thrown_away_within_a_loop_free_their_memory(tiny, prefilled) -> None:
    with sparsekv.patch(tiny("llama"), **SMALL) as patch:
        cache, run = prefilled(patch), Run()
        decoded(partial(patch.decoder, run), cache, range(5, 9))
        graph = ref(next(iter(patch.decoder._steps.values())))
        assert graph() in run.captured
        patch.free_memory()
        gc.collect()
        assert graph() is None
        assert len(run.captured) == len(run.verified) == 0


def test_every_device_has_a_stream_and_a_pool_of_its_own(tiny) -> None:
    with sparsekv.patch(tiny("llama"), **SMALL) as patch:
        decoder, devices = patch.decoder, [torch.device("cuda", i) for i in range(2)]
        sites = [decoder._site(device) for device in devices]
        assert [site.device for site in sites] == devices
        assert [decoder._site(device) for device in devices] == sites
        patch.free_memory()
        assert decoder._site(devices[0]) is not sites[0]


def test_budgets_by_layer_are_part_of_a_step(tiny, prefilled) -> None:
    """A fork with other budgets in the same pages is captured anew; each gives and counts what an eager one does."""
    model = tiny("llama")
    with sparsekv.patch(model, **SMALL | {"budget": {2: 64, "rest": 48}}) as patch:
        cache = prefilled(patch)
        for budget in ({2: 64, "rest": 48}, {2: 48, "rest": 64}, {2: 0.7, "rest": 48}, 48):
            ours, theirs = cache.fork(budget=budget), cache.fork(budget=budget)
            captures = patch.decoder.captures
            found, expected = loop(patch.decoder, ours, range(5, 11)), decoded(model, theirs, range(5, 11))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert patch.decoder.captures == captures + 1
            assert (ours.stats.as_dict(), ours.stats.shares) == (theirs.stats.as_dict(), theirs.stats.shares)
            assert len(set(ours.stats.shares.values())) == (2 if budget == 48 else 3)
