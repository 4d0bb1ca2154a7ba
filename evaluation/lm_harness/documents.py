"""Our tasks in lm_eval's form: a prompt per question, written for the tokenizer of the model that is measured.

What `tasks/*.yaml` name. `--metadata` sets lengths, num_examples and seed; lm_eval adds the model's arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from sparsekv.errors import ConfigError
from sparsekv.evaluation.tasks import Metric, Writer, make_task, score, spread
from sparsekv.hf import models

LENGTHS = (4096,)
NUM_EXAMPLES = 64  # per length
_HINT = """--metadata '{"lengths": [4096, 16384], "num_examples": 64, "seed": 0}'"""


def dataset(task_name: str, **metadata: Any) -> dict[str, Any]:
    """A task's questions, as `custom_dataset` wants them.

    Raises:
        ConfigError: the metadata cannot be used, or the tokenizer lacks words.
    """
    import datasets

    given = metadata.get("lengths", metadata.get("max_seq_lengths", LENGTHS))  # as RULER's tasks call them
    lengths = [_whole("lengths", n) for n in (given if isinstance(given, (list, tuple)) else [given])]
    if not lengths:
        raise ConfigError(f"metadata: lengths is empty. For example: {_HINT}")
    num_examples = _whole("num_examples", metadata.get("num_examples", NUM_EXAMPLES))
    seed = metadata.get("seed", 0)
    tokenizer = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(tokenizer, str):
        raise ConfigError(
            "The tasks are written for a tokenizer: name it with --model_args pretrained=..., or with metadata "
            f"tokenizer=... (it is {tokenizer!r})."
        )
    writer = _writer(tokenizer)
    rows = [row for length in lengths for row in _rows(task_name, writer, length, num_examples, seed)]
    several = len(lengths) > 1
    return {"test": datasets.Dataset.from_list([{**row, "several_lengths": several} for row in rows])}


def process_results(row: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The share of the expected strings that were said; where there are several lengths, for each too."""
    points = score(Metric(row["metric"]), [results[0]], [row["answers"]])
    by_length = {f"recall_{row['length']}": points} if row["several_lengths"] else {}
    return {"recall": points, **by_length}


def _rows(task_name: str, writer: Writer, length: int, num_examples: int, seed: int) -> Iterator[dict[str, Any]]:
    task = make_task(task_name)
    for start in range(0, num_examples, task.num_questions):
        seed_of_document = task.seed_of(seed, start // task.num_questions)
        document = task.write(writer, length, task.num_questions, seed_of_document)
        for number in spread(task.num_questions, num_examples - start):
            (turn,) = document.questions[number].turns
            yield {
                "input": document.text + turn.prompt,
                "prompt_tokens": len(writer.encode(turn.prompt)),
                "answers": list(turn.answers),
                "target": turn.reference,
                "metric": task.metric.value,
                "length": length,
            }


@cache
def _writer(tokenizer: str) -> Writer:
    from transformers import AutoTokenizer

    return Writer(models.pretrained(AutoTokenizer, tokenizer))


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"metadata: {name}={value!r} must be a whole number, at least 1. For example: {_HINT}")
    return value
