"""The accuracy harness on the testbed: what it measures, goes on with, shares out and refuses."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsekv.cli import main
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import eval_command, testbed
from sparsekv.evaluation import runner as runner_module
from sparsekv.evaluation.eval_options import RunOptions
from sparsekv.evaluation.methods import METHODS, method, pairs
from sparsekv.evaluation.results import read_lines
from sparsekv.evaluation.runner import Runner, Share

QUIET = Console(quiet=True)
SMALL: dict[str, Any] = {"tasks": ("multi_key",), "lengths": (1024,), "budgets": (128,), "num_examples": 8}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return testbed.load()


def run(loaded: Any, folder: Path, share: Share | None = None, **settings: Any) -> list[dict[str, Any]]:
    Runner(*loaded, "testbed", RunOptions(**SMALL | settings), folder, "a command", share or Share()).run(QUIET)
    return list(read_lines(folder, "results*.jsonl"))


def mean(lines: list[dict[str, Any]]) -> dict[str, float]:
    scores = defaultdict(list)
    for line in lines:
        scores[line["method"]].append(line["score"])
    return {name: sum(found) / len(found) for name, found in scores.items()}


def test_methods_differ_in_what_they_read(loaded: Any, tmp_path: Path) -> None:
    """A method that drops the needle's page fails; the counters say who read what."""
    lines = run(loaded, tmp_path, methods=tuple(METHODS))
    assert all(line["error"] is None for line in lines)
    scores = mean(lines)
    assert scores["dense"] == scores["oracle"] == scores["sketch"] == 1
    assert scores["quest"] >= 0.75
    assert scores["recent"] <= 0.5 >= scores["random"]
    by_method = {line["method"]: line for line in lines}
    assert by_method["dense"]["bytes_per_token"] == by_method["dense"]["dense_bytes_per_token"]
    assert by_method["recent"]["bytes_per_token"] < by_method["quest"]["bytes_per_token"]
    assert by_method["quest"]["bytes_per_token"] < by_method["oracle"]["bytes_per_token"]
    assert by_method["dense"]["sparse_steps"] == 0 < by_method["quest"]["sparse_steps"]
    probes = list(read_lines(tmp_path, "probes*.jsonl"))
    assert {line["method"] for line in probes} == set(METHODS) - {"dense"}
    assert all(0 <= share <= 1.001 for line in probes for share in (*line["mass"], *line["overlap"]))


def test_a_killed_run_goes_on(loaded: Any, tmp_path: Path) -> None:
    """What is there is not measured again, and what comes is what would have come."""
    whole = run(loaded, tmp_path / "whole", methods=("dense", "quest"))
    run(loaded, tmp_path / "cut", methods=("dense",))
    path = tmp_path / "cut" / "results.jsonl"
    path.write_text(path.read_text()[:-20])  # killed while it wrote
    kept = path.read_text().count("\n")
    again = run(loaded, tmp_path / "cut", methods=("dense", "quest"))
    assert kept == 7
    key = ("method", "document", "question")
    found = {tuple(line[k] for k in key): line["said"] for line in again}
    assert found == {tuple(line[k] for k in key): line["said"] for line in whole}
    before = path.read_bytes()
    run(loaded, tmp_path / "cut", methods=("dense", "quest"))
    assert path.read_bytes() == before


def test_processes_share_the_documents(loaded: Any, tmp_path: Path) -> None:
    settings = {"num_examples": 16, "methods": ("quest",)}
    alone = run(loaded, tmp_path / "alone", **settings)
    run(loaded, tmp_path / "shared", Share(0, 2), **settings)
    together = run(loaded, tmp_path / "shared", Share(1, 2), **settings)
    assert {path.name for path in (tmp_path / "shared").glob("results*")} == {
        "results-00000.jsonl",
        "results-00001.jsonl",
    }

    def answers(lines: list[dict[str, Any]]) -> list[Any]:
        return sorted((line["document"], line["question"], line["said"], line["score"]) for line in lines)

    assert answers(alone) == answers(together)


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the eval extra: pip install sparsekv[eval]")
    # --multi_gpu is torchrun, and needs no GPU; --cpu would be one process
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["-m", "sparsekv.evaluation", "run", "--out", str(tmp_path), "--tasks", "multi_key", "--lengths", "1k"]
    launch += ["--budgets", "128", "--examples", "16", "--methods", "dense", "quest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = list(read_lines(tmp_path, "results*.jsonl"))
    assert len(lines) == 32
    assert {line["document"] for line in read_lines(tmp_path, "results-00001.jsonl")} == {1}


def test_a_dense_run_that_calls_itself_sparse_is_an_error(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a line has no score: dense is never compared with dense."""
    monkeypatch.setattr("sparsekv.policies.top_k.TopK.decode", lambda self, step, softcap, sinks: (
        step.append(), (step.attend(None, softcap, sinks), None))[1])  # fmt: skip
    monkeypatch.setattr("sparsekv.policies.top_k.TopK.select", lambda self, step: None)
    lines = run(loaded, tmp_path, methods=("quest",), probe=False)
    assert all(line["score"] is None and "were dense, although" in line["error"] for line in lines)


def test_perplexity_and_several_turns(loaded: Any, tmp_path: Path) -> None:
    settings = {
        "tasks": ("perplexity", "multi_turn"),
        "num_examples": 2,
        "budgets": (128,),
        "methods": ("dense", "random"),
    }
    lines = run(loaded, tmp_path, **settings)
    nll = {line["method"]: line["nll"] for line in lines if line["task"] == "perplexity" and not line["document"]}
    assert nll["dense"] < nll["random"]
    turns = [line for line in lines if line["task"] == "multi_turn"]
    assert all(len(line["said"]) == 4 == len(line["expected"]) for line in turns)
    assert mean(turns)["dense"] > mean(turns)["random"]


def test_export(tmp_path: Path) -> None:
    assert (
        main(["eval", "export", "--out", str(tmp_path), "--tasks", "needle", "--lengths", "1k", "--examples", "3"])
        == 0
    )
    (example,) = [json.loads(text) for text in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert len(example["document_ids"]) <= 1024
    assert [q["details"]["depth"] for q in example["questions"]] == [0, 50, 100]
    assert example["questions"][0]["turns"][0]["answers"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tasks": ("neddle",)}, UnknownNameError, "Did you mean 'needle'"),
        ({"methods": ("qest",)}, UnknownNameError, "Did you mean 'quest'"),
        ({"methods": ("minmaxx/top_k",)}, UnknownNameError, "Did you mean 'minmax'"),
        ({"budgets": (16,)}, ConfigError, "budget=16 is below"),
        ({"lengths": ()}, ConfigError, "lengths is empty"),
    ],
)
def test_what_cannot_be_measured(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RunOptions(**SMALL | settings)


def test_a_length_beyond_the_context(loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beyond the model's context of"):
        run(loaded, tmp_path / "run", lengths=(1 << 20,))
    assert not (tmp_path / "run").exists()


def test_questions_beyond_the_context(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document alone would fit."""
    monkeypatch.setattr(loaded[0].config, "max_position_embeddings", 1030)
    with pytest.raises(ConfigError, match=r"multi_key at --lengths 1024 needs \d+ tokens with its questions"):
        run(loaded, tmp_path)


def test_methods() -> None:
    assert pairs() == ["minmax/top_k", "sign_sketch/top_k"]
    assert method("sign_sketch/top_k").digest == "sign_sketch"
    assert method("minmax/recent").digest is None
    base = RunOptions(**SMALL).base
    assert method("quest").config(base, 64).recent == 16  # a small budget is not all recent tokens
    assert method("quest").config(base, 1024).recent == 64


def test_a_config_file_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags win; k counts 1024 in both."""
    seen: list[RunOptions] = []
    monkeypatch.setattr(runner_module, "run", lambda options, *rest: seen.append(options) or 0)
    monkeypatch.setattr(eval_command, "_print_tables", lambda *rest: None)
    (tmp_path / "run.yaml").write_text("tasks: [needle, passkey]\nlengths: 2k\nbudgets: [128, 1k]\nseed: 3\n")
    arguments = ["eval", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]
    assert main([*arguments, "--budgets", "256"]) == 0
    assert seen[0].tasks == ("needle", "passkey")
    assert (seen[0].lengths, seen[0].budgets, seen[0].seed) == ((2048,), (256,), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("task: needle", "Did you mean 'tasks'"), ("[", "cannot be read"), ("3", "names and values"),
     ("lengths: [many]", "no number of tokens")],
)  # fmt: skip
def test_a_bad_config_file(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert main(["eval", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
