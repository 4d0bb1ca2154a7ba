"""How much accuracy a method and budget cost, and what it reads.

    sparsekv eval run --tasks needle multi_key --budgets 256 1024 --lengths 4k 16k --out DIR
    sparsekv eval report DIR
    sparsekv eval choose DIR DIR

Questions about long documents, answered densely and sparsely. The same command goes on where a run was cut short.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsekv.command_line import add_json_option, new_console, with_json
from sparsekv.errors import ConfigError
from sparsekv.hf import parallel
from sparsekv.hf.ranks import Ranks

from .options import add_arguments, add_work_arguments, options_of, parts_of
from .tolerances import Tolerances

RUN = "run"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """`run`, `report`, `choose` and `export`."""
    commands = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    run = commands.add_parser(
        RUN,
        help="ask a model questions, densely and sparsely",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(run)
    add_work_arguments(run)
    parallel.add_argument(run)
    run.set_defaults(run=parallel.by_all_ranks(_run))
    report = commands.add_parser(
        "report",
        help="tables, pictures and one HTML page of a run",
        description="Makes tables, pictures, intervals, failed examples and one HTML page of a run, finished or not.",
    )
    report.add_argument("folder", metavar="DIR", help="a run's folder (--out of run)")
    report.add_argument("--out", metavar="DIR", help="where to (default: DIR/report)")
    add_json_option(report)
    report.set_defaults(run=with_json(_report))
    choose = commands.add_parser(
        "choose",
        help="the setting that reads the fewest bytes of those that lose little enough in every run",
        description="Prints what every setting loses in every run, and names the one that reads the fewest bytes of "
        "those that lose little enough. The upper ends of 95 % intervals count.",
    )
    choose.add_argument("folders", nargs="+", metavar="DIR", help="folders of runs (--out of run)")
    for name, value in vars(Tolerances()).items():
        unit = "points" if value >= 0.1 else "nats"
        told = f"{unit} that may be lost (default {value:g})"
        choose.add_argument(f"--{name}", type=float, default=value, metavar=unit.upper(), help=told)
    choose.add_argument("--out", metavar="FILE", help="the table as Markdown, too")
    add_json_option(choose)
    choose.set_defaults(run=with_json(_choose))
    export = commands.add_parser(
        "export",
        help="the examples of a run as a file, for other programs to answer",
        description="Writes DIR/examples.jsonl: the documents, questions and answers of a run with these options, in "
        "tokens, a document a line. tools/kvpress_peer.py answers them.",
    )
    add_arguments(export)
    export.set_defaults(run=_export)


def _run(args: argparse.Namespace, command: str) -> int:
    from .session import run
    from .workload import Share

    parts, console, folder = parts_of(args), new_console(), Path(args.out)
    failed = run(parts, folder, command, console, args.parallel)
    is_whole = Share.of_launch(args.parallel).count == 1  # else the other processes are not done yet
    if is_whole and Ranks.of_launch().rank == 0:
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


def _choose(args: argparse.Namespace, command: str) -> dict[str, Any]:
    from .choose import best, candidates, grid
    from .summary import Run
    from .tables import fitted, section

    tolerances = Tolerances(**{name: getattr(args, name) for name in vars(Tolerances())})
    found = candidates([Run.read(Path(folder)) for folder in args.folders], tolerances)
    table, console, (chosen, is_met) = grid(found), new_console(), best(found)
    for part in fitted(table, console.width):
        console.print(part)
    if args.out:
        Path(args.out).write_text(section(table), encoding="utf-8")
        console.print(f"Written: {args.out}")
    rows = [
        {
            **asdict(candidate.setting),
            "num_tokens": candidate.num_tokens,
            "nbytes": candidate.nbytes,
            "meets": candidate.meets,
            "losses": [{**asdict(c), **asdict(loss)} for c, loss in candidate.losses.items()],
        }
        for candidate in found
    ]
    return {"chosen": asdict(chosen.setting), "is_met": is_met, "candidates": rows}


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
