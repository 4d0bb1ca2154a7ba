"""How much memory a cache is given before the first token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparsekv
from sparsekv.hf import generation

PROMPT, AHEAD = 100_000, generation.AHEAD


def reserved(
    prompt: int | None, batch_size: int = 1, device: str = "cuda", columns: str = "", **settings: Any
) -> int:
    """Of a model on a GPU, though there is none."""
    known = {"max_new_tokens": None, "num_beams": 1, "num_return_sequences": 1, "cache_implementation": None}
    config = SimpleNamespace(**known | settings)
    arguments = (
        {} if prompt is None else {columns or "attention_mask": torch.empty(batch_size, prompt, device="meta")}
    )
    model: Any = SimpleNamespace(device=torch.device(device))
    return generation._reserved(model, config, arguments, batch_size, config.max_length - 1)


@pytest.mark.parametrize("columns", ["attention_mask", "position_ids"])
def test_the_prompt_and_some_tokens_more_however_the_end_is_given(columns) -> None:
    """A step that is captured stays where it is for AHEAD tokens, and nothing is reserved that cannot come."""
    for settings in ({}, {"max_new_tokens": 31_072}):
        assert reserved(PROMPT, max_length=131_072, columns=columns, **settings) == PROMPT + AHEAD
    for settings in ({}, {"max_new_tokens": 100}):
        assert reserved(PROMPT, max_length=PROMPT + 100, columns=columns, **settings) == PROMPT + 99


def test_a_prompt_that_only_the_lengths_tell() -> None:
    assert reserved(None, max_length=131_072, max_new_tokens=31_072) == PROMPT + AHEAD
    assert reserved(None, max_length=131_072) == AHEAD


def test_all_sequences_are_counted() -> None:
    assert reserved(50, batch_size=3, max_length=100) == 3 * 99
    assert reserved(50, batch_size=3, max_length=100, num_return_sequences=4) == 12 * 99


def test_none_for_beams_which_share_pages_and_without_a_gpu() -> None:
    assert reserved(50, max_length=100, num_beams=3) == 0
    assert reserved(50, max_length=100, device="cpu") == 0


def test_all_of_a_static_cache() -> None:
    wanted = {"cache_implementation": "static", "max_length": 131_072}
    assert reserved(50, device="cpu", **wanted) == reserved(50, **wanted) == 131_071
    assert reserved(50, num_beams=3, **wanted) == 3 * 131_071


@pytest.mark.parametrize("length", [{"max_length": 60}, {"max_new_tokens": 20}], ids=str)
def test_generate_tells_how_long_the_prompt_is(length, tiny, prompt, monkeypatch) -> None:
    """By a mask or by positions, in every version of transformers."""
    seen: list[int] = []
    columns = generation._columns

    def spy(arguments: dict[str, Any]) -> Any:
        found = columns(arguments)
        seen.append(-1 if found is None else found.shape[-1])
        return found

    monkeypatch.setattr(generation, "_columns", spy)
    with sparsekv.patch(tiny("llama"), budget=64, page_size=4, recent=8) as patch:
        for lengths in ((40,), (40, 33)):
            patch.model.generate(**prompt(*lengths), do_sample=False, **length)
    assert set(seen) == {40}
