"""LongBench's and RULER's own data: document i is row i; its context is prefilled, its question decoded sparsely."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

from sparsekv.errors import ConfigError, UnknownNameError

from .base import Document, Metric, Question, Task, Turn
from .rows import Row, rows_of
from .texts import TEXT_TASKS, fitting, text_task
from .writer import Writer

FILE_TASKS = ("longbench", "ruler", *TEXT_TASKS)
LONGBENCH_F1 = ("2wikimqa", "hotpotqa", "multifieldqa_en", "musique", "narrativeqa", "qasper", "triviaqa")
_ANSWER = "Answer:"
_ANSWER_TOKENS = 64  # a free answer may be so long, however short the right ones are
_SENTENCE = r"(?<=[.!?])\s"
# What stands before the part that asks, and what is in it.
_ENDS = ((r"\n", r"\bQuestion:|[?]"), (_SENTENCE, r"\bQuestion:"), (_SENTENCE, r"[?]"))
_QA = re.compile(r"(?:^|/)qa(?:[/_.-]|$)")


@dataclass(frozen=True)
class Example:
    """A row, split in what is read and what is asked.

    Attributes:
        opening: the question's end, where it begins the answer.
    """

    where: str
    context: str
    question: str
    answers: tuple[str, ...]
    opening: str = ""


class RowTask(Task):
    """Documents that are rows of a data set, in its order: the seed is the row's number, from 0.

    Attributes:
        source: names the data in messages.
    """

    num_questions = 1

    def __init__(self, source: str, examples: list[Example]) -> None:
        self.source, self.examples = source, examples

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        if num_questions != 1:
            raise ConfigError(f"{self.source} has one question a document; {num_questions} were asked for.")
        if not 0 <= seed < len(self.examples):
            raise ConfigError(
                f"{self.source} has {len(self.examples)} rows, and document {seed} (counted from 0) is none of them: "
                f"ask for at most {len(self.examples)} (--examples)."
            )
        example = self.examples[seed]
        text, count = self.context(writer, example, num_tokens)
        said = " " + ", ".join(example.answers)
        room = " ." * max(0, _ANSWER_TOKENS - len(writer.encode(said)))  # as far as a free answer may go
        turn = Turn(example.question, example.answers, said + room, example.opening)
        writer.check(turn.prompt)
        return Document(text, (Question((turn,)),), count)

    def seed_of(self, seed: int, number: int) -> int:
        return number

    @property
    def sha256(self) -> str:
        rows = [[example.context, example.question, example.answers] for example in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @abstractmethod
    def context(self, writer: Writer, example: Example, num_tokens: int) -> tuple[str, int]:
        """What is read, of at most so many tokens, and how many it has."""


class LongBench(RowTask):
    """Question answering of LongBench (Bai et al. 2023): rows with `context`, `input` and `answers`. As there, a
    context that is too long loses its middle: what matters is more often near the ends."""

    metric = Metric.F1

    def context(self, writer: Writer, example: Example, num_tokens: int) -> tuple[str, int]:
        ids = writer.check(example.context)
        if len(ids) <= num_tokens:
            return example.context, len(ids)

        def halves(most: int) -> str:
            tail = most // 2
            return "".join(map(writer.tokenizer.decode, (ids[: most - tail], ids[len(ids) - tail :])))

        return fitting(writer, num_tokens, halves)


class Ruler(RowTask):
    """RULER's own data: rows with `input` and `outputs`, as its scripts write them. A context that is too long is
    refused: cutting it could take the answer away."""

    def __init__(self, source: str, examples: list[Example], metric: Metric) -> None:
        super().__init__(source, examples)
        self.metric = metric

    def context(self, writer: Writer, example: Example, num_tokens: int) -> tuple[str, int]:
        count, added = len(writer.check(example.context)), len(writer.prefix)
        if count > num_tokens:
            raise ConfigError(
                f"{example.where} has {count + added} tokens of context, not at most {num_tokens + added}, and "
                f"cutting it could take the answer away: ask for more (--lengths {count + added}), or make the data "
                "anew for this length."
            )
        return example.context, count


def from_source(kind: str, source: str) -> Task:
    """`longbench:SOURCE` or `ruler:SOURCE`, where SOURCE is a file of JSON lines, a subset of LongBench or
    OWNER/NAME/CONFIG on the hub; `SOURCE#TASK` takes the rows whose `task` or `dataset` is TASK. Or a task in a text.

    Raises:
        ConfigError: there is no such data, or a row is malformed.
    """
    if kind in TEXT_TASKS:
        return text_task(kind, source)
    name, _, task = source.partition("#")
    rows = [row for row in rows_of(kind, name) if not task or task in _tasks_of(row)]
    if not rows:
        raise ConfigError(f"{name} has no rows whose 'task' or 'dataset' is {task!r}.")
    if kind == "longbench":
        return LongBench(f"longbench:{source}", [_longbench(row) for row in rows])
    return Ruler(f"ruler:{source}", [_ruler(row) for row in rows], _ruler_metric(name, rows))


def _tasks_of(row: Row) -> set[str]:
    return {str(row.fields[name]) for name in ("task", "dataset") if row.fields.get(name)}


def _longbench(row: Row) -> Example:
    for name in _tasks_of(row):
        if name.removesuffix("_e") not in LONGBENCH_F1:
            # Summaries, classes, code and Chinese have measures of their own.
            raise UnknownNameError(f"{row.where}: LongBench's subset for question answering", name, LONGBENCH_F1)
    asked = row.text("input").strip()
    if not asked:
        raise ConfigError(f"{row.where}: 'input' is empty, but only questions can be asked.")
    asked = asked if asked.endswith(_ANSWER) else f"Question: {asked}\n{_ANSWER}"
    how = "Answer the question on the text above with a few words only.\n"
    return Example(row.where, row.text("context"), f"\n\n{how}{asked}", row.texts("answers"), _ANSWER)


def _ruler(row: Row) -> Example:
    prefix = row.text("answer_prefix") if "answer_prefix" in row else ""
    prefix = f" {prefix.strip()}" if prefix.strip() else ""
    if "context" in row:  # as others have published it, split already
        context, asked, answers = row.text("context"), f"\n{row.text('question').strip()}", row.texts("answer")
    else:
        (context, asked), answers = split_question(row.text("input"), row.where), row.texts("outputs")
    opening = prefix or (asked[asked.rindex(_ANSWER) :] if _ANSWER in asked else "")
    return Example(row.where, context, asked + prefix, answers, opening)


def _ruler_metric(source: str, rows: list[Row]) -> Metric:
    """RULER's questions about real texts (qa_1, qa_2) have several right answers, its other tasks several parts. It
    names folders after tasks."""
    folder = "/".join(Path(source).parts[-2:])
    kinds = {bool(_QA.search(str(row.fields.get("task", folder)))) for row in rows}
    if len(kinds) > 1:
        raise ConfigError(
            f"{source} holds several tasks, which are scored differently: choose one, as ruler:{source}#qa_1."
        )
    return Metric.ANY if kinds.pop() else Metric.RECALL


def split_question(text: str, where: str) -> tuple[str, str]:
    """A prompt of RULER in two: what is read, and the question with what begins the answer.

    Its templates end in a line with the question, and some say `Question:` before it. Where line breaks were taken
    out, the question begins with the last sentence that says so or, if there is none, that asks.

    Raises:
        ConfigError: nothing is asked at its end.
    """
    text = text.rstrip()
    for begins, asks in _ENDS:
        last = max((match.end() for match in re.finditer(asks, text)), default=0)
        place = max((match.start() for match in re.finditer(begins, text) if match.start() < last), default=0)
        if place > len(text) // 2:
            return text[:place], text[place:]
    raise ConfigError(f"{where}: no question is found at the end of 'input', so none could be decoded sparsely.")
