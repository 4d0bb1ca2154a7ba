"""A patched model trains exactly as it does unpatched."""

from __future__ import annotations

import pytest
import torch

import sparsekv
from sparsekv import CacheStateError

SMALL = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": 1}


def train(model, inputs) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Loss, logits and gradients of one step."""
    model.zero_grad()
    out = model(**inputs, labels=inputs["input_ids"])
    out.loss.backward()
    return out.loss, out.logits, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_training_is_not_touched(training, checkpointing, tiny, prompt) -> None:
    """Outputs, loss and gradients, with and without checkpointing, and also of a model left in eval mode."""
    model, inputs = tiny("llama").train(training), prompt(40, 33)
    if checkpointing:
        model.gradient_checkpointing_enable()
    theirs = train(model, inputs)
    with sparsekv.patch(model, **SMALL) as patch:
        ours = train(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))
    assert patch.stats.sparse_steps == patch.stats.dense_steps == 0


def test_generate_in_training_mode_is_the_models_own(tiny, prompt, decode, assert_same) -> None:
    model = tiny("llama").train()
    theirs = decode(model, prompt(40, 33))
    with sparsekv.patch(model, **SMALL) as patch:
        assert_same(decode(model, prompt(40, 33)), theirs)
    assert patch.stats.sparse_steps == patch.stats.dense_passes == 0


def test_a_paged_cache_in_training_mode_is_refused(tiny, prompt) -> None:
    model = tiny("llama").train()
    with sparsekv.patch(model) as patch:
        cache = patch.new_cache()
        with pytest.raises(CacheStateError, match=r"carries no gradients: call model.eval\(\)"):
            model(**prompt(40), past_key_values=cache)
        assert cache.get_seq_length() == 0
