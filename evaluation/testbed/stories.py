"""Seeded stories: English prose with facts hidden in it, and questions whose answers are those facts.

>>> story = make_story(2048, tasks=("needle",), num_questions=1, seed=7)
>>> story.questions[0].prompt
'Question : what is the secret code of the ... ? Answer :'

The testbed's tokenizer splits at spaces, so a word's index in `Story.text` is its token's index.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekv.errors import ConfigError, UnknownNameError

from . import vocabulary as vocab
from .tasks import TASKS, Fact, Pools, TaskBuilder

__all__ = ["TASKS", "Question", "Story", "TaskBuilder", "make_story"]

ALL_TASKS = tuple(TASKS)
NUM_PROSE_SENTENCES = 20_000
PROSE_SEED = 2024
MIN_SENTENCE = min(len(template.split()) for template in vocab.PROSE_TEMPLATES)
MAX_SENTENCE = max(len(template.split()) for template in vocab.PROSE_TEMPLATES)

Sentence = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about a story; `text + " " + prompt` is continued by `answer` and then "</s>"."""

    task: str
    prompt: str
    answer: str  # words separated by single spaces
    evidence: tuple[tuple[int, int], ...]  # word spans [start, end) of the facts needed, in answer order


@dataclass(frozen=True)
class Story:
    """A text of words joined by single spaces, and questions about it."""

    text: str
    questions: tuple[Question, ...]

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        return tuple(self.text.split(" "))

    @property
    def num_tokens(self) -> int:
        """Words in the text, which are also its tokens."""
        return len(self.words)


def make_story(num_tokens: int, tasks: Sequence[str] = ALL_TASKS, num_questions: int = 8, seed: int = 0) -> Story:
    """Writes a story of exactly `num_tokens` words with `num_questions` questions.

    The questions take turns through `tasks`, in the order given. The same arguments give the same story;
    another seed gives other facts, prose and order. Raises `ConfigError`, a ValueError, for an unknown task or if
    the facts do not fit.
    """
    _check(tasks, num_questions)
    rng = random.Random(seed)
    pools = Pools(rng, num_tokens)
    shares = {task: len(range(i, num_questions, len(tasks))) for i, task in enumerate(tasks)}
    plans = {task: TASKS[task](pools, share) for task, share in shares.items() if share}
    threads = [thread for plan in plans.values() for thread in plan.threads]
    taken = sum(len(fact.words) for thread in threads for fact in thread)
    words: list[str] = []
    spans: dict[Fact, tuple[int, int]] = {}  # where each fact stands, in words [start, end)
    for sentence in mixed(rng, threads, _prose(rng, num_tokens, taken)):
        start = len(words)
        words += sentence.words if isinstance(sentence, Fact) else sentence
        if isinstance(sentence, Fact):
            spans[sentence] = (start, len(words))
    asks = {task: iter(plan.asks) for task, plan in plans.items()}
    turns = [(task, next(asks[task])) for task in itertools.islice(itertools.cycle(tasks), num_questions)]
    questions = (Question(task, ask.prompt, ask.answer, tuple(spans[f] for f in ask.needs)) for task, ask in turns)
    return Story(" ".join(words), tuple(questions))


def _check(tasks: Sequence[str], num_questions: int) -> None:
    """Refuses what no story can serve, and says what would work."""
    if isinstance(tasks, str) or not tasks:
        raise ConfigError(f"tasks must be a non-empty sequence of names, such as ('needle',); got {tasks!r}")
    for task in tasks:
        if task not in TASKS:
            raise UnknownNameError("task", task, TASKS)
    if len(set(tasks)) != len(tasks):
        raise ConfigError(f"each task may be named once; got {tuple(tasks)}")
    if num_questions < 1:
        raise ConfigError(f"num_questions must be at least 1; got {num_questions}")


def mixed(rng: random.Random, threads: Sequence[Sequence[Fact]], prose: Sequence[Sentence]) -> list[Fact | Sentence]:
    """Mixes threads and prose at random, but each thread in its own order."""
    turns = [i for i, thread in enumerate(threads) for _ in thread] + [-1] * len(prose)
    rng.shuffle(turns)
    told = [iter(thread) for thread in threads]
    rest = iter(prose)
    return [next(rest) if turn < 0 else next(told[turn]) for turn in turns]


def _prose(rng: random.Random, num_tokens: int, taken: int) -> list[Sentence]:
    """Draws prose for all tokens but the `taken` ones, which the facts fill."""
    left = num_tokens - taken
    if left < 0 or 0 < left < MIN_SENTENCE:
        raise ConfigError(
            f"a story of {num_tokens} tokens is too short: these facts alone take {taken}; "
            "make it longer, or ask fewer questions"
        )
    bank, by_length = prose_bank()
    sentences: list[Sentence] = []
    while left >= MAX_SENTENCE + MIN_SENTENCE:
        sentences.append(rng.choice(bank))
        left -= len(sentences[-1])
    while left:  # from here on, never leave a gap that no sentence fits
        length = left if left <= MAX_SENTENCE else rng.randint(MIN_SENTENCE, left - MIN_SENTENCE)
        length = min(length, MAX_SENTENCE)
        sentences.append(rng.choice(by_length[length]))
        left -= length
    return sentences


@functools.cache
def prose_bank() -> tuple[list[Sentence], dict[int, list[Sentence]]]:
    """The prose sentences that all stories draw from, as a list and by length in words."""
    rng = random.Random(PROSE_SEED)
    bank: list[Sentence] = []
    by_length: dict[int, list[Sentence]] = {}
    for i in range(NUM_PROSE_SENTENCES):
        template = vocab.PROSE_TEMPLATES[i % len(vocab.PROSE_TEMPLATES)].split()
        sentence = tuple(rng.choice(vocab.SLOTS[word[1:-1]]) if word.startswith("{") else word for word in template)
        bank.append(sentence)
        by_length.setdefault(len(sentence), []).append(sentence)
    return bank, by_length
