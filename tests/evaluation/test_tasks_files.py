"""LongBench's and RULER's data: small local samples, and whatever can be wrong with files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.tasks import Document, Metric, Writer, make_task, score
from sparsekv.evaluation.tasks.files import split_question

DATA = Path(__file__).parent / "data"
LONGBENCH = f"longbench:{DATA / 'longbench.jsonl'}"
NIAH, VT, QA = (f"ruler:{DATA / 'ruler' / name / 'validation.jsonl'}" for name in ("niah_multikey_1", "vt", "qa_1"))


def written(name: str, writer: Writer, num_tokens: int = 4096, seed: int = 0) -> Document:
    task = make_task(name)
    return task.write(writer, num_tokens, task.num_questions, seed)


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


# --- LongBench ---


def test_document_i_is_row_i(writer: Writer) -> None:
    document = written(LONGBENCH, writer, seed=1)
    assert document.text == "The miller sells flour. The baker sells bread."
    assert document.num_tokens == len(document.text)
    (question,) = document.questions
    assert question.turns[0].prompt.endswith("\nQuestion: What does the miller sell?\nAnswer:")
    assert question.turns[0].answers == ("flour",)
    assert make_task(LONGBENCH).metric is Metric.F1
    assert score(Metric.F1, [" Flour.\n"], [question.turns[0].answers]) == 1.0


def test_a_question_that_is_a_template_already_is_left_as_it_is(writer: Writer) -> None:
    prompt = written(LONGBENCH, writer, seed=2).questions[0].turns[0].prompt
    assert prompt.count("Question:") == prompt.count("Answer:") == 1
    assert prompt.endswith("Passage: The bread was cold.\nQuestion: What was cold?\nAnswer:")


def test_a_long_context_loses_its_middle(writer: Writer) -> None:
    whole, cut = written(LONGBENCH, writer, 4096), written(LONGBENCH, writer, 301)
    assert cut.num_tokens == len(cut.text) == 301 < whole.num_tokens
    assert cut.text == whole.text[:151] + whole.text[-150:]


def test_a_cut_through_a_letter_does_not_make_it_longer(writer: Writer, tmp_path: Path) -> None:
    row = {"input": "Wer?", "context": "äöü" * 100, "answers": ["ä"]}
    name = f"longbench:{lines(tmp_path / 'umlauts.jsonl', row)}"
    for num_tokens in (101, 102, 103, 104):
        document = written(name, writer, num_tokens)
        assert num_tokens - 8 <= document.num_tokens == len(writer.encode(document.text)) <= num_tokens


def test_a_byte_order_mark_is_no_part_of_a_file(writer: Writer, tmp_path: Path) -> None:
    row = json.dumps({"input": "Who?", "context": "x " * 2000, "answers": ["y"]})
    for kind in ("longbench", "perplexity"):
        (path := tmp_path / "rows.jsonl").write_text(row, encoding="utf-8-sig")
        marked = make_task(f"{kind}:{path}").sha256
        path.write_text(row)
        assert make_task(f"{kind}:{path}").sha256 == marked


@pytest.mark.parametrize("seed", [3, 100, -1])
def test_more_documents_than_rows_are_refused(seed: int, writer: Writer) -> None:
    with pytest.raises(ConfigError, match=r"has 3 rows.*at most 3 \(--examples\)"):
        written(LONGBENCH, writer, seed=seed)


def test_rows_are_taken_in_order_whatever_the_seed() -> None:
    assert [make_task(LONGBENCH).seed_of(seed, 2) for seed in (0, 1)] == [2, 2]


@pytest.mark.parametrize("kind", ["longbench", "perplexity"])
def test_the_content_of_a_file_is_told_by_its_hash(kind: str, tmp_path: Path) -> None:
    def sha256(**changes: Any) -> str | None:
        row = {"input": "Who?", "context": "x", "answers": ["y"], **changes}
        return make_task(f"{kind}:{lines(tmp_path / 'rows.jsonl', row)}").sha256

    same = sha256()
    assert same is not None
    assert len(same) == 64
    assert sha256() == same
    assert len({same, sha256(context="z"), sha256(answers=["z"]), sha256(input="What?")}) == 4


def test_other_measures_than_f1_are_refused(tmp_path: Path) -> None:
    row = {"input": "", "context": "x", "answers": ["x"], "dataset": "gov_report"}
    with pytest.raises(UnknownNameError, match=r"line 1.*'gov_report' is not known.*hotpotqa"):
        make_task(f"longbench:{lines(tmp_path / 'rows.jsonl', row)}")


def test_words_that_a_tokenizer_lacks_are_named() -> None:
    with pytest.raises(ConfigError, match="does not know 'miller', 'sells'"):
        written(LONGBENCH, Writer(testbed.load()[1]), seed=1)


# --- RULER ---


def test_the_question_is_split_off_the_context(writer: Writer) -> None:
    document = written(NIAH, writer, seed=1)
    (turn,) = document.questions[0].turns
    assert turn.prompt == (
        "\nWhat is the number that goes with quick-meadow in the lines above?"
        " The number that goes with quick-meadow in the lines above is"
    )
    assert turn.answers == ("2740615",)
    assert "quick-meadow is 2740615" in document.text
    assert "What is" not in document.text
    assert score(Metric.RECALL, [turn.reference], [turn.answers]) == 1.0


def test_a_prompt_without_line_breaks_is_split_at_its_last_sentence(writer: Writer) -> None:
    first, second = (written(VT, writer, seed=seed) for seed in (0, 1))
    assert "\n" in first.text
    assert "\n" not in second.text
    for document in (first, second):
        prompt = document.questions[0].turns[0].prompt
        assert prompt[1:].startswith("Question: Find every variable")
        assert prompt.endswith("40217 are")
        assert "Question" not in document.text
    assert first.text.split() == second.text.split()


def test_questions_about_texts_have_several_right_answers(writer: Writer) -> None:
    assert make_task(NIAH).metric is make_task(VT).metric is Metric.RECALL
    assert make_task(QA).metric is Metric.ANY
    (turn,) = written(QA, writer).questions[0].turns
    assert turn.prompt == "\nQuestion: Where does Ina live? Answer:"
    assert turn.answers == ("Brook", "in Brook")


@pytest.mark.parametrize(
    ("name", "asked", "begun"),
    [
        (NIAH, "What is the number ", "The number that goes with "),
        (VT, "Question: Find every variable", ""),
        (QA, "Question: Where does Ina live?", ""),
        (LONGBENCH, "Answer the question on the text above", ""),
    ],
)
def test_in_a_chat_the_answer_is_begun_by_the_model(name: str, asked: str, begun: str, writer: Writer) -> None:
    """And nobody says `Answer:`."""
    (turn,) = written(name, writer).questions[0].turns
    assert turn.asked.startswith(asked)
    assert turn.begun.startswith(begun)
    assert "Answer:" not in turn.asked + turn.begun
    assert turn.prompt.endswith(turn.begun or turn.opening)


def test_a_context_that_would_have_to_be_cut_is_refused(writer: Writer) -> None:
    with pytest.raises(ConfigError, match=r"line 1 has \d+ tokens of context, not at most 200.*--lengths"):
        written(NIAH, writer, 200)


def test_what_a_tokenizer_puts_before_a_text_counts(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length that the message asks for is then enough."""
    needed = len(written(NIAH, writer).text) + 2
    monkeypatch.setattr(writer, "prefix", [1, 1])
    with pytest.raises(ConfigError, match=rf"has {needed} tokens of context, not at most 200.*--lengths {needed}\)"):
        written(NIAH, writer, 200 - len(writer.prefix))
    assert written(NIAH, writer, needed - len(writer.prefix)).text


def test_rows_split_by_others_are_taken_by_task(writer: Writer, tmp_path: Path) -> None:
    row = {"context": "Ina is 41.", "question": "How old is Ina?", "answer_prefix": "Answer: ", "answer": ["41"]}
    rows = [{**row, "task": "niah"}, {**row, "task": "qa_1", "answer": "41"}]
    source = f"ruler:{lines(tmp_path / 'rows.jsonl', *rows)}"
    assert make_task(f"{source}#niah").metric is Metric.RECALL
    assert make_task(f"{source}#qa_1").metric is Metric.ANY
    (turn,) = written(f"{source}#qa_1", writer).questions[0].turns
    assert (turn.prompt, turn.answers) == ("\nHow old is Ina? Answer:", ("41",))
    with pytest.raises(ConfigError, match="several tasks"):
        make_task(source)
    with pytest.raises(ConfigError, match=r"no rows whose .* is 'vt'"):
        make_task(f"{source}#vt")


@pytest.mark.parametrize("text", ["Statements only. Nothing else.", "Why?", "What is it? " + "It is so. " * 20, ""])
def test_a_prompt_that_asks_nothing_at_its_end_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="row 7: no question is found"):
        split_question(text, "row 7")


# --- Files and the hub ---


@pytest.mark.parametrize("kind", ["longbench", "ruler", "perplexity"])
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.jsonl cannot be read"):
        make_task(f"{kind}:{tmp_path / 'nothing.jsonl'}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "line 2 is no JSON"),
        ("[1, 2]", r"line 2 must hold a JSON object; got \[1, 2\]"),
        ({"input": "Who?", "answers": ["x"]}, r"line 2: 'context' must be a text; got None. The row has 'input'"),
        ({"input": "Who?", "context": 3, "answers": ["x"]}, "line 2: 'context' must be a text; got 3"),
        ({"input": "Who?", "context": "x", "answers": []}, r"line 2: 'answers' must be a list of texts; got \[\]"),
        ({"input": " ", "context": "x", "answers": ["x"]}, "line 2: 'input' is empty"),
    ],
)
def test_a_malformed_line_is_named(row: Any, message: str, tmp_path: Path) -> None:
    right = {"input": "Who?", "context": "x", "answers": ["x"]}
    with pytest.raises(ConfigError, match=message):
        make_task(f"longbench:{lines(tmp_path / 'rows.jsonl', right, row)}")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        make_task(f"ruler:{lines(tmp_path / 'rows.jsonl')}")


def test_data_of_the_hub_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: str, **options: str) -> list[dict[str, Any]]:
        asked.append((*args, options))
        if "data_files" in options:
            return [{"input": "Who?", "context": "x", "answers": ["x"]}]
        return [{"input": "One is 1. " * 9 + "\nWhat is one?", "outputs": ["1"]}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    make_task("longbench:hotpotqa")
    make_task("ruler:somebody/ruler/4096")
    make_task("ruler:somebody/ruler_v1.0")
    archive = "zip://data/hotpotqa.jsonl::hf://datasets/THUDM/LongBench/data.zip"
    assert asked[0] == ("json", {"data_files": archive, "split": "train"})
    assert asked[1] == ("somebody/ruler", "4096", {"split": "test"})
    assert asked[2] == ("somebody/ruler_v1.0", {"split": "test"})


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"longbench:hotpotqa is no file here.*pip install '\.\[eval\]' in the clone"
    ):
        make_task("longbench:hotpotqa")
    with pytest.raises(ConfigError, match="name JSON lines"):
        make_task("ruler:niah")


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: str, **options: str) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConfigError, match="cannot be loaded from the hub: no route to the hub"):
        make_task("longbench:hotpotqa")
