"""How right an answer is, from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from sparsekv.errors import ConfigError

from .base import Metric

_ARTICLES = {"a", "an", "the"}


def score(metric: Metric, said: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """What the answers to a question's turns are worth.

    RECALL and ANY are RULER's string_match_all and string_match_part (Hsieh et al. 2024), by whole words. PREFIX is
    the share of the expected strings that were said, in order, before the first other word. F1 is LongBench's (Bai et
    al. 2023, after SQuAD), of the answer's first line against the best of the right answers: what comes after a line
    break is often a question that the model made up.

    Args:
        said: by turn.
        answers: by turn, the expected strings.

    Raises:
        ConfigError: perplexity is no score, or there are not as many turns.
    """
    if len(said) != len(answers):
        raise ConfigError(f"{len(said)} answers were given, {len(answers)} are expected: one per turn.")
    if metric is Metric.PERPLEXITY:
        raise ConfigError("perplexity has no score: report the mean negative log-likelihood.")
    if metric is Metric.PREFIX:
        return _prefix(said, answers)
    points = []
    for text, expected in zip(said, answers, strict=True):
        how_right = _f1 if metric is Metric.F1 else _holds
        rights = [float(how_right(text, answer)) for answer in expected]
        points += rights if metric is Metric.RECALL else [max(rights, default=0.0)]
    return sum(points) / max(len(points), 1)


def _words(text: str) -> list[str]:
    """Words and numbers; an answer of signs only is compared as it is."""
    return re.findall(r"\w+", text.lower()) or text.split()


def _holds(text: str, answer: str) -> bool:
    return f" {' '.join(_words(answer))} " in f" {' '.join(_words(text))} "


def _prefix(said: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    right, total = 0, sum(map(len, answers))
    for text, expected in zip(said, answers, strict=True):
        words = _words(text)
        for answer in expected:
            wanted = _words(answer)
            if words[: len(wanted)] != wanted:
                return right / total
            words = words[len(wanted) :]
            right += 1
    return right / max(total, 1)


def _f1(said: str, answer: str) -> float:
    ours, theirs = _plain(next(iter(said.strip().splitlines()), "")), _plain(answer)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else float(ours == theirs)


def _plain(text: str) -> list[str]:
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return [word for word in text.split() if word not in _ARTICLES]
