"""Puts the committed figures into README.md, so that every number there has a file behind it.

python tools/readme.py          # writes them
python tools/readme.py --check  # fails if they differ
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekv.evaluation.committed import RESULTS, TESTBED_RUN, Accuracy, load

README = Path(__file__).parents[1] / "README.md"
_SECTION = re.compile(r"(<!-- figures: (?P<name>\w+) -->\n).*?(<!-- end of figures -->)", re.S)
_Times = dict[tuple[str, int, int, int], float]  # by digest, budget, batch and context
_OF_DIGEST = {"minmax": "", "sign_sketch": "_sign_sketch"}  # what the names of its result files end in
_ACCURACY_LENGTH = 32768  # tokens of the documents that the README's table is about


def render(markdown: str) -> str:
    """The text with every `<!-- figures: NAME -->` section filled from its result file."""
    return _SECTION.sub(lambda section: f"{section[1]}\n{_TABLES[section['name']]()}\n{section[3]}", markdown)


def _load(name: str) -> dict[str, Any]:
    return load(name, RESULTS)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _source(name: str, result: dict[str, Any]) -> str:
    where = result["gpu"] or f"{result['cpu_threads']} CPU threads"
    measured = [row["measured"]["command"] for row in result["rows"] if row.get("measured")]
    commands = list(dict.fromkeys(measured)) or [result["command"]]  # rows may be of several
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
            f"{row['dense_ms']:.2f}",
            f"{row['sparse_ms']:.2f}",
            f"{row['speedup']:.1f}x",
            f"{row['share']:.1%}",
        ]
        for row in result["rows"]
    ]
    header = ["context", "dense (SDPA), ms", "sparsekv, ms", "faster", "cache read"]
    return _table(header, rows) + _source("attention_cpu", result)


def _attention_cuda() -> str:
    """The shapes of the first row's geometry and budget: other ones are in the file."""
    result = _load("attention_cuda")
    first = result["rows"][0]
    rows = [
        [
            str(row["batch"]),
            f"{row['context']:,}",
            _figure(row.get("flashinfer_us")),
            _figure(row.get("sdpa_us")),
            _figure(row.get("shelf_us")),
            _figure(row["sparse_us"]),
            _figure(row["speedup"], "x"),
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
            _figure(modes.get("sparse", {}).get("speedup"), "x"),
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
        [str(batch), f"{context:,}", *(_figure(us.get((*kind, batch, context))) for kind in in_step),
         *(_figure(ms.get((*kind, batch, context))) for kind in of_token)]
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
        rows, result = _load(f"attention_cuda{end}")["rows"], _load(f"generate_cuda{end}")
        for row in rows:
            if row["geometry"] == rows[0]["geometry"]:
                us[digest, row["budget"], row["batch"], row["context"]] = row["sparse_us"]
        for row in result["rows"]:
            if row["mode"] == "sparse":
                ms[digest, result["settings"]["budget"], row["batch"], row["context"]] = row["ms_per_token"]
    return us, ms


def _accuracy_testbed() -> str:
    """Accuracy and share of the bytes read, by method and budget: means of the tasks that all methods were run on."""
    manifest = _load(f"{TESTBED_RUN}/manifest")
    found = Accuracy(_ACCURACY_LENGTH, folder=RESULTS)
    budgets = manifest["settings"]["budgets"]
    rows = [[name, *(_accuracy(found, name, budget) for budget in budgets)] for name in found.methods]
    header = ["budget", *(f"{budget:,}" for budget in budgets)]
    what = f"{len(found.tasks)} tasks, at least {found.fewest}"
    return _table(header, rows) + _source_of_means(what, manifest, TESTBED_RUN)


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
    what = f"{', '.join(tasks)}, at least {min(of_run.fewest for of_run in found.values())}"
    return _table(header, rows) + _source_of_means(what, manifest, runs[0])


def _source_of_means(what: str, manifest: dict[str, Any], run: str) -> str:
    where = f"{manifest['gpu']}, torch {manifest['versions']['torch']}, {manifest['date']}"
    how = f"`{manifest['command']}`, {where}: [all figures](evaluation/results/{run}/tables.md)"
    return f"\nMeans of {what} questions each. {how}\n"


def _accuracy(found: Accuracy, method: str, budget: int) -> str:
    return f"{found.mean(method, budget):.1%} ({found.mean(method, budget, 'share'):.0%})"


def _ms(row: dict[str, Any] | None, key: str = "ms_per_token", form: str = ".1f", missing: str | None = None) -> str:
    """A figure of a mode; if there is none `missing`, or why."""
    if row is None or row[key] is None:
        return missing or (row or {}).get("error", "-")
    return format(row[key], form)


def _figure(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.1f}{unit}"


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
        prog="python tools/readme.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a figure differs")
    args = parser.parse_args(argv)
    old = README.read_text()
    new = render(old)
    if args.check and new != old:
        print("README.md differs from the committed results: run python tools/readme.py", file=sys.stderr)
        return 1
    if not args.check:
        README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
