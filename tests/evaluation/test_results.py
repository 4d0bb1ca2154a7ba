"""A run's folder: lines that survive a kill and a full disk, and a manifest that refuses to mix runs."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.evaluation import results
from sparsekv.evaluation.results import Key, LineFile, finished, model_hash, read_lines, save_manifest


def line(document: int = 0, question: int = 0, error: str | None = None) -> dict[str, Any]:
    identity = {"task": "needle", "length": 1024, "method": "quest", "budget": 64}
    return {**identity, "document": document, "question": question, "score": 1.0, "error": error}


def test_lines_are_added_and_read_in_order(tmp_path: Path) -> None:
    LineFile(tmp_path / "results.jsonl").add([line(0), line(1)])
    LineFile(tmp_path / "results.jsonl").add([line(2)])
    LineFile(tmp_path / "results-00001.jsonl").add([line(3)])
    assert [found["document"] for found in read_lines(tmp_path, "results*.jsonl")] == [3, 0, 1, 2]


def test_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    LineFile(path).add([line(0)])
    with path.open("a") as file:
        file.write(json.dumps(line(1))[:30])
    assert len(finished(tmp_path)) == 1  # a reader leaves it out
    LineFile(path).add([line(2)])  # a writer removes it
    assert [found["document"] for found in read_lines(tmp_path, "*.jsonl")] == [0, 2]


def test_another_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{}\nnonsense\n{}\n")
    with pytest.raises(ConfigError, match=r"results\.jsonl, line 2 is no JSON"):
        list(read_lines(tmp_path, "results*.jsonl"))


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and no half of what was to come."""
    file = LineFile(tmp_path / "results.jsonl")
    file.add([line(0)])
    before = file.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.add([line(1)])
    assert file.path.read_bytes() == before


def test_errors_are_measured_again(tmp_path: Path) -> None:
    LineFile(tmp_path / "results.jsonl").add([line(0), line(1, error="the sparse path did not run")])
    assert finished(tmp_path) == {Key("needle", 1024, "quest", 64, 0, 0)}


def manifest(**changes: Any) -> dict[str, Any]:
    settings = {"tasks": ["needle"], "lengths": [1024], "methods": ["quest"], "budgets": [64], "num_examples": 8}
    settings |= {"seed": 0, "page_size": 16} | changes
    return {"command": "a command", "model": {"name": "m", "sha256": "0"}, "settings": settings}


def test_a_run_may_grow(tmp_path: Path) -> None:
    save_manifest(tmp_path / "run", manifest())
    save_manifest(tmp_path / "run", manifest(tasks=["passkey"], budgets=[64, 128], num_examples=4))
    settings = json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"]
    assert settings["tasks"] == ["needle", "passkey"]
    assert settings["budgets"] == [64, 128]
    assert settings["num_examples"] == 8


@pytest.mark.parametrize("changes", [{"seed": 1}, {"page_size": 32}])
def test_a_run_of_something_else_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    save_manifest(tmp_path, manifest())
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match=f"of another run \\({next(iter(changes))} was"):
        save_manifest(tmp_path, manifest(**changes))
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_the_hash_tells_weights_apart() -> None:
    torch.manual_seed(0)
    one, same = torch.nn.Linear(9, 5), torch.nn.Linear(9, 5)
    same.load_state_dict(one.state_dict())
    assert model_hash(one) == model_hash(same)
    with torch.no_grad():
        same.weight[0, 0] += 1
    assert model_hash(one) != model_hash(same)
