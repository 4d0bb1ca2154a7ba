"""Measures how many answers survive: every document prefilled once, every question decoded by every method.

All methods of a digest go on from the same prefilled pages (`PagedCache.fork`), so they differ in nothing but what
they read. Under `accelerate launch` each process takes its share of the documents, and writes a file of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import sparsekv
from sparsekv import PagedCache, Patch, SparseConfig
from sparsekv.errors import ConfigError, SparseKVError

from . import testbed
from .asking import Row, decode, prefill, stepper, turns_of
from .eval_options import TESTBED, RunOptions
from .methods import Method
from .probes import Probe
from .report import choose_device, circumstances
from .results import Key, Line, LineFile, finished, model_hash, save_manifest
from .tasks import Document, Metric, Task, Writer, make_task, score

_BATCH_TOKENS = {"cuda": 1 << 20, "cpu": 1 << 15}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Cell = tuple[Method, "int | None"]


@dataclass(frozen=True)
class Share:
    """Which documents this process takes: those whose number leaves `rank` when divided by `count`."""

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> Share:
        """As `accelerate launch` and `torchrun` tell it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def suffix(self) -> str:
        """Of the files that this process writes."""
        return f"-{self.rank:05d}" if self.count > 1 else ""


@dataclass(frozen=True)
class Batch:
    """Documents of one task and length that are prefilled together, and the cells that lack them."""

    task: str
    length: int
    numbers: tuple[int, ...]
    cells: tuple[Cell, ...]


class Runner:
    """A model, and what is to be asked of it.

    Args:
        model, tokenizer: of transformers; the model is patched while it runs.
        folder: of the run. What it holds already is not measured again.

    Raises:
        ConfigError: a length is beyond the model's context, or the folder holds another run.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, options: RunOptions, folder: Path, command: str,
        share: Share | None = None,
    ) -> None:  # fmt: skip
        self.model, self.options, self.folder = model, options, folder
        self.share = share or Share.from_environment()
        self.writer = Writer(tokenizer)
        self.tasks = {task: make_task(task) for task in options.tasks}
        self._check_lengths()
        self.stop_ids = _stop_ids(model, tokenizer)
        if self.share.rank == 0:
            save_manifest(folder, self._manifest(name, command))
        self._results = LineFile(folder / f"results{self.share.suffix}.jsonl")
        self._probes = LineFile(folder / f"probes{self.share.suffix}.jsonl")

    def run(self, console: Console) -> tuple[int, int]:
        """Measures what is missing; returns how many lines were written, and how many of them are errors."""
        batches = self._missing()
        total = sum(len(batch.cells) * self._questions(batch.task) * len(batch.numbers) for batch in batches)
        written = failed = 0
        with _progress(console) as progress:
            bar = progress.add_task("questions", total=total)
            for batch in batches:
                progress.update(bar, description=f"{batch.task}, {batch.length:,} tokens")
                for lines in self._measure(batch):
                    self._results.add(lines)
                    written += len(lines)
                    failed += sum(line["error"] is not None for line in lines)
                    progress.advance(bar, len(lines))
        return written, failed

    def examples(self) -> Iterator[Line]:
        """Every document and question in tokens."""
        for name, task in self.tasks.items():
            count = math.ceil(self.options.num_examples / self._questions(name))
            for length in self.options.lengths:
                for number in range(count):
                    document = self._document(name, length, number)
                    yield {"task": name, "length": length, "document": number, **self._in_tokens(task, document)}

    def _document(self, task: str, length: int, number: int) -> Document:
        return self.tasks[task].write(self.writer, length, self._questions(task), self.options.seed + number)

    def _in_tokens(self, task: Task, document: Document) -> Line:
        asked = []
        for number, question in enumerate(document.questions):
            turns = [
                {"prompt_ids": t.prompt, "reference_ids": t.reference, "answers": list(turn.answers)}
                for t, turn in zip(turns_of(question, self.writer.encode), question.turns, strict=True)
            ]
            asked.append({"question": number, "turns": turns, "details": question.details})
        stop_ids = sorted(self.stop_ids)
        told = {"metric": task.metric.value, "stops": task.stops, "eos_token_id": stop_ids}
        return {**told, "document_ids": self.writer.check(document.text), "questions": asked}

    # -- what is to be done

    def _questions(self, task: str) -> int:
        """About one document."""
        return min(self.tasks[task].num_questions, self.options.num_examples)

    def _missing(self) -> list[Batch]:
        done = finished(self.folder)
        return [batch for task in self.tasks for length in self.options.lengths
                for batch in self._batches(task, length, done)]  # fmt: skip

    def _batches(self, task: str, length: int, done: set[Key]) -> Iterator[Batch]:
        count = math.ceil(self.options.num_examples / self._questions(task))
        numbers = [n for n in range(count) if n % self.share.count == self.share.rank]
        at_once = self._at_once(task, length)
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            for cells, of_cells in _grouped(some, lambda n: self._open_cells(task, length, n, done)):
                if cells:
                    yield Batch(task, length, tuple(of_cells), cells)

    def _open_cells(self, task: str, length: int, number: int, done: set[Key]) -> tuple[Cell, ...]:
        asked = range(self._questions(task))
        return tuple(
            (m, b)
            for m, b in self.options.cells
            if not all(Key(task, length, m.name, b, number, question) in done for question in asked)
        )

    def _at_once(self, task: str, length: int) -> int:
        """Documents that are prefilled together."""
        most = self.options.batch_tokens or _BATCH_TOKENS[self.model.device.type]
        return max(1, min(most // length, self.options.batch_rows // self._questions(task)))

    # -- how it is done

    def _measure(self, batch: Batch) -> Iterator[list[Line]]:
        """The lines of a batch, cell by cell."""
        documents = [self._document(batch.task, batch.length, number) for number in batch.numbers]
        ids = [self.writer.check(document.text) for document in documents]
        self._check_room(batch, documents, ids)
        default = next((m.digest for m, _ in batch.cells if m.digest), self.options.base.digest)
        for digest, cells in _grouped(batch.cells, lambda cell: cell[0].digest or default):
            base = self.options.base.with_(digest=digest)
            with sparsekv.patch(self.model, base) as patch:
                cache = patch.new_cache()
                mask = prefill(self.model, ids, cache)
                for cell in cells:
                    yield self._decode(batch, documents, patch, cache, mask, cell)
                del cache

    def _decode(
        self, batch: Batch, documents: Sequence[Document], patch: Patch, cache: PagedCache, mask: Tensor, cell: Cell
    ) -> list[Line]:
        (method, budget), task = cell, self.tasks[batch.task]
        places = [(d, q) for d, document in enumerate(documents) for q in range(len(document.questions))]
        rows = [self._row(task, documents[d], q) for d, q in places]
        of_rows = torch.tensor([d for d, _ in places])
        config = method.config(cache.config, budget)
        fork = cache.fork(config)
        fork.batch_select_indices(of_rows)
        mask = mask[of_rows.to(mask.device)]
        longest = max(row.longest for row in rows)
        probe = self._probe(batch, fork, budget, longest)
        step = patch.model if probe is not None else stepper(patch, longest)
        look = None if probe is None else probe.before_step
        num_steps = decode(step, fork, rows, mask, look, () if task.stops else sorted(self.stop_ids))
        if probe is not None:
            self._save_probe(batch, method.name, budget, probe)
        counted = _counts(fork, num_steps, len(rows))
        counted["error"] = _error(fork, config, budget, int(mask.sum(1).min()), num_steps)
        return [
            {
                **_identity(batch.task, batch.length, method.name, budget),
                "document": batch.numbers[d],
                "question": q,
                **self._outcome(task, documents[d], q, row, counted["error"]),
                **counted,
            }
            for (d, q), row in zip(places, rows, strict=True)
        ]

    def _row(self, task: Task, document: Document, number: int) -> Row:
        turns = turns_of(document.questions[number], self.writer.encode)
        return Row(turns, task.metric, self.stop_ids if task.stops else frozenset())

    def _outcome(self, task: Task, document: Document, number: int, row: Row, error: str | None) -> Line:
        question = document.questions[number]
        said = [self.writer.tokenizer.decode(ids) for ids in row.said]
        expected = [list(turn.answers) for turn in question.turns]
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
        """Of the first documents of a task and length only. An observed cache decodes eagerly."""
        if not self.options.probe or budget is None or batch.numbers[0] != self.share.rank:
            return None
        probe = Probe(num_steps)
        cache.observers.append(probe)
        return probe

    def _save_probe(self, batch: Batch, method: str, budget: int | None, probe: Probe) -> None:
        key = _identity(batch.task, batch.length, method, budget)
        self._probes.add({**key, **line} for line in probe.lines())

    # -- checks and circumstances

    @property
    def _context(self) -> int | None:
        """Tokens that the model was made for."""
        found: int | None = getattr(sparsekv.hf.support.text_config(self.model), "max_position_embeddings", None)
        return found

    def _check_lengths(self) -> None:
        longest = max(self.options.lengths)
        if self._context is not None and longest > self._context:
            raise ConfigError(f"--lengths {longest} is beyond the model's context of {self._context} tokens.")

    def _check_room(self, batch: Batch, documents: Sequence[Document], ids: Sequence[Sequence[int]]) -> None:
        """What is asked and answered must fit into the model's context too."""
        task = self.tasks[batch.task]
        needed = max(
            len(text) + self._row(task, document, q).longest
            for document, text in zip(documents, ids, strict=True)
            for q in range(len(document.questions))
        )
        if self._context is not None and needed > self._context:
            raise ConfigError(
                f"{batch.task} at --lengths {batch.length} needs {needed} tokens with its questions and answers, and "
                f"the model's context is {self._context}: ask for shorter documents. What was finished is kept."
            )

    def _manifest(self, name: str, command: str) -> Line:
        config = sparsekv.hf.support.text_config(self.model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return {
            **circumstances(command),
            "model": {
                "name": name,
                "sha256": model_hash(self.model),
                "num_layers": config.num_hidden_layers,
                "num_kv_heads": heads,
                "head_dim": head_dim,
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
            "settings": self.options.settings(),
        }


def _identity(task: str, length: int, method: str, budget: int | None) -> Line:
    return {"task": task, "length": length, "method": method, "budget": budget}


def _grouped(items: Sequence[Any], key: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Items by key, in the order of the first of each."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    yield from groups.items()


def _counts(cache: PagedCache, num_steps: int, num_rows: int) -> Line:
    """What a token of one sequence read, over all layers."""
    stats, tokens = cache.stats, max(num_steps, 1) * num_rows
    return {
        "bytes_per_token": stats.bytes_read / tokens,
        "dense_bytes_per_token": stats.bytes_total / tokens,
        "pages_per_token": stats.pages_read / tokens,
        "sparse_steps": stats.sparse_steps,
        "dense_steps": stats.dense_steps,
    }


def _error(cache: PagedCache, config: SparseConfig, budget: int | None, shortest: int, num_steps: int) -> str | None:
    """What the counters say against a method's claim, or None."""
    stats = cache.stats
    if stats.sparse_steps + stats.dense_steps != num_steps:
        return f"of {num_steps} steps {stats.sparse_steps} sparse and {stats.dense_steps} dense ones were counted"
    if budget is None:
        return "dense, and yet some steps chose pages" if stats.sparse_steps else None
    if stats.sparse_steps < num_steps and config.pages_for(shortest) > config.budget_pages(shortest):
        return f"{stats.dense_steps} of {num_steps} steps were dense, although the document exceeds the budget"
    return None


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    ids = [found] if isinstance(found, int) else list(found or [])
    return frozenset([*ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])])


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def load(options: RunOptions) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        ConfigError: there is no such model, device or dtype.
    """
    local = os.environ.get("LOCAL_RANK")
    wanted = f"cuda:{local}" if local and options.device == "auto" and torch.cuda.is_available() else options.device
    device = choose_device(wanted)
    names = {"auto": torch.float32 if device.type == "cpu" else torch.bfloat16, **_DTYPES}
    if options.dtype not in names:
        raise ConfigError(f"dtype={options.dtype!r} is not allowed: {', '.join(names)}.")
    if options.model == TESTBED:
        return testbed.load(device, names[options.dtype])
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=names[options.dtype])
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {options.model}: {' '.join(str(error).split())[:300]}") from error
    return model.to(device).eval(), tokenizer


def run(options: RunOptions, folder: Path, command: str, console: Console) -> int:
    """Loads the model and measures; returns the number of answers that are errors.

    Raises:
        SparseKVError: bad input, and nothing was changed; or the disk is full, and nothing is lost.
    """
    model, tokenizer = load(options)
    runner = Runner(model, tokenizer, options.model, options, folder, command)
    try:
        written, failed = runner.run(console)
    except OSError as error:
        raise SparseKVError(f"{error}. What was finished is in {folder}; the same command goes on.") from error
    console.print(f"{written} answers written to {folder}")
    if failed:
        console.print(f"[red]{failed} of them are errors: the counters contradict the method (see 'error')[/red]")
    return failed


def export(options: RunOptions, folder: Path, command: str) -> Path:
    """Writes `examples.jsonl`, a line per document, in tokens: for programs that cannot import sparsekv.

    Raises:
        ConfigError: bad input.
    """
    model, tokenizer = load(options)
    runner = Runner(model, tokenizer, options.model, options, folder, command)
    path = folder / "examples.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for example in runner.examples():
            file.write(json.dumps(example) + "\n")
    return path
