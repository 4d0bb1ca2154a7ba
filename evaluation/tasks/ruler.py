"""RULER's families of tasks (Hsieh et al., COLM 2024), in the testbed's words."""

from __future__ import annotations

from collections.abc import Callable

from sparsekv.evaluation.testbed import tasks as grammar
from sparsekv.evaluation.testbed import vocabulary as vocab
from sparsekv.evaluation.testbed.tasks import FactPlan, Pools

from .base import register
from .planned import CODES, Planned


@register("multi_key")
class MultiKey(Planned):
    """A code among those of look-alike keys, one key for every 64 words (RULER: multi-keys NIAH)."""

    builder = staticmethod(grammar.many_keys)
    items = CODES
    how = "Answer with the code only."


@register("multi_query")
class MultiQuery(Planned):
    """Two to four codes at once, among look-alike keys (multi-queries NIAH). The prompt ends with the first key."""

    builder = staticmethod(grammar.multi_query)
    items = CODES
    how = "Answer with each of them and its code, in the order asked, separated by commas."


@register("multi_value")
class MultiValue(Planned):
    """All the towns, two to four, that one of many look-alike travellers went to (multi-values NIAH)."""

    builder = staticmethod(grammar.multi_value)
    how = "Answer with the names of all towns only, in the order of the text, separated by spaces."


@register("variable_tracking")
class VariableTracking(Planned):
    """All the people, three to five, who keep a number that each has from the one before; other chains lie around."""

    builder = staticmethod(grammar.variable_tracking)
    how = (
        "Who keeps the same number as somebody who keeps it keeps it too. Answer with the names of all of them only, "
        "separated by spaces."
    )


def _counts(pools: Pools, num_questions: int, count: Callable[[int, int], int]) -> FactPlan:
    """All ten members of a category, `count(top, rank)` times each; asks for the first."""
    top, plan = grammar.most_mentions(pools), FactPlan()
    for category in pools.take("categories", num_questions):
        members = vocab.CATEGORIES[category][1]
        ranked = enumerate(pools.rng.sample(members, len(members)), 1)
        counts = {member: count(top, rank) for rank, member in ranked}
        plan.asks.append(grammar.ask_count(pools, plan, category, counts))
    return plan


def _common(pools: Pools, num_questions: int) -> FactPlan:
    return _counts(pools, num_questions, lambda top, rank: top if rank == 1 else 1)


def _zipf(pools: Pools, num_questions: int) -> FactPlan:
    return _counts(pools, num_questions, lambda top, rank: max(1, round(top / rank)))


@register("common_words")
class CommonWords(Planned):
    """Which member of a category is common, told of up to eight times, where nine are rare, told of once.

    RULER's words are ten common and many rare ones, 30 times and 3 times, and all ten are asked for. Here each of
    several categories has one, as the testbed knows no question with ten answers in any order.
    """

    num_questions = 4
    builder = staticmethod(_common)
    how = "Answer with one word."


@register("frequent_words")
class FrequentWords(Planned):
    """Which member of a category is told of most often, where the frequencies of all ten follow a Zipf law: the
    second is told of half as often, the third a third as often, and so on.

    RULER asks for the three most frequent of one list of made-up words, here each of several categories is asked for
    its first.
    """

    num_questions = 4
    builder = staticmethod(_zipf)
    how = "Answer with one word."
