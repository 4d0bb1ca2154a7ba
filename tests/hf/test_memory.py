"""What a context takes is told before it is tried, and is what a cache of that size then takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import sparsekv
from sparsekv import ConfigError, SparseConfig
from sparsekv.cache import BesideState, StateLayer
from sparsekv.cli import main
from sparsekv.evaluation.testbed import MODEL_DIR
from sparsekv.hf import forecast
from sparsekv.hf.memory import GIB, forecast_memory, memory

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip


@pytest.mark.parametrize("kv", ["plain", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "mistral", "llama4_text", "deepseek_v3"])
def test_pages_and_digests_are_those_of_a_cache(family, kv, tiny) -> None:
    """Also of windows and chunks, of layers that read another's, and of latents."""
    model = tiny(family, **({"sliding_window": 8} if family == "mistral" else {}))
    settings = {"budget": 48, "page_size": 4, "recent": 4, "dense_layers": (0,), "kv": kv}
    with sparsekv.patch(model, **settings) as patch:
        told = patch.memory(152, 3)
        cache = patch.new_cache(reserve_tokens=3 * 152)
        model(torch.randint(3, 100, (3, 152)), past_key_values=cache)
        assert told.pages + told.digests == cache.nbytes
        assert (told.digests > 0) == (family != "mistral")
        assert told.weights == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        assert (told.limit, told.fits, told.longest) == (None, None, None)
        assert patch.memory(150, 3, limit=1).longest == 0


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "falcon_h1", "zamba2"])
def test_states_are_those_of_a_cache(family: str, hybrid) -> None:
    """Alone or beside keys and values."""
    model = hybrid(family)
    with sparsekv.patch(model, page_size=4) as patch:
        told = patch.memory(40, 3)
        cache = patch.new_cache(reserve_tokens=3 * 40)
        model(torch.randint(3, 100, (3, 40)), past_key_values=cache)
        states = [layer if isinstance(layer, StateLayer) else layer.state for layer in with_states(cache)]
        assert told.states == sum(x.nbytes for state in states for x in state.states) > 0
        assert told.pages + told.digests == cache.nbytes
        assert told.not_counted == 0
        assert "states" in str(told)


def with_states(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if isinstance(layer, StateLayer | BesideState)]


def test_what_is_not_in_pages_is_told(tiny, monkeypatch) -> None:
    """Layers of transformers' own cache, and states that model code makes by looking at numbers."""
    assert "not counted: 4 layers" in str(forecast_memory(tiny("diffllama").config, SparseConfig(), 100))
    monkeypatch.setattr(forecast, "without_weights", lambda config: 1 / 0)
    told = memory(tiny("qwen3_next"), SparseConfig(), 100)
    assert (told.not_counted, told.states) == (3, 0)


@pytest.mark.parametrize(("kv", "pages", "fits"), [("plain", 128, False), ("int8", 66, False), ("int4", 44, True)])
def test_eight_times_128k_of_8b_on_80_gib(kv: str, pages: int, fits: bool) -> None:
    told = forecast_memory(LLAMA_8B, SparseConfig(kv=kv), 128 << 10, 8, 80 * GIB)
    assert told.pages / GIB == pytest.approx(pages, rel=0.01)
    assert told.weights / GIB == pytest.approx(14.96, rel=0.01)
    assert told.fits == fits
    assert told.longest is not None
    at_most = forecast_memory(LLAMA_8B, SparseConfig(kv=kv), told.longest, 8, 80 * GIB)
    assert at_most.fits
    assert not forecast_memory(LLAMA_8B, SparseConfig(kv=kv), told.longest + 16, 8, 80 * GIB).fits


@pytest.mark.parametrize(("context", "batch", "message"), [(0, 1, "context=0"), (16, 0, "batch=0"), (1.5, 1, "1.5")])
def test_what_is_no_size_is_refused(context, batch, message) -> None:
    with pytest.raises(ConfigError, match=f"{message} must be a whole number, at least 1"):
        forecast_memory(LLAMA_8B, SparseConfig(), context, batch)


def test_doctor_tells_it_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["doctor", "--model", str(MODEL_DIR), "--context", "64k", "--batch", "2", "--kv", "int8", "--memory", "1"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "2 x 65,536 tokens, kv int8" in printed
    assert "does not fit 1.0 GiB" in printed
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == sum(told[name] for name in ("weights", "pages", "digests", "rest"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "8"], "--batch goes with --model"),
        (["--kv", "int8"], "--kv goes with --model, or with --compile"),
        (["--model", str(MODEL_DIR), "--memory", "-1"], "--memory=-1.0 must be more than 0 GiB"),
        (["--model", str(MODEL_DIR), "--kv", "int9"], "kv='int9' is not known"),
    ],
)
def test_doctor_says_what_is_wrong(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *options]) in (1, 2)
    assert message in capsys.readouterr().err
