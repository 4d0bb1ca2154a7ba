"""Tasks in any text: what is cut out of it, what is said again, and what is hidden."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed, texts
from sparsekv.evaluation.tasks import Document, Metric, Writer, make_task, score
from sparsekv.evaluation.tasks.texts import RUN_IN


def written(name: str, writer: Writer, num_tokens: int = 4096, seed: int = 0, num_questions: int = 0) -> Document:
    task = make_task(name)
    return task.write(writer, num_tokens, num_questions or task.num_questions, seed)


@pytest.mark.parametrize("kind", ["perplexity", "recall", "needle"])
def test_the_word_excerpt_stands_for_the_text_that_ships(kind: str, writer: Writer) -> None:
    task = make_task(f"{kind}:excerpt")
    assert task.sha256 == make_task(f"{kind}:{texts.EXCERPT}").sha256
    assert [task.seed_of(seed, 2) for seed in (0, 1)] == [2, 2]
    documents = [written(f"{kind}:excerpt", writer, 2048, seed) for seed in (0, 1)]
    assert documents[0].text != documents[1].text
    for document in documents:
        assert 0.98 * 2048 <= document.num_tokens == len(writer.encode(document.text)) <= 2048


# --- How likely it goes on ---


def test_a_text_is_read_piece_by_piece(writer: Writer, tmp_path: Path) -> None:
    text = "".join(f"Line {i} of a book. " for i in range(200))
    path = tmp_path / "book.txt"
    path.write_text(text)
    pieces = [written(f"perplexity:{path}", writer, 512, seed) for seed in range(4)]
    for i, document in enumerate(pieces):
        (turn,) = document.questions[0].turns
        assert turn.prompt.strip()
        assert document.text + turn.prompt + turn.reference == text[i * 768 : (i + 1) * 768]
        assert document.num_tokens == 512
        assert len(writer.encode(turn.prompt + turn.reference)) == 256
    with pytest.raises(ConfigError, match=r"book.txt has \d+ tokens: 5 pieces of 512 and the 256"):
        written(f"perplexity:{path}", writer, 512, seed=len(text) // 768)


def test_a_text_without_spaces_is_scored_nearly_whole(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("長い文章" * 200, encoding="utf-8")
    (turn,) = written(f"perplexity:{path}", writer, 512).questions[0].turns
    assert len(writer.encode(turn.reference)) > 200


def test_a_text_of_the_testbeds_words(tmp_path: Path) -> None:
    writer = Writer(testbed.load()[1])
    path = tmp_path / "story.txt"
    path.write_text(testbed.make_story(2000, seed=1).text)
    document = written(f"perplexity:{path}", writer, 1024)
    assert document.num_tokens == 1024
    (turn,) = document.questions[0].turns
    assert [len(writer.encode(part)) for part in (turn.prompt, turn.reference)] == [1, 255]


@pytest.mark.parametrize("kind", ["perplexity", "recall"])
def test_the_number_of_scored_tokens_can_be_set(kind: str, writer: Writer) -> None:
    (turn,) = written(f"{kind}:excerpt#40", writer).questions[0].turns
    assert 24 <= len(writer.encode(turn.reference)) <= 40


# --- What it said early ---


@pytest.mark.parametrize("seed", range(4))
def test_an_early_passage_comes_again(seed: int, writer: Writer) -> None:
    document = written("recall:excerpt", writer, seed=seed)
    (question,) = document.questions
    (turn,), ((start, end),) = question.turns, question.evidence
    assert make_task("recall:excerpt").metric is Metric.PERPLEXITY
    assert document.text[start - len(turn.prompt) : end] == turn.prompt + turn.reference
    assert 1 / 12 <= (start - len(turn.prompt)) / len(document.text) <= 0.26
    assert RUN_IN - 16 < len(writer.encode(turn.prompt)) <= RUN_IN
    assert 240 < len(writer.encode(turn.reference)) <= 256
    assert turn.prompt[0].isspace()
    assert turn.reference[0].isspace()


def test_passages_begin_at_different_places(writer: Writer) -> None:
    places = {written("recall:excerpt", writer, seed=seed).questions[0].evidence[0][0] for seed in range(6)}
    assert len(places) == 6


def test_a_text_without_spaces_is_repeated_too(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(chr(0x4E00 + i % 4001) for i in range(3000)), encoding="utf-8")
    document = written(f"recall:{path}", writer)
    (question,) = document.questions
    (start, end), turn = question.evidence[0], question.turns[0]
    assert document.text[start:end] == turn.reference
    assert document.text[:start].endswith(turn.prompt)
    assert len(writer.encode(turn.reference)) > 200


def test_a_document_too_short_to_repeat_itself_is_refused(writer: Writer) -> None:
    with pytest.raises(ConfigError, match=r"too short to repeat 288 .*--lengths.*recall:FILE#TOKENS"):
        written("recall:excerpt", writer, 512)
    assert written("recall:excerpt#32", writer, 512)


# --- Needles ---


def test_sentences_are_hidden_between_others_at_even_depths(writer: Writer) -> None:
    document = written("needle:excerpt", writer, seed=3)
    depths = [question.details["depth"] for question in document.questions]
    assert depths == [0, 14, 29, 43, 57, 71, 86, 100]
    for question in document.questions:
        ((start, end),), (turn,) = question.evidence, question.turns
        told = document.text[start:end]
        assert told == f"{turn.begun} {turn.answers[0]}."
        assert turn.asked == f"Question: {turn.begun.replace('The', 'What is the', 1).removesuffix(' is')}?"
        assert question.details["depth"] in (0, 100) or document.text[start - 2] in ".!?\"'"
        assert abs(start / len(document.text) - question.details["depth"] / 100) < 0.05
        assert score(Metric.RECALL, [turn.reference], [turn.answers]) == 1.0
    assert document.questions[0].evidence[0][0] == 0
    assert document.questions[-1].evidence[0][1] == len(document.text)
    starts = [question.evidence[0][0] for question in document.questions]
    assert all(earlier < later for earlier, later in pairwise(starts))


def test_needles_are_others_in_every_piece_and_as_many_as_wanted(writer: Writer) -> None:
    first, second = (written("needle:excerpt", writer, 1024, seed, num_questions=3) for seed in (0, 1))
    assert len(first.questions) == len(second.questions) == 3
    assert {q.turns[0].answers for q in first.questions}.isdisjoint(q.turns[0].answers for q in second.questions)
    with pytest.raises(ConfigError, match="at most 12 needles; 13 were"):
        written("needle:excerpt", writer, num_questions=13)


def test_fewer_needles_may_be_asked_for_than_are_hidden(writer: Writer) -> None:
    """Another one in every document, so that all depths are asked."""
    asked = [written("needle:excerpt#1", writer, 1024, seed) for seed in range(9)]
    assert all(len(document.questions) == 1 for document in asked)
    assert [document.questions[0].details["depth"] for document in asked] == [0, 14, 29, 43, 57, 71, 86, 100, 0]
    assert asked[3].text == written("needle:excerpt", writer, 1024, 3).text
    with pytest.raises(ConfigError, match="at most 8 needles; 9 were"):
        written("needle:excerpt#1", writer, num_questions=9)


def test_a_document_has_room_for_its_needles_and_a_text_for_its_documents(writer: Writer) -> None:
    with pytest.raises(ConfigError, match=r"too short: its needles alone take \d+.*--lengths"):
        written("needle:excerpt", writer, 512)
    with pytest.raises(ConfigError, match=r"excerpt has 282436 tokens: 68 pieces of 4096\. Ask for no"):
        written("needle:excerpt", writer, seed=68)


def test_words_that_a_tokenizer_lacks_are_named() -> None:
    with pytest.raises(ConfigError, match="The tokenizer does not know 'CHAPTER'"):
        written("needle:excerpt", Writer(testbed.load()[1]))
