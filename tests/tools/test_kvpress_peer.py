"""kvpress as a peer: what can be tested without it, and a real run where there is a Python that has it."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.cli import main
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.manifest import model_hash
from sparsekv.evaluation.accuracy.results import Key, read_lines
from sparsekv.evaluation.accuracy.summary import Run
from sparsekv.evaluation.tasks import Metric, long_output, score
from tools import kvpress_peer
from tools.kvpress_peer import InputError, Peer

SCRIPT = Path(kvpress_peer.__file__)
MODEL = str(testbed.MODEL_DIR)
TASKS = ("multi_key", "table", "multi_turn", "perplexity")
ALL_FITS = 4096
# A Python with kvpress; sparsekv's own cannot have it, as kvpress wants an older transformers.
PYTHON = os.environ.get("KVPRESS_PYTHON") or (sys.executable if importlib.util.find_spec("kvpress") else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with examples of every kind, answered densely by our own runner."""
    out = tmp_path_factory.mktemp("run")
    options = ["--lengths", "512", "--budgets", "128", "--examples", "2", "--methods", "dense", "--device", "cpu"]
    options += ["--tasks", *TASKS, "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_output, "ROWS", 8)  # two turns instead of eight
        assert main(["eval", "export", *options]) == 0
        assert main(["eval", "run", *options, "--no-probe"]) == 0
    return out


@pytest.fixture(scope="module")
def loaded() -> Any:
    return testbed.load()


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


# -- on the way there


def test_it_imports_nothing_of_sparsekv() -> None:
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.startswith((".", "sparsekv", "evaluation")) for name in names)


WORDS = st.text("ab1 ,.\n", max_size=12)
ANSWERS = st.lists(st.text("ab1 .", min_size=1, max_size=4), min_size=1, max_size=3)
TURNS = st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3)


@given(metric=st.sampled_from([metric for metric in Metric if metric is not Metric.PERPLEXITY]), turns=TURNS)
def test_scores_are_ours(metric: Metric, turns: list[tuple[str, list[str]]]) -> None:
    said, answers = [text for text, _ in turns], [expected for _, expected in turns]
    assert kvpress_peer.score(metric.value, said, answers) == pytest.approx(score(metric, said, answers))


def test_every_metric_is_known() -> None:
    assert {metric.value for metric in Metric} == set(kvpress_peer._METRICS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no .*eval export"),
        ('{"task": "needle"}\n', "line 1 lacks length, document"),
        ("{\n", "line 1 is no JSON"),
    ],
)
def test_examples_are_checked(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        kvpress_peer.read_examples(path)


def test_bad_input_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(**changed: str) -> str:
        given = {"examples": str(folder / "examples.jsonl"), "model": MODEL, "methods": "snapkv", "budgets": "64"}
        options = [word for name, value in (given | changed).items() for word in (f"--{name}", value)]
        assert kvpress_peer.main([*options, "--out", str(tmp_path / "results-kvpress.jsonl")]) == 1
        return capsys.readouterr().err

    assert "method='snapvk' is not known. Did you mean 'snapkv'?" in run(methods="snapvk")
    assert "--budgets 0 is not allowed" in run(budgets="0")
    if importlib.util.find_spec("kvpress") is None:
        assert "kvpress==0.5.5 'transformers<5.3'" in run()
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval export"):
        kvpress_peer.read_manifest(tmp_path / "manifest.json")


def test_the_weights_hash_is_ours(loaded: Any) -> None:
    assert kvpress_peer.weights_hash(loaded[0]) == model_hash(loaded[0])


# -- answers


def test_with_all_tokens_kept_the_answers_are_dense_ones(folder: Path, loaded: Any) -> None:
    """Our runner's, question by question: the same tokens are fed, the same are scored."""
    out = folder / "results-kvpress.jsonl"
    examples = kvpress_peer.read_examples(folder / "examples.jsonl")
    assert Peer(*loaded, out).run(examples, [("snapkv", ALL_FITS)]) == 0
    ours = {(line["task"], line["document"], line["question"]): line for line in read_lines(folder, "results.jsonl")}
    theirs = results(out)
    assert len(theirs) == len(ours) == len({Key.of(line) for line in theirs})
    for line in theirs:
        expected = ours[line["task"], line["document"], line["question"]]
        assert line.keys() == expected.keys()
        for name in ("said", "expected", "score", "num_scored", "num_tokens", "details", "error"):
            assert line[name] == expected[name], name
        assert (line["nll"] or 0) == pytest.approx(expected["nll"] or 0, rel=1e-4)
        assert line["bytes_per_token"] == line["dense_bytes_per_token"]
        assert line["bytes_per_token"] == pytest.approx(expected["bytes_per_token"], rel=0.05)  # whole pages there
        assert line["sparse_steps"] == 0 < line["dense_steps"]
    run = Run.read(folder)
    assert not run.notes
    assert run.methods == ["dense", "snapkv"]


def test_goes_on_where_it_was(folder: Path, loaded: Any, tmp_path: Path) -> None:
    out = tmp_path / "results-kvpress.jsonl"
    examples = kvpress_peer.read_examples(folder / "examples.jsonl")[:2]
    cells = [("snapkv", ALL_FITS)]
    Peer(*loaded, out).run(examples[:1], cells)
    first = out.read_text()
    out.write_text(first + first[: len(first) // 3])  # killed in the middle of a line
    Peer(*loaded, out).run(examples, cells)
    assert out.read_text().startswith(first)
    assert len({Key.of(line) for line in results(out)}) == len(results(out)) > first.count("\n")
    before = out.read_text()
    Peer(*loaded, out).run(examples, cells)
    assert out.read_text() == before


@pytest.mark.parametrize("kept", [100, 90])
def test_what_is_kept_is_what_is_read(kept: int, folder: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch,
                                      tmp_path: Path) -> None:  # fmt: skip
    """A press of our own that keeps the last tokens; one that keeps others than asked for is an error."""
    model, tokenizer = loaded
    monkeypatch.setattr(kvpress_peer, "make_press", lambda *_: last_tokens(kept))
    out = tmp_path / "results-kvpress.jsonl"
    failed = Peer(model, tokenizer, out).run(
        kvpress_peer.read_examples(folder / "examples.jsonl")[:1], [("tova", 100)]
    )
    lines = results(out)
    if kept != 100:
        assert failed == len(lines)
        assert all(f"[{kept}] were kept, not 100" in line["error"] and line["score"] is None for line in lines)
        assert kvpress_peer.finished(out) == set()  # to be tried again
        return
    assert failed == 0
    per_token = 6 * 2 * 2 * 64 * 4  # layers, keys and values, kv heads, head_dim, float32
    steps = lines[0]["sparse_steps"]
    assert steps > 0 == lines[0]["dense_steps"]
    assert lines[0]["bytes_per_token"] == pytest.approx(per_token * (kept + (steps + 1) / 2))
    assert lines[0]["dense_bytes_per_token"] > 4 * lines[0]["bytes_per_token"]


def last_tokens(kept: int) -> Any:
    """A context manager as kvpress's: hooks cut every layer's cache down after its prefill."""
    import contextlib
    from collections.abc import Iterator

    @contextlib.contextmanager
    def press(model: Any) -> Iterator[None]:
        def cut(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

        hooks = [x.self_attn.register_forward_hook(cut, with_kwargs=True) for x in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()

    return press


@pytest.mark.wide
@pytest.mark.skipif(PYTHON is None, reason="needs kvpress: KVPRESS_PYTHON=... names a Python that has it")
def test_kvpress_itself(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results-kvpress.jsonl"
    (tmp_path / "manifest.json").write_text((folder / "manifest.json").read_text())
    (tmp_path / "examples.jsonl").write_text((folder / "examples.jsonl").read_text().splitlines(keepends=True)[0])
    command = [str(PYTHON), str(SCRIPT), "--examples", str(tmp_path / "examples.jsonl"), "--model", MODEL]
    command += ["--methods", *kvpress_peer.METHODS, "--budgets", "100", str(ALL_FITS), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "not those of the manifest" not in done.stderr
    lines = results(out)
    assert all(line["score"] == 1 for line in lines if line["budget"] == ALL_FITS)
    cut = [line for line in lines if line["budget"] == 100]
    assert {line["method"] for line in cut} == set(kvpress_peer.METHODS)
    assert all(line["sparse_steps"] and line["bytes_per_token"] * 3 < line["dense_bytes_per_token"] for line in cut)
    assert json.loads((tmp_path / "manifest-kvpress.json").read_text())["versions"]["kvpress"]
