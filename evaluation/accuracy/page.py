"""The report of a run: tables, pictures, and one HTML page that holds them all and needs no other file or network."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .attention_plot import attention_figure
from .cells import cells, means
from .heatmaps import save_heatmaps
from .loss_plot import loss_figure
from .plots import accuracy_figure, bytes_figure
from .results import Line
from .summary import Run
from .tables import ERROR, csv_text, grids, markdown, notes

_NUM_FAILURES = 5  # shown of every method
_MAX_ERRORS = 50  # shown; the rest is counted
_MAX_SIGNS = 400  # shown of a text
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip


def write_report(folder: Path, out: Path | None = None) -> list[Path]:
    """Writes report.html, tables.md, cells.csv and the pictures into `out`; returns their paths.

    Args:
        folder: of a run, which may still be going on.
        out: default: `report` in that folder.

    Raises:
        ConfigError: the folder holds no results, or something else.
    """
    run = Run.read(folder)
    out = folder / "report" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    pictures = save_plots(run, out)
    texts = {"report.html": page(run, pictures), "tables.md": markdown(run), "cells.csv": csv_text(run)}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return [*(out / name for name in texts), *pictures]


def save_plots(run: Run, folder: Path) -> list[Path]:
    """Draws whatever the run has figures for; returns the files, those that say most first."""
    found = cells(run)
    averages = means(found)

    def saved(name: str, figure: Any) -> list[Path]:
        if figure is None:
            return []
        figure.savefig(folder / name)
        return [folder / name]

    files = saved("bytes.png", bytes_figure(run, found, averages)) + saved("losses.png", loss_figure(run, found))
    for length in run.lengths:
        some, mean = ([cell for cell in group if cell.length == length] for group in (found, averages))
        files += saved(f"accuracy_{length}.png", accuracy_figure(run, some, mean))
    files += save_heatmaps(run, folder)
    for length in run.lengths:
        files += saved(f"attention_{length}.png", attention_figure(run, length))
    return files


def page(run: Run, pictures: Sequence[Path] = ()) -> str:
    """The page; pictures, PNG files, become a part of it."""
    return _TEMPLATES.get_template("page.html.jinja").render(
        title=f"{run.model}: accuracy and bytes read",
        about=_about(run),
        notes=notes(run),
        grids=grids(run),
        says_error=re.compile(rf"\d {ERROR}s?$").search,
        pictures=[(path.name, base64.b64encode(path.read_bytes()).decode()) for path in pictures],
        failures={method: map(_failure, lines) for method, lines in failures(run, _NUM_FAILURES).items()},
        errors=_errors(run),
        num_errors=len(run.errors),
        max_errors=_MAX_ERRORS,
        manifest=json.dumps(run.manifest, indent=1),
    )


def failures(run: Run, per_method: int) -> dict[str, list[Line]]:
    """A few wrong answers of every method: of as many tasks as possible, the worst at the largest budgets first."""
    wrong: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in run.lines:
        if not line["error"] and line.get("score") is not None and line["score"] < 1:
            wrong[line["method"]][line["task"]].append(line)
    found = {}
    for method in run.methods:
        ranked = [
            (place, line["score"], position, line)
            for lines in wrong[method].values()
            for place, (position, line) in enumerate(
                sorted(enumerate(lines), key=lambda numbered: (numbered[1]["score"], -(numbered[1]["budget"] or 0)))
            )
        ]
        found[method] = [line for *_, line in sorted(ranked, key=lambda rank: rank[:3])[:per_method]]
    return {method: lines for method, lines in found.items() if lines}


def _about(run: Run) -> str:
    """The circumstances in a line."""
    known, model = run.manifest, run.manifest.get("model", {})
    versions = [f"{name} {version}" for name, version in known.get("versions", {}).items()]
    where = known.get("gpu") or (f"{known['cpu_threads']} CPU threads" if known.get("cpu_threads") else None)
    sha = model.get("sha256")
    parts = [known.get("date"), where, model.get("dtype"), *versions, f"weights {sha[:12]}" if sha else None]
    return ", ".join(str(part) for part in parts if part) or "Where and when is not known."


def _failure(line: Line) -> list[str]:
    """What the page shows of a wrong answer."""
    expected = "\n".join(" | ".join(map(str, turn)) for turn in line.get("expected") or [])
    said = "\n".join(map(str, line.get("said") or []))
    budget = "" if line["budget"] is None else f"{line['budget']:,}"
    where = [line["task"], f"{line['length']:,}", budget, f"{line['document']}, {line['question']}"]
    return [*where, f"{line['score']:.2f}", _short(expected), _short(said)]


def _errors(run: Run) -> list[list[str]]:
    """How often every message came up, the message, and where; the most frequent first."""
    groups = Counter((x["error"], x["task"], x["length"], x["method"], x["budget"]) for x in run.errors)
    return [
        [str(count), _short(error), *("" if part is None else str(part) for part in place)]
        for (error, *place), count in groups.most_common()
    ]


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SIGNS else f"{text[:_MAX_SIGNS]} … ({len(text):,} signs)"
