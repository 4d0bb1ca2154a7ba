"""Writes the stories of the testbed's grammar for any tokenizer: in its spelling, of as many tokens as asked for."""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsekv.errors import ConfigError
from sparsekv.evaluation.testbed import vocabulary as vocab
from sparsekv.evaluation.testbed.stories import Sentence, mixed, prose_bank
from sparsekv.evaluation.testbed.tasks import Fact, Pools
from sparsekv.hf.wording import Wording

_PROBE = "goat."  # a tokenizer that splits at spaces does not know it
_SAMPLE = 256  # sentences that tell how many tokens a word is
_MAX_WORDS = 1 << 16  # that the number of facts grows with: the lists of names and towns end
_FULL = 0.99  # of the tokens asked for
_MISSES = 16  # sentences that may turn out too long for the rest, before it is left empty


@dataclass(frozen=True)
class Text:
    """What was written.

    Attributes:
        spans: where each fact stands, in characters `[start, end)`.
    """

    text: str
    num_tokens: int
    spans: dict[Fact, tuple[int, int]]


class Writer:
    """Adapts the grammar to a tokenizer.

    Args:
        wording: of the chat that documents and questions are a part of; None: of none.

    Attributes:
        prefix: tokens that the wording or, without one, the tokenizer puts before every text, as a BOS token; what it
            puts behind one is left out.
        spaced: whether all words and signs are separated by spaces, as a word-level tokenizer wants them; else text
            is written as people do.
    """

    def __init__(self, tokenizer: Any, wording: Wording | None = None) -> None:
        self.tokenizer, self.wording = tokenizer, wording
        self._unknown = tokenizer.unk_token_id
        self._counts: dict[str, int] = {}
        self._tokens_per_word: float | None = None
        special = set(tokenizer.all_special_ids) - {self._unknown}
        begun = itertools.takewhile(special.__contains__, tokenizer(_PROBE, verbose=False).input_ids)
        self.prefix = self.encode(wording.start) if wording else list(begun)
        self.spaced = self._unknown is not None and self._unknown in self.encode(_PROBE)

    # -- tokens

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def check(self, text: str) -> list[int]:
        """Token ids of a text that has no unknown words.

        Raises:
            ConfigError: the tokenizer lacks some of its words.
        """
        ids = self.encode(text)
        if self._unknown is not None and self._unknown in ids:
            lacking = [word for word in dict.fromkeys(text.split()) if self._unknown in self.encode(word)]
            some = ", ".join(map(repr, lacking[:5])) or "some signs"
            raise ConfigError(
                f"The tokenizer does not know {some}{' and more' if len(lacking) > 5 else ''}, so the model cannot "
                "be asked: choose other tasks (--tasks), or a model whose tokenizer knows these words."
            )
        return ids

    def document_ids(self, text: str) -> list[int]:
        """Token ids of a whole document, as the model has learned to see one: `prefix` and text.

        Raises:
            ConfigError: the tokenizer lacks some of its words.
        """
        return [*self.prefix, *self.check(text)]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, after a space. What was counted once is remembered: prose repeats."""
        new = [text for text in dict.fromkeys(texts) if text not in self._counts]
        if new:
            spaced = [f" {text}" for text in new]
            ids = self.tokenizer(spaced, add_special_tokens=False, verbose=False).input_ids
            self._counts.update(zip(new, map(len, ids), strict=True))
        return [self._counts[text] for text in texts]

    def num_words(self, num_tokens: int) -> int:
        """About how many words of the grammar are so many tokens."""
        if self._tokens_per_word is None:
            sample = prose_bank()[0][:_SAMPLE]
            counts = self.count([self.render(sentence) for sentence in sample])
            self._tokens_per_word = sum(counts) / sum(map(len, sample))
        return int(num_tokens / self._tokens_per_word)

    # -- words

    def pools(self, rng: random.Random, num_tokens: int) -> Pools:
        """Words for the facts of a document. There are more facts in longer ones, up to 64k words."""
        return Pools(rng, min(self.num_words(num_tokens), _MAX_WORDS))

    def render(self, words: str | Sequence[str]) -> str:
        """Words of the grammar in this tokenizer's spelling."""
        text = words if isinstance(words, str) else " ".join(words)
        if self.spaced:
            return text
        text = re.sub(r"\b(\d) (?=\d\b)", r"\1", text)  # a code is one number
        return re.sub(r" ([.,?:])", r"\1", text)

    def prompt(self, question: str, how: str = "", later: bool = False) -> str:
        """A question of the grammar, ready to follow a document.

        Args:
            how: in what form to answer; said only where text is written as people do.
            later: whether another answer comes before. The testbed has learned that an answer has an end.
        """
        text = self.render(question)
        if self.spaced:
            return f" {vocab.END} {text}" if later else f" {text}"
        asked, answer, start = text.partition(" Answer:")
        return f"\n\n{asked}{how and ' '}{how}\n{answer.strip()}{start}"

    # -- documents

    def tell(
        self, threads: Sequence[Sequence[Fact]], num_tokens: int, rng: random.Random,
        depths: Sequence[float] | None = None,
    ) -> Text:  # fmt: skip
        """Facts among prose.

        Args:
            threads: facts that keep their order.
            depths: of each thread, which is then told in one piece: the share of the text before it. Else all are
                mixed at random.

        Raises:
            ConfigError: the facts do not fit, or the tokenizer does not know the words.
        """
        order, taken = rng.random(), self._taken(threads, num_tokens)
        prose = self._prose(rng, num_tokens - taken)
        has_shrunk = False
        while True:
            text = self._text(self._order(threads, prose, depths, random.Random(order)))
            if text.num_tokens > num_tokens:  # sentences are a little longer together than each by itself
                has_shrunk = True
                prose = self._without(prose, text.num_tokens - num_tokens)
            else:
                more = self._prose(rng, num_tokens - text.num_tokens)
                if has_shrunk or not more or text.num_tokens > _FULL * num_tokens:
                    return text
                prose += more

    def _taken(self, threads: Sequence[Sequence[Fact]], num_tokens: int) -> int:
        facts = [self.render(fact.words) for thread in threads for fact in thread]
        taken = sum(self.count(facts))
        if taken > num_tokens:
            raise ConfigError(
                f"A document of {num_tokens} tokens is too short: its facts alone take {taken}. Ask for longer ones "
                "(--lengths), or leave this task out (--tasks)."
            )
        return taken

    def _prose(self, rng: random.Random, room: int) -> list[Sentence]:
        """Sentences of together at most, and nearly, `room` tokens."""
        bank, _ = prose_bank()
        taken: list[Sentence] = []
        misses = 0
        while misses < _MISSES:
            drawn = rng.choices(bank, k=1 + room // 16)
            counts = self.count([self.render(sentence) for sentence in drawn])
            for sentence, count in zip(drawn, counts, strict=True):
                if count > room:
                    misses += 1
                elif misses < _MISSES:
                    taken.append(sentence)
                    room -= count
        return taken

    def _without(self, prose: list[Sentence], excess: int) -> list[Sentence]:
        """Leaves the last sentences out, of so many tokens."""
        if not prose:
            raise ConfigError(
                f"A document is too short for its facts, by {excess} tokens: ask for longer ones (--lengths)."
            )
        kept = list(prose)
        while kept and excess > 0:
            excess -= self.count([self.render(kept.pop())])[0]
        return kept

    def _order(
        self, threads: Sequence[Sequence[Fact]], prose: Sequence[Sentence], depths: Sequence[float] | None,
        rng: random.Random,
    ) -> list[Fact | Sentence]:  # fmt: skip
        if depths is None:
            return mixed(rng, threads, prose)
        counts = self.count([self.render(sentence) for sentence in prose])
        before = [0, *itertools.accumulate(counts)]  # each place
        told: list[Fact | Sentence] = list(prose)
        # From the last to the first: what is put in does not move what comes before.
        for thread, depth in sorted(zip(threads, depths, strict=True), key=lambda pair: pair[1])[::-1]:
            place = bisect.bisect_left(before, depth * before[-1])
            told[place:place] = thread
        return told

    def _text(self, sentences: Sequence[Fact | Sentence]) -> Text:
        parts: list[str] = []
        spans: dict[Fact, tuple[int, int]] = {}
        start = 0
        for sentence in sentences:
            part = self.render(sentence.words if isinstance(sentence, Fact) else sentence)
            if isinstance(sentence, Fact):
                spans[sentence] = (start, start + len(part))
            parts.append(part)
            start += len(part) + 1
        text = " ".join(parts)
        return Text(text, len(self.check(text)), spans)
