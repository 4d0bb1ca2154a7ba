"""The demo: a small language model answers questions about a long story, densely and sparsely, side by side.

With --model it is a model that you name, and plain English.
"""

from __future__ import annotations

import argparse
import operator
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsekv.command_line import add_json_option, new_console, positive, tokens
from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.asking import PromptTurn
from sparsekv.evaluation.pages_plot import PageTrace, pages_figure
from sparsekv.evaluation.report import result, save_json
from sparsekv.evaluation.testbed.stories import Story, make_story
from sparsekv.hf import models

from . import english
from .side_by_side import Answer, Ask, Method, Scene, compare

Shown = tuple[Scene, list[Method], PageTrace]
TASKS = ("needle", "many_keys")
MIN_CONTEXT, MAX_CONTEXT = 4096, 32768  # below, the smallest budget is all sinks and recent; above, never trained
BUDGET_SHARES = (32, 16, 8)  # the budgets shown: the context divided by these
_CAPTION = (
    "The story is prefilled once, densely; questions and answers are decoded token by token.\n"
    "Budgets are tokens per kv head in each of the six layers. Shares count digests."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv demo`."""
    parser.add_argument("--model", default=testbed.NAME, metavar="ID_OR_PATH", help=f"{models.WHAT} (default)")
    parser.add_argument("--context", type=tokens, help="tokens of the story (default 16k; of plain English 4k)")
    parser.add_argument("--questions", type=positive, default=8, help="questions about it (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another number tells another story")
    models.add_arguments(parser)
    parser.add_argument(
        "--out", default="sparsekv_demo", metavar="DIR",
        help="write DIR/demo.png, the pages read, and DIR/demo.json (default %(default)s)",
    )  # fmt: skip
    add_json_option(parser)
    parser.add_argument("--quick", action="store_true", help="the smallest story and fewer questions: a few seconds")


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Tells a story, asks the questions with every method, prints the answers and writes the files; returns what the
    JSON file holds."""
    show, least, most, context, num_questions = _of_testbed, MIN_CONTEXT, MAX_CONTEXT, 16384, args.questions
    if args.model != testbed.NAME:
        show, least, most, context = _of_english, english.MIN_CONTEXT, 1 << 20, 4096
    context = args.context or context
    if args.quick:
        context, num_questions = least, (num_questions + 1) // 2
    if not least <= context <= most:
        raise ConfigError(f"--context={context} is not allowed: {least} to {most}.")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise ConfigError(f"--out={args.out} is a file: name a folder; demo.png and demo.json are written into it.")
    model, tokenizer = models.load(args.model, args.device, args.dtype)
    scene, methods, trace = show(model, tokenizer, context, num_questions, args.seed)
    settings = {"model": args.model, "context": context, "seed": args.seed}
    content = result(command, settings, [method.as_row() for method in methods])
    path = save_json(args.out, "demo", content)
    picture = path.with_suffix(".png")
    pages_figure(trace, len(scene.document)).savefig(picture)
    console = new_console()
    console.print(f"Which pages were read, and where the answer lies: [bold]{picture}[/bold]; all figures: {path}")
    if args.model == testbed.NAME:
        console.print(
            f"The same with a trained model, about a novel:\n[bold]{_program()} demo --model smollm2[/bold]"
        )
    return content


def _program() -> str:
    """How this program is called in a shell: `make demo` leaves no command on the path."""
    return "sparsekv" if shutil.which("sparsekv") else f"{os.path.relpath(sys.executable)} -m sparsekv"


def _of_testbed(model: Any, tokenizer: Any, context: int, num_questions: int, seed: int) -> Shown:
    story = make_story(context, TASKS, num_questions, seed)
    scene = scene_of(story, tokenizer)
    methods, trace = compare(model, tokenizer, scene)
    new_console().print(_table(story, methods))
    return scene, methods, trace


def _of_english(model: Any, tokenizer: Any, context: int, num_questions: int, seed: int) -> Shown:
    text, facts = english.hide(tokenizer, context, num_questions, seed)
    scene = english.scene_of(model, tokenizer, text, facts, context)
    methods, trace = compare(model, tokenizer, scene)
    new_console().print(english.shown(text, facts, scene, methods))
    return scene, methods, trace


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
    table.add_column("secret code of the")
    table.add_column("answer", justify="right")
    for method in methods:
        table.add_column(method.name, justify="right", max_width=14, overflow="fold")
    for i, question in enumerate(story.questions):
        asked = question.prompt.removeprefix("Question : what is the secret code of the ")
        cells = [_cell(method.answers[i]) for method in methods]
        table.add_row(asked.removesuffix(" ? Answer :"), _compact(question.answer), *cells)
    table.add_section()
    total = len(story.questions)
    table.add_row("[bold]right[/bold]", "", *(f"[bold]{m.num_right} of {total}[/bold]" for m in methods))
    table.add_row("cache read per token", "", *(f"{m.share:.1%}" for m in methods))
    table.add_row("ms per token", "", *(f"{m.ms_per_token:.1f}" for m in methods))
    return table


def _cell(answer: Answer) -> str:
    said = _compact(answer.text) or "(nothing)"
    return f"[green]{said} ✓[/green]" if answer.is_right else f"[red]{said} ✗[/red]"


def _compact(answer: str) -> str:
    """Digits are words to the model; a reader takes them as one number."""
    return answer.replace(" ", "") if answer.replace(" ", "").isdigit() else answer
