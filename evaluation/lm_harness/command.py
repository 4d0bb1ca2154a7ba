"""`sparsekv lm-eval`: lm_eval's own command line with our model class and our tasks filled in.

sparsekv lm-eval --model_args pretrained=M,budget=1024 --tasks sparsekv --metadata '{"lengths": [16384]}'

All options are lm_eval's; model_args are those of its `hf` model, every setting of sparsekv (budget, policy, digest,
page_size, dense_layers, sinks, recent, ...), settings, a file of them, and tail, the tokens of each prompt's end that
are decoded one by one (default 64; in our tasks, at least the question). pretrained=testbed is the small model that
ships. Our tasks are the group `sparsekv`; an --include_path of your own replaces them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from sparsekv.errors import ConfigError

TASKS_DIR = Path(__file__).parent / "tasks"
NAME = "sparsekv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Takes all that follows, for lm_eval."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of lm_eval")


def run(args: argparse.Namespace, command: str) -> int:
    """The subcommand of `sparsekv`.

    Raises:
        ConfigError: lm_eval is not installed, or another model class is asked for.
    """
    return main([argument for i, argument in enumerate(args.arguments) if (i, argument) != (0, "--")])


def main(arguments: list[str]) -> int:
    """Runs lm_eval in this process."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, flush=True)
        arguments = ["--help"]
    wanted = _command_line(arguments)
    cli_evaluate = _entry_point()
    ours, sys.argv = sys.argv, wanted
    try:
        cli_evaluate()
    finally:
        sys.argv = ours
    return 0


def _command_line(arguments: list[str]) -> list[str]:
    """The command line as if it had been typed for lm_eval."""
    ours = ["--include_path", str(TASKS_DIR)]
    if arguments[0] in ("ls", "validate"):
        return ["lm-eval", *arguments, *ours]
    rest = arguments[1:] if arguments[0] == "run" else arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M", default=NAME)
    given, rest = parser.parse_known_args(rest)
    if given.model != NAME:
        raise ConfigError(
            f"--model {given.model}: `sparsekv lm-eval` always runs --model {NAME}. Other models have lm_eval's own "
            "command; dense attention is --model_args policy=all."
        )
    # Without `run`, which lm_eval fills in by itself: older versions do not know it.
    return ["lm-eval", "--model", NAME, *ours, *rest]


def _entry_point() -> Callable[[], None]:
    """lm_eval's `main`, with our model class registered."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from . import model  # noqa: F401  (registers itself)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`sparsekv lm-eval` needs lm-evaluation-harness ({error}): pip install '.[eval]' in the clone"
        ) from error
    main_of_lm_eval: Callable[[], None] = cli_evaluate
    return main_of_lm_eval
