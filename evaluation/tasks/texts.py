"""Tasks in a text of one's own: how likely it goes on, how likely what it said early is said again, and needles.

Document i is the text's i-th piece, so the seed of `write` is the piece's number, from 0.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from sparsekv.errors import ConfigError
from sparsekv.evaluation import texts

from . import perplexity, rows
from .base import Document, Metric, Question, Task, Turn
from .perplexity import MAX_LETTERS, WORD, begun
from .planned import seeded
from .writer import Writer

TEXT_TASKS = ("perplexity", "recall", "needle")
RUN_IN = 32  # tokens of a repetition that are fed and not scored: nothing tells a model before that it has begun
_EARLY = (1 / 12, 1 / 4)  # where in a document the passage begins that is repeated: behind the first tokens, far back
_MAX_TRIES = 64
_BLOCK = re.compile(r".{1,1000000}(?=\s|\Z)|.+", re.S)  # is encoded at once: a long text takes gigabytes and minutes
_SPACE = re.compile(r"\s(?=\S)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s|(?<=[.!?][\"'”’])\s")
# What has a number. No two are alike: the smallest models would mix them up.
_FACTS = (
    "pass code of the north tower",
    "telephone number of the village bakery",
    "ticket number of Captain Morris",
    "secret code of the silver teapot",
    "price of the red balloon",
    "postcode of the city of Lisbon",
    "weight of the lazy elephant",
    "engine number of the night train",
    "room number of Professor Hamilton",
    "population of the island of Samoa",
    "combination of the bank safe",
    "serial number of the old piano",
)


class TextTask(Task):
    """Documents that are pieces of a text.

    Args:
        source: a file, or `excerpt`: the text that ships.

    Raises:
        ConfigError: it cannot be read.
    """

    num_questions = 1

    def __init__(self, source: str) -> None:
        self.source = source
        self.text = texts.excerpt() if source == texts.NAME else rows.read(Path(source))
        self._encoded: WeakKeyDictionary[Writer, tuple[list[int], Iterator[re.Match[str]]]] = WeakKeyDictionary()

    def seed_of(self, seed: int, number: int) -> int:
        return number

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def piece(self, writer: Writer, num_tokens: int, number: int, num_scored: int = 0) -> list[int]:
        """Token ids of a piece and of those after it that are scored.

        Raises:
            ConfigError: the text is too short.
        """
        whole = num_tokens + num_scored
        ids, blocks = self._encoded.setdefault(writer, ([], _BLOCK.finditer(self.text)))
        while (number < 0 or len(ids) < (number + 1) * whole) and (block := next(blocks, None)):
            ids += writer.check(block[0])
        if not 0 <= number < len(ids) // whole:
            after = f" and the {num_scored} to be scored after each" if num_scored else ""
            raise ConfigError(
                f"{self.source} has {len(ids)} tokens: {len(ids) // whole} pieces of {num_tokens}{after}. Ask for no "
                "more (--examples), or for shorter ones (--lengths)."
            )
        return ids[number * whole : (number + 1) * whole]


class TextPerplexity(TextTask):
    """How likely the text after a piece is.

    Args:
        num_scored: tokens after each piece; None: as many as a quiz of `perplexity` has.
    """

    metric = Metric.PERPLEXITY
    stops = False

    def __init__(self, source: str, num_scored: int | None = None) -> None:
        super().__init__(source)
        self.num_scored = num_scored or perplexity.SCORED_TOKENS

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        if num_questions != 1:
            raise ConfigError(f"{self.source} is scored once a document; {num_questions} questions were asked for.")
        return self._scored(writer, num_tokens, seed)

    def _scored(self, writer: Writer, num_tokens: int, number: int) -> Document:
        ids = self.piece(writer, num_tokens, number, self.num_scored)
        before, scored = ids[:num_tokens], writer.tokenizer.decode(ids[num_tokens:])
        text, count = fitting(writer, num_tokens, lambda most: writer.tokenizer.decode(before[-most:]))
        return Document(text, (Question((begun(writer, scored),)),), count)


class TextRecall(TextPerplexity):
    """How likely a passage is that stood early in the piece and comes again after it: the answer stands far back.

    The passage begins at a word in the second or third twelfth of the document, drawn by its number. The first
    `RUN_IN` tokens of the repetition are fed and not scored.
    """

    def _scored(self, writer: Writer, num_tokens: int, number: int) -> Document:
        ids = self.piece(writer, num_tokens, number)
        text, count = fitting(writer, num_tokens, lambda most: writer.tokenizer.decode(ids[:most]))
        place = round(seeded(self, number).uniform(*_EARLY) * len(text))
        space = _SPACE.search(text, place)
        start = space.start() if space else place
        prompt = _beginning(writer, text[start:], RUN_IN)
        scored = start + len(prompt)
        reference = _beginning(writer, text[scored:], self.num_scored)
        end = scored + len(reference)
        if end > len(text) / 2:
            raise ConfigError(
                f"A document of {num_tokens} tokens is too short to repeat {RUN_IN + self.num_scored} of its first "
                "half: ask for longer ones (--lengths), or score fewer tokens (recall:FILE#TOKENS)."
            )
        return Document(text, (Question((Turn(prompt, (), reference),), ((scored, end),)),), count)


class TextNeedle(TextTask):
    """Sentences that tell numbers, hidden in a piece at depths spread evenly from its beginning to its end; each
    number is asked for by itself: `needle` in plain English.

    Args:
        num_asked: how many of a document's eight needles are asked for, beginning with that of its number; None: all.
            Questions of different documents are independent, so fewer answers settle what they say.
    """

    num_questions = 8

    def __init__(self, source: str, num_asked: int | None = None) -> None:
        super().__init__(source)
        self.num_asked = num_asked
        self.num_questions = num_asked or self.num_questions

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        num_hidden = num_questions if self.num_asked is None else type(self).num_questions
        most = len(_FACTS) if self.num_asked is None else num_hidden
        if num_questions > most:
            raise ConfigError(f"A document has at most {most} needles; {num_questions} were asked for.")
        rng = seeded(self, seed)
        numbers = {fact: str(rng.randrange(10_000, 100_000)) for fact in rng.sample(_FACTS, num_hidden)}
        told = [f"The {fact} is {number}." for fact, number in numbers.items()]
        room = num_tokens - sum(writer.count(told))
        if room < num_tokens / 2:
            raise ConfigError(
                f"A document of {num_tokens} tokens is too short: its needles alone take {num_tokens - room}. Ask "
                "for longer ones (--lengths), or leave this task out (--tasks)."
            )
        ids = self.piece(writer, num_tokens, seed)
        depths = [i / max(num_hidden - 1, 1) for i in range(num_hidden)]

        def hidden(most: int) -> str:
            return _hidden(writer.tokenizer.decode(ids[: room - num_tokens + most]), told, depths)

        text, count = fitting(writer, num_tokens, hidden)
        needles = list(zip(numbers.items(), told, depths, strict=True))
        asked = [needles[i] for i in sorted((seed + i) % num_hidden for i in range(num_questions))]
        return Document(text, tuple(_needle(writer, text, *needle) for needle in asked), count)


def _hidden(text: str, told: Sequence[str], depths: Sequence[float]) -> str:
    """A text with sentences put in where others end, each at its share of the text."""
    text = f" {text.strip()}"
    ends = [0, *(match.start() for match in _SENTENCE_END.finditer(text)), len(text)]
    places = [min(ends, key=lambda end: abs(end - depth * len(text))) for depth in depths]
    # From the last to the first: what is put in does not move what comes before.
    for sentence, place in reversed(list(zip(told, places, strict=True))):
        text = f"{text[:place]} {sentence}{text[place:]}"
    return text.strip()


def _needle(writer: Writer, text: str, fact: tuple[str, str], told: str, depth: float) -> Question:
    (what, number), start = fact, text.index(told)
    opening = f"Answer: The {what} is"
    prompt = f"\n\nQuestion: What is the {what}?\n{opening}"
    writer.check(f"{prompt} {number}")
    turn = Turn(prompt, (number,), f" {number}", opening)
    return Question((turn,), ((start, start + len(told)),), {"depth": round(100 * depth)})


def _beginning(writer: Writer, text: str, num_tokens: int) -> str:
    """At most so many tokens of a text, up to the end of a word."""
    ends = [match.end() for match in WORD.finditer(text[: num_tokens * MAX_LETTERS])]
    return text[: ([0, *ends])[bisect.bisect_right(ends, num_tokens, key=lambda end: len(writer.encode(text[:end])))]]


def text_task(kind: str, source: str) -> TextTask:
    """`perplexity:FILE`, `recall:FILE` or `needle:FILE`; `FILE#N` says how many tokens the first two score after each
    document, instead of 256, and how many of a document's eight needles are asked for. `excerpt` is the text that
    ships; a file of that name is `./excerpt`.

    Raises:
        ConfigError: there is no such file.
    """
    task = TextNeedle if kind == "needle" else TextRecall if kind == "recall" else TextPerplexity
    counted = re.fullmatch(r"(.+)#([1-9]\d*)", source)
    return task(counted[1], int(counted[2])) if counted else task(source)


def fitting(writer: Writer, num_tokens: int, cut: Callable[[int], str]) -> tuple[str, int]:
    """A text cut to at most so many tokens, and how many it has: where a cut falls into a word or a sign, the text of
    so many tokens may be more of them."""
    for most in range(num_tokens, num_tokens - _MAX_TRIES, -1):
        text = cut(most)
        count = len(writer.check(text))
        if count <= num_tokens:
            return text, count
    raise ConfigError(f"A text cannot be cut to {num_tokens} tokens: its tokens are not those of its decoded text.")
