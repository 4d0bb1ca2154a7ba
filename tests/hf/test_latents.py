"""Layers of latent attention, in pages: what they give is what the unpatched model gives, and they read sparsely."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import sparsekv
from sparsekv.cache import LatentLayer, layer_kinds
from sparsekv.digests import DIGESTS
from sparsekv.errors import CacheStateError
from sparsekv.hf.support import CACHE
from sparsekv.pages.formats import KEYS, page_format
from sparsekv.testing.consistency import assert_consistent
from tools.tiny_models import smallest

FULL: dict[str, Any] = {"budget": 4096, "page_size": 4, "dense_layers": 1}
SMALL: dict[str, Any] = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": 0}
FAMILIES = """
    axk1 bailing_hybrid deepseek_v2 glm4_moe_lite kimi_linear longcat_flash minicpm3 mistral4 sarvam_mla youtu
""".split()
RANK = 16  # of the tiny model's latents, whose rotary parts have 8 channels


@pytest.fixture
def model(tiny) -> Any:
    return tiny("deepseek_v3")


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    found: Tensor = model(ids, **{CACHE: cache}, use_cache=True).logits
    return found


def latent_layers(cache: Any) -> list[LatentLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LatentLayer)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        ((1,), {}),
        ((33,), {"prefill_chunk_size": 8}),  # the last is one token, which looks like a decode step
        ((40, 33, 3), {"prefill_chunk_size": 15}),
        ((33, 19, 1), {"num_beams": 2}),
    ],
    ids=str,
)
def test_generation_is_the_unpatched_model_s(lengths, settings, attention, tiny, prompt, decode, assert_same) -> None:
    model, inputs = tiny("deepseek_v3", attn_implementation=attention), prompt(*lengths)
    unpatched = decode(model, inputs, **settings)
    with sparsekv.patch(model, **FULL):
        patched = decode(model, inputs, **settings)
    assert_same(patched, unpatched)
    assert [layer.is_paged for layer in latent_layers(patched.past_key_values)] == [True] * 4


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in CONFIG_MAPPING])
def test_every_family_that_keeps_latents(family, prompt, decode, assert_same) -> None:
    model, inputs = smallest(family), prompt(21, 9)
    inputs["input_ids"] = inputs["input_ids"] % model.config.get_text_config().vocab_size
    unpatched = decode(model, inputs, max_new_tokens=4)
    with sparsekv.patch(model, **FULL | {"dense_layers": 0}) as patch:
        assert_same(patched := decode(model, inputs, max_new_tokens=4), unpatched)
    served = latent_layers(patched.past_key_values)
    assert served
    assert all(layer.is_paged for layer in served)
    assert all(status.is_sparse for status in patch.layers if status.kind == "LatentLayer")


def test_a_second_turn_and_assisted_decoding(model, prompt, decode, assert_same) -> None:
    """Several tokens after others; rejected ones are dropped. Later turns are padded on the right."""

    def turns(cache: Any) -> list[Any]:
        inputs = prompt(30, 21)
        first = decode(model, inputs, **{CACHE: cache})
        more = prompt(12, 7)
        ids = torch.cat([first.sequences, more["input_ids"].flip(1)], dim=1)
        new = torch.ones(2, first.sequences.shape[1] - 30, dtype=torch.int64)
        mask = torch.cat([inputs["attention_mask"], new, more["attention_mask"].flip(1)], dim=1)
        return [first, decode(model, {"input_ids": ids, "attention_mask": mask}, **{CACHE: cache})]

    draft = copy.deepcopy(model)
    for parameter in draft.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    unpatched = turns(DynamicCache(config=model.config)), decode(model, prompt(40), assistant_model=draft)
    with sparsekv.patch(model, **FULL) as patch:
        for ours, theirs in zip(turns(patch.new_cache()), unpatched[0], strict=True):
            assert_same(ours, theirs)
        assert_same(decode(model, prompt(40), assistant_model=draft), unpatched[1])


@torch.no_grad()
def test_forks_copies_exports_and_crops_go_on_by_themselves(model) -> None:
    ids, more = torch.randint(3, 100, (2, 40)), torch.randint(3, 100, (2, 9))
    expected = logits(model, torch.cat([ids, more], dim=1), None)[:, -9:]

    def go_on(cache: Any) -> None:
        ours = torch.cat([logits(model, token, cache) for token in more.split(1, 1)], 1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)

    plain = DynamicCache(config=model.config)
    logits(model, ids, plain)
    with sparsekv.patch(model, **FULL) as patch:
        logits(model, ids, cache := patch.new_cache())
        for ours, theirs in zip(cache.layers, plain.layers, strict=True):
            torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), rtol=0, atol=1e-5)
        exported, other, fork = cache.to_dynamic(), cache.fork(), cache.fork()
        other.batch_select_indices([1, 0, 1])
        logits(model, torch.randint(3, 100, (3, 5)), other)
        for each in (fork, copy.deepcopy(cache), cache):
            go_on(each)
        assert_consistent(cache._store, fork._store, other._store)
        cache.crop(-9)
        go_on(cache)
        cache.reset()
        logits(model, ids, cache)
        go_on(cache)
    go_on(exported)


@torch.no_grad()
@pytest.mark.parametrize(("kv", "loss"), [("int8", 0.02), ("int4", 0.4)])
def test_latents_in_fewer_bits(kv, loss, model) -> None:
    """They are what the format leaves of them, as one half; forks and exports go on from that."""
    ids, more, kind = torch.randint(3, 100, (2, 40)), torch.randint(3, 100, (2, 9)), page_format(kv)

    def steps(cache: Any) -> Tensor:
        return torch.cat([logits(model, token, cache) for token in more.split(1, 1)], 1)

    plain = DynamicCache(config=model.config)
    logits(model, ids, plain)
    first, expected = torch.cat([plain.layers[0].keys, plain.layers[0].values], -1), steps(plain)
    with sparsekv.patch(model, **FULL, kv=kv) as patch:
        logits(model, ids, cache := patch.new_cache())
        held = kind.decode(kind.encode(first, None, KEYS), RANK + 8, first.dtype, KEYS)
        assert torch.equal(torch.cat([cache.layers[0].keys, cache.layers[0].values], -1), held)
        fork, exported = cache.fork(), cache.to_dynamic()
        ours = steps(cache)
        assert torch.equal(steps(fork), ours)
        fork.crop(-9)
        assert torch.equal(steps(fork), ours)
        assert_consistent(cache._store, fork._store)
    for found in (ours, steps(exported)):
        assert 0 < (found - expected).norm() < loss * expected.norm()


def naive_step(module: Any, query: Tensor, latent: Tensor, rotary: Tensor, visible: Tensor) -> Tensor:
    """One row's attention to the keys that `kv_b_proj` makes of the latents of the pages with the best bounds, in
    float64: query `[hq, d]`, latent `[n, rank]`, rotary `[n, rotary]`, visible `[n]` -> `[hq, dv]`."""
    query, latent, rotary = query.double(), latent.double(), rotary.double()
    weight = module.kv_b_proj.weight.double().view(len(query), -1, RANK)
    to_key, to_value = weight.split([module.qk_nope_head_dim, module.v_head_dim], dim=1)
    pages = visible.nonzero().flatten().split(SMALL["page_size"])
    absorbed = torch.stack([torch.cat([to_key[h].T @ q[:-8], q[-8:]]) for h, q in enumerate(query)])
    scores = []
    for i, page in enumerate(pages):
        both = torch.cat([latent[page], rotary[page]], dim=1)
        bound = torch.maximum(absorbed * both.amin(0), absorbed * both.amax(0)).sum(1).max().item()
        forced = i == 0 or (i + 1) * SMALL["page_size"] > int(visible.sum()) - SMALL["recent"]
        scores.append(float("inf") if forced else bound)
    best = sorted(range(len(pages)), key=lambda i: -scores[i])[: SMALL["budget"] // SMALL["page_size"]]
    chosen = torch.cat([pages[i] for i in sorted(best)])
    out = []
    for h, q in enumerate(query):
        keys = torch.cat([latent[chosen] @ to_key[h].T, rotary[chosen]], dim=1)
        out.append((keys @ q * module.scaling).softmax(0) @ (latent[chosen] @ to_value[h].T))
    return torch.stack(out).float()


@pytest.mark.parametrize("lengths", [(40,), (40, 33, 3)], ids=str)
def test_a_step_is_attention_to_the_chosen_pages(
    lengths, model, prompt, decode, assert_same, distance, monkeypatch
) -> None:
    """Against a loop that expands what it has chosen by its own bounds; one selection for all heads of a layer. A
    patched step expands the new token alone, and counts what it read."""
    naive, inputs, cache = copy.deepcopy(model), prompt(*lengths), DynamicCache(config=model.config)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if query.shape[2] > 1:
            return nn.functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=kwargs["scaling"]
            ).transpose(1, 2), None
        layer, visible = cache.layers[module.layer_idx], torch.ones(len(query), key.shape[2], dtype=torch.bool)
        visible = visible if mask is None else mask[:, 0, -1]
        rows = zip(query[:, :, 0], layer.keys[:, 0], layer.values[:, 0], visible, strict=True)
        return torch.stack([naive_step(module, *row) for row in rows])[:, None], None

    monkeypatch.setitem(AttentionInterface._global_mapping, "naive", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "naive", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    naive.set_attn_implementation("naive")
    unpatched, expected = decode(model, inputs), decode(naive, inputs, **{CACHE: cache})
    kind, expanded = type(model.model.layers[0].self_attn), []
    own = kind.expand_kv
    monkeypatch.setattr(kind, "expand_kv", lambda *args: expanded.append(args[1].shape[2]) or own(*args))
    with sparsekv.patch(model, **SMALL, digest="minmax") as patch:
        patched = decode(model, inputs)
    assert_same(patched, expected)
    assert distance(patched, unpatched) > 0.1
    assert expanded == [40] * 4 + [1] * 4 * 7
    assert (patch.stats.sparse_steps, patch.stats.dense_steps, patch.stats.dense_passes) == (7, 0, 1)
    lengths_of_steps = [n + i for n in lengths for i in range(1, 8)]
    assert patch.stats.pages_total == 4 * sum(-(-n // 4) for n in lengths_of_steps)
    assert patch.stats.pages_read == 4 * sum(min(4, -(-n // 4)) for n in lengths_of_steps)
    assert patch.stats.bytes_total == patch.stats.pages_total * 4 * (RANK + 8) * 4  # once, not as keys and values


@pytest.mark.parametrize("other", [{"policy": "oracle"}, *({"digest": name} for name in DIGESTS)], ids=str)
def test_other_digests_and_policies(other, model, prompt, decode) -> None:
    with sparsekv.patch(model, **SMALL | other) as patch:
        decode(model, prompt(40, 9))
    assert patch.stats.sparse_steps == 7
    assert 0 < patch.stats.pages_read < patch.stats.pages_total


class Adapted(nn.Module):
    """A linear layer with something added, as LoRA does it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.added = linear, nn.Parameter(0.1 * torch.randn_like(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.added.T


def test_maps_that_are_no_plain_weights(model, prompt, decode, assert_same) -> None:
    """They are found anew at every step, so that what is changed in between counts."""
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Adapted(layer.self_attn.kv_b_proj)
    for _ in range(2):
        unpatched = decode(model, prompt(40, 33))
        with sparsekv.patch(model, **FULL) as patch:
            assert_same(decode(model, prompt(40, 33)), unpatched)
        assert all(status.is_in_place for status in patch.layers)
        with torch.no_grad():
            model.model.layers[2].self_attn.kv_b_proj.added.mul_(3)


@pytest.mark.parametrize("wrong", ["keys", "values", "rotary"])
def test_maps_that_are_not_linear_leave_a_layer_dense(wrong, model, prompt, decode, assert_same, monkeypatch) -> None:
    """Only the first use can tell; what the layer gives is right all the same."""
    kind = type(model.model.layers[0].self_attn)
    own = kind.expand_kv

    def expand_kv(module: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        key, value = own(module, latent, rotary)
        if wrong == "values":
            return key, value.tanh()
        if wrong == "rotary":
            return torch.cat([key[..., :-8], key[..., -8:].tanh()], dim=-1), value
        return torch.cat([key[..., :-8].tanh(), key[..., -8:]], dim=-1), value

    monkeypatch.setattr(kind, "expand_kv", expand_kv)
    unpatched = decode(model, prompt(40, 33))
    unknown = pytest.warns(UserWarning, match="decodes densely: its keys and values are not what its `kv_b_proj`")
    with sparsekv.patch(model, **SMALL) as patch, unknown:
        assert_same(decode(model, prompt(40, 33)), unpatched)
    assert not any(status.is_in_place for status in patch.layers)
    assert patch.stats.sparse_steps == 0


@torch.no_grad()
def test_a_module_that_brings_other_keys_is_noticed(model, monkeypatch) -> None:
    """Of a step it has been given the newest alone: to go on would be wrong."""
    with sparsekv.patch(model, **SMALL) as patch:
        logits(model, torch.randint(3, 100, (1, 20)), cache := patch.new_cache())
        kind = type(model.model.layers[0].self_attn)
        own = kind.expand_kv
        monkeypatch.setattr(kind, "expand_kv", lambda self, *x: own(self, *(y.repeat(1, 1, 2, 1) for y in x)))
        with pytest.raises(CacheStateError, match="Layer 0 cannot go on sparsely"):
            logits(model, torch.tensor([[5]]), cache)


def test_model_code_that_expands_before_the_cache_runs_dense_and_says_so(
    model, prompt, decode, assert_same, monkeypatch
) -> None:
    unpatched = decode(model, prompt(40))
    monkeypatch.setattr(layer_kinds, "_keeps_latents", lambda config_class: False)
    with pytest.warns(UserWarning, match="latent attention: its keys and values are expanded before the cache"):
        patch = sparsekv.patch(model, **FULL)
    assert_same(decode(model, prompt(40)), unpatched)
    assert [status.kind for status in patch.layers] == [None] * 4


def test_it_is_told_beforehand(model) -> None:
    told = sparsekv.supports(model, dense_layers=1)
    assert [(x.count, x.decodes, x.is_asked_for) for x in told.layers] == [(1, "dense", True), (3, "sparse", False)]
    assert (told.verdict, told.why_eager) == ("sparse", None)
