"""prefill="sparse" in patched models: where it reads less, where prompts stay dense, and that cuts and padding do not
matter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekv
from sparsekv.cache.prompt_blocks import BLOCK_TOKENS

ROUNDING = 1e-3  # of float32 logits, which are about 10
SETTINGS: dict[str, Any] = {"policy": "all", "prefill": "sparse"}
LENGTH = 6 * BLOCK_TOKENS


def random_ids(rows: int = 1) -> Tensor:
    return torch.randint(3, 100, (rows, LENGTH))


@torch.no_grad()
def logits(model: Any, ids: Tensor, cuts: tuple[int, ...] = (), **inputs: Any) -> Tensor:
    """Of all tokens, in passes that end at the cuts."""
    past, found = None, []
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        shown = {name: x[:, :end] if name == "attention_mask" else x[:, start:end] for name, x in inputs.items()}
        out = model(ids[:, start:end], past_key_values=past, **shown)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.fixture
def long(tiny) -> Callable[[str], Any]:
    """A model of a type, with room for the prompt."""
    return lambda family: tiny(family, max_position_embeddings=2 * LENGTH)


@pytest.fixture
def model(long) -> Any:
    return long("llama")


def test_it_reads_less_and_all_of_the_mass_is_dense(model) -> None:
    ids = random_ids()
    dense = logits(model, ids)
    with sparsekv.patch(model, **SETTINGS, prefill_mass=1.0) as patch:
        torch.testing.assert_close(logits(model, ids), dense, rtol=0, atol=ROUNDING)
    with sparsekv.patch(model, **SETTINGS, prefill_mass=0.2, dense_layers=1) as patch:
        assert "sparse prompts of mass 0.2" in str(patch)
        found = logits(model, ids)
        assert set(patch.stats.prefill.densities) == {1, 2, 3}  # the first one reads everything, prompts too
        assert 0.5 < patch.stats.prefill.density < 0.95
    assert float((found - dense).abs().max()) > 1


def test_neither_cuts_between_blocks_nor_padding_matter(model) -> None:
    """But for the last tokens before a cut, which see all."""
    ids, other = random_ids(2).split(1)
    real = torch.ones(2, LENGTH + 40, dtype=torch.long)
    real[0, :40], real[1, :100] = 0, 0
    padded = torch.cat([torch.nn.functional.pad(ids, (40, 0)), torch.nn.functional.pad(other, (40, 0))])
    with sparsekv.patch(model, **SETTINGS, prefill_mass=0.3):
        alone = logits(model, ids)
        cut = logits(model, ids, (3 * BLOCK_TOKENS,))
        batch = logits(model, padded, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0))
    torch.testing.assert_close(batch[:1, 40:], alone, rtol=0, atol=ROUNDING)
    until = 2 * BLOCK_TOKENS
    torch.testing.assert_close(cut[:, :until], alone[:, :until], rtol=0, atol=ROUNDING)


def test_sliding_layers_are_their_windows(long) -> None:
    model, ids = long("gemma3_text"), random_ids()
    with sparsekv.patch(model, **SETTINGS, prefill_mass=0.2) as patch, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits(model, ids)
    kinds = model.config.layer_types
    assert set(patch.stats.prefill.densities) == {i for i, kind in enumerate(kinds) if kind == "full_attention"}


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "deepseek_v3"])
def test_where_it_means_nothing_prompts_are_dense_and_it_is_said(family: str, long) -> None:
    """Sinks, softcaps, latents."""
    model, ids = long(family), random_ids()[:, : 3 * BLOCK_TOKENS]
    dense = logits(model, ids)
    with sparsekv.patch(model, **SETTINGS) as patch:
        with pytest.warns(UserWarning, match="a prompt is read densely"):
            found = logits(model, ids)
        assert patch.stats.prefill.densities == {}
    torch.testing.assert_close(found, dense, rtol=0, atol=ROUNDING)


def test_a_short_pass_sees_all(model) -> None:
    """As the question after a document, or a verification."""
    ids = random_ids()
    cut = LENGTH - BLOCK_TOKENS + 1
    with sparsekv.patch(model, **SETTINGS, prefill_mass=0.2) as patch:
        with torch.no_grad():
            cache = model(ids[:, :cut]).past_key_values
            before = patch.stats.prefill
            model(ids[:, cut:], past_key_values=cache)
        assert patch.stats.prefill == before


def test_gradients_flow(model) -> None:
    ids = random_ids()
    with sparsekv.patch(model, **SETTINGS, prefill_mass=0.2) as patch:
        model(ids).logits.sum().backward()
        assert patch.stats.prefill.density < 1
    assert float(model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum()) > 0
