"""Measures how many answers survive: every document prefilled once, every question decoded by every method.

All methods of a digest go on from the same prefilled pages (`PagedCache.fork`), so they differ in nothing but what
they read. Under `accelerate launch` each process takes its share of the documents, and writes a file of its own. With
`--parallel tensor` they hold one model together, and all do the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import sparsekv
from sparsekv import PagedCache, Patch
from sparsekv.errors import ConfigError
from sparsekv.evaluation.tasks import Document, Metric, Question, Task, Writer, make_task, score
from sparsekv.hf.ranks import Ranks
from sparsekv.hf.support import context_of
from sparsekv.hf.wording import of_run, stop_ids

from .asking import PromptTurn, Row, decode, prefill, stepper, turns_of
from .counters import Counters, layers_not_sparse
from .manifest import check_manifest, describe, save_manifest
from .options import RunOptions
from .probes import Probe
from .results import Key, Line, LineFile, finished
from .room import batch_tokens
from .workload import Batch, Cell, Share, Workload, grouped

_NOT_FINITE = "the model gave logits that are not finite (NaN or infinite), so what was said is no answer"


@dataclass(frozen=True)
class Asked:
    """A batch, written.

    Attributes:
        ids: the documents in tokens.
        turns: of each question, by the place of its document and its number.
    """

    batch: Batch
    task: Task
    documents: list[Document]
    ids: list[list[int]]
    turns: dict[tuple[int, int], list[PromptTurn]]

    def row(self, place: int, question: int, stop_ids: frozenset[int]) -> Row:
        """A question that is to be answered."""
        return Row(self.turns[place, question], self.task.metric, stop_ids if self.task.stops else frozenset())

    @property
    def steps(self) -> list[int]:
        """How many the questions about each document may take."""
        found = [0] * len(self.ids)
        for place, question in self.turns:
            found[place] = max(found[place], self.row(place, question, frozenset()).longest)
        return found

    def room(self, page_size: int) -> int:
        """Tokens to reserve memory for, so that pages need not move: documents, and what a row each adds to them,
        which begins with a copy of the last page."""
        rows = len(self.ids) + len(self.turns)
        return sum(map(len, self.ids)) + rows * (max(self.steps) + 2 * page_size)


class Runner:
    """A model, and what is to be asked of it.

    Args:
        model, tokenizer: of transformers; the model is patched while it runs.
        folder: of the run. What it holds already is not measured again; of several ranks, the first one's counts.

    Raises:
        ConfigError: a length is beyond the model's context, or the folder holds another run.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, options: RunOptions, folder: Path, command: str,
        share: Share | None = None,
    ) -> None:  # fmt: skip
        self.model, self.options, self.folder = model, options, folder
        self.share, self._ranks = share or Share(), Ranks.of(model)
        self.tasks = {task: make_task(task) for task in options.tasks}
        longest, self._context = max(options.lengths), context_of(model.config)
        if self._context is not None and longest > self._context:
            raise ConfigError(f"--lengths {longest} is beyond the model's context of {self._context} tokens.")
        wording = of_run(tokenizer, options.chat)
        self._plain, self._chat = Writer(tokenizer), Writer(tokenizer, wording)
        self.stop_ids = stop_ids(model, tokenizer, wording)
        digests = {options.base.digest, *(m.digest for m, _ in options.cells if m.digest)}
        at_once = options.batch_tokens or batch_tokens(model, digests, options.page_size)
        at_once = min(self._ranks.gather(at_once, "the size of a batch"))
        self.work = Workload(options, self.tasks, self.share, at_once)
        self._done: Mapping[Key, Line] = {}
        self._expected: dict[Any, Any] = {}
        settings = {**options.settings(), "chat": wording.as_json() if wording else None}
        self._gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
        self._manifest = describe(name, model, self._plain.prefix, settings, self.tasks, command)
        self._save_manifest()
        self._results = LineFile(folder / f"results{self.share.suffix}.jsonl")
        self._probes = LineFile(folder / f"probes{self.share.suffix}.jsonl")

    def run(self, console: Console) -> tuple[int, int]:
        """Measures what is missing; returns how many lines were written, and how many of them are errors.

        Raises:
            ConfigError: what the folder holds was asked about other documents, or is no result.
        """
        self._done = self._ranks.told(lambda: finished(self.folder), "what is finished")
        self._expected = {key.place: line.get("expected") for key, line in self._done.items()}
        batches = self.work.missing(self._done)
        total = sum(len(self.work.questions(batch, cell, self._done)) for batch in batches for cell in batch.cells)
        written = failed = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("questions", total=total)
            for batch in batches:
                progress.update(bar, description=f"{batch.task}, {batch.length:,} tokens")
                for lines in self._measure(batch):
                    self._results.add(lines)
                    written += len(lines)
                    failed += sum(line["error"] is not None for line in lines)
                    progress.advance(bar, len(lines))
        return written, failed

    def document(self, name: str, length: int, number: int) -> Document:
        """The document of a task, with all its questions.

        Raises:
            ConfigError: it cannot be written for this tokenizer and length.
        """
        task, writer = self.tasks[name], self.writer(name)
        room = length - len(writer.prefix)
        return task.write(writer, room, task.num_questions, task.seed_of(self.options.seed, number))

    def writer(self, name: str) -> Writer:
        """What writes a task's documents and questions. How likely a text is is never asked in a chat."""
        return self._plain if self.tasks[name].metric is Metric.PERPLEXITY else self._chat

    def turns(self, name: str, question: Question) -> list[PromptTurn]:
        """A question of a task in tokens."""
        writer = self.writer(name)
        return turns_of(question, writer.encode, writer.wording)

    # -- how it is done

    def _measure(self, batch: Batch) -> Iterator[list[Line]]:
        """The lines of a batch, cell by cell."""
        asked = self._written(batch)
        default = next((m.digest for m, _ in batch.cells if m.digest), self.options.base.digest)
        own = self.options.base.page_format

        def settings(cell: Cell) -> tuple[str, str, float | None]:
            method = cell[0]
            return method.digest or default, method.kv or own, method.prefill_mass

        for (digest, kv, mass), cells in grouped(batch.cells, settings):
            base = self.options.base.with_(digest=digest, kv=kv)
            base = base if mass is None else base.with_(prefill="sparse", prefill_mass=mass)
            with sparsekv.patch(self.model, base, dense_layers=self.options.fewest_dense) as patch:
                cache = patch.new_cache(asked.room(base.page_size))
                mask = prefill(self.model, asked.ids, cache)
                self._tell_of_layers(patch)
                for cell in cells:
                    yield self._decode(asked, patch, cache.fork(cell[0].config(base, cell[1])), mask, cell)
                del cache

    def _written(self, batch: Batch) -> Asked:
        """The documents and questions of a batch.

        Raises:
            ConfigError: they are not those that the folder has answers about, or do not fit into the model's context.
        """
        documents = [self.document(batch.task, batch.length, number) for number in batch.numbers]
        self._check_same(batch, documents)
        ids = [self.writer(batch.task).document_ids(document.text) for document in documents]
        numbers = self.work.asked(batch.task)
        turns = {(d, q): self.turns(batch.task, x.questions[q]) for d, x in enumerate(documents) for q in numbers}
        asked = Asked(batch, self.tasks[batch.task], documents, ids, turns)
        self._check_room(asked)
        return asked

    def _decode(self, asked: Asked, patch: Patch, cache: PagedCache, mask: Tensor, cell: Cell) -> list[Line]:
        (method, budget), batch, task = cell, asked.batch, asked.task
        places = self.work.questions(batch, cell, self._done)
        rows = [asked.row(*place, self.stop_ids) for place in places]
        of_rows = torch.tensor([d for d, _ in places])
        cache.batch_select_indices(of_rows)
        counters = Counters(cache)
        mask = mask[of_rows.to(mask.device)]
        longest = max(row.longest for row in rows)
        probe = self._probe(batch, cache, budget, longest)
        look = None if probe is None else probe.before_step
        banned = () if task.stops else sorted(self.stop_ids)
        num_steps = decode(stepper(patch, longest), cache, rows, mask, look, banned)
        if probe is not None:
            identity = {"task": batch.task, "length": batch.length, "method": method.name, "budget": budget}
            self._probes.add({**identity, **line} for line in probe.lines())
        counted = counters.counts(num_steps, len(rows))
        error = counters.error(num_steps, int(mask.sum(1).max()))
        errors = [error or (None if row.is_finite else _NOT_FINITE) for row in rows]
        return [
            {
                **vars(batch.key(cell, batch.numbers[d], q)),
                **self._outcome(task, asked.documents[d], q, row, wrong),
                **counted,
                "prompt_density": patch.stats.prefill.density,
                "gpu": self._gpu,
                "error": wrong,
            }
            for (d, q), row, wrong in zip(places, rows, errors, strict=True)
        ]

    def _outcome(self, task: Task, document: Document, number: int, row: Row, error: str | None) -> Line:
        question = document.questions[number]
        said = [self._plain.tokenizer.decode(ids) for ids in row.said]
        expected = _expected(document, number)
        scored = task.metric is not Metric.PERPLEXITY and error is None
        return {
            "score": score(task.metric, said, expected) if scored else None,
            "nll": row.nll / row.num_scored if row.num_scored and error is None else None,
            "num_scored": row.num_scored or None,
            "said": said,
            "expected": expected,
            "num_tokens": row.num_tokens,
            "details": question.details,
        }

    def _probe(self, batch: Batch, cache: PagedCache, budget: int | None, num_steps: int) -> Probe | None:
        """Looks at the first documents of a task and length only."""
        if not self.options.probe or budget is None or batch.numbers[0] != self.share.rank:
            return None
        return Probe(cache, num_steps)

    # -- checks and circumstances

    def _check_room(self, asked: Asked) -> None:
        """What is asked and answered must fit into the model's context too."""
        batch, lengths = asked.batch, map(len, asked.ids)
        needed = max(map(sum, zip(lengths, asked.steps, strict=True)))
        if self._context is not None and needed > self._context:
            raise ConfigError(
                f"{batch.task} at --lengths {batch.length} needs {needed} tokens with its questions and answers, and "
                f"the model's context is {self._context}: ask for shorter documents. What was finished is kept."
            )

    def _check_same(self, batch: Batch, documents: Sequence[Document]) -> None:
        """What the folder holds was asked about the same documents."""
        for number, document in zip(batch.numbers, documents, strict=True):
            for q in self.work.asked(batch.task):
                place, expected = (batch.task, batch.length, number, q), _expected(document, q)
                if self._expected.get(place, expected) != expected:
                    raise ConfigError(
                        f"{self.folder} has answers to question {q} about document {number} of {batch.task} at "
                        f"{batch.length} tokens, but expected {self._expected[place]!r}, and it is now {expected!r}: "
                        "its documents were written otherwise. Choose another --out."
                    )

    def _save_manifest(self) -> None:
        """Every process looks whether it may go on; one writes."""
        (save_manifest if self.share.rank == 0 else check_manifest)(self.folder, self._manifest)

    def _tell_of_layers(self, patch: Patch) -> None:
        """Which layers choose no pages is known when they were used."""
        found = layers_not_sparse(patch.layers)
        if self._manifest.get("layers_not_sparse") != found:
            self._manifest["layers_not_sparse"] = found
            self._save_manifest()


def _expected(document: Document, number: int) -> list[list[str]]:
    """The right answers to a question, by turn."""
    return [list(turn.answers) for turn in document.questions[number].turns]
