"""The report of a run: tables, pictures, and one HTML page that holds them all and needs no other file or network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .attention_plot import save_attention_plot
from .cells import cells, means
from .heatmaps import save_heatmaps
from .plots import save_accuracy_plot, save_bytes_plot
from .results import Line
from .summary import Run
from .tables import ERROR, Grid, csv_text, grids, markdown, notes

_FAILURES = 5  # shown of every method
_MOST_ERRORS = 50  # shown; the rest is counted
_MOST_SIGNS = 400  # shown of a text

# Whatever an answer may hold: the browser is told to run nothing and to load nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem }
.wide { overflow-x: auto } .small, figcaption { color: #555; font-size: .87rem }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th { border-bottom: 2px solid #888; vertical-align: bottom }
th:first-child, td:first-child, .text { text-align: left }
.figures td { white-space: nowrap }
tr.first td { border-top: 1px solid #888 } td.error { background: #fbe3d6; font-weight: bold }
.alarm { background: #fbe3d6; border-left: .4rem solid #d55e00; padding: .5rem 1rem; font-weight: bold }
.note { background: #f3f3f3; border-left: .4rem solid #888; padding: .5rem 1rem }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 26rem; font-family: ui-monospace, monospace }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6 }
"""


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
    files = save_bytes_plot(run, found, averages, folder / "bytes.png")
    for length in run.lengths:
        some = [cell for cell in found if cell.length == length]
        mean = [cell for cell in averages if cell.length == length]
        files += save_accuracy_plot(run, some, mean, folder / f"accuracy_{length}.png")
    files += save_heatmaps(run, folder)
    for length in run.lengths:
        files += save_attention_plot(run, length, folder / f"attention_{length}.png")
    return files


def page(run: Run, pictures: Sequence[Path] = ()) -> str:
    """The page; pictures, PNG files, become a part of it."""
    title = f"{run.model}: accuracy and bytes read"
    body = "\n".join(
        [
            f"<h1>{_text(title)}</h1>",
            f'<p class="small">{_text(_about(run))}</p>',
            *_notes(run),
            *(part for grid in grids(run) for part in _table(grid)),
            *_pictures(pictures),
            *_failures(run),
            *_errors(run),
            f"<h2>How it was measured</h2>\n<pre>{_text(json.dumps(run.manifest, indent=1))}</pre>",
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
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
            for place, (position, line) in enumerate(sorted(enumerate(lines), key=_worst_first))
        ]
        found[method] = [line for *_, line in sorted(ranked, key=lambda rank: rank[:3])[:per_method]]
    return {method: lines for method, lines in found.items() if lines}


def _worst_first(numbered: tuple[int, Line]) -> tuple[float, int]:
    return numbered[1]["score"], -(numbered[1]["budget"] or 0)


def _about(run: Run) -> str:
    """The circumstances in a line."""
    known, model = run.manifest, run.manifest.get("model", {})
    versions = [f"{name} {version}" for name, version in known.get("versions", {}).items()]
    where = known.get("gpu") or (f"{known['cpu_threads']} CPU threads" if known.get("cpu_threads") else None)
    sha = model.get("sha256")
    parts = [known.get("date"), where, model.get("dtype"), *versions, f"weights {sha[:12]}" if sha else None]
    return ", ".join(str(part) for part in parts if part) or "Where and when is not known."


def _notes(run: Run) -> Iterator[str]:
    for i, note in enumerate(notes(run)):
        yield f'<p class="{"alarm" if run.errors and i == 0 else "note"}">{_text(note)}</p>'


def _table(grid: Grid) -> Iterator[str]:
    yield f'<h2>{_text(grid.title)}</h2>\n<div class="wide"><table class="figures">\n<tr>'
    yield "".join(f"<th>{_broken(name)}</th>" for name in grid.header) + "</tr>"
    method = None
    for row in grid.rows:
        cells = "".join(f"<td{_marked(text)}>{_broken(text)}</td>" for text in row)
        yield f"<tr{_class('first' if row[0] != method else '')}>{cells}</tr>"
        method = row[0]
    yield f'</table></div>\n<p class="small">{_text(" ".join(grid.notes))}</p>'


def _broken(text: str) -> str:
    """A figure, and its interval below it."""
    return _text(text).replace(" (", "<br>(")


def _marked(text: str) -> str:
    return _class(ERROR if re.search(rf"\d {ERROR}s?$", text) else "")


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _pictures(pictures: Sequence[Path]) -> Iterator[str]:
    if pictures:
        yield "<h2>Pictures</h2>"
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        name = _text(path.name)
        yield f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'


def _failures(run: Run) -> Iterator[str]:
    found = failures(run, _FAILURES)
    if found:
        yield "<h2>Wrong answers</h2>"
    for method, lines in found.items():
        yield f"<details{' open' * (method == next(iter(found)))}><summary>{_text(method)}</summary>"
        yield '<div class="wide"><table><tr><th>task</th><th>length</th><th>budget</th><th>document, question</th>'
        yield '<th>score</th><th class="text">expected</th><th class="text">said</th></tr>'
        for line in lines:
            yield _failure(line)
        yield "</table></div></details>"


def _failure(line: Line) -> str:
    expected = "\n".join(" | ".join(map(str, turn)) for turn in line.get("expected") or [])
    said = "\n".join(map(str, line.get("said") or []))
    budget = "" if line["budget"] is None else f"{line['budget']:,}"
    plain = [line["task"], f"{line['length']:,}", budget, f"{line['document']}, {line['question']}"]
    cells = [*plain, f"{line['score']:.2f}"]
    texts = "".join(f'<td class="text">{_text(_short(text))}</td>' for text in (expected, said))
    return "<tr>" + "".join(f"<td>{_text(text)}</td>" for text in cells) + texts + "</tr>"


def _errors(run: Run) -> Iterator[str]:
    """Every message with where it came up, the most frequent first."""
    if not run.errors:
        return
    groups = Counter((x["error"], x["task"], x["length"], x["method"], x["budget"]) for x in run.errors)
    yield f'<h2>Errors</h2><p class="alarm">{len(run.errors)} results are errors and count in no figure.</p>'
    yield '<div class="wide"><table><tr><th>times</th><th class="text">error</th><th>task</th><th>length</th>'
    yield "<th>method</th><th>budget</th></tr>"
    for (error, *place), count in groups.most_common(_MOST_ERRORS):
        where = "".join(f"<td>{_text('' if part is None else part)}</td>" for part in place)
        yield f'<tr><td>{count}</td><td class="text">{_text(_short(error))}</td>{where}</tr>'
    yield "</table></div>"
    if len(groups) > _MOST_ERRORS:
        yield f"<p>and {len(groups) - _MOST_ERRORS} more kinds or places.</p>"


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SIGNS else f"{text[:_MOST_SIGNS]} … ({len(text):,} signs)"


def _text(value: Any) -> str:
    """Text that a browser shows as it is: nothing in it is markup, and it can be written as UTF-8."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())
