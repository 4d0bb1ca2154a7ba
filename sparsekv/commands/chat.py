"""Chat about a document: it is read once, densely, and each answer says which share of the cache it took.

Every line of input is a question; questions may also come through a pipe. Answers go to stdout, all else to stderr.
What was read of a document is kept, and loaded the next time (`sparsekv documents` lists it; --no-keep).
Questions are read densely over the cache, as is every forward of several tokens; the tokens of the answers are
decoded sparsely. Without --model it is the small model that ships, which knows nothing but what its document says.
/help lists what else can be typed. Ctrl-C stops an answer, and at the prompt ends the chat; so does Ctrl-D.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import sparsekv
from sparsekv.command_line import BYTE_ORDER_MARK, EXIT_OK, read_text
from sparsekv.errors import ConfigError, SparseKVError, UnknownNameError
from sparsekv.evaluation import testbed
from sparsekv.hf import models, wording
from sparsekv.hf.ranks import Ranks

from . import model_options, shelf
from .conversation import Conversation

PROMPT = "> "
STORY_TOKENS, STORY_QUESTIONS = 8192, 4
HELP = {
    "/help": "this list",
    "/stats": "the cache, what the last answer read, and which layers are sparse",
    "/budget N": "tokens read per kv head from now on, or a fraction (0.1)",
    "/undo": "forget the last question and its answer",
    "/reset": "forget all questions and keep the document",
    "/quit": "end, as Ctrl-D",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv chat`."""
    parser.add_argument("--document", metavar="FILE", help="text file to ask about (default: none; testbed: a story)")
    shelf.add_arguments(parser)
    parser.add_argument("--plain", action="store_true", help="plain text, even if the model has a chat template")
    model_options.add_arguments(parser, needs_model=False)


def run(args: argparse.Namespace, command: str) -> int:
    """Reads the document, then answers line by line.

    Raises:
        ConfigError, UnsupportedModelError: the document, the model or a setting cannot be used; or a line of a pipe.
        KeyboardInterrupt: Ctrl-C at the prompt, or twice.
    """
    given = partial(read_text, "--document", args.document)
    document = Ranks.of_launch().told(given, "the document") if args.document is not None else None
    config = model_options.config_of(args)
    model, tokenizer = models.load(args.model, args.device, args.dtype, args.parallel)
    hints: list[str] = []
    if args.model == testbed.NAME and document is None:
        document, hints = _story()
    if args.model == testbed.NAME:
        words = wording.of_testbed()
    elif args.plain or tokenizer.chat_template is None:
        words = wording.plain(document is not None)
    else:
        words = wording.of_template(tokenizer, document is not None)
    with sparsekv.patch(model, config) as patch:
        conversation = Conversation(patch, tokenizer, words, args.max_new_tokens)
        if document is not None:
            kept = shelf.chosen(args) if args.document is not None else None
            conversation.read(document, kept, Path(args.document or "").name)
            _tell(f"{len(conversation.turns[0].ids):,} tokens read.")
        _tell("/help lists what can be typed beside questions.", *hints)
        _converse(conversation, Ranks.of_launch().told(sys.stdin.isatty, "the kind of input"))
    return EXIT_OK


def _story() -> tuple[str, list[str]]:
    """A document for the small model, and what it can be asked."""
    story = testbed.make_story(STORY_TOKENS, tasks=("needle", "many_keys"), num_questions=STORY_QUESTIONS)
    asks = [q.prompt.removeprefix("Question : ").removesuffix(" Answer :") for q in story.questions]
    return story.text, ["A story was made up. Ask, for example:", *(f"  {ask}" for ask in asks)]


def _converse(conversation: Conversation, is_terminal: bool) -> None:
    """Answers until /quit or the end of input. At a terminal a line that cannot be followed is no end."""
    typed, ranks = _lines(is_terminal), Ranks.of_launch()
    while (line := ranks.told(lambda: next(typed, None), "a line of input")) is not None:
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                _follow(conversation, *line.split(maxsplit=1))
                continue
            with _stopped_by_interrupt(is_terminal) as event:
                turn = conversation.ask(line, partial(print, end="", flush=True), event.is_set)
            print(flush=True)
            _tell(turn or "[stopped; the question is forgotten]")
        except SparseKVError as error:
            if not is_terminal:
                raise
            _tell(error)


def _lines(is_terminal: bool) -> Iterator[str]:
    """What is typed, without empty lines."""
    prompt = PROMPT if is_terminal and sys.stdout.isatty() else ""
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
    try:
        while True:
            if is_terminal and not prompt:  # stdout goes elsewhere, and is for answers alone
                _tell(PROMPT, end="")
            line = input(prompt).removeprefix(BYTE_ORDER_MARK).strip()
            if line:
                yield line
    except EOFError:
        if is_terminal:
            _tell()  # the shell's prompt gets a line of its own
    except UnicodeDecodeError as error:
        raise ConfigError(f"A question is no UTF-8 text ({error}).") from error


def _follow(conversation: Conversation, name: str, rest: str = "") -> None:
    """Does what a line that begins with / says."""
    turns = conversation.turns
    match name:
        case "/help":
            _tell(*(f"{name:<10} {what}" for name, what in HELP.items()))
            _tell("All else is a question. It is read densely over the cache; its answer is decoded sparsely.")
        case "/stats":
            _tell(conversation.patch, turns[-1].cache, *(turn.cache.stats for turn in turns[1:][-1:]))
        case "/budget":
            try:
                conversation.config = conversation.config.with_(budget=model_options.budget(rest))
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"/budget: {error}") from error
            _tell(f"Budget from now on: {rest}.")
        case "/undo":
            _tell("The last question is forgotten." if turns[1:] else "There is no question to forget.")
            del turns[max(1, len(turns) - 1) :]
        case "/reset":
            del turns[1:]
            _tell("All questions are forgotten.")
        case _:
            raise ConfigError(str(UnknownNameError("command", name, [known.split()[0] for known in HELP])))


@contextlib.contextmanager
def _stopped_by_interrupt(is_wanted: bool) -> Iterator[threading.Event]:
    """Within it the first Ctrl-C only sets the event, so that no forward is cut in two; the second raises."""
    event = threading.Event()

    def note(*signal_and_frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, note) if is_wanted else None
    try:
        yield event
    finally:
        if is_wanted:
            signal.signal(signal.SIGINT, before)


def _tell(*lines: object, end: str = "\n") -> None:
    """What is no answer."""
    print(*lines, sep="\n", end=end, file=sys.stderr, flush=True)
