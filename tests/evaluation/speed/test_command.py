"""`speed.measure`, as the notebooks call it, and layers like those of a model that is named."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from sparsekv.errors import ConfigError
from sparsekv.evaluation import speed
from sparsekv.evaluation.speed.geometry import Geometry


def test_a_measurement_from_python_is_what_json_prints(capsys: pytest.CaptureFixture[str]) -> None:
    found = speed.measure("attention --device cpu --contexts 1k 2k --budget 256 --repeats 1")
    assert [row["context"] for row in found["rows"]] == [1024, 2048]
    assert found["rows"][0] | {"batch": 1, "budget": 256} == found["rows"][0]
    assert found["command"].startswith("sparsekv bench attention --device cpu")
    assert "1 x 2k" in capsys.readouterr().out


def test_an_option_that_is_not_allowed_is_an_error_in_python_too() -> None:
    with pytest.raises(ConfigError, match="--preset=quick is for --device cuda"):
        speed.measure("attention --device cpu --preset quick")


def test_a_models_layers_are_read_from_its_config(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2).save_pretrained(tmp_path)
    found = Geometry.of(str(tmp_path))
    assert (found.num_q_heads, found.num_kv_heads, found.head_dim, found.group) == (8, 2, 64, 4)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model .*nothing.*--geometry \(llama-3.1-8b"):
        Geometry.of(str(tmp_path / "nothing"))
