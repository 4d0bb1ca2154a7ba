"""Estimates and their 95 % intervals, against known values and against simulated data."""

import math

import numpy as np
import pytest

from sparsekv.evaluation.accuracy.intervals import (
    Estimate,
    difference,
    mean,
    nats_difference,
    perplexity,
    perplexity_difference,
    proportion,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962)],
)
def test_one_question_per_document_gets_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    """By hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96."""
    found = proportion([1.0] * right + [0.0] * (count - right), range(count))
    assert found.value == pytest.approx(right / count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert wilson(right, count) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("num_documents", [5, 8, 30])
@pytest.mark.parametrize("difficulty", [(2, 2), (8, 2)])
def test_the_bootstrap_over_documents_covers_the_truth(num_documents: int, difficulty: tuple[int, int]) -> None:
    """Eight questions per document, and documents differ: 95 % of the intervals hold the true mean, about."""
    rng, truth, covered = np.random.default_rng(0), difficulty[0] / sum(difficulty), 0
    documents = np.repeat(np.arange(num_documents), 8)
    for _ in range(300):
        scores = rng.random(len(documents)) < rng.beta(*difficulty, num_documents)[documents]
        found = proportion(scores.astype(float), documents)
        covered += found.low <= truth <= found.high  # type: ignore[operator]
    assert 0.89 <= covered / 300 <= 0.99


def test_questions_taken_for_independent_would_give_too_narrow_an_interval() -> None:
    """Documents of eight equal answers are worth one question each, not eight."""
    rights = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    scores, documents = np.repeat(rights, 8), np.repeat(np.arange(10), 8)
    together, alone = proportion(scores, documents), proportion(scores, range(80))
    assert _width(together) > 2 * _width(alone)


@pytest.mark.parametrize("num_documents", [1, 3, 12])
def test_where_resampling_says_nothing_wilson_on_the_documents_does(num_documents: int) -> None:
    documents = np.repeat(np.arange(num_documents), 4)
    for score in (0.0, 1.0):
        found = proportion(np.full(len(documents), score), documents)
        assert (found.low, found.high) == pytest.approx(wilson(int(score) * num_documents, num_documents))
    same = difference(np.zeros(len(documents)), documents)
    assert same.value == 0
    assert same.high == pytest.approx(wilson(0, num_documents)[1])
    assert same.low == pytest.approx(-same.high)


@pytest.mark.parametrize("num_documents", [2, 3])
def test_of_very_few_documents_the_interval_is_wide_and_within_the_bounds(num_documents: int) -> None:
    scores, documents = [1.0, 0.0, 1.0, 1.0] * num_documents, np.repeat(np.arange(num_documents), 4)
    found = proportion(scores, documents)
    assert 0 <= found.low < found.value < found.high <= 1  # type: ignore[operator]
    assert _width(found) > 0.5


def test_pairing_tells_small_differences_from_noise() -> None:
    """Two methods that differ in one question of each of 40 documents, while documents differ much more."""
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(40), 5)
    dense = (rng.random(200) < rng.beta(0.5, 0.5, 40)[documents]).astype(float)
    ours = dense.copy()
    ours[::5] = 0
    paired = difference(ours - dense, documents)
    assert paired.value == pytest.approx(ours.mean() - dense.mean())
    assert paired.high < 0  # type: ignore[operator]
    assert proportion(ours, documents).high > proportion(dense, documents).low  # type: ignore[operator]


def test_perplexity_weighs_tokens_not_rows() -> None:
    found = perplexity([1.0, 2.0], [300, 100], [0, 1])
    assert found == Estimate(pytest.approx(math.exp(1.25)))
    assert math.isfinite(perplexity([1e4] * 4, [1] * 4, range(4)).value)  # of a broken model


def test_the_interval_of_a_perplexity_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(2), 0
    for _ in range(300):
        nll = rng.normal(2.0, 0.3, 12)
        found = perplexity(nll, [128] * 12, range(12))
        covered += found.low <= math.exp(2.0) <= found.high  # type: ignore[operator]
    assert 0.9 <= covered / 300 <= 0.99


def test_a_perplexitys_difference_is_paired_too() -> None:
    dense = np.linspace(1.0, 3.0, 10)
    found = perplexity_difference(dense + 0.01, dense, [64] * 10, range(10))
    assert found.value == pytest.approx(math.exp(2.01) - math.exp(2.0))
    assert 0 < found.low < found.value < found.high  # type: ignore[operator]
    assert perplexity_difference(dense[:2], dense[:2], [64] * 2, range(2)) == Estimate(0.0)


def test_nats_over_dense_have_a_paired_standard_error() -> None:
    """Of the documents' means where all are as long; a document of more tokens weighs more."""
    rng = np.random.default_rng(3)
    dense = rng.normal(3.0, 1.0, 50)
    more = rng.normal(0.02, 0.01, 50)
    found = nats_difference(dense + more, dense, [128] * 50, range(50))
    assert found.value == pytest.approx(more.mean())
    assert found.error == pytest.approx(more.std(ddof=1) / math.sqrt(50))
    assert (found.low, found.high) == pytest.approx(
        (found.value - 2 * found.error, found.value + 2 * found.error), abs=4e-4
    )
    assert nats_difference([2.0, 3.0], [1.0, 1.0], [300, 100], [0, 1]) == Estimate(1.25)


def test_a_mean_is_surer_than_what_it_is_of() -> None:
    one = Estimate(0.5, 0.3, 0.6)
    assert mean([one]) == Estimate(0.5, pytest.approx(0.3), pytest.approx(0.6))
    found = mean([one] * 4)
    assert (found.low, found.high) == pytest.approx((0.4, 0.55))
    assert mean([one, Estimate(1.0)]) == Estimate(0.75)


def test_the_same_scores_give_the_same_interval() -> None:
    scores, documents = [1.0, 0.0, 0.5, 1.0] * 5, np.repeat(np.arange(10), 2)
    assert proportion(scores, documents) == proportion(scores, documents)
    assert proportion(scores, documents + 100) == proportion(scores, documents)


def _width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low
