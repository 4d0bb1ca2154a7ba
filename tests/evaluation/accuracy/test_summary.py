"""Reading the files of a run, and what becomes one of its figures."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sparsekv.errors import ConfigError
from sparsekv.evaluation.accuracy.cells import MEAN, Cell, cells, means
from sparsekv.evaluation.accuracy.summary import Run


def line(score: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    where = {"task": "needle", "length": 4096, "method": "quest", "budget": 256, "document": 0, "question": 0}
    read = {"bytes_per_token": 100.0, "dense_bytes_per_token": 400.0, "pages_per_token": 16.0, "num_tokens": 20}
    other = {"nll": None, "num_scored": None, "said": [""], "expected": [[""]], "details": {}, "error": None}
    return {**where, "score": score, **read, **other, **changes}


def dense(score: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    return line(score, **{"method": "dense", "budget": None, "bytes_per_token": 400.0, **changes})


def read(folder: Path, *lines: dict[str, Any], name: str = "results.jsonl", end: str = "") -> Run:
    write(folder / name, lines, end)
    return Run.read(folder)


def write(path: Path, lines: Iterable[dict[str, Any]], end: str = "") -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + end)


def only(run: Run, **wanted: Any) -> Cell:
    (found,) = [c for c in cells(run) if all(getattr(c, name) == value for name, value in wanted.items())]
    return found


def test_files_of_several_processes_are_one_run(tmp_path: Path) -> None:
    write(tmp_path / "results-00000.jsonl", [line(1.0), line(0.0, document=2)])
    write(tmp_path / "results-00001.jsonl", [line(1.0, document=1)])
    write(tmp_path / "results-kvpress.jsonl", [line(0.5, method="kvpress/snapkv")])
    (tmp_path / "manifest.json").write_text('{"model": {"name": "small"}, "settings": {"methods": ["quest"]}}')
    run = Run.read(tmp_path)
    assert run.methods == ["quest", "kvpress/snapkv"]
    assert (run.model, run.lengths, run.budgets, run.notes) == ("small", [4096], [256], ())
    found = only(run, method="quest")
    assert (found.num_examples, found.num_documents, found.num_errors) == (3, 3, 0)
    assert found.score is not None
    assert found.score.value == pytest.approx(2 / 3)


def test_the_last_figure_of_a_question_counts(tmp_path: Path) -> None:
    """A resumed run measures again what was an error, perhaps in a process whose file is read earlier."""
    killed, right = line(None, error="out of memory"), line(0.5)
    for lines in ([line(0.0), right], [killed, right], [right, killed]):
        run = read(tmp_path, *lines)
        assert not run.errors
        assert [one["score"] for one in run.lines] == [0.5]


def test_errors_are_counted_and_never_averaged(tmp_path: Path) -> None:
    run = read(tmp_path, line(1.0), line(None, question=1, error="killed"), line(None, budget=512, error="killed"))
    assert len(run.errors) == 2
    some, none = only(run, budget=256), only(run, budget=512)
    assert (some.num_examples, some.num_errors) == (1, 1)
    assert some.score is not None
    assert some.score.value == 1.0
    assert (none.num_examples, none.num_errors, none.score, none.bytes_per_token) == (0, 1, None, None)


@pytest.mark.parametrize(
    "broken",
    [
        {"score": None},
        {"score": float("nan")},
        {"score": 1.5},
        {"score": "1"},
        {"score": None, "nll": float("inf"), "num_scored": 5},
        {"score": None, "nll": 2.0, "num_scored": None},
    ],
    ids=str,
)
def test_what_is_no_figure_becomes_an_error(broken: dict[str, Any], tmp_path: Path) -> None:
    run = read(tmp_path, line(1.0), line(**{"question": 1, **broken}))
    assert len(run.errors) == 1
    assert only(run).num_errors == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{no json", "is no JSON"),
        ("[1, 2]", "is no object"),
        ('{"task": "needle"}', "lacks length, method"),
        (json.dumps(line(length="4k")), "length='4k'"),
        (json.dumps(line(budget=0.5)), "budget=0.5"),
    ],
)
def test_a_malformed_line_is_named_with_file_and_number(text: str, told: str, tmp_path: Path) -> None:
    write(tmp_path / "results.jsonl", [line()], end=text + "\n")
    with pytest.raises(ConfigError, match=r"results\.jsonl, line 2") as error:
        Run.read(tmp_path)
    assert told in str(error.value)


def test_a_folder_without_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sparsekv eval run --out"):
        Run.read(tmp_path)
    write(tmp_path / "results.jsonl", [line()])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json is no JSON"):
        Run.read(tmp_path)


def test_answers_to_other_questions_are_no_pairs(tmp_path: Path) -> None:
    """What is at the same place is the same question, or an error."""
    ours = [line(1.0, question=q, expected=[["1"]]) for q in range(2)]
    run = read(tmp_path, *ours, dense(0.0, expected=[["1"]]), dense(0.0, question=1, expected=[["2"]]))
    assert [one["question"] for one in run.errors] == [1]
    assert run.errors[0]["method"] == "quest"
    assert "another question than others at this place, where [['2']] is expected" in run.errors[0]["error"]
    found = only(run, method="quest")
    assert (found.num_examples, found.num_errors) == (1, 1)


def test_without_dense_the_first_answer_says_what_was_asked(tmp_path: Path) -> None:
    lines = [line(None, expected=[["0"]], error="killed"), line(expected=[["1"]], budget=64)]
    run = read(tmp_path, *lines, line(expected=[["2"]], budget=128))
    assert [(one["budget"], one["error"][:15]) for one in run.errors] == [(256, "killed"), (128, "another questio")]


def told(folder: Path, name: str = "manifest.json", **content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def test_other_programs_results_are_noted(tmp_path: Path) -> None:
    told(tmp_path, model={"sha256": "a" * 64}, settings={})
    told(tmp_path, "manifest-kvpress.json", model={"sha256": "a" * 64}, versions={"kvpress": "0.5.5", "torch": "2.8"})
    told(tmp_path, "manifest-other.json", model={"sha256": "b" * 64})
    notes = read(tmp_path, line()).notes
    assert notes[0] == "manifest-kvpress.json: some results are of another program (kvpress 0.5.5, torch 2.8)."
    assert notes[1] == "manifest-other.json: some results are of another program (its versions are not known)."
    assert notes[2] == f"manifest-other.json: its weights ({'b' * 12}) are not those of this run ({'a' * 12})."
    assert len(notes) == 3


def test_parts_from_unlike_machines_are_noted(tmp_path: Path) -> None:
    one, other = {"gpu": "H200", "versions": {"torch": "2.11"}}, {"gpu": None, "versions": {"torch": "2.13"}}
    told(tmp_path, runs=[one, other, one], settings={})
    assert read(tmp_path, line()).notes == (
        "Parts of it were measured on different processors: H200, CPU.",
        "Parts of it were measured with different versions of torch: 2.11, 2.13.",
    )
    told(tmp_path, runs=[one, one], settings={})
    assert not Run.read(tmp_path).notes


def test_differences_to_dense_are_of_the_questions_that_both_answered(tmp_path: Path) -> None:
    ours = [line(0.0, document=d) for d in range(6)]
    theirs = [dense(1.0, document=d) for d in range(3)] + [dense(None, document=3, error="killed")]
    run = read(tmp_path, *ours, *theirs, dense(0.0, document=7), dense(0.0, length=8192, document=4))
    change = only(run, method="quest").change
    assert change is not None
    assert change.value == -1.0  # of three questions: dense's mean of all it answered is not 1
    assert change.low == -1.0
    assert only(run, method="dense", length=4096).change is None


def test_perplexities_are_cells_of_their_own(tmp_path: Path) -> None:
    text = {"task": "book", "num_scored": 100}
    ours = [line(None, document=d, nll=2.0 + 0.1 * d, **text) for d in range(5)]
    theirs = [dense(None, document=d, nll=1.9 + 0.1 * d, **text) for d in range(5)]
    found = only(read(tmp_path, *ours, *theirs), method="quest")
    assert found.score is None
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(math.exp(2.2))
    assert found.change is not None
    assert found.change.value == pytest.approx(math.exp(2.2) - math.exp(2.1))
    assert found.change.low > 0  # type: ignore[operator]
    assert found.nats_change is not None
    assert found.nats_change.value == pytest.approx(0.1)


def test_cells_say_what_they_decoded_with_and_on_what(tmp_path: Path) -> None:
    """Lines of earlier runs did not; then all of it is what the manifest says."""
    told(tmp_path, settings={"group_pooling": "sum", "dense_layers": 2}, gpu="one")
    names = ("quest", "sketch+max+dense0", "recent", "oracle", "kvpress/snapkv", "dense")
    run = read(tmp_path, *(line(method=name) for name in names), line(method="quest", question=1, gpu="other"))
    assert {c.method: (c.pooling, c.dense_layers, c.gpu) for c in cells(run)} == {
        "quest": ("sum", 2, "one, other"),
        "sketch+max+dense0": ("max", 0, "one"),
        "recent": (None, 2, "one"),
        "oracle": ("sum", 2, "one"),
        "kvpress/snapkv": (None, None, "one"),
        "dense": (None, None, "one"),
    }
    (tmp_path / "manifest.json").unlink()
    assert [(c.pooling, c.dense_layers, c.gpu) for c in cells(Run.read(tmp_path))][1] == ("max", None, "other")


def test_bytes_are_averaged_over_tokens_and_may_be_unknown(tmp_path: Path) -> None:
    short = line(question=0, num_tokens=10, bytes_per_token=100.0)
    long = line(question=1, num_tokens=30, bytes_per_token=200.0)
    peer = line(method="peer", bytes_per_token=None, pages_per_token=None)
    run = read(tmp_path, short, long, peer)
    assert only(run, method="quest").bytes_per_token == pytest.approx(175.0)
    assert only(run, method="quest").share == pytest.approx(175 / 400)
    assert only(run, method="peer").share is None


def test_every_task_weighs_the_same_in_a_mean(tmp_path: Path) -> None:
    many = [line(1.0, document=d) for d in range(9)]
    run = read(
        tmp_path,
        *many,
        line(0.0, task="multi_key", bytes_per_token=300.0),
        line(None, task="book", nll=2.0, num_scored=9),
    )
    (mean,) = means(cells(run))
    assert (mean.task, mean.num_examples) == (MEAN, 10)
    assert mean.score is not None
    assert mean.score.value == pytest.approx(0.5)
    assert mean.bytes_per_token == pytest.approx(200.0)


def test_a_method_that_lacks_a_task_has_no_mean(tmp_path: Path) -> None:
    run = read(tmp_path, line(), line(task="multi_key"), line(method="recent"), line(method="recent", length=8192))
    found = {(c.method, c.length): c.score for c in means(cells(run))}
    assert found["quest", 4096] is not None
    assert found["recent", 4096] is None
    assert found["recent", 8192] is not None
