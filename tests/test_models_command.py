"""`sparsekv models`: the table, its JSON, and names that are none."""

import json

import pytest

from sparsekv.cli import main
from sparsekv.evaluation.testbed import MODEL_DIR


def test_every_name_has_a_row_whatever_is_to_be_said_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "llama", "gemma3_text", "bloom", "diffllama", "dbrx", str(MODEL_DIR)]) == 0
    printed = capsys.readouterr().out
    assert "32 full_attention: sparse" in printed
    assert "22 sliding_attention: dense" in printed
    assert "2 sparse, 1 some, 1 dense, 1 refused, 1 cannot be built by its name" in printed


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "bloom", "dbrx", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"] == {"refused": 1, "cannot be built by its name": 1}
    bloom, dbrx = told["models"]
    assert bloom["name"] == "bloom"
    assert "attention interface" in bloom["refusal"]
    assert bloom["layers"][0]["layer_type"] == "full_attention"
    assert "rope_theta" in dbrx["error"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("lama", "Did you mean 'llama' or 'mllama'? `sparsekv models` lists all"), ("./none", "there is no folder")],
)
def test_a_name_that_is_none_is_told(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", name]) == 1
    assert message in capsys.readouterr().err
