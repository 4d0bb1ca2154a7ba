"""Puts the committed figures into README.md, so that every number there has a file behind it.

python -m evaluation.readme          # writes them
python -m evaluation.readme --check  # fails if they differ
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .committed import RESULTS, TESTBED_RUN, Accuracy, load

README = Path(__file__).parents[1] / "README.md"
_SECTION = re.compile(r"(<!-- figures: (?P<name>\w+) -->\n).*?(<!-- end of figures -->)", re.S)
_Times = dict[tuple[str, int, int, int], float]  # by digest, budget, batch and context
_OF_DIGEST = {"minmax": "", "sign_sketch": "_sign_sketch"}  # what the names of its result files end in
_ACCURACY_LENGTH = 32768  # tokens of the documents that the README's table is about


def render(markdown: str) -> str:
    """The text with every `<!-- figures: NAME -->` section filled from its result file."""
    return _SECTION.sub(_filled, markdown)


def _filled(section: re.Match[str]) -> str:
    return section[1] + "\n" + _TABLES[section["name"]]() + "\n" + section[3]


def _load(name: str) -> dict[str, Any]:
    return load(name, RESULTS)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _source(name: str, result: dict[str, Any]) -> str:
    where = result["gpu"] or f"{result['cpu_threads']} CPU threads"
    measured = [row["measured"]["command"] for row in result["rows"] if row.get("measured")]
    commands = list(dict.fromkeys(measured)) or [result["command"]]  # rows may be of several
    commands = [command.replace("python -m evaluation.speed", "sparsekv bench") for command in commands]  # as it was
    how = (
        ", ".join(f"`{command}`" for command in commands)
        + f"; {where}, torch {result['versions']['torch']}, {result['date']}"
    )
    return f"\n{how}: [all figures](evaluation/results/{name}.json)\n"


def _demo() -> str:
    result = _load("demo")
    rows = [
        [
            row["method"],
            f"{row['right']} of {len(row['answers'])}",
            f"{row['share']:.1%}",
            f"{row['sparse_share']:.1%}",
            f"{row['ms_per_token']:.1f}",
        ]
        for row in result["rows"]
    ]
    header = ["method, budget", "right answers", "cache read per token", "in the sparse layers", "ms per token"]
    return _table(header, rows) + _source("demo", result)


def _attention_cpu() -> str:
    result = _load("attention_cpu")
    rows = [
        [
            f"{row['context']:,}",
            f"{_in_ms(row, 'sdpa_us', 'dense_ms'):.2f}",
            f"{_in_ms(row, 'sparse_us', 'sparse_ms'):.2f}",
            f"{row['speedup']:.1f}x",
            f"{row['share']:.1%}",
        ]
        for row in result["rows"]
    ]
    header = ["context", "dense (SDPA), ms", "sparsekv, ms", "faster", "cache read"]
    return _table(header, rows) + _source("attention_cpu", result)


def _in_ms(row: dict[str, Any], us: str, ms: str) -> float:
    """Files of before had milliseconds, and called SDPA dense."""
    return float(row[us] / 1e3 if us in row else row[ms])


def _attention_cuda() -> str:
    """The shapes of the first row's geometry and budget: other ones are in the file."""
    result = _load("attention_cuda")
    first = result["rows"][0]
    rows = [
        [
            str(row["batch"]),
            f"{row['context']:,}",
            _us(row.get("flashinfer_us")),
            _us(row.get("sdpa_us")),
            _us(row.get("shelf_us")),
            _us(row["sparse_us"]),
            f"{row['speedup']:.1f}x" if row["speedup"] else "-",
            f"{row['floor_us']:.1f}",
        ]
        for row in result["rows"]
        if "sparse_us" in row and all(row[key] == first[key] for key in ("geometry", "budget"))
    ]
    header = ["batch", "context", "FlashInfer, us", "SDPA, us", "shelf, us", "sparsekv, us", "faster", "floor, us"]
    return _table(header, rows) + _source("attention_cuda", result)


def _generate_cuda() -> str:
    """A row per point: the modes side by side."""
    result = _load("generate_cuda")
    points: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        points.setdefault((row["batch"], row["context"]), {})[row["mode"]] = row
    rows = [
        [
            str(batch),
            f"{context:,}",
            *(_ms(modes.get(name)) for name in ("default", "static", "sparse")),
            _times(modes.get("sparse", {}).get("speedup")),
            _ms(modes.get("sparse"), "tokens_per_s", ",.0f", missing="-"),
        ]
        for (batch, context), modes in points.items()
    ]
    header = ["batch", "context", "unpatched, ms", "static, ms", "sparsekv, ms", "faster", "tokens/s"]
    return _table(header, rows) + _source("generate_cuda", result)


def _sketch_cuda() -> str:
    """Min/max at the default budget beside the sketch, also at a quarter of it: a layer's step, and a token."""
    us, ms = _steps_and_tokens()
    low, high = sorted({key[1] for key in ms})
    of_token = [("minmax", high), ("sign_sketch", low)]
    in_step = [of_token[0], ("sign_sketch", high), of_token[1]]
    rows = [
        [str(batch), f"{context:,}", *(_us(us.get((*kind, batch, context))) for kind in in_step),
         *(_us(ms.get((*kind, batch, context))) for kind in of_token)]
        for digest, _, batch, context in ms if digest == "sign_sketch"
    ]  # fmt: skip
    named = {kind: f"{'min/max' if kind[0] == 'minmax' else 'sketch'} {kind[1]:,}" for kind in in_step}
    header = [*(f"{named[kind]}, us" for kind in in_step), *(f"token: {named[kind]}, ms" for kind in of_token)]
    names = (f"{what}_cuda{_OF_DIGEST['sign_sketch']}" for what in ("attention", "generate"))
    return _table(["batch", "context", *header], rows) + "".join(_source(name, _load(name)) for name in names)


def _steps_and_tokens() -> tuple[_Times, _Times]:
    """Microseconds of a layer's step, and milliseconds of a token, of every digest that was measured."""
    us: _Times = {}
    ms: _Times = {}
    for digest, end in _OF_DIGEST.items():
        us |= {
            (digest, row["budget"], *_point(row)): row["sparse_us"] for row in _alike(_load(f"attention_cuda{end}"))
        }
        result = _load(f"generate_cuda{end}")
        sparse = [row for row in result["rows"] if row["mode"] == "sparse"]
        ms |= {(digest, result["settings"]["budget"], *_point(row)): row["ms_per_token"] for row in sparse}
    return us, ms


def _alike(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the first one's geometry."""
    return [row for row in result["rows"] if row["geometry"] == result["rows"][0]["geometry"]]


def _point(row: dict[str, Any]) -> tuple[int, int]:
    return row["batch"], row["context"]


def _accuracy_testbed() -> str:
    """Accuracy and share of the bytes read, by method and budget: means of the tasks that all methods were run on."""
    manifest = _load(f"{TESTBED_RUN}/manifest")
    found = Accuracy(_ACCURACY_LENGTH, folder=RESULTS)
    budgets = manifest["settings"]["budgets"]
    rows = [[name, *(_accuracy(found, name, budget) for budget in budgets)] for name in found.methods]
    header = ["budget", *(f"{budget:,}" for budget in budgets)]
    what = f"\nMeans of {len(found.tasks)} tasks, at least {found.fewest} questions each. "
    how = f"`{manifest['command']}`, {manifest['gpu']}, torch {manifest['versions']['torch']}, {manifest['date']}"
    return _table(header, rows) + what + how + ": [all figures](evaluation/results/testbed/tables.md)\n"


def _dense_layers() -> str:
    """Accuracy and share of the bytes read, by the number of layers that read everything."""
    runs = {number: f"{TESTBED_RUN}_dense_layers_{number}" for number in (0, 1)} | {2: TESTBED_RUN}
    manifest = _load(f"{runs[0]}/manifest")
    tasks, budgets = manifest["settings"]["tasks"], manifest["settings"]["budgets"]
    found = {number: Accuracy(_ACCURACY_LENGTH, run, tasks, RESULTS) for number, run in runs.items()}
    rows = [
        [method, str(number), *(_accuracy(of_run, method, budget) for budget in budgets)]
        for method in ("quest", "sketch")
        for number, of_run in found.items()
    ]
    header = ["method", "`dense_layers`", *(f"{budget:,}" for budget in budgets)]
    fewest = min(of_run.fewest for of_run in found.values())
    what = f"\nMeans of {', '.join(tasks)}, at least {fewest} questions each. "
    how = f"`{manifest['command']}`, {manifest['gpu']}, torch {manifest['versions']['torch']}, {manifest['date']}"
    return _table(header, rows) + what + how + f": [all figures](evaluation/results/{runs[0]}/tables.md)\n"


def _accuracy(found: Accuracy, method: str, budget: int) -> str:
    return f"{found.mean(method, budget):.1%} ({found.mean(method, budget, 'share'):.0%})"


def _ms(row: dict[str, Any] | None, key: str = "ms_per_token", form: str = ".1f", missing: str | None = None) -> str:
    """A figure of a mode; if there is none `missing`, or why."""
    if row is None or row[key] is None:
        return missing or (row or {}).get("error", "-")
    return format(row[key], form)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


_TABLES: dict[str, Callable[[], str]] = {
    "demo": _demo,
    "attention_cpu": _attention_cpu,
    "attention_cuda": _attention_cuda,
    "generate_cuda": _generate_cuda,
    "sketch_cuda": _sketch_cuda,
    "accuracy_testbed": _accuracy_testbed,
    "dense_layers": _dense_layers,
}


def main(argv: list[str] | None = None) -> int:
    """Writes or checks README.md; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a figure differs")
    args = parser.parse_args(argv)
    old = README.read_text()
    new = render(old)
    if args.check and new != old:
        print("README.md differs from the committed results: run python -m evaluation.readme", file=sys.stderr)
        return 1
    if not args.check:
        README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
