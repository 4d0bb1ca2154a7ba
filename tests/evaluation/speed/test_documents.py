"""`sparsekv bench documents`: what it measures, and what it refuses to call a load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsekv.errors import SparseKVError
from sparsekv.evaluation.speed import documents_bench, measure


def test_a_row_for_each_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--device cpu --geometry tiny --context 100 --repeats 1 --kv plain int8 --out {tmp_path}"
    found = measure(f"documents {options}")
    assert json.loads((tmp_path / "documents_cpu.json").read_text())["rows"] == found["rows"]
    assert [row["kv"] for row in found["rows"]] == ["plain", "int8"]
    assert found["rows"][0]["GB"] > found["rows"][1]["GB"]
    assert all(row[name] > 0 for row in found["rows"] for name in ("read", "save", "cp", "load", "first token"))
    assert "first token, s" in capsys.readouterr().out


def test_a_load_that_gives_something_else_is_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    load = documents_bench.Patch.load

    def wrong(*args: object, **more: object) -> object:
        cache = load(*args, **more)
        cache._store.layers[0].kv[0, 0, 0, 0].view(torch.uint8)[0] ^= 1
        return cache

    monkeypatch.setattr(documents_bench.Patch, "load", wrong)
    with pytest.raises(SparseKVError, match="layer 0 is not what was saved"):
        measure("documents --device cpu --geometry tiny --context 100 --repeats 1")
