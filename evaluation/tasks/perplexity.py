"""How likely the end of a text is, token by token through the sparse path (as PG19 is used; Rae et al. 2019)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

from sparsekv.errors import ConfigError
from sparsekv.evaluation.testbed import tasks as grammar

from . import rows
from .base import Document, Metric, Question, Task, Turn, register
from .planned import evidence, seeded
from .writer import Writer

SCORED_TOKENS = 256
_ASKED = 16  # questions that a quiz has at most: about so many tokens
_MAX_TRIES = 64
_MAX_LETTERS = 16


@register("perplexity")
class Perplexity(Task):
    """A story that ends in a quiz about itself, answered. So its end is likely to one who looks back.

    Plain sentences that tell the facts again would do for large models; the testbed looks facts up in answers only.
    A text of one's own: `perplexity:FILE`.
    """

    metric = Metric.PERPLEXITY
    num_questions = 1
    stops = False

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        rng = seeded(self, seed)
        pools = writer.pools(rng, num_tokens)
        plan = grammar.many_keys(pools, max(_ASKED, pools.num_tokens // 64))
        text = writer.tell(plan.threads, num_tokens, rng)
        questions = []
        for _ in range(num_questions):
            asks, quiz = rng.sample(plan.asks, _ASKED), ""
            for ask in asks:
                if len(writer.encode(quiz)) < SCORED_TOKENS:
                    quiz += f"{writer.prompt(ask.prompt, later=bool(quiz))} {writer.render(ask.answer)}"
            questions.append(Question((begun(writer, quiz),), evidence(text, *asks)))
        return Document(text.text, tuple(questions), text.num_tokens)


def begun(writer: Writer, text: str) -> Turn:
    """A text to be scored, all but its beginning: a word, or part of a long one.

    Raises:
        ConfigError: the tokenizer does not know all words.
    """
    writer.check(text)
    first = re.match(rf"\s*\S{{1,{_MAX_LETTERS}}}", text)
    start = first.end() if first else 1
    return Turn(text[:start], (), text[start:])


class TextPerplexity(Task):
    """The perplexity of a text file: document i is its i-th piece, of the length asked for, and the 256 tokens after
    it are scored. The seed is the piece's number, from 0."""

    metric = Metric.PERPLEXITY
    num_questions = 1
    stops = False

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, rows.read(path)
        self._ids: WeakKeyDictionary[Writer, list[int]] = WeakKeyDictionary()  # a book is encoded once

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        if writer not in self._ids:
            self._ids[writer] = writer.check(self.text)
        ids, whole = self._ids[writer], num_tokens + SCORED_TOKENS
        if not 0 <= seed < len(ids) // whole or num_questions != 1:
            raise ConfigError(
                f"{self.path} has {len(ids)} tokens: {len(ids) // whole} pieces of {num_tokens} and the "
                f"{SCORED_TOKENS} to be scored after each, with one question a piece. Ask for no more (--examples), "
                "or for shorter ones (--lengths)."
            )
        piece = ids[seed * whole : (seed + 1) * whole]
        before, scored = piece[:num_tokens], piece[num_tokens:]
        text, count = fitting(writer, num_tokens, lambda most: writer.tokenizer.decode(before[-most:]))
        return Document(text, (Question((begun(writer, writer.tokenizer.decode(scored)),)),), count)

    def seed_of(self, seed: int, number: int) -> int:
        return number

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def fitting(writer: Writer, num_tokens: int, cut: Callable[[int], str]) -> tuple[str, int]:
    """A text cut to at most so many tokens, and how many it has: where a cut falls into a word or a sign, the text of
    so many tokens may be more of them."""
    for most in range(num_tokens, num_tokens - _MAX_TRIES, -1):
        text = cut(most)
        count = len(writer.check(text))
        if count <= num_tokens:
            return text, count
    raise ConfigError(f"A text cannot be cut to {num_tokens} tokens: its tokens are not those of its decoded text.")
