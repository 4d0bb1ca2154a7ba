"""Estimates with 95 % intervals, for questions of which several are about one document.

Such questions are not independent, so documents are what is resampled (the bootstrap: Efron 1979; of clusters:
Davison and Hinkley 1997, 3.8). Percentiles of few documents give intervals that are too narrow: they are taken
further out, as far as Student's t says (Hesterberg 2015). Where every document has one question, and it is right or
wrong, the interval is Wilson's (1927). Where resampling says nothing, because there are fewer than four documents or
all have the same mean, the interval is what it would be if those documents that Wilson's interval for 0 of n still
allows were as far from the ones seen as can be; for 0 % and for 100 % that is Wilson's interval on the number of
documents. Perplexities have no bounds, and of fewer than four documents no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

NUM_RESAMPLES = 2000
_SEED = 20260101
_MAX_NLL = 700.0  # whose perplexity is still a number: 1e304
MIN_DOCUMENTS = 4  # of fewer, not even the extremes of all resamples reach 95 %
_LEVEL = 0.95

Numbers = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes:
        low, high: None if nothing can be said.
        error: the standard error, where it is asked for.
    """

    value: float
    low: float | None = None
    high: float | None = None
    error: float | None = None


def proportion(scores: Sequence[float], documents: Sequence[int]) -> Estimate:
    """The mean of scores from 0 to 1; a score and the number of its document each."""
    values = np.asarray(scores, np.float64)
    sums, counts = _by_document(documents, values, np.ones_like(values))
    mean = float(values.mean())
    if counts.max() == 1 and np.isin(values, (0, 1)).all():
        return Estimate(mean, *wilson(int(values.sum()), len(values)))
    return Estimate(mean, *_of_mean(mean, sums, counts, bounds=(0, 1)))


def difference(changes: Sequence[float], documents: Sequence[int]) -> Estimate:
    """The mean of differences between two scores of the same question."""
    values = np.asarray(changes, np.float64)
    sums, counts = _by_document(documents, values, np.ones_like(values))
    mean = float(values.mean())
    return Estimate(mean, *_of_mean(mean, sums, counts, bounds=(-1, 1)))


def perplexity(nll: Sequence[float], num_scored: Sequence[int], documents: Sequence[int]) -> Estimate:
    """The perplexity of all tokens together, from mean negative log-likelihoods of so many tokens each."""
    tokens = np.asarray(num_scored, np.float64)
    sums, counts = _by_document(documents, np.asarray(nll) * tokens, tokens)
    return _resampled(lambda draws: _exp((draws @ sums) / (draws @ counts)), len(counts))


def perplexity_difference(
    nll: Sequence[float], dense_nll: Sequence[float], num_scored: Sequence[int], documents: Sequence[int]
) -> Estimate:
    """How much higher the first perplexity is than the second, of the same tokens."""
    tokens = np.asarray(num_scored, np.float64)
    columns = (np.asarray(nll) * tokens, np.asarray(dense_nll) * tokens, tokens)
    ours, theirs, counts = _by_document(documents, *columns)

    def of(draws: Numbers) -> Numbers:
        total = draws @ counts
        return _exp(draws @ ours / total) - _exp(draws @ theirs / total)

    return _resampled(of, len(counts))


def nats_difference(
    nll: Sequence[float], dense_nll: Sequence[float], num_scored: Sequence[int], documents: Sequence[int]
) -> Estimate:
    """How many nats per token more the first costs than the second, over the same tokens, with its standard error."""
    tokens = np.asarray(num_scored, np.float64)
    more, counts = _by_document(documents, (np.asarray(nll) - np.asarray(dense_nll)) * tokens, tokens)
    found = _resampled(lambda draws: (draws @ more) / (draws @ counts), len(counts))
    if found.low is None:
        return found
    residuals = more - found.value * counts  # of the ratio of two sums (Cochran 1977, 6.4)
    freedom = len(counts) / (len(counts) - 1)
    return replace(found, error=math.sqrt(freedom * float(residuals @ residuals)) / float(counts.sum()))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The plain mean of independent estimates; its interval from theirs (Zou and Donner 2008)."""
    value = sum(one.value for one in estimates) / len(estimates)
    below = above = 0.0
    for one in estimates:
        if one.low is None or one.high is None:
            return Estimate(value)
        below += (one.value - one.low) ** 2
        above += (one.high - one.value) ** 2
    return Estimate(value, value - math.sqrt(below) / len(estimates), value + math.sqrt(above) / len(estimates))


def wilson(right: int, count: int) -> Interval:
    """Wilson's score interval for the share of `right` among `count` independent trials."""
    found = stats.binomtest(right, count).proportion_ci(_LEVEL, method="wilson")
    return float(found.low), float(found.high)


def _of_mean(mean: float, sums: Numbers, counts: Numbers, bounds: Interval) -> Interval:
    num_documents = len(counts)
    if num_documents < MIN_DOCUMENTS or np.ptp(sums / counts) < 1e-12:
        unlike = wilson(0, num_documents)[1]  # so large a share of all documents may be
        return mean + unlike * (bounds[0] - mean), mean + unlike * (bounds[1] - mean)
    draws = _draws(num_documents)
    return _percentiles((draws @ sums) / (draws @ counts), num_documents)


def _resampled(of: Any, num_documents: int) -> Estimate:
    """What `of` makes of the documents, and of its resamples."""
    value = float(of(np.ones((1, num_documents)))[0])
    resamples = of(_draws(num_documents))
    if num_documents < MIN_DOCUMENTS or not np.isfinite(resamples).all():
        return Estimate(value)
    return Estimate(value, *_percentiles(resamples, num_documents))


def _by_document(documents: Sequence[int], *columns: Numbers) -> list[Numbers]:
    """The sums of each column, by document."""
    _, index = np.unique(np.asarray(documents), return_inverse=True)
    return [np.bincount(index, weights=column).astype(np.float64) for column in columns]


@lru_cache(maxsize=8)
def _draws(num_documents: int) -> Numbers:
    """How often each document is in each resample, `[NUM_RESAMPLES, num_documents]`.

    All cells share them, and few products replace a resampling; with `scipy.stats.bootstrap` a report of 1,300 cells
    takes four times as long.
    """
    rng = np.random.default_rng((_SEED, num_documents))
    shares = np.full(num_documents, 1 / num_documents)
    return rng.multinomial(num_documents, shares, size=NUM_RESAMPLES).astype(np.float64)


def _percentiles(resamples: Numbers, num_documents: int) -> Interval:
    freedom = num_documents - 1
    reach = math.sqrt(num_documents / freedom) * stats.t.ppf((1 + _LEVEL) / 2, freedom)
    tail = stats.norm.cdf(-reach)
    low, high = np.quantile(resamples, (tail, 1 - tail))
    return float(low), float(high)


def _exp(values: Numbers) -> Numbers:
    return np.asarray(np.exp(np.minimum(values, _MAX_NLL)))
