"""The demo: a small language model answers questions about a long story, densely and sparsely, side by side."""

from __future__ import annotations

import argparse
import operator
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsekv.command_line import add_json_option, choose_device, new_console, positive
from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.asking import PromptTurn
from sparsekv.evaluation.pages_plot import pages_figure
from sparsekv.evaluation.report import result, save_json
from sparsekv.evaluation.testbed.stories import Story, make_story

from .side_by_side import Answer, Ask, Method, Scene, compare

TASKS = ("needle", "many_keys")
MIN_CONTEXT, MAX_CONTEXT = 4096, 32768  # below, the smallest budget is all sinks and recent; above, never trained
BUDGET_SHARES = (32, 16, 8)  # the budgets shown: the context divided by these
_CAPTION = (
    "The story is prefilled once, densely; questions and answers are decoded token by token.\n"
    "Budgets are tokens per kv head; the first two of the six layers always read everything. Shares count digests."
)


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
    methods, trace = compare(model, tokenizer, scene_of(story, tokenizer))
    console.print(_table(story, methods))
    content = result(command, {"context": context, "seed": args.seed}, [method.as_row() for method in methods])
    path = save_json(args.out, "demo", content)
    picture = path.with_suffix(".png")
    pages_figure(trace, context).savefig(picture)
    console.print(f"Which pages were read, and where the answer lies: [bold]{picture}[/bold]; all figures: {path}")
    return content


def scene_of(story: Story, tokenizer: Any) -> Scene:
    """A story in tokens."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    budgets = [story.num_tokens // share for share in BUDGET_SHARES]
    asks = [Ask(PromptTurn(encode(q.prompt), encode(q.answer)), q.answer, q.evidence) for q in story.questions]
    return Scene(encode(story.text), asks, budgets, frozenset([tokenizer.eos_token_id]), operator.eq)


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
