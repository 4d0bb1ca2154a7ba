"""A run from its options to its files: loads the model, measures what is missing, says what was written.

model, tokenizer = session.load(RunOptions(model="testbed"))
session.run([RunOptions(tasks=("needle",))], Path("run"), "the command", console)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparsekv.errors import SparseKVError
from sparsekv.hf import models
from sparsekv.hf.ranks import Ranks

from .options import AUTO, RunOptions
from .results import Line
from .runner import Runner
from .workload import Share


def load(options: RunOptions, parallel: str | None = None) -> tuple[Any, Any]:
    """The model and its tokenizer; of several processes, each on a GPU of its own, or by `parallel` each its part.

    Raises:
        ConfigError: there is no such model or device.
    """
    local = os.environ.get("LOCAL_RANK")
    wanted = options.device
    if local and wanted == AUTO and torch.cuda.is_available():
        wanted = f"cuda:{local}"
        torch.cuda.set_device(wanted)
    return models.load(options.model, wanted, options.dtype, parallel)


def run(
    parts: Sequence[RunOptions], folder: Path, command: str, console: Console, parallel: str | None = None
) -> int:
    """Loads the model and measures part after part; returns the number of answers that are errors. Of ranks that hold
    the model together, by `parallel`, the first one writes.

    Raises:
        SparseKVError: bad input, and nothing was changed; or the disk is full, and nothing is lost.
    """
    model, tokenizer = load(parts[0], parallel)
    share = Share.of_launch(parallel)
    with tempfile.TemporaryDirectory() as unread:
        own = Path(unread) if Ranks.of(model).rank else folder
        # All runners first: what is wrong is told before anything is measured, and the memory is still free.
        return _measure([Runner(model, tokenizer, x.model, x, own, command, share) for x in parts], own, console)


def _measure(runners: Sequence[Runner], folder: Path, console: Console) -> int:
    try:
        written, failed = map(sum, zip(*(runner.run(console) for runner in runners), strict=True))
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
        for name in runner.tasks:
            for length in options.lengths:
                for number in runner.work.documents(name):
                    file.write(json.dumps(_example(runner, name, length, number)) + "\n")
    return path


def _example(runner: Runner, name: str, length: int, number: int) -> Line:
    """A document and its questions in tokens."""
    task, document = runner.tasks[name], runner.document(name, length, number)

    def asked(q: int) -> Line:
        question = document.questions[q]
        turns = [
            {"prompt_ids": t.prompt, "reference_ids": t.reference, "spare": t.spare, "answers": list(turn.answers)}
            for t, turn in zip(runner.turns(name, question), question.turns, strict=True)
        ]
        return {"question": q, "turns": turns, "details": question.details}

    return {
        "task": name,
        "length": length,
        "document": number,
        "metric": task.metric.value,
        "stops": task.stops,
        "eos_token_id": sorted(runner.stop_ids),
        "document_ids": runner.writer(name).document_ids(document.text),
        "questions": [asked(q) for q in runner.work.asked(name)],
    }
