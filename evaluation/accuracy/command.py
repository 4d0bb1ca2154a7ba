"""How much accuracy a method and budget cost, and what it reads.

    sparsekv eval run --tasks needle multi_key --budgets 256 1024 --lengths 4k 16k --out DIR
    sparsekv eval report DIR

Questions about long documents, answered densely and sparsely. The same command goes on where a run was cut short.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsekv.command_line import EXIT_CODES, Parser, add_json_option, run_to_exit_code, with_json
from sparsekv.errors import ConfigError
from sparsekv.evaluation.report import new_console

from .options import add_arguments, add_work_arguments, options_of

RUN = "run"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """`run`, `report` and `export`."""
    commands = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    run = commands.add_parser(
        RUN,
        help="ask a model questions, densely and sparsely",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(run)
    add_work_arguments(run)
    run.set_defaults(run=_run)
    report = commands.add_parser(
        "report",
        help="tables, pictures and one HTML page of a run",
        description="Makes tables, pictures, intervals, failed examples and one HTML page of a run, finished or not.",
    )
    report.add_argument("folder", metavar="DIR", help="a run's folder (--out of run)")
    report.add_argument("--out", metavar="DIR", help="where to (default: DIR/report)")
    add_json_option(report)
    report.set_defaults(run=with_json(_report))
    export = commands.add_parser(
        "export",
        help="the examples of a run as a file, for other programs to answer",
        description="Writes DIR/examples.jsonl: the documents, questions and answers of a run with these options, in "
        "tokens, a document a line. tools/kvpress_peer.py answers them.",
    )
    add_arguments(export)
    export.set_defaults(run=_export)


def _run(args: argparse.Namespace, command: str) -> int:
    from .plan import Share
    from .session import run

    options, console, folder = options_of(args), new_console(), Path(args.out)
    failed = run(options, folder, command, console)
    if Share.from_environment().count == 1:  # else the other processes are not done yet
        _print_tables(folder, console)
    console.print(f"Tables, pictures, intervals and failed examples: sparsekv eval report {folder}")
    return 1 if failed else 0


def _print_tables(folder: Path, console: Any) -> None:
    from .summary import Run
    from .tables import terminal_tables

    for table in terminal_tables(Run.read(folder), console.width):
        console.print(table)


def _export(args: argparse.Namespace, command: str) -> int:
    from .session import export

    path = export(options_of(args), Path(args.out), command)
    new_console().print(f"Written: {path}")
    return 0


def _report(args: argparse.Namespace, command: str) -> dict[str, Any]:
    from .page import write_report

    folder = Path(args.folder)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}: name the --out of a run.")
    console = new_console()
    written = write_report(folder, Path(args.out) if args.out else None)
    _print_tables(folder, console)
    for path in written:
        console.print(f"Written: {path}")
    return _content(folder)


def _content(folder: Path) -> dict[str, Any]:
    """What `eval report --json` prints: the manifest, what a reader must know, and every cell."""
    from .cells import cells, unsolved
    from .summary import Run
    from .tables import notes

    run = Run.read(folder)
    found = cells(run)
    return {
        "manifest": run.manifest,
        "notes": notes(run),
        "unsolved": [{"length": length, "task": task} for length, task in unsolved(found)],
        "cells": [{**asdict(cell), "share": cell.share} for cell in found],
    }


def spelt_out(arguments: list[str]) -> list[str]:
    """`sparsekv eval OPTIONS` is short for `sparsekv eval run OPTIONS`."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        return [RUN, *arguments]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """`python -m evaluation`; returns the exit code (see `sparsekv.command_line`)."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="python -m evaluation",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_commands(parser)
    command = shlex.join(["python", "-m", "evaluation", *arguments])
    return run_to_exit_code(lambda: parser.run(spelt_out(arguments), command), "evaluation")
