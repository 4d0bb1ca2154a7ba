"""Another choice of prompt blocks: one method of a policy, which the layers' prefill follows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekv
from sparsekv.cache import prompt_blocks
from sparsekv.cache.stats import PrefillStats
from sparsekv.errors import ConfigError
from sparsekv.policies import POLICIES, DecodeStep, Policy, PromptChunk

NUM_LAST, BLOCK = 2, prompt_blocks.BLOCK_TOKENS
SMALL: dict[str, Any] = {"policy": "ends", "budget": 4096, "page_size": 4, "dense_layers": 0}
LENGTH = 600


class Ends(Policy):
    """A prompt sees its first block, and the last two."""

    def select(self, step: DecodeStep) -> None:
        return None

    def prompt_blocks(self, chunk: PromptChunk) -> Tensor:
        queries = torch.arange(chunk.num_query_blocks)[:, None] + chunk.first_block
        keys = torch.arange(chunk.num_key_blocks)
        seen = (keys == 0) | (keys > queries - NUM_LAST)
        return seen.expand(chunk.query.shape[0], chunk.key.shape[1], -1, -1)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    POLICIES.register("ends")(Ends)
    yield
    POLICIES.remove("ends")


def tiny(implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation=implementation)).eval()


def visible(real: Tensor) -> Tensor:
    """The equivalent mask, `[b, 1, n, n]` bool, of which blocks count from each row's first token."""
    position = real.cumsum(1) - 1
    query, key = position[:, :, None], position[:, None]
    near = (key < BLOCK) | (key // BLOCK > query // BLOCK - NUM_LAST)
    return ((key <= query) & near & real[:, None])[:, None]


@torch.no_grad()
def logits(
    model: Any, ids: Tensor, real: Tensor, sizes: tuple[int, ...] = (LENGTH,), mask: Tensor | None = None
) -> Tensor:
    """Of all tokens, after passes over so many columns each; `mask`: one in four dimensions instead of `real`."""
    past, found, end = None, [], 0
    positions = (real.cumsum(1) - 1).clamp_min(0)
    for size in sizes:
        start, end = end, end + size
        part = slice(start, end)
        shown = real[:, :end].long() if mask is None else mask
        out = model(ids[:, part], attention_mask=shown, position_ids=positions[:, part], past_key_values=past)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def prompt(*lengths: int) -> tuple[Tensor, Tensor]:
    """Ids, and which are no padding, `[b, n]`."""
    real = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]
    return torch.randint(3, 100, real.shape), real


@pytest.mark.parametrize("sizes", [(600,), (128, 256, 216), (200, 114, 286)], ids=str)
@pytest.mark.parametrize("lengths", [(600,), (600, 600), (600, 422, 140)], ids=str)
def test_a_prompt_sees_the_chosen_blocks(lengths: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Whole and in chunks that begin and end within blocks, padded or not."""
    model, (ids, real) = tiny(), prompt(*lengths)
    equivalent = visible(real) | torch.eye(LENGTH, dtype=torch.bool)  # so that padding sees something
    expected, dense = logits(model, ids, real, mask=equivalent)[real], logits(model, ids, real)[real]
    with sparsekv.patch(model, **SMALL) as patch, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = logits(model, ids, real, sizes)[real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((expected - dense).abs().max()) > 0.1
    assert patch.stats.dense_passes == len(sizes)


def test_the_counters_say_what_was_computed() -> None:
    """Of five blocks' fifteen, twelve; a layer that reads everything is not asked."""
    model, (ids, real) = tiny(), prompt(LENGTH)
    with sparsekv.patch(model, **SMALL | {"dense_layers": 1}) as patch:
        logits(model, ids, real)
        assert patch.stats.prefill == PrefillStats(2 * 12, 2 * 15, {1: 12 / 15})
        assert "80.0% of prompts' blocks" in repr(patch.stats)
        patch.stats.reset()
        assert patch.stats.prefill.density == 1


def test_heads_may_see_blocks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is later, or its own block, a policy need not think of."""

    def by_head(self: Policy, chunk: PromptChunk) -> Tensor:
        shape = 1, 4, chunk.num_query_blocks, chunk.num_key_blocks
        return (torch.arange(4)[:, None, None] + torch.arange(shape[-1])).remainder(3).eq(0).expand(shape)

    monkeypatch.setattr(Ends, "prompt_blocks", by_head)
    model, (ids, real) = tiny(), prompt(LENGTH)
    block, causal = torch.arange(LENGTH) // BLOCK, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    chosen = (torch.arange(4)[:, None, None] + block).remainder(3).eq(0) | (block == block[:, None])
    expected = logits(model, ids, real, mask=(chosen & causal)[None])
    with sparsekv.patch(model, **SMALL):
        torch.testing.assert_close(logits(model, ids, real), expected, rtol=0, atol=1e-4)


def test_none_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ends, "prompt_blocks", lambda self, chunk: None)
    model, (ids, real) = tiny(), prompt(LENGTH, 240)
    expected = logits(model, ids, real)[real]
    with sparsekv.patch(model, **SMALL) as patch:
        found = logits(model, ids, real, (170, 430))[real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert patch.stats.prefill.density == 1


@pytest.mark.parametrize(("implementation", "reason"), [("eager", "not sdpa's"), ("sdpa", "a mask of its own")])
def test_what_cannot_be_honoured_is_dense_and_says_so_once(implementation: str, reason: str) -> None:
    model, (ids, real) = tiny(implementation), prompt(LENGTH)
    mask = None if implementation == "eager" else (torch.ones(LENGTH, LENGTH).tril(7) > 0)[None, None]
    expected = logits(model, ids, real, mask=mask)
    with sparsekv.patch(model, **SMALL) as patch:
        with pytest.warns(UserWarning, match=reason) as warned:
            found = [logits(model, ids, real, mask=mask) for _ in range(2)]
        assert "a prompt is read densely, whatever policy 'ends' chooses of it: " in str(patch)
    assert sum(reason in str(each.message) for each in warned) == 1
    for each in found:
        torch.testing.assert_close(each, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", [torch.ones(1, 2, 5, 4) > 0, torch.ones(1, 2, 5, 5)], ids=["shape", "dtype"])
def test_what_is_no_choice_of_blocks_is_an_error(wrong: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ends, "prompt_blocks", lambda self, chunk: wrong)
    model, inputs = tiny(), prompt(LENGTH)
    with sparsekv.patch(model, **SMALL), pytest.raises(ConfigError, match=r"Give \(1, 2, 5, 5\) or \(1, 4, 5, 5\)"):
        logits(model, *inputs)
