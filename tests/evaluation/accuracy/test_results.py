"""The lines of a run's folder: they survive a kill and a full disk, and what is no figure is measured again."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from sparsekv.errors import ConfigError
from sparsekv.evaluation.accuracy import results
from sparsekv.evaluation.accuracy.results import Key, LineFile, finished, read_lines


def line(document: int) -> dict[str, Any]:
    identity = {"task": "needle", "length": 1024, "method": "quest", "budget": 64}
    return {**identity, "document": document, "question": 0, "score": 1.0, "error": None}


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


def test_a_foreign_line_is_named_before_a_run_goes_on(tmp_path: Path) -> None:
    """What else may be wrong with lines is in test_summary.py."""
    LineFile(tmp_path / "results.jsonl").add([line(0), {}])
    with pytest.raises(ConfigError, match=r"results\.jsonl, line 2 lacks task, length"):
        finished(tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(ConfigError, match=r"results\.jsonl is no UTF-8 text"):
        finished(tmp_path)


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


@pytest.mark.parametrize("broken", [{"score": None, "error": "killed"}, {"score": float("nan")}], ids=str)
def test_what_is_an_error_or_no_figure_is_measured_again(broken: dict[str, Any], tmp_path: Path) -> None:
    """As the report counts it as an error."""
    LineFile(tmp_path / "results.jsonl").add([line(0), line(1) | broken])
    assert set(finished(tmp_path)) == {Key("needle", 1024, "quest", 64, 0, 0)}
