"""The demo: a small language model answers questions about a long story, densely and sparsely, side by side."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.cache_utils import Cache

import sparsekv
from sparsekv import DecodeStats, PagedCache
from sparsekv.command_line import add_json_option, choose_device, new_console, positive
from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.asking import PromptTurn, Row, decode, prefill
from sparsekv.evaluation.pages_plot import PageTrace, pages_figure
from sparsekv.evaluation.report import result, save_json
from sparsekv.evaluation.tasks import Metric
from sparsekv.evaluation.testbed.stories import Question, Story, make_story
from sparsekv.testing.timing import synchronize

TASKS = ("needle", "many_keys")
MIN_CONTEXT, MAX_CONTEXT = 4096, 32768  # below, the smallest budget is all sinks and recent; above, never trained
BUDGET_SHARES = (32, 16, 8)  # the budgets shown: the context divided by these
_CAPTION = (
    "The story is prefilled once, densely; questions and answers are decoded token by token.\n"
    "Budgets are tokens per kv head; the first two of the six layers always read everything. Shares count digests."
)


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it took.

    Attributes:
        text: the decoded answer, without the end token.
        is_right: whether it equals the expected text.
        num_tokens: tokens decoded one by one, the question's included.
        ms_per_token: mean milliseconds of one of them.
    """

    text: str
    is_right: bool
    num_tokens: int
    ms_per_token: float


@dataclass
class Method:
    """A way to decode: its cache, and the answers it gave."""

    name: str
    cache: Cache
    stats: DecodeStats | None
    answers: list[Answer] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Part of the cache read per token; dense reads it all."""
        return self.stats.share if self.stats is not None else 1.0

    @property
    def sparse_share(self) -> float:
        """Part that is read of the layers that choose their pages."""
        return self.stats.sparse_share if self.stats is not None else 1.0

    def as_row(self) -> dict[str, Any]:
        """What the JSON file says of it."""
        return {
            "method": self.name,
            "right": self.num_right,
            "share": self.share,
            "sparse_share": self.sparse_share,
            "ms_per_token": self.ms_per_token,
            "stats": self.stats.as_dict() if self.stats is not None else None,
            "answers": [asdict(answer) for answer in self.answers],
        }

    @property
    def ms_per_token(self) -> float:
        tokens = sum(a.num_tokens for a in self.answers)
        return sum(a.ms_per_token * a.num_tokens for a in self.answers) / max(tokens, 1)

    @property
    def num_right(self) -> int:
        return sum(a.is_right for a in self.answers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv demo`."""
    parser.add_argument("--context", type=positive, default=16384, help="tokens of the story (default %(default)s)")
    parser.add_argument("--questions", type=positive, default=8, help="questions about it (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another number tells another story")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    parser.add_argument(
        "--out", default="sparsekv_demo", metavar="DIR",
        help="write DIR/demo.png, the pages read, and DIR/demo.json (default %(default)s)",
    )  # fmt: skip
    add_json_option(parser)
    parser.add_argument("--quick", action="store_true", help="a 4k story and 4 questions: a few seconds")


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Tells a story, asks the questions with every method, prints the table and writes the files; returns what the
    JSON file holds."""
    context, num_questions = (MIN_CONTEXT, 4) if args.quick else (args.context, args.questions)
    if not MIN_CONTEXT <= context <= MAX_CONTEXT:
        raise ConfigError(f"--context={context} is not allowed: {MIN_CONTEXT} to {MAX_CONTEXT}.")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise ConfigError(f"--out={args.out} is a file: name a folder; demo.png and demo.json are written into it.")
    console = new_console()
    model, tokenizer = testbed.load(choose_device(args.device))
    story = make_story(context, TASKS, num_questions, args.seed)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        methods, trace = _compare(model, tokenizer, story, progress)
    console.print(_table(story, methods))
    content = result(command, {"context": context, "seed": args.seed}, [method.as_row() for method in methods])
    path = save_json(args.out, "demo", content)
    picture = path.with_suffix(".png")
    pages_figure(trace, context).savefig(picture)
    console.print(f"Which pages were read, and where the answer lies: [bold]{picture}[/bold]; all figures: {path}")
    return content


def _compare(model: Any, tokenizer: Any, story: Story, progress: Progress) -> tuple[list[Method], PageTrace]:
    """Reads the story once; every method then decodes from the same keys and values."""
    budgets = [story.num_tokens // share for share in BUDGET_SHARES]
    reading = progress.add_task(f"reading {story.num_tokens:,} tokens (dense prefill)", total=1)
    with sparsekv.patch(model, budget=budgets[0]) as patch:
        cache = patch.new_cache()
        prefill(model, [_encode(tokenizer, story.text)], cache)
        progress.advance(reading)
        plain = Method("dense", cache.to_dynamic(), None)
        forks = {f"top_k {budget}": cache.fork(budget=budget) for budget in budgets}
        forks[f"recent {budgets[-1]}"] = cache.fork(budget=budgets[-1], policy="recent")
        sparse = [Method(name, fork, fork.stats) for name, fork in forks.items()]
        for method in sparse:
            _ask_all(model, tokenizer, method, story, progress)
        right = [q for q, answer in zip(story.questions, sparse[0].answers, strict=True) if answer.is_right]
        trace = _trace(model, tokenizer, cache.fork(budget=budgets[0]), (right or list(story.questions))[0])
    _ask_all(model, tokenizer, plain, story, progress)  # the model as it is without sparsekv
    return [plain, *sparse], trace


def _ask_all(model: Any, tokenizer: Any, method: Method, story: Story, progress: Progress) -> None:
    task = progress.add_task(method.name, total=len(story.questions))
    for question in story.questions:
        method.answers.append(ask(model, tokenizer, method.cache, question.prompt, question.answer))
        progress.advance(task)


def ask(model: Any, tokenizer: Any, cache: Cache, prompt: str, expected: str) -> Answer:
    """Feeds a question token by token, decodes greedily to the end token, and puts the cache back as it was."""
    turn = PromptTurn(_encode(tokenizer, prompt), _encode(tokenizer, expected))
    row = Row([turn], Metric.RECALL, frozenset([tokenizer.eos_token_id]))
    mask = torch.ones(1, cache.get_seq_length(), dtype=torch.long, device=model.device)
    synchronize(model.device)
    start = time.perf_counter()
    decode(model, cache, [row], mask)
    seconds = time.perf_counter() - start
    cache.crop(-row.num_tokens)
    text = tokenizer.decode(row.said[0])
    return Answer(text, text == expected, row.num_tokens, seconds / row.num_tokens * 1e3)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _trace(model: Any, tokenizer: Any, fork: PagedCache, question: Question) -> PageTrace:
    """Asks one question again, and notes every page read."""
    trace = PageTrace(question.evidence, page_size=fork.config.page_size, budget=int(fork.config.plain_budget))
    fork.observers.append(trace.observe)
    answer = ask(model, tokenizer, fork, question.prompt, question.answer)
    trace.words = f"{question.prompt} {answer.text}".split()
    trace.num_asked = len(question.prompt.split())
    return trace


def _table(story: Story, methods: list[Method]) -> Table:
    table = Table(title=f"Questions about a story of {story.num_tokens:,} tokens", caption=_CAPTION)
    table.add_column("question")
    table.add_column("answer", justify="right")
    for method in methods:
        table.add_column(method.name, justify="right")
    for i, question in enumerate(story.questions):
        asked = question.prompt.removeprefix("Question : ").removeprefix("what is the ")
        cells = [_cell(method.answers[i]) for method in methods]
        table.add_row(asked.removesuffix(" ? Answer :"), _compact(question.answer), *cells)
    table.add_section()
    total = len(story.questions)
    table.add_row("[bold]right[/bold]", "", *(f"[bold]{m.num_right} of {total}[/bold]" for m in methods))
    table.add_row("share of the cache read per token", "", *(f"{m.share:.1%}" for m in methods))
    table.add_row("... in the sparse layers alone", "", *(f"{m.sparse_share:.1%}" for m in methods))
    table.add_row("ms per token", "", *(f"{m.ms_per_token:.1f}" for m in methods))
    return table


def _cell(answer: Answer) -> str:
    said = _compact(answer.text) or "(nothing)"
    return f"[green]{said} ✓[/green]" if answer.is_right else f"[red]{said} ✗[/red]"


def _compact(answer: str) -> str:
    """Digits are words to the model; a reader takes them as one number. Long wrong answers are cut."""
    text = answer.replace(" ", "") if answer.replace(" ", "").isdigit() else answer
    return text if len(text) <= 12 else text[:11] + "…"
