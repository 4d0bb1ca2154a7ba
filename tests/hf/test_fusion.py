"""Which parts of a model are fused, and that nothing of it stays."""

import sys

import pytest
import torch

from sparsekv.hf import fusion


@pytest.mark.parametrize(
    ("family", "norms", "rotary"),
    [("llama", ["LlamaRMSNorm"], 1), ("qwen3", ["Qwen3RMSNorm"], 1), ("opt", [], 0), ("gpt2", [], 0)],
)
def test_small_parts(family: str, norms: list[str], rotary: int, tiny) -> None:
    parts = fusion.small_parts(tiny(family))
    assert [owner.__name__ for owner, name in parts if name == "forward"] == norms
    assert len([owner for owner, name in parts if name == "apply_rotary_pos_emb"]) == rotary


def test_nothing_stays(tiny, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error; within, what is compiled is called."""
    called = []
    monkeypatch.setattr(fusion, "_compiled", {})
    monkeypatch.setattr(
        torch, "compile", lambda function, options: lambda *args: called.append(function) or function(*args)
    )
    model = tiny("llama")
    file, norm = sys.modules[type(model).__module__], type(model.model.norm)
    before = norm.forward, file.apply_rotary_pos_emb
    expected = model(**prompt(9)).logits
    with fusion.fused(model):
        assert torch.equal(model(**prompt(9)).logits, expected)
    assert (norm.forward, file.apply_rotary_pos_emb) == before
    with pytest.raises(TypeError), fusion.fused(model):
        model(input_ids="no tokens")
    assert (norm.forward, file.apply_rotary_pos_emb) == before
    assert set(called) == set(before)
