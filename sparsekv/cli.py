"""The `sparsekv` command and its commands, each of which has a module of its own."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from typing import Any

from sparsekv.command_line import (
    EXIT_CODES,
    EXIT_ERROR,
    EXIT_OK,
    Parser,
    add_json_option,
    new_console,
    positive,
    run_to_exit_code,
    with_json,
)
from sparsekv.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `sparsekv` command; returns the exit code (see `sparsekv.command_line`)."""
    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["sparsekv", *arguments])
    return run_to_exit_code(lambda: _parser().run(_spelt_out(arguments), command), "sparsekv")


def _spelt_out(arguments: list[str]) -> list[str]:
    """`sparsekv bench OPTIONS` is short for `sparsekv bench attention OPTIONS`, as is `eval` for `eval run`."""
    rest = arguments[1:]
    if arguments[:1] == ["eval"]:
        from sparsekv.evaluation.accuracy.command import spelt_out

        return ["eval", *spelt_out(rest)]
    if arguments[:1] == ["lm-eval"]:
        return ["lm-eval", "--", *rest]  # all that follows is lm_eval's, its options too
    if arguments[:1] != ["bench"] or (rest and (not rest[0].startswith("-") or rest[0] in ("-h", "--help"))):
        return arguments
    return ["bench", "attention", *rest]


def _parser() -> Parser:
    parser = Parser(
        prog="sparsekv",
        description="Query-aware sparse attention: Hugging Face models decode long contexts by reading few pages.",
        epilog=f"`sparsekv COMMAND --help` lists a command's options; {EXIT_CODES}.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_inspect(commands)
    _add_calibrate(commands)
    _add_eval(commands)
    _add_lm_eval(commands)
    _add_bench(commands)
    _add_models(commands)
    _add_documents(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: Any) -> None:
    from sparsekv.commands import demo

    parser = commands.add_parser(
        "demo",
        help="a small model answers questions about a long story, dense beside sparse",
        description=demo.__doc__,
    )
    demo.add_arguments(parser)
    parser.set_defaults(run=with_json(demo.run))


def _add_bench(commands: Any) -> None:
    from sparsekv.evaluation import speed

    parser = commands.add_parser(
        "bench",
        help="time a decode step, a token of generate or a prompt, sparse beside dense",
        description="Times sparse attention beside dense attention. `sparsekv bench OPTIONS` is short for "
        "`sparsekv bench attention OPTIONS`.",
        epilog="`sparsekv bench WHAT --help` lists the options.",
    )
    speed.add_commands(parser)


def _add_generate(commands: Any) -> None:
    from sparsekv.commands import generate
    from sparsekv.hf.parallel import by_all_ranks

    parser = commands.add_parser(
        "generate",
        help="let a model of your own continue a prompt, sparsely",
        description=generate.__doc__,
    )
    generate.add_arguments(parser)
    parser.set_defaults(run=by_all_ranks(with_json(generate.run)))


def _add_chat(commands: Any) -> None:
    from sparsekv.commands import chat
    from sparsekv.hf.parallel import by_all_ranks

    parser = commands.add_parser(
        "chat",
        help="ask about a document, turn by turn, and see what each answer read",
        description=chat.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat.add_arguments(parser)
    parser.set_defaults(run=by_all_ranks(chat.run))


def _add_inspect(commands: Any) -> None:
    from sparsekv.commands import inspect

    parser = commands.add_parser(
        "inspect",
        help="a page that shows what each token of an answer read of a document",
        description=inspect.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_arguments(parser)
    parser.set_defaults(run=inspect.run)


def _add_calibrate(commands: Any) -> None:
    from sparsekv.evaluation.calibration import command

    parser = commands.add_parser(
        "calibrate",
        help="find the smallest setting that keeps what a model says of a text of yours",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _add_eval(commands: Any) -> None:
    from sparsekv.evaluation.accuracy import command as eval_command

    parser = commands.add_parser(
        "eval",
        help="how much accuracy a method and budget cost, and what it reads",
        description="Asks a model questions about long documents, densely and sparsely. `sparsekv eval OPTIONS` is "
        "short for `sparsekv eval run OPTIONS`.",
        epilog="`sparsekv eval WHAT --help` lists the options.",
    )
    eval_command.add_commands(parser)


def _add_lm_eval(commands: Any) -> None:
    from sparsekv.evaluation.lm_harness import command

    parser = commands.add_parser(
        "lm-eval",
        help="EleutherAI's lm-evaluation-harness, decoding sparsely",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.set_defaults(run=command.run)


def _add_models(commands: Any) -> None:
    from sparsekv.commands import models

    parser = commands.add_parser(
        "models",
        help="which models decode sparsely, which of their layers, and why not",
        description=models.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models.add_arguments(parser)
    parser.set_defaults(run=with_json(models.run))


def _add_documents(commands: Any) -> None:
    from sparsekv.commands import documents

    parser = commands.add_parser(
        "documents",
        help="what chat and generate have read and kept: list it, delete it",
        description=documents.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    documents.add_arguments(parser)
    parser.set_defaults(run=with_json(documents.run))


def _add_doctor(commands: Any) -> None:
    from sparsekv.commands import memory

    parser = commands.add_parser("doctor", help="versions, devices, what would run where, and what would fit")
    add_json_option(parser)
    parser.add_argument("--compile", action="store_true", help="compile all kernels now rather than at first use")
    parser.add_argument("--arch", nargs="+", metavar="SM", help="for these, as sm_90 (default: the GPUs present)")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="at once (default %(default)s)")
    memory.add_arguments(parser)
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace, command: str) -> int:
    from sparsekv import doctor
    from sparsekv.commands import memory

    if memory.is_asked(args):
        return with_json(memory.run)(args, command)
    if args.arch and not args.compile:
        raise ConfigError("--arch goes with --compile.")
    formats = [args.kv or "plain"]
    compiled = {"compile": doctor.compile_kernels(args.arch, args.jobs, formats)} if args.compile else {}
    report = doctor.report() | compiled
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        new_console().print(doctor.render(report))
    return EXIT_ERROR if compiled and compiled["compile"]["failed"] else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
