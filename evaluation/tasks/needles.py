"""Codes in prose: where in a document does a model still find what it is asked for?"""

from __future__ import annotations

import random
from collections.abc import Sequence

from sparsekv.evaluation.testbed import tasks as grammar

from .base import Document, Question, Task, register
from .planned import CODES, evidence, seeded, turn
from .writer import Writer


@register("passkey")
class Passkey(Task):
    """One code in prose, at a random depth (Mohtashami and Jaggi 2023)."""

    num_questions = 1

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        rng = seeded(self, seed)
        return _needles(writer, num_tokens, [rng.random() for _ in range(num_questions)], rng)


@register("needle")
class Needle(Task):
    """Codes at depths spread evenly from a document's beginning to its end, each asked for by itself (the needle in a
    haystack of Kamradt 2023, depth by length). As many depths as questions."""

    num_questions = 11

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        depths = [i / max(num_questions - 1, 1) for i in range(num_questions)]
        return _needles(writer, num_tokens, depths, seeded(self, seed))


def _needles(writer: Writer, num_tokens: int, depths: Sequence[float], rng: random.Random) -> Document:
    """A question per depth; no two keys share a word."""
    plan = grammar.needle(writer.pools(rng, num_tokens), len(depths))
    text = writer.tell(plan.threads, num_tokens, rng, depths)
    questions = []
    for ask, depth in zip(plan.asks, depths, strict=True):
        asked = turn(writer, ask, CODES, "Answer with the code only.")
        questions.append(Question((asked,), evidence(text, ask), {"depth": round(100 * depth)}))
    return Document(text.text, tuple(questions), text.num_tokens)
