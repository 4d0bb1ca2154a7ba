"""Layers with sliding windows, in pages of their own: what they give is what the unpatched model gives."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import sparsekv
from sparsekv.cache import WindowLayer
from sparsekv.errors import CacheStateError
from sparsekv.testing.consistency import assert_consistent

FULL: dict[str, Any] = {"budget": 4096, "page_size": 4, "dense_layers": 1}
LONG = 150  # more than a window and what is held beyond it
FAMILIES = ["gemma3_text", "gemma2", "gpt_oss", "mistral", "gemma3n_text", "llama4_text"]


@pytest.fixture(params=["gemma3_text", "llama4_text"])
def model(tiny, request) -> Any:
    """With sliding windows, and with chunks."""
    return tiny(request.param)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        ((5,), {"prefill_chunk_size": 2}),  # a chunk of one token, which looks like a decode step
        ((LONG,), {"prefill_chunk_size": 100}),
        ((LONG, 120, 5), {"prefill_chunk_size": 80}),
        ((33, 19, 1), {"num_beams": 2}),
    ],
    ids=str,
)
def test_generation_is_the_unpatched_model_s(family, lengths, settings, tiny, prompt, decode, assert_same) -> None:
    """In one pass and in chunks, also where a chunk is longer than all that is kept; padded; beams."""
    model = tiny(family, **({"sliding_window": 8} if family == "mistral" else {}))
    inputs, settings = prompt(*lengths), settings | {"max_new_tokens": 20}
    unpatched = decode(model, inputs, **settings)
    with sparsekv.patch(model, **FULL):
        patched = decode(model, inputs, **settings)
    assert_same(patched, unpatched)
    windows = [layer for layer in patched.past_key_values.layers if isinstance(layer, WindowLayer)]
    assert windows
    assert all(layer.is_paged for layer in windows)


def in_turns(decode: Callable[..., Any], model: Any, prompt: Callable[..., Any], cache: Any) -> list[Any]:
    """Three turns of three rows; later ones are padded on the right, and hide the end of an answer."""
    inputs, found = prompt(30, 21, 9), []
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for lengths in ((12, 9, 1), (90, 85, 20)):
        found.append(decode(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache))
        answered = torch.ones(3, found[-1].sequences.shape[1] - ids.shape[1], dtype=torch.int64)
        answered[1, -2:] = 0  # as if it had ended earlier
        more = prompt(*lengths)
        ids = torch.cat([found[-1].sequences, more["input_ids"].flip(1)], dim=1)
        mask = torch.cat([mask, answered, more["attention_mask"].flip(1)], dim=1)
    return [*found, decode(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)]


def test_padding_between_turns_counts_as_in_transformers(model, prompt, decode, assert_same) -> None:
    unpatched = in_turns(decode, model, prompt, DynamicCache(config=model.config))
    with sparsekv.patch(model, **FULL) as patch:
        patched = in_turns(decode, model, prompt, patch.new_cache())
    for ours, theirs in zip(patched, unpatched, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("length", [20, LONG])
@pytest.mark.parametrize("is_patched", [True, False], ids=["patched", "plain"])
def test_assisted_decoding(length, is_patched, model, prompt, decode, assert_same) -> None:
    """Rejected tokens are dropped: by the model after each pass, by a patched draft after several steps."""
    draft = copy.deepcopy(model)
    for parameter in draft.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    unpatched = decode(model, prompt(length), assistant_model=draft, max_new_tokens=30)
    if is_patched:
        sparsekv.patch(draft, **FULL)
    with sparsekv.patch(model, **FULL):
        assert_same(decode(model, prompt(length), assistant_model=draft, max_new_tokens=30), unpatched)


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    found: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    return found


@torch.no_grad()
def test_forks_copies_exports_and_rows_go_on_by_themselves(model) -> None:
    ids, more = torch.randint(3, 100, (2, 40)), torch.randint(3, 100, (2, 20))
    expected = logits(model, torch.cat([ids, more], dim=1), None)[:, -20:]

    def go_on(cache: Any) -> None:
        ours = torch.cat([logits(model, token, cache) for token in more.split(1, 1)], 1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)

    with sparsekv.patch(model, **FULL) as patch:
        logits(model, ids, cache := patch.new_cache())
        exported, other = cache.to_dynamic(), cache.fork()
        other.batch_select_indices([1, 0, 1])
        logits(model, torch.randint(3, 100, (3, 20)), other)
        fork = cache.fork()
        for each in (fork, copy.deepcopy(cache), cache):
            go_on(each)
        assert_consistent(cache._store, fork._store, other._store)
        cache.reset()
        logits(model, ids, cache)
        go_on(cache)
    go_on(exported)


@torch.no_grad()
def test_what_the_last_pass_brought_can_be_dropped_and_no_more(model) -> None:
    """A drop that a window cannot follow changes nothing, in no layer."""
    ids, more = torch.randint(3, 100, (1, LONG)), torch.randint(3, 100, (1, LONG))
    expected = logits(model, torch.cat([ids, more[:, :30]], dim=1), None)[:, -30:]
    with sparsekv.patch(model, **FULL) as patch:
        for recorded in (False, True):
            logits(model, ids, cache := patch.new_cache())
            if recorded:
                cache.activate_past_recording()
            logits(model, more, cache)
            cache.crop(-LONG)
            logits(model, more[:, :10], cache)
            cache.crop(-9)
            ours = [logits(model, token, cache) for token in more[:, 1:30].split(1, 1)]
            torch.testing.assert_close(torch.cat(ours, 1), expected[:, 1:], rtol=0, atol=1e-4)
            if recorded:
                cache.crop(-29)
                torch.testing.assert_close(logits(model, more[:, 1:30], cache), expected[:, 1:], rtol=0, atol=1e-4)
            else:
                with pytest.raises(CacheStateError, match="what is in the sliding window before them is gone"):
                    cache.crop(-29)
                assert [layer.get_seq_length() for layer in cache.layers] == [LONG + 30] * 4


@torch.no_grad()
def test_memory_does_not_grow_with_the_context(model) -> None:
    with sparsekv.patch(model, **FULL) as patch:
        cache, sizes = patch.new_cache(), []
        for t in (LONG, LONG, LONG, *[1] * 30, LONG):
            logits(model, torch.randint(3, 100, (2, t)), cache)
            (windows,) = cache._store.windows.values()
            sizes.append(windows.layers[0].nbytes)
            assert t > 1 or (windows.table.num_pages <= 3).all()  # of four tokens, for a window of eight
        assert len(set(sizes[1:])) == 1


@torch.no_grad()
def test_a_pass_that_broke_off_is_noticed(model, monkeypatch) -> None:
    """Here some layers have taken its tokens, and others none; what they took can be dropped."""
    ids = torch.randint(3, 100, (1, 21))
    expected = logits(model, ids, None)[:, -1:]
    with sparsekv.patch(model, **FULL) as patch:
        logits(model, ids[:, :20], cache := patch.new_cache())
        with monkeypatch.context() as broken:
            broken.setattr(model.model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                logits(model, ids[:, 20:], cache)
        with pytest.raises(CacheStateError, match="an earlier forward pass was interrupted"):
            logits(model, ids[:, 20:], cache)
        cache.crop(-2)  # of both attempts
        torch.testing.assert_close(logits(model, ids[:, 20:], cache), expected, rtol=0, atol=1e-4)


def test_the_report_and_the_counters_tell_of_windows(model, prompt, decode) -> None:
    with sparsekv.patch(model, **FULL) as patch:
        decode(model, prompt(40))
        assert re.search(r"layer 0: dense \((sliding window|chunks) of 8, in pages\)", str(patch))
    assert [status.is_in_place for status in patch.layers] == [True] * 4
    assert set(patch.stats.shares) == {0, 1, 2, 3}


@pytest.mark.parametrize(("kv", "loss"), [("int8", 0.03), ("int4", 0.3)])
@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text"])
def test_windows_in_fewer_bits(family, kv, loss, tiny, prompt, decode) -> None:
    """A row of a padded batch decodes as it does alone, and a prompt in chunks close to the unpatched model."""
    one_expert = {"num_local_experts": 1} if family == "llama4_text" else {}  # of several it may be another
    model, inputs = tiny(family, **one_expert), prompt(70, 45)
    unpatched = decode(model, inputs)
    with sparsekv.patch(model, **FULL, kv=kv) as patch:
        found, chunked = decode(model, inputs), decode(model, inputs, prefill_chunk_size=30)
        alone = decode(model, {name: x[1:, -45:] for name, x in inputs.items()})
        assert f"page_size 4, kv {kv})" in str(patch)
    assert torch.equal(found.sequences[1, 70:], alone.sequences[0, 45:])
    parts = found.past_key_values._store.parts
    assert {pages.kv.dtype for part in parts for pages in part.layers.values()} == {torch.uint8}
    for ours, theirs in ((chunked.logits[0], unpatched.logits[0]), (found.logits[1], unpatched.logits[1])):
        assert 0 < (ours - theirs).norm() < loss * theirs.norm()
