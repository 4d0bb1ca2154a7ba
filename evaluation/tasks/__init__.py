"""Long-context tasks, written for any tokenizer.

>>> from sparsekv.evaluation import tasks, testbed
>>> writer = tasks.Writer(testbed.load()[1])
>>> document = tasks.make_task("needle").write(writer, num_tokens=2048, num_questions=3, seed=1)
>>> [question.details["depth"] for question in document.questions]
[0, 50, 100]
"""

from sparsekv.errors import UnknownNameError

from . import long_output, needles, perplexity, ruler  # noqa: F401  (they register themselves)
from .base import TASKS, Document, Metric, Question, Task, Turn, register, spread
from .files import FILE_TASKS, from_source
from .scoring import score
from .writer import Writer

__all__ = [
    "FILE_TASKS",
    "TASKS",
    "Document",
    "Metric",
    "Question",
    "Task",
    "Turn",
    "Writer",
    "make_task",
    "register",
    "score",
    "spread",
]


def make_task(name: str) -> Task:
    """The task called so: a name of the registry, `longbench:SOURCE`, `ruler:SOURCE`, or, in any text in UTF-8,
    `perplexity:FILE`, `recall:FILE`, `needle:FILE`.

    SOURCE is a file of JSON lines, a subset of LongBench, or OWNER/NAME/CONFIG on the hub. FILE is a text, or
    `excerpt`: the one that ships; `perplexity:FILE#TOKENS` and `recall:FILE#TOKENS` score so many tokens after each
    document, instead of 256, and `needle:FILE#NEEDLES` asks for so many of eight. Documents of such tasks are the
    rows or pieces in their order: seed 0 of `write` is the first.

    Raises:
        UnknownNameError: there is none.
        ConfigError: its data cannot be used.
    """
    kind, _, source = name.partition(":")
    if source and kind in FILE_TASKS:
        return from_source(kind, source)
    if name not in TASKS:
        raise UnknownNameError("task", name, [*TASKS, *(f"{kind}:FILE" for kind in FILE_TASKS)])
    return TASKS.get(name)()
