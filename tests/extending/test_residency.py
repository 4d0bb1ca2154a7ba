"""A residency: one class, and nothing in the package that names it."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekv
from sparsekv import ConfigError, UnknownNameError
from sparsekv.hf.capture.decoder import CapturedDecoder
from sparsekv.pages.residency import RESIDENCIES
from sparsekv.testing.cache_pair import CachePair

InDict = runpy.run_path(str(Path(__file__).with_name("host_pages.py")))["InDict"]
SETTINGS: dict[str, Any] = {"budget": 16, "page_size": 4, "sinks": 4, "recent": 4, "dense_layers": 0}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    RESIDENCIES.register("dict")(InDict)
    yield
    RESIDENCIES.remove("dict")


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.5)).eval()


def generated(model: LlamaForCausalLM, residency: str, **options: Any) -> tuple[Tensor, sparsekv.PagedCache]:
    """A padded prompt; then, on cropped and forked caches, another turn."""
    torch.manual_seed(0)
    tokens, mask = torch.randint(1, 50, (2, 43)), torch.ones(2, 43, dtype=torch.int64)
    mask[0, :7] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options}
    with sparsekv.patch(model, residency=residency, **SETTINGS):
        out = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **options)
    return out.sequences, out.past_key_values


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_model_generates_the_same_wherever_its_pages_lie(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    tokens, cache = generated(model, "dict", **options)
    expected, on_device = generated(model, "device", **options)
    assert torch.equal(tokens, expected)
    assert cache.stats.as_dict() == on_device.stats.as_dict()
    assert cache.stats.sparse_steps > 0
    pages = cache._store.layers[0]
    assert (pages.kv.nbytes, pages.page_nbytes) == (0, on_device._store.layers[0].page_nbytes)
    assert 0 < pages.residency.nbytes < pages.nbytes


@pytest.mark.parametrize("policy", ["top_k", "oracle", "all"])
@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
def test_a_cache_holds_the_same_through_crop_fork_and_beams(digest: str, policy: str) -> None:
    pair = CachePair(residency="dict", digest=digest, policy=policy, **SETTINGS)
    pair.forward(30, 3, torch.arange(30) >= torch.tensor([[0], [11], [29]]))
    pair.forward(1)
    fork = pair.fork()
    for turn in (pair, fork):
        turn.reorder(torch.tensor([1, 1, 0]))
        turn.forward(1)
        turn.crop(3)
        turn.forward(6)
        read: list[Tensor | None] = []
        turn.paged.observers.append(lambda step, slots, read=read: read.append(slots))
        for layer_idx, out in enumerate(turn.forward(1)):
            torch.testing.assert_close(out.double(), turn.attention(layer_idx, read[layer_idx]), rtol=1e-4, atol=1e-5)
        pair.check(fork)
    with pytest.raises(ConfigError, match="residency must stay 'dict'"):
        pair.paged.fork(residency="device")


def test_a_step_fetches_the_listed_pages_and_no_others() -> None:
    pair = CachePair(residency="dict", **SETTINGS)
    pair.forward(101, 2, torch.arange(101) >= torch.tensor([[0], [40]]))
    seen = []
    pair.paged.observers.append(lambda step, slots: seen.append((step.block_table, slots)))
    for pages in pair.paged._store.layers.values():
        pages.residency.fetched.clear()
    pair.forward(1)
    for (table, slots), pages in zip(seen, pair.paged._store.layers.values(), strict=True):
        listed = {int(table[row, slot]) for row in range(2) for slot in slots[row].flatten() if slot >= 0}
        assert set(pages.residency.fetched) == listed
        assert len(listed) < int(pair.paged._store.table.total_pages)


def test_fetching_is_not_captured_and_a_wrong_name_is_an_error(model: LlamaForCausalLM) -> None:
    decoder = CapturedDecoder(model, sparsekv.SparseConfig(residency="dict"), [])
    assert "residency 'dict'" in str(decoder.why_eager(torch.device("cuda", 0)))
    with pytest.raises(UnknownNameError, match="residency='disk' is not known"):
        sparsekv.patch(model, residency="disk")
