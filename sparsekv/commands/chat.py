"""Chat about a document: it is read once, densely, and each answer says which share of the cache it took.

Every line of input is a question; questions may also come through a pipe. Answers go to stdout, all else to stderr.
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
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import Progress

import sparsekv
from sparsekv.command_line import BYTE_ORDER_MARK, EXIT_OK, read_text
from sparsekv.errors import ConfigError, SparseKVError, UnknownNameError
from sparsekv.evaluation import testbed, wording

from . import model_options
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
    parser.add_argument("--plain", action="store_true", help="plain text, even if the model has a chat template")
    model_options.add_arguments(parser, needs_model=False)


def run(args: argparse.Namespace, command: str) -> int:
    """Reads the document, then answers line by line.

    Raises:
        ConfigError, UnsupportedModelError: the document, the model or a setting cannot be used.
    """
    document = read_text("--document", args.document) if args.document is not None else None
    config = model_options.config_of(args)
    model, tokenizer = model_options.load(args)
    hints: list[str] = []
    if args.model == testbed.NAME and document is None:
        document, hints = _story()
    words = _wording(args, tokenizer, document is not None)
    with sparsekv.patch(model, config) as patch:
        conversation = Conversation(patch, tokenizer, words, args.max_new_tokens)
        if document is not None:
            _read(conversation, document)
        _tell("/help lists what can be typed beside questions.", *hints)
        Session(conversation).run()
    return EXIT_OK


def _story() -> tuple[str, list[str]]:
    """A document for the small model, and what it can be asked."""
    story = testbed.make_story(STORY_TOKENS, tasks=("needle", "many_keys"), num_questions=STORY_QUESTIONS)
    asks = [q.prompt.removeprefix("Question : ").removesuffix(" Answer :") for q in story.questions]
    return story.text, ["A story was made up. Ask, for example:", *(f"  {ask}" for ask in asks)]


def _wording(args: argparse.Namespace, tokenizer: Any, has_document: bool) -> wording.Wording:
    if args.model == testbed.NAME:
        return wording.of_testbed()
    if args.plain or tokenizer.chat_template is None:
        return wording.plain(has_document)
    return wording.of_template(tokenizer, has_document)


def _read(conversation: Conversation, document: str) -> None:
    ids = conversation.encode_document(document)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"reading {len(ids):,} tokens (dense prefill)", total=len(ids))
        conversation.read(ids, lambda count: progress.advance(task, count))
    _tell(f"{len(ids):,} tokens read.")


class Session:
    """The lines that are typed, until they end.

    Raises:
        SparseKVError: a question cannot be answered, and there is nobody to try another one.
        KeyboardInterrupt: Ctrl-C at the prompt, or twice.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._is_terminal = sys.stdin.isatty()
        self._commands = {
            "/help": self._help,
            "/stats": self._stats,
            "/budget": self._budget,
            "/undo": self._undo,
            "/reset": self._reset,
        }

    def run(self) -> None:
        """Answers until /quit or the end of input."""
        for line in self._lines():
            if line == "/quit":
                return
            try:
                self._take(line)
            except SparseKVError as error:
                if not self._is_terminal:
                    raise
                _tell(str(error))

    def _lines(self) -> Iterator[str]:
        """What is typed, without empty lines."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines and remembers them)
        try:
            while True:
                line = self._input().removeprefix(BYTE_ORDER_MARK).strip()
                if line:
                    yield line
        except EOFError:
            if self._is_terminal:
                _tell("")  # the shell's prompt gets a line of its own
        except UnicodeDecodeError as error:
            raise ConfigError(f"A question is no UTF-8 text ({error}).") from error

    def _input(self) -> str:
        if self._is_terminal and sys.stdout.isatty():
            return input(PROMPT)
        if self._is_terminal:  # stdout goes elsewhere, and is for answers alone
            print(PROMPT, end="", file=sys.stderr, flush=True)
        return input()

    def _take(self, line: str) -> None:
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ConfigError(str(UnknownNameError("command", name, [*self._commands, "/quit"])))
        self._commands[name](rest.strip())

    def _answer(self, question: str) -> None:
        with _stopped_by_interrupt(self._is_terminal) as is_stopped:
            turn = self.conversation.ask(question, _show, is_stopped.is_set)
        print(flush=True)
        _tell("[stopped; the question is forgotten]" if turn is None else str(turn))

    def _help(self, rest: str) -> None:
        _tell(*(f"{name:<10} {what}" for name, what in HELP.items()))
        _tell("All else is a question. It is read densely over the cache; its answer is decoded sparsely.")

    def _stats(self, rest: str) -> None:
        _tell(str(self.conversation.patch), str(self.conversation.state.cache))
        for turn in self.conversation.turns[-1:]:
            _tell(str(turn.after.cache.stats))

    def _budget(self, rest: str) -> None:
        try:
            self.conversation.set_budget(model_options.budget(rest))
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"/budget: {error}") from error
        _tell(f"Budget from now on: {rest}.")

    def _undo(self, rest: str) -> None:
        had_one = self.conversation.undo()
        _tell("The last question is forgotten." if had_one else "There is no question to forget.")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        _tell("All questions are forgotten.")


@contextlib.contextmanager
def _stopped_by_interrupt(is_wanted: bool) -> Iterator[threading.Event]:
    """Within it the first Ctrl-C only sets the event, so that no forward is cut in two; the second raises."""
    event = threading.Event()

    def note(signum: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, note) if is_wanted else None
    try:
        yield event
    finally:
        if is_wanted:
            signal.signal(signal.SIGINT, before)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _tell(*lines: str) -> None:
    """What is no answer."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)
