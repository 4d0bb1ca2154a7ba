"""What every command has in common: "did you mean", exit codes, numbers, devices, the console, and `--json`.

Exit codes: 0, done; 1, an error, named on stderr; 2, a command line that is not understood; 130, interrupted. Output
into a pipe that nobody reads any more (`| head`) is no error.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib import metadata
from typing import Any, NoReturn

import torch
from rich.console import Console

from sparsekv.config import PREFILLS, SparseConfig
from sparsekv.errors import ConfigError, SparseKVError, UnknownNameError, did_you_mean

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = (
    "exit codes: 0 done, 1 an error (named on stderr), 2 a misspelt command line, 3 calibrate found no setting, "
    "130 interrupted"
)

BYTE_ORDER_MARK = "\ufeff"  # what Windows programs begin a text with
Run = Callable[[argparse.Namespace, str], int]  # options, the command as it was typed -> exit code


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers what it does not know in one line, with the nearest name that it knows.

    The parsers of its subcommands are of this class too.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Iterable[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse, but nothing is left over: a subcommand refuses its own unknown options."""
        self._given = list(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(self._given, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def run(self, arguments: list[str], command: str) -> int:
        """Runs what was asked for: `args.run` of the subcommand; returns its exit code.

        Args:
            command: as it was typed, for the records.
        """
        args = self.parse_args(arguments)
        chosen: Run = args.run
        return chosen(args, command)

    def error(self, message: str) -> NoReturn:
        """Prints one line to stderr and exits with 2. A misspelt option explains everything else."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        unknown = next((name for name in self._long_options() if not any(k.startswith(name) for k in known)), None)
        if unknown is not None:
            message = f"There is no option {unknown}.{did_you_mean(unknown, known, prefix='--')}"
        end = "" if message.endswith((".", "?")) else "."
        self.exit(EXIT_USAGE, f"{self.prog}: {message}{end} `{self.prog} --help` lists all.\n")

    def _long_options(self) -> Iterable[str]:
        """Of what was given, up to the subcommand's own."""
        own = self._given
        for i, argument in enumerate(own):
            if argument == "--" or argument in self._command_names:
                own = own[:i]
                break
        return [argument.partition("=")[0] for argument in own if argument.startswith("--") and " " not in argument]

    @property
    def _command_names(self) -> set[str]:
        return {name for group in self._actions for name in _commands_of(group)}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own check of `choices`, with a better message."""
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest).lower()
            raise argparse.ArgumentError(None, str(UnknownNameError(name, value, action.choices)))


def _commands_of(action: argparse.Action) -> Iterable[str]:
    return action.choices or () if isinstance(action, argparse._SubParsersAction) else ()


def run_to_exit_code(run: Callable[[], int], prog: str) -> int:
    """Runs a command; what stops it becomes a line on stderr and an exit code."""
    try:
        return _flushed(run)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except (SparseKVError, OSError, torch.OutOfMemoryError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UnknownNameError) else EXIT_ERROR
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _flushed(run: Callable[[], int]) -> int:
    """Runs a command, and hears of a closed pipe now rather than when the interpreter ends."""
    try:
        code = run()
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def positive(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: at least 1")
    return number


def tokens(text: str) -> int:
    """The type of an option that counts tokens: `32768`, `32k` or `1M`, where k is 1024 and M is 1024 k."""
    scale = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower())
    try:
        return positive(text) if scale is None else positive(text[:-1]) * scale
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: 32768, 32k or 1M") from error


def add_settings_option(parser: argparse.ArgumentParser) -> None:
    """`--settings`, for commands that take single settings as options: those have no defaults, see `settings_of`."""
    parser.add_argument(
        "--settings", metavar="FILE", help="JSON file of SparseConfig.save; other options given here override it"
    )


def add_prefill_options(parser: argparse.ArgumentParser) -> None:
    """`--prefill` and `--prefill-mass`, for commands that take them as single settings."""
    default, mass = SparseConfig.prefill, SparseConfig.prefill_mass
    parser.add_argument(
        "--prefill", choices=PREFILLS,
        help=f"how prompts are read; sparse: the blocks that hold most of their attention (default {default})",
    )  # fmt: skip
    parser.add_argument(
        "--prefill-mass", type=float, metavar="SHARE", help=f"how much these blocks hold of it (default {mass})"
    )


def settings_of(args: argparse.Namespace, **more: Any) -> SparseConfig:
    """The settings that were given as options, over those of `--settings`, over the defaults.

    Args:
        more: settings that are told by options of other names. None: not given, as in `args`.

    Raises:
        ConfigError, UnknownNameError: one is not allowed, or the file cannot be used.
    """
    names = [field.name for field in fields(SparseConfig)]
    options = {name: value for name, value in vars(args).items() if name in names} | more
    given = {name: value for name, value in options.items() if value is not None}
    return SparseConfig.of(SparseConfig.load(args.settings) if args.settings else None, **given)


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not known: use cpu, cuda, cuda:N or auto.") from error
    if device.type == "meta":
        raise ConfigError(f"device={name!r} holds no numbers: use cpu, cuda, cuda:N or auto.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: PyTorch sees no GPU here. Use cpu; `sparsekv doctor` says more.")
    return device


class PipeConsole(Console):
    """A console that says when nobody reads its output any more; rich would end the process with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def new_console() -> Console:
    """A console wide enough for our tables where the output is a file or a pipe."""
    console = PipeConsole()
    if console.is_jupyter:  # the same text as in a pipe, not a display for each line
        return PipeConsole(force_jupyter=False, force_terminal=False, width=118)
    return console if console.is_terminal else PipeConsole(width=max(console.width, 118))


def circumstances(command: str) -> dict[str, Any]:
    """Where and when something was run, for the records: command, date, processor, versions."""
    installed = {name: _version(name) for name in ("sparsekv", "torch", "transformers")}
    flashinfer = _version("flashinfer-python")
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
        "versions": {
            **installed,
            "python": platform.python_version(),
            **({"flashinfer": flashinfer} if flashinfer else {}),
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """`--json`, for commands that `with_json` runs."""
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else to stdout")


def with_json(measure: Callable[[argparse.Namespace, str], dict[str, Any]]) -> Run:
    """The `run` of a command that prints what it finds, and with `--json` returns it to stdout.

    Args:
        measure: does the work and prints for people; with `--json` that goes to stderr. Returns what goes into JSON.
    """

    def run(args: argparse.Namespace, command: str) -> int:
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            content = measure(args, command)
        if args.json:
            print(json.dumps(content, indent=1))
        return EXIT_OK

    return run


def read_text(option: str, path: str) -> str:
    """The content of a UTF-8 text file; `-` is standard input.

    Raises:
        ConfigError: it cannot be read, or holds nothing.
    """
    try:
        if path == "-":
            text = sys.stdin.read().removeprefix(BYTE_ORDER_MARK)
        else:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {path} is no UTF-8 text ({error}): convert it first.") from error
    if not text.strip():
        raise ConfigError(f"{option} {path} is empty.")
    return text
