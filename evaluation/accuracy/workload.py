"""What a run measures, and what of it is missing: documents in batches, and the methods that lack them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sparsekv.evaluation.tasks import Task, spread

from .methods import Method
from .options import RunOptions
from .results import Key

Cell = tuple[Method, "int | None"]
Item = TypeVar("Item")
Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class Share:
    """Which documents this process takes: those whose number leaves `rank` when divided by `count`."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_launch(cls, parallel: str | None = None) -> Share:
        """The share of this process, of those that `accelerate launch` has started with a model each; all of it where
        `parallel` says that they hold one together."""
        if parallel is not None:
            return cls()
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def suffix(self) -> str:
        """How the names of the files end that this process writes."""
        return f"-{self.rank:05d}" if self.count > 1 else ""


@dataclass(frozen=True)
class Batch:
    """Documents of one task and length that are prefilled together, and the cells that lack an answer about each."""

    task: str
    length: int
    numbers: tuple[int, ...]
    cells: tuple[Cell, ...]

    def key(self, cell: Cell, number: int, question: int) -> Key:
        """The key of a line of this batch."""
        return Key(self.task, self.length, cell[0].name, cell[1], number, question)


class Workload:
    """The questions of a run.

    Args:
        tasks: by name, those of the options.
        batch_tokens: most tokens of documents at once.
    """

    def __init__(self, options: RunOptions, tasks: Mapping[str, Task], share: Share, batch_tokens: int) -> None:
        self.options, self.tasks, self.share, self.batch_tokens = options, tasks, share, batch_tokens

    def asked(self, task: str) -> list[int]:
        """The numbers of the questions that are asked about each document. Documents are the same however many it
        are, so a run may grow."""
        return spread(self.tasks[task].num_questions, self.options.num_examples)

    def documents(self, task: str) -> range:
        """The numbers of the documents."""
        return range(math.ceil(self.options.num_examples / len(self.asked(task))))

    def missing(self, done: Collection[Key]) -> list[Batch]:
        """What this process has to do."""
        return [
            batch
            for task in self.tasks
            for length in self.options.lengths
            for batch in self._batches(task, length, done)
        ]

    def questions(self, batch: Batch, cell: Cell, done: Collection[Key]) -> list[tuple[int, int]]:
        """What a cell lacks of a batch: places of documents in it, and numbers of questions."""
        return [
            (place, question)
            for place, number in enumerate(batch.numbers)
            for question in self.asked(batch.task)
            if batch.key(cell, number, question) not in done
        ]

    def _batches(self, task: str, length: int, done: Collection[Key]) -> Iterator[Batch]:
        numbers = [n for n in self.documents(task) if n % self.share.count == self.share.rank]
        at_once = max(1, min(self.batch_tokens // length, self.options.batch_rows // len(self.asked(task))))

        def open_cells(number: int) -> tuple[Cell, ...]:
            alone = Batch(task, length, (number,), tuple(self.options.cells))
            return tuple(cell for cell in alone.cells if self.questions(alone, cell, done))

        for start in range(0, len(numbers), at_once):
            for cells, of_cells in grouped(numbers[start : start + at_once], open_cells):
                if cells:
                    yield Batch(task, length, tuple(of_cells), cells)


def grouped(items: Iterable[Item], key: Callable[[Item], Group]) -> Iterable[tuple[Group, list[Item]]]:
    """Items by key, in the order of the first of each."""
    groups: dict[Group, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()
