"""What a task is: documents with questions about them, written for any tokenizer and sized in its tokens.

A document is prefilled once, densely. Every question about it is then asked on its own over the same cache, question
and answer token by token: what is asked inside a dense prefill has collected its answer there, and nothing sparse
would be measured.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from sparsekv.registry import Registry

if TYPE_CHECKING:
    from .writer import Writer


MAX_DOCUMENTS = 1 << 20  # of a task and length


class Metric(Enum):
    """What is counted of an answer."""

    RECALL = "recall"  # share of the expected strings that were said (RULER's string_match_all)
    ANY = "any"  # whether one of the expected strings was said (RULER's string_match_part)
    PREFIX = "prefix"  # share of the expected strings that were said before the first error: errors add up
    F1 = "f1"  # of words, against the best of several right answers (LongBench)
    PERPLEXITY = "perplexity"  # nothing is said: the mean negative log-likelihood of the reference, in nats a token


@dataclass(frozen=True)
class Turn:
    """One prompt and what is expected to follow it.

    Attributes:
        prompt: comes right after what is in the cache, its leading space or line break included.
        answers: the strings that a right answer holds, in order (F1: right answers, any of them).
        reference: what a perfect model would say, its leading space included: sizes the answer, and is what is fed
            where the metric is perplexity.
        opening: the prompt's end, where it begins the answer, as `Answer: the first is`.
    """

    prompt: str
    answers: tuple[str, ...]
    reference: str
    opening: str = ""

    @property
    def asked(self) -> str:
        """What a user would say in a chat."""
        return self.prompt.removesuffix(self.opening).strip()

    @property
    def begun(self) -> str:
        """What the model's turn of a chat begins with."""
        return re.sub(r"^\s*Answer ?:", "", self.opening).strip()


@dataclass(frozen=True)
class Question:
    """One or more turns over one document: each is asked after the answers to those before.

    Attributes:
        evidence: character spans `[start, end)` of the document that the answers come from.
        details: what a report may group by, such as the depth of a needle in percent.
    """

    turns: tuple[Turn, ...]
    evidence: tuple[tuple[int, int], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A text and questions about it.

    Attributes:
        text: at most as many tokens as were asked for, and hardly fewer.
        num_tokens: what the tokenizer makes of the text.
    """

    text: str
    questions: tuple[Question, ...]
    num_tokens: int


class Task(ABC):
    """Writes documents. Stateless: the same arguments give the same document.

    Attributes:
        metric: what is counted.
        num_questions: about one document, unless asked otherwise.
        stops: whether the model may end its answer by itself; if not, as many tokens are decoded as the reference
            has, whatever they are.
    """

    metric: Metric = Metric.RECALL
    num_questions: int = 8
    stops: bool = True

    @abstractmethod
    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        """A document of at most `num_tokens` tokens of the writer's tokenizer.

        Args:
            num_questions: another number makes another document, whose first questions are others too.

        Raises:
            ConfigError: its facts do not fit, or the tokenizer lacks words that they need.
        """

    def seed_of(self, seed: int, number: int) -> int:
        """The seed of a run's document: no two runs of different seeds share one. Documents that are read from a file
        are counted instead, whatever the seed."""
        return seed * MAX_DOCUMENTS + number

    @property
    def sha256(self) -> str | None:
        """The hash of the data that documents are made of; None: they are made of `write`'s arguments alone."""
        return None


def spread(num_questions: int, count: int) -> list[int]:
    """Which of a document's questions are asked where fewer are wanted: spread evenly over all, as those for needles
    are in the order of their depths."""
    count = min(num_questions, count)
    return [round(i * (num_questions - 1) / max(count - 1, 1)) for i in range(count)]


TASKS: Registry[Task] = Registry("task")


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: files a task under `name`."""
    return TASKS.register(name)
