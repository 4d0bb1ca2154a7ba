"""Caches whose pages take fewer bits: every layer holds what the format leaves of its tokens, however they came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, Llama4TextConfig, LlamaConfig

from sparsekv.cache import PagedCache, tagged_layer
from sparsekv.digests import DIGESTS
from sparsekv.pages.formats import KEYS, VALUES, page_format

LENGTH, SCALING = 50, 0.3
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_size": 64}
MODELS = {
    "windows": (Gemma3TextConfig, {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}),
    "chunks": (
        Llama4TextConfig,
        {"attention_chunk_size": 20, "layer_types": ["chunked_attention", "full_attention"]},
    ),
}


def feed(cache: PagedCache, tokens: Tensor, query: Tensor) -> list[Any]:
    """One pass of keys and values `[2, layers, b, hkv, t, d]`; what each layer's attention gives."""
    found = []
    for i, (key, value) in enumerate(tokens.transpose(0, 1)):
        keys, values = cache.update(key, value, i)
        layer = tagged_layer(keys, values)
        assert layer is not None
        if key.shape[2] == 1:
            found.append(layer.decode(query, SCALING, 0.0, None))
        else:
            found.append(layer.prefill(query, keys, values, None, SCALING, is_plain=False))
    return found


def left_of(kv: str, tokens: Tensor) -> Tensor:
    """What a format leaves of keys and values `[2, ...]`."""
    kind, d = page_format(kv), tokens.shape[-1]
    halves = ((which, tokens[which].flatten(0, 1)) for which in (KEYS, VALUES))
    held = [kind.decode(kind.encode(x, None, which), d, x.dtype, which) for which, x in halves]
    return torch.stack(held).view(tokens.shape)


def assert_holds(cache: Any, tokens: Tensor, kv: str, window: int) -> None:
    """Bit for bit; of a window or a chunk, what the next token may see."""
    for layer, expected, start in zip(
        cache.layers, left_of(kv, tokens).transpose(0, 1), (1 - window, 0), strict=True
    ):
        for mine, theirs in zip((layer.keys, layer.values), expected, strict=True):
            assert torch.equal(mine, theirs[:, :, start:])


@pytest.mark.parametrize(("page_size", "d", "kv"), [(4, 8, "int8"), (16, 32, "int4"), (16, 32, "int8-int4")])
@pytest.mark.parametrize("kind", MODELS)
def test_layers_hold_what_the_format_leaves_however_tokens_came(kind: str, page_size: int, d: int, kv: str) -> None:
    """At once and one by one; what a fork does after it dropped some, into a full page, the other does not see."""
    make, settings = MODELS[kind]
    config, window = make(**HEADS, head_dim=d, **settings), 20
    tokens, query = torch.randn(2, 2, 2, 2, LENGTH, d), torch.randn(2, 4, 1, d)
    for cuts in ([LENGTH], [25, 1, 24], [35, *[1] * 15]):
        cache = PagedCache(config, kv=kv, page_size=page_size, budget=4096)
        cache.activate_past_recording()
        for part in tokens.split(cuts, -2):
            attended = feed(cache, part, query)
        assert_holds(cache, tokens, kv, window)
    seen = window if kind == "windows" else (LENGTH - 1) % window + 1
    for out, expected, count in zip(attended, left_of(kv, tokens).transpose(0, 1), (seen, LENGTH), strict=True):
        keys, values = expected[..., -count:, :].repeat_interleave(2, 2)
        weights = (query @ keys.transpose(-1, -2) * SCALING).softmax(-1)
        torch.testing.assert_close(out, weights @ values)
    fork, more = cache.fork(), torch.randn(2, 2, 2, 2, 9, d)
    fork.crop(-17)
    for part in more.split([6, 1, 1, 1], -2):
        feed(fork, part, query)
    assert_holds(fork, torch.cat([tokens[..., :-17, :], more], -2), kv, window)
    assert_holds(cache, tokens, kv, window)
    assert_holds(cache.to_dynamic(), tokens, kv, window)


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("digest", list(DIGESTS))
def test_digests_are_of_what_pages_hold_however_tokens_came(digest: str, kv: str) -> None:
    """Bit for bit those of plain pages of the rounded keys, in a fork that dropped some of a full page, too."""
    config = LlamaConfig(**HEADS | {"num_hidden_layers": 1}, head_dim=32)
    tokens, query, found = torch.randn(2, 1, 2, 2, LENGTH, 32), torch.randn(2, 4, 1, 32), []
    ways = [(kv, tokens, cuts) for cuts in ([LENGTH], [25, 1, 24], [35, *[1] * 15])]
    for name, states, cuts in [*ways, ("plain", left_of(kv, tokens), [LENGTH])]:
        cache = PagedCache(config, kv=name, digest=digest, budget=4096)
        for part in states.split(cuts, -2):
            feed(cache, part, query)
        fork = cache.fork()
        fork.crop(-9)
        stores = [x._store for x in (cache, fork)]
        found.append([f[x.table.pages_of(0)] for x in stores for f in x.layers[0].summary])
    for fields in found[:-1]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(fields, found[-1], strict=True))
