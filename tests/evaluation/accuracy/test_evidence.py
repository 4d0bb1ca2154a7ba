"""The runs that the default is chosen by can be made, and measure the same settings on every model."""

import argparse
from pathlib import Path

import pytest

from sparsekv import evaluation
from sparsekv.evaluation.accuracy.options import RunOptions, add_arguments, options_of

FILES = sorted((Path(evaluation.__file__).parent / "evidence").glob("*.yaml"))


def options(path: Path) -> RunOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_of(parser.parse_args(["--out", "run", "--config", str(path)]))


def test_all_measure_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real.txt").write_text("Once upon a time there was a text. " * 4000)
    monkeypatch.chdir(tmp_path)
    runs = [options(path) for path in FILES]
    assert [run.model for run in runs] == ["gemma3-270m", "smollm2", "testbed"]
    cells = {tuple((method.name, budget) for method, budget in run.cells) for run in runs}
    assert len(cells) == 1
    assert len(cells.pop()) == 1 + (4 * 4 + 2 + 1) * 2 * 6  # dense; digests by pooling, two least shares, the oracle
    assert all(method.config(run.base, budget).dense_layers in (0, 2) for run in runs for method, budget in run.cells)
