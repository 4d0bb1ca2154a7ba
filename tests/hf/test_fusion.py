"""Which parts of a model are replaced by one kernel each, and that they compute the same."""

import sys

import pytest
import torch

from sparsekv.errors import KernelError
from sparsekv.hf import fusion


@pytest.mark.parametrize(
    ("family", "norms", "rotary"),
    [
        ("llama", ["LlamaRMSNorm"], 1),
        ("qwen3", ["Qwen3RMSNorm"], 1),
        ("olmo2", ["Olmo2RMSNorm"], 1),
        ("gemma2", [], 1),  # its norms multiply by one plus the weight
        ("glm4", ["Glm4RMSNorm"], 0),  # its channels turn with their neighbours
        ("opt", [], 0),
        ("gpt2", [], 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_replaced(family: str, norms: list[str], rotary: int, dtype: torch.dtype, tiny) -> None:
    found = list(fusion.replacements(tiny(family).to(dtype)))
    assert [owner.__name__ for owner, name, _ in found if name == "forward"] == norms
    assert len([owner for owner, name, _ in found if name == "apply_rotary_pos_emb"]) == rotary


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_the_same_logits_and_nothing_stays(family: str, tiny, prompt) -> None:
    """Also after an error."""
    model = tiny(family)
    file, norm = sys.modules[type(model).__module__], type(model.model.norm)
    before = norm.forward, file.apply_rotary_pos_emb
    expected, state = model(**prompt(9)).logits, torch.get_rng_state()
    with fusion.fused(model):
        assert file.apply_rotary_pos_emb is not before[1]
        torch.testing.assert_close(model(**prompt(9)).logits, expected)
    assert (norm.forward, file.apply_rotary_pos_emb) == before
    with pytest.raises(TypeError), fusion.fused(model):
        model(input_ids="no tokens")
    assert (norm.forward, file.apply_rotary_pos_emb) == before
    assert torch.equal(torch.get_rng_state(), state)  # sampling goes on with the numbers it would have had


def test_a_changed_part_is_left_alone(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user has put in the place of a norm is not what the replacement computes."""
    model = tiny("llama")
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: 2 * x)
    assert [name for _, name, _ in fusion.replacements(model)] == ["apply_rotary_pos_emb"]


def test_a_kernel_that_fails_is_heard(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a norm that computes something else."""

    def fail(original: object) -> object:
        def forward(module: object, x: object) -> None:
            raise KernelError("a test")

        return forward

    monkeypatch.setattr(fusion, "_norm", fail)
    with pytest.raises(KernelError, match="a test"):
        list(fusion.replacements(tiny("llama")))
