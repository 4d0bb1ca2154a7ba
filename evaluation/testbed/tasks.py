"""The six task families, after RULER (Hsieh et al. 2024): which facts each hides and what it asks.

A builder gets the words that are still free in the story (`Pools`) and the number of questions, and returns
a `FactPlan`: facts to hide and questions about them. It knows nothing of prose, order of threads, or positions.
Adding a task is one builder and one row in `TASKS`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from sparsekv.errors import ConfigError

from . import vocabulary as vocab

MIN_KEYS = 4  # the fewest keys of which each can share both its words with others


@dataclass(frozen=True, eq=False)
class Fact:
    """One sentence of a story that a question may need; compared by identity."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Ask:
    """A question before its facts have a place in the story."""

    prompt: str
    answer: str
    needs: tuple[Fact, ...]


@dataclass
class FactPlan:
    """What a task adds to a story: facts, in threads that are each told in order, and questions about them."""

    threads: list[list[Fact]] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)


class Pools:
    """Words not used by any task yet. Tasks share no key, so no question has two answers."""

    def __init__(self, rng: random.Random, num_tokens: int) -> None:
        self.rng = rng
        self.num_tokens = num_tokens
        self._free = {
            "adjectives": [*vocab.ADJECTIVES],
            "animals": [*vocab.ANIMALS],
            "names": [*vocab.NAMES],
            "towns": [*vocab.TOWNS],
            "numbers": [*vocab.NUMBERS],
            "categories": [*vocab.CATEGORIES],
        }

    def take(self, what: str, count: int) -> list[str]:
        """Returns `count` words of a kind that nobody else in the story will get."""
        free = self._free[what]
        if count > len(free):
            raise ConfigError(
                f"the story needs {count} more {what}, but only {len(free)} are left: "
                "ask fewer questions per story, or fewer tasks"
            )
        return [_pop_any(self.rng, free) for _ in range(count)]

    def fill(self, templates: tuple[str, ...], **slots: str) -> Fact:
        """Writes one of the templates; slots not given are filled with any word of their list."""
        template = self.rng.choice(templates)
        for slot in ("name", "town", "when", "land"):
            if "{" + slot + "}" in template:
                slots[slot] = self.rng.choice(vocab.SLOTS[slot])
        return Fact(tuple(template.format(**slots).split()))

    def code(self) -> str:
        """Five random digits, separated by spaces."""
        return " ".join(self.rng.choices(vocab.DIGITS, k=5))

    def look_alike_keys(self, count: int) -> list[str]:
        """At least `count` different keys such as "amber falcon", in random order.

        Each shares its adjective with another one and its animal with a third: the keys are the cells of
        `width` >= 2 diagonals of an adjective x animal square.
        """
        width = max(2, math.isqrt(count // 2))
        side = max(width, -(-count // width))
        adjectives, animals = self.take("adjectives", side), self.take("animals", side)
        keys = [
            f"{adjectives[row]} {animals[(row + diagonal) % side]}"
            for row in range(side)
            for diagonal in range(width)
        ]
        self.rng.shuffle(keys)
        return keys


def _pop_any(rng: random.Random, words: list[str]) -> str:
    """Removes a random word, without shuffling the rest: training writes thousands of stories a second."""
    index = int(rng.random() * len(words))
    words[index], words[-1] = words[-1], words[index]
    return words.pop()


TaskBuilder = Callable[[Pools, int], FactPlan]


def needle(pools: Pools, num_questions: int) -> FactPlan:
    """One code per question; no two of its keys share a word."""
    words = pools.take("adjectives", num_questions), pools.take("animals", num_questions)
    return _asked([_ask_code(pools, " ".join(key)) for key in zip(*words, strict=True)], num_questions)


def many_keys(pools: Pools, num_questions: int) -> FactPlan:
    """Codes of look-alike keys, one key for every 64 tokens of story; some of them are asked for."""
    keys = pools.look_alike_keys(max(num_questions, MIN_KEYS, pools.num_tokens // 64))
    return _asked([_ask_code(pools, key) for key in keys], num_questions)


def _asked(asks: list[Ask], num_questions: int) -> FactPlan:
    """Hides the facts of all, each one's in a thread; the first `num_questions` are asked."""
    return FactPlan([list(ask.needs) for ask in asks], asks[:num_questions])


def _ask_code(pools: Pools, key: str) -> Ask:
    code = pools.code()
    fact = pools.fill(vocab.CODE_FACTS, key=key, code=code)
    return Ask(vocab.CODE_QUESTION.format(key=key), code, (fact,))


def multi_query(pools: Pools, num_questions: int) -> FactPlan:
    """Asks for two to four codes at once; the prompt ends with the first key, the answer repeats the others."""
    sizes = [pools.rng.randint(2, 4) for _ in range(num_questions)]
    keys = pools.look_alike_keys(max(sum(sizes), MIN_KEYS, pools.num_tokens // 128))
    plan = FactPlan()
    for size in sizes:
        asked, keys = keys[:size], keys[size:]
        plan.asks.append(ask_codes(pools, plan, asked))
    for key in keys:
        plan.threads.append([pools.fill(vocab.CODE_FACTS, key=key, code=pools.code())])
    return plan


def ask_codes(pools: Pools, plan: FactPlan, keys: list[str], templates: tuple[str, ...] = vocab.CODE_FACTS) -> Ask:
    """Hides a code for every key, and asks for all of them at once."""
    codes = [pools.code() for _ in keys]
    facts = [pools.fill(templates, key=key, code=code) for key, code in zip(keys, codes, strict=True)]
    plan.threads += [[fact] for fact in facts]
    listed = " , ".join(f"the {key}" for key in keys[:-1]) + f" and the {keys[-1]}"
    answer = " , ".join(f"{key} {code}" for key, code in zip(keys, codes, strict=True))
    prompt = f"{vocab.CODES_QUESTION.format(keys=listed)} {keys[0]}"
    return Ask(prompt, answer.removeprefix(f"{keys[0]} "), tuple(facts))


def multi_value(pools: Pools, num_questions: int) -> FactPlan:
    """Travellers with look-alike names and two to four journeys each; all are asked for, in story order."""
    num_travellers = max(num_questions, MIN_KEYS, pools.num_tokens // 512)
    asks = []
    for traveller in pools.look_alike_keys(num_travellers)[:num_travellers]:
        towns = pools.take("towns", pools.rng.randint(2, 4))
        facts = [pools.fill(vocab.JOURNEY_FACTS, key=traveller, value=town) for town in towns]
        asks.append(Ask(vocab.JOURNEY_QUESTION.format(key=traveller), " ".join(towns), tuple(facts)))
    return _asked(asks, num_questions)


def variable_tracking(pools: Pools, num_questions: int) -> FactPlan:
    """Chains of two to four hops: one person keeps a number, each next one "the same number as" the last."""
    numbers = pools.take("numbers", num_questions + max(1, pools.num_tokens // 1024))
    return _asked([chain(pools, number, pools.rng.randint(2, 4)) for number in numbers], num_questions)


def chain(pools: Pools, number: str, hops: int) -> Ask:
    """One person keeps a number, and each of `hops` others the same as the one before; asks for all of them."""
    people = pools.take("names", 1 + hops)
    facts = [pools.fill(vocab.ROOT_FACTS, owner=people[0], number=number)]
    for source, owner in itertools.pairwise(people):
        facts.append(pools.fill(vocab.COPY_FACTS, owner=owner, source=source))
    return Ask(vocab.CHAIN_QUESTION.format(number=number), " ".join(people), tuple(facts))


def frequent_word(pools: Pools, num_questions: int) -> FactPlan:
    """Asks for the most frequent member of a category; no other member occurs more than half as often."""
    top = most_mentions(pools)
    plan = FactPlan()
    for category in pools.take("categories", num_questions):
        members = pools.rng.sample(vocab.CATEGORIES[category][1], 4)
        counts = [top, *(pools.rng.randint(1, top // 2) for _ in members[1:])]
        plan.asks.append(ask_count(pools, plan, category, dict(zip(members, counts, strict=True))))
    return plan


def most_mentions(pools: Pools) -> int:
    """How often the most frequent member of a category is told of."""
    return 4 if pools.num_tokens < 1024 else 6 if pools.num_tokens < 4096 else 8


def ask_count(pools: Pools, plan: FactPlan, category: str, counts: dict[str, int]) -> Ask:
    """Tells of the members of a category so many times, and asks for the first, the most frequent one."""
    verb, _ = vocab.CATEGORIES[category]
    facts = {
        member: [pools.fill(vocab.COUNT_FACTS, verb=verb, member=member) for _ in range(count)]
        for member, count in counts.items()
    }
    plan.threads += [[fact] for told in facts.values() for fact in told]
    answer = next(iter(counts))
    return Ask(vocab.COUNT_QUESTION.format(category=category, verb=verb), answer, tuple(facts[answer]))


TASKS: dict[str, TaskBuilder] = {
    "needle": needle,
    "many_keys": many_keys,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "variable_tracking": variable_tracking,
    "frequent_word": frequent_word,
}
