"""The runs that the default is chosen by can be made, and measure the same settings on every model."""

import argparse
from pathlib import Path

import pytest

from sparsekv import evaluation
from sparsekv.evaluation.accuracy.options import RunOptions, add_arguments, parts_of

FILES = sorted((Path(evaluation.__file__).parent / "evidence").glob("*.yaml"))
CANDIDATES = 4 * 5 * 6 + 3 * 3 + 6  # digests by poolings and two dense layers; least shares of two bits, and of one


def parts(path: Path) -> list[RunOptions]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parts_of(parser.parse_args(["--out", "run", "--config", str(path)]))


def test_all_measure_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every task at one length at least, none twice; the oracle, which is no candidate, by fewer documents."""
    (tmp_path / "real.txt").write_text("Once upon a time there was a text. " * 4000)
    monkeypatch.chdir(tmp_path)
    runs = [parts(path) for path in FILES]
    assert [run[0].model for run in runs] == ["gemma3-270m", "smollm2", "testbed"]
    for run in runs:
        cells: dict[str, list[tuple[str, int | None, int]]] = {}
        for part in run:
            for task in part.tasks:
                cells.setdefault(task, []).extend(
                    (method.name, budget, part.num_examples)
                    for method, budget in part.cells
                    if method.policy != "oracle"
                )
        assert all(len(found) == len(set(found)) == 1 + CANDIDATES for found in cells.values())
        assert len({frozenset(found) for found in cells.values()}) == 1
        assert {part.num_examples for part in run} == {200, 48}
    names = [{(method.name, budget) for part in run for method, budget in part.cells} for run in runs]
    assert names[0] == names[1] == names[2]
