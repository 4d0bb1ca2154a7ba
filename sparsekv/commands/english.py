"""The demo's document for a real model: plain English with facts hidden in it, and questions in the model's words."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsekv.errors import ConfigError
from sparsekv.evaluation.accuracy.asking import PromptTurn
from sparsekv.hf import wording
from sparsekv.hf.support import context_of

from .side_by_side import Ask, Method, Scene

MIN_CONTEXT = 1024
BUDGET_SHARES = (16, 4)  # the budgets shown: the context divided by these
_SPARE = 24  # tokens that a model may say around an answer
_ROOM = 128  # tokens of a question and its answer, and of what a chat puts around them
_AROUND = 90  # signs that are shown on either side of a fact


class Fact(NamedTuple):
    """A sentence that is hidden: what it is about, and the words that a right answer holds."""

    subject: str
    answer: str

    @property
    def told(self) -> str:
        return f"The {self.subject} is {self.answer}."

    @property
    def question(self) -> str:
        """In the sentence's own words: that is what models as small as these understand."""
        return f"What is the {self.subject}?"


# Such that dense SmolLM2 135M finds them: where it does not, nothing can be compared.
FACTS = (
    Fact("pass code of the north tower", "4827"),
    Fact("hiding place of the silver key", "the green flowerpot"),
    Fact("favourite dish of the innkeeper", "plum dumplings"),
    Fact("meeting place of the smugglers", "the ruined windmill"),
    Fact("favourite colour of the blacksmith", "turquoise"),
    Fact("birthplace of the clockmaker", "Ravensburg"),
    Fact("favourite instrument of the gardener", "the bassoon"),
    Fact("name of the ship in the harbour", "the Golden Heron"),
)


def plain_english() -> str:
    """The text that documents are cut from: paragraphs with empty lines between them."""
    from sparsekv.evaluation.texts import excerpt

    return str(excerpt())


def hide(tokenizer: Any, num_tokens: int, num_facts: int, seed: int) -> tuple[str, list[Fact]]:
    """A document of about, and at most, so many tokens, with facts at even distances.

    Raises:
        ConfigError: there are not so many facts.
    """
    if num_facts > len(FACTS):
        raise ConfigError(f"--questions={num_facts} is not allowed: at most {len(FACTS)} about plain English.")
    rng = random.Random(seed)
    facts = rng.sample(FACTS, num_facts)
    paragraphs = [" ".join(paragraph.split()) for paragraph in plain_english().split("\n\n")]
    first = rng.randrange(len(paragraphs))
    room, told = num_tokens - sum(_count(tokenizer, fact.told) + 1 for fact in facts), []
    for paragraph in [*paragraphs[first:], *paragraphs[:first]]:
        room -= _count(tokenizer, f"{paragraph}\n\n")
        if room < 0:
            break
        told.append(paragraph)
    ends = list(itertools.accumulate(map(len, told)))
    for i, fact in enumerate(facts):
        told[bisect.bisect(ends, (i + 1) * ends[-1] / (num_facts + 1))] += f" {fact.told}"
    return "\n\n".join(told), facts


def scene_of(model: Any, tokenizer: Any, text: str, facts: Sequence[Fact], num_tokens: int) -> Scene:
    """A document and its questions in tokens: in the model's chat template if it has one, else as plain text.

    Args:
        num_tokens: what was asked for; the budgets are shares of it.

    Raises:
        ConfigError: the model was made for fewer tokens.
    """
    is_chat = bool(tokenizer.chat_template)
    words = wording.of_template(tokenizer, has_document=True) if is_chat else wording.plain(has_document=True)
    starts = tokenizer("").input_ids if words.adds_start_token else []

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def ask(fact: Fact) -> Ask:
        before, _, _ = text.partition(f" {fact.told}")
        start = len(starts) + len(encode(words.start + before))
        turn = PromptTurn(encode(words.question(fact.question, is_first=True)), encode(fact.answer), _SPARE)
        return Ask(turn, fact.answer, [(start, start + len(encode(f" {fact.told}")))])

    document, most = [*starts, *encode(words.start + text)], context_of(model.config)
    if most is not None and len(document) + _ROOM > most:
        raise ConfigError(f"--context: the model was made for {most:,} tokens, {_ROOM} of them for questions.")
    budgets = [num_tokens // share for share in BUDGET_SHARES]
    stops = wording.stop_ids(model, tokenizer, words if is_chat else None)
    return Scene(document, [ask(fact) for fact in facts], budgets, stops, _is_right)


def shown(text: str, facts: Sequence[Fact], scene: Scene, methods: Sequence[Method]) -> RenderableType:
    """The facts where they stand, what each method answered, and what that took."""
    passages = Table.grid(padding=(0, 1))
    for fact in facts:
        passages.add_row(*_passage(text, fact))
    answers = Table("method", "answer", title="Answers", min_width=80)
    for i, fact in enumerate(facts):
        answers.add_row("", f"[bold]{fact.question}[/bold]")
        for method in methods:
            said, color = method.answers[i], "green" if method.answers[i].is_right else "red"
            answers.add_row(method.name, Text(_answer(said.text) or "(nothing)", style=color))
        answers.add_section()
    costs = Table(
        "method", "right", "cache read per token", "... in the sparse layers", "ms per token", title="Costs",
        caption="Questions and answers are decoded token by token; time is saved in longer contexts.",
    )  # fmt: skip
    for method in methods:
        right = f"{method.num_right} of {len(facts)}"
        costs.add_row(
            method.name, right, f"{method.share:.1%}", f"{method.sparse_share:.1%}", f"{method.ms_per_token:.1f}"
        )
    return Group(f"Hidden in {len(scene.document):,} tokens of plain English:", passages, answers, costs)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _answer(said: str) -> str:
    """Its first line: a model that does not chat goes on with questions of its own."""
    return said.strip().partition("\n")[0]


def _is_right(said: str, expected: str) -> bool:
    return expected.lower() in _answer(said).lower()


def _passage(text: str, fact: Fact) -> tuple[str, Text]:
    """How far into the document a fact stands, and what is around it."""
    before, _, after = " ".join(text.split()).partition(fact.told)
    _, _, left = before[-_AROUND:].partition(" ")
    right, _, _ = after[:_AROUND].rpartition(" ")
    return f"{len(before) / len(text):.0%}", Text.assemble(f"… {left}", (fact.told, "bold"), f"{right} …")
