"""Tasks that a plan of the testbed's grammar describes: facts to be hidden in prose, and questions about them."""

from __future__ import annotations

import random
import re
from typing import ClassVar

from sparsekv.evaluation.testbed.tasks import Ask, FactPlan, TaskBuilder

from .base import Document, Question, Task, Turn
from .writer import Text, Writer

# What to look for in an answer.
CODES = r"\d(?: ?\d){4}"
WORDS = r"\w+"


def seeded(task: Task, seed: int) -> random.Random:
    """Each task draws numbers of its own, or their documents would hold the same facts."""
    return random.Random(f"{type(task).__name__} {seed}")


def turn(writer: Writer, ask: Ask, items: str, how: str = "", later: bool = False) -> Turn:
    """A question of the grammar in the writer's spelling.

    Args:
        items: pattern of the expected strings in the right answer.
        how, later: as `Writer.prompt` takes them.

    Raises:
        ConfigError: the tokenizer does not know all words.
    """
    prompt, answer = writer.prompt(ask.prompt, how, later), writer.render(ask.answer)
    writer.check(f"{prompt} {answer}")
    opening = prompt[prompt.rindex("Answer") :]
    return Turn(prompt, tuple(re.findall(items, answer)), f" {answer}", opening)


def evidence(text: Text, *asks: Ask) -> tuple[tuple[int, int], ...]:
    """Where the facts stand that are needed."""
    return tuple(text.spans[fact] for ask in asks for fact in ask.needs)


class Planned(Task):
    """A task whose builder says what to hide and to ask; the facts are mixed with prose at random.

    Attributes:
        builder: makes the plan.
        items: pattern of the expected strings in the right answer.
        how: in what form to answer.
    """

    builder: ClassVar[TaskBuilder]
    items: ClassVar[str] = WORDS
    how: ClassVar[str]

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        rng, kind = seeded(self, seed), type(self)
        plan: FactPlan = kind.builder(writer.pools(rng, num_tokens), num_questions)
        text = writer.tell(plan.threads, num_tokens, rng)
        questions = [Question((turn(writer, ask, kind.items, kind.how),), evidence(text, ask)) for ask in plan.asks]
        return Document(text.text, tuple(questions), text.num_tokens)
