"""How much fits on a device, against what a cache really takes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparsekv
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.room import MAX_AT_ONCE, batch_tokens, token_nbytes, tokens_at_once


@pytest.fixture(scope="module")
def model() -> Any:
    return testbed.load()[0]


@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
def test_a_token_takes_what_its_pages_take(digest: str, model: Any) -> None:
    with sparsekv.patch(model, digest=digest, dense_layers=0) as patch, torch.inference_mode():
        cache = patch.new_cache()
        model(torch.full((1, 64), 5), past_key_values=cache)
    pages = cache._store.layers.values()
    heads = sum(2 * (layer.page_nbytes + layer.digest_nbytes) for layer in pages)
    assert token_nbytes(model, (digest,), 16) == heads / 16


def test_a_batch_on_a_gpu_fits_its_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(device=torch.device("cuda"), config=model.config, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))
    assert 0.5 < batch_tokens(fake, ("minmax",), 16) * token_nbytes(fake, ("minmax",), 16) / (1 << 30) < 0.7


def test_wide_models_read_fewer_tokens_at_once(model: Any) -> None:
    assert tokens_at_once(model) == MAX_AT_ONCE
    wide = SimpleNamespace(hidden_size=4096, intermediate_size=14336)
    fake = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: wide), dtype=torch.bfloat16)
    assert 1 << 16 < tokens_at_once(fake) < 1 << 18
