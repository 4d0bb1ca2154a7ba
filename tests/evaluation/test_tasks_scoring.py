"""Scores of answers: between 0 and 1, whatever is said, and right where that can be said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.evaluation.tasks import Metric, score

SCORES = [metric for metric in Metric if metric is not Metric.PERPLEXITY]
WORDS = st.lists(st.sampled_from("ash birch cedar 4 2 17 the .".split()), max_size=8).map(" ".join)
ANSWERS = st.lists(st.sampled_from(["ash", "birch cedar", "4 2", "17"]), min_size=1, max_size=5, unique=True)


@given(said=st.text(max_size=40), answers=st.lists(st.text(max_size=10), max_size=4))
@pytest.mark.parametrize("metric", SCORES)
def test_every_score_is_a_share(metric: Metric, said: str, answers: list[str]) -> None:
    assert 0.0 <= score(metric, [said], [answers]) <= 1.0


@given(answers=ANSWERS, space=st.sampled_from([" ", "  ", "\n", ", ", " .\n"]))
@pytest.mark.parametrize("metric", [Metric.RECALL, Metric.PREFIX, Metric.ANY])
def test_all_answers_said_in_order_is_right(metric: Metric, answers: list[str], space: str) -> None:
    assert score(metric, [f" {space.join(answers).upper()} "], [answers]) == 1.0


@given(said=WORDS, answers=ANSWERS)
def test_prefix_is_at_most_recall_and_recall_at_most_any(said: str, answers: list[str]) -> None:
    prefix, recall, some = (score(m, [said], [answers]) for m in (Metric.PREFIX, Metric.RECALL, Metric.ANY))
    assert prefix <= recall <= some


@given(said=WORDS, more=WORDS, answers=ANSWERS)
def test_recall_does_not_fall_when_more_is_said(said: str, more: str, answers: list[str]) -> None:
    assert score(Metric.RECALL, [f"{said} {more}"], [answers]) >= score(Metric.RECALL, [said], [answers])


@given(answers=ANSWERS, right=st.integers(0, 5))
def test_prefix_counts_up_to_the_first_error(answers: list[str], right: int) -> None:
    said = " ".join([*answers[:right], "wrong", *answers[right:]])
    assert score(Metric.PREFIX, [said], [answers]) == min(right, len(answers)) / len(answers)


@given(said=WORDS, answer=WORDS)
def test_f1_is_symmetric_on_a_line(said: str, answer: str) -> None:
    assert score(Metric.F1, [said], [[answer]]) == score(Metric.F1, [answer], [[said]])


@given(said=WORDS, answers=ANSWERS)
def test_f1_is_that_of_the_best_answer(said: str, answers: list[str]) -> None:
    assert score(Metric.F1, [said], [answers]) == max(score(Metric.F1, [said], [[answer]]) for answer in answers)


@pytest.mark.parametrize(
    ("metric", "said", "answers", "expected"),
    [
        (Metric.RECALL, ["the code is 42179."], [["42179"]], 1.0),
        (Metric.RECALL, ["421790"], [["42179"]], 0.0),
        (Metric.RECALL, ["4 2 1 7 9 , grey fox 0 0 1 1 2"], [["4 2 1 7 9", "0 0 1 1 3"]], 0.5),
        (Metric.RECALL, ["Ashton", "Elmford Oakham"], [["Ashton"], ["Oakham", "Elmford", "Redgate"]], 0.75),
        (Metric.RECALL, ["?"], [["?"]], 1.0),
        (Metric.RECALL, [""], [["x"]], 0.0),
        (Metric.ANY, ["in Brook, I think"], [["Brook", "Brookfield"]], 1.0),
        (Metric.ANY, ["Brooks"], [["Brook"]], 0.0),
        (Metric.PREFIX, ["a b x d"], [["a", "b", "c", "d"]], 0.5),
        (Metric.PREFIX, ["Well, a b c d"], [["a", "b", "c", "d"]], 0.0),
        (Metric.PREFIX, ["42179\ngrey fox: 00112"], [["42179", "grey fox 00112"]], 1.0),
        (Metric.PREFIX, ["a b", "x", "e f"], [["a", "b"], ["c", "d"], ["e", "f"]], 1 / 3),
        (Metric.F1, ["The bell of Harrow!"], [["bell Harrow"]], 0.8),
        (Metric.F1, [" Odette\nQuestion: who else?"], [["odette"]], 1.0),
        (Metric.F1, ["no"], [["yes"]], 0.0),
        (Metric.F1, [""], [["the"]], 1.0),
    ],
)
def test_known_scores(metric: Metric, said: list[str], answers: list[list[str]], expected: float) -> None:
    assert score(metric, said, answers) == pytest.approx(expected)


def test_what_has_no_score_is_refused() -> None:
    with pytest.raises(ConfigError, match="no score"):
        score(Metric.PERPLEXITY, ["x"], [[]])
    with pytest.raises(ConfigError, match="2 answers were given, 1 are expected"):
        score(Metric.RECALL, ["x", "y"], [["x"]])
