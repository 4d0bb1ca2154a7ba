"""Puts the committed figures into README.md and docs/, so that every number there has a file behind it.

python -m tools.readme          # writes them, and draws the README's picture of a token
python -m tools.readme --check  # fails if they differ
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsekv.evaluation.accuracy.cells import SOLVED
from sparsekv.evaluation.accuracy.choose import Setting
from sparsekv.evaluation.committed import RESULTS, TESTBED_RUN, Accuracy, load
from sparsekv.evaluation.report import short
from sparsekv.evaluation.speed.generate_points import MODES
from sparsekv.evaluation.speed.known_models import MODELS
from sparsekv.evaluation.speed.plots import tokens_figure

README = Path(__file__).parents[1] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]
_SECTION = re.compile(r"(<!-- figures: (?P<name>\w+) -->\n).*?(<!-- end of figures -->)", re.S)
_GENERATE = "generate_cuda"
_WAITS = ((1, 8192), (1, 32768), (1, 131072), (1, 524288), (16, 32768))  # batch and context, as far as measured
_ATTENTION = "attention_cuda_minmax"  # of the earlier default
_DEFAULT = "attention_cuda_minmax_sign_sketch"  # the default beside it
_REAL_MODELS = ("smollm2", "gemma3-270m")
_REAL_SETTINGS = (
    (
        "min/max, 2,048 tokens, two layers dense (Quest)",
        "quest+max+dense2",
        Setting("minmax", "top_k", "max", 2, 2048, 16),
    ),
    ("min/max, 2,048", "quest", Setting("minmax", "top_k", "max", 0, 2048, 16)),
    ("**`sign_sketch`, 2,048: the default**", "sketch", Setting("sign_sketch", "top_k", "max", 0, 2048, 16)),
    ("`sign_sketch`, 1,024", "sketch", Setting("sign_sketch", "top_k", "max", 0, 1024, 16)),
    ("`mean_std`, 2,048", "mean_std/top_k", Setting("mean_std", "top_k", "max", 0, 2048, 16)),
    ("`sketch2`, 2,048", "sketch2/top_k", Setting("sketch2", "top_k", "max", 0, 2048, 16)),
)
_ACCURACY_LENGTH = 32768  # tokens of the documents that the README's table is about

Row = Mapping[str, Any]


def render(markdown: str, root: str = "") -> str:
    """The text with every `<!-- figures: NAME -->` section filled from its result file; `root`: where links start."""

    def filled(section: re.Match[str]) -> str:
        table = _TABLES[section["name"]]().replace("](evaluation/", f"]({root}evaluation/")
        return f"{section[1]}\n{table}\n{section[3]}"

    return _SECTION.sub(filled, markdown)


def _load(name: str) -> dict[str, Any]:
    return load(name, RESULTS)


def _table(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """A line per row; `columns` are the format strings of its cells, by heading. One without a figure is left out."""
    rows = list(rows)
    shown = {name: form for name, form in columns.items() if any(_cell(form, row) != "-" for row in rows)}
    return _markdown(list(shown), [[_cell(form, row) for form in shown.values()] for row in rows])


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, ["---"] * len(header), *lines])


def _cell(form: str, row: Row) -> str:
    """A dash where the figure is missing or None."""
    try:
        return form.format_map(row)
    except (KeyError, TypeError):
        return "-"


def _source(name: str) -> str:
    result = _load(name)
    where = result["gpu"] or f"{result['cpu_threads']} CPU threads"
    measured = [row["measured"]["command"] for row in result["rows"] if row.get("measured")]
    commands = list(dict.fromkeys(measured)) or [result["command"]]  # rows may be of several
    how = ", ".join(f"`{of_today(command)}`" for command in commands)
    what = f"{how}; {where}, torch {result['versions']['torch']}, {result['date']}"
    return f"\n{what}: [all figures](evaluation/results/{name}.json)\n"


def of_today(command: str) -> str:
    """The command that a result was made with, by its name of today."""
    named = re.sub(r"python -m (sparsekv\.)?evaluation\.speed", "sparsekv bench", command)
    return re.sub(r"python -m (sparsekv\.)?evaluation", "sparsekv eval", named)


def _demo() -> str:
    columns = {
        "method, budget": "{method}",
        "right answers": "{right} of {num_answers}",
        "cache read per token": "{share:.1%}",
        "ms per token": "{ms_per_token:.1f}",
    }
    rows = [{**row, "num_answers": len(row["answers"])} for row in _load("demo")["rows"]]
    return _table(columns, rows) + _source("demo")


def _attention_cpu() -> str:
    columns = {
        "context": "{context:,}",
        "dense (SDPA), ms": "{dense_ms:.2f}",
        "sparsekv, ms": "{sparse_ms:.2f}",
        "faster": "{speedup:.1f}x",
        "cache read": "{share:.1%}",
    }
    rows = [
        {**row, "dense_ms": row["sdpa_us"] / 1e3, "sparse_ms": row["sparse_us"] / 1e3}
        for row in _load("attention_cpu")["rows"]
    ]
    return _table(columns, rows) + _source("attention_cpu")


def _attention_cuda() -> str:
    """The shapes of the first row's geometry and budget: other ones are in the file."""
    rows = _load(_ATTENTION)["rows"]
    columns = {
        "batch": "{batch}",
        "context": "{context:,}",
        "FlashInfer, us": "{flashinfer_us:.1f}",
        "SDPA, us": "{sdpa_us:.1f}",
        "shelf, us": "{shelf_us:.1f}",
        "sparsekv, us": "{sparse_us:.1f}",
        "faster": "{speedup:.1f}x",
        "floor, us": "{floor_us:.1f}",
    }
    alike = [row for row in rows if "sparse_us" in row and _is_like(row, rows[0], "geometry", "budget")]
    return _table(columns, alike) + _source(_ATTENTION)


def _is_like(row: Row, other: Row, *names: str) -> bool:
    return all(row[name] == other[name] for name in names)


def _waits(name: str, points: Collection[tuple[int, int]] | None = None) -> str:
    """What a user of `generate` waits for: the first token, a token in every mode, and the memory it takes.

    Args:
        points: batch and context of the rows; None: all that the file has.
    """
    columns = {
        "batch x context": "{where}",
        "first token, s": "{default[first]} → {sparse[first]}",
        "a token, ms: unpatched": "{default[token]}",
        "static": "{static[token]}",
        "all pages": "{all[token]}",
        "sparsekv": "**{sparse[token]}**",
        "dense limit": "{sparse[limit]}",
        "GiB": "{default[memory]} → {sparse[memory]}",
    }
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for row in _load(name)["rows"]:
        where = (row["batch"], row["context"])
        if points is None or where in points:
            unknown = {mode: _waited({}) for mode in MODES}
            point = found.setdefault(where, {"where": f"{where[0]} x {short(where[1])}", **unknown})
            point[row["mode"]] = _waited(row)
    if all(point["sparse"]["memory"] == "-" for point in found.values()):
        del columns["GiB"]
    return _table(columns, found.values()) + _source(name)


def _waited(row: Row) -> dict[str, str]:
    """A mode at one point. Its limit is what a step takes that reads weights and all keys and values at the memory's
    speed."""
    known = {**row}
    if row.get("peak_bytes"):
        known["gib"] = row["peak_bytes"] / 2**30
    if row.get("weights_ms") and "stats" in row:
        steps = row["stats"]["sparse_steps"] + row["stats"]["dense_steps"]
        known["limit"] = row["weights_ms"] + row["stats"]["bytes_total"] / steps / row["memory_tb_per_s"] / 1e9
    forms = {"first": "{first_token_s:.2f}", "limit": "{limit:.1f}", "memory": "{gib:.1f}"}
    found = {name: _cell(form, known) for name, form in forms.items()}
    return found | {"token": row.get("error") or _cell("{ms_per_token:.1f}", known)}


def _first_tokens() -> str:
    """The first token of one sequence: unpatched, after a dense prompt, and after sparse ones."""
    names = _GENERATE, "first_token_cuda"
    columns = {"context": "{context:,}", "unpatched, s": "{default:.2f}", "sparsekv, s": "{sparse:.2f}"}
    columns |= {f"sparse, {mass}, s": f"{{{mass}:.2f}}" for mass in ("mass 25%", "mass 10%")}
    points: dict[int, dict[str, Any]] = {row["context"]: {**row} for row in _load(names[1])["rows"]}
    for row in (row for name in names for row in _load(name)["rows"]):
        if row["batch"] == 1 and row["context"] in points:
            name = f"mass {row['prefill_mass']:.0%}" if "prefill_mass" in row else row["mode"]
            points[row["context"]][name] = row["first_token_s"]
    return _table(columns, points.values()) + _source(names[1])


def _formats_cuda() -> str:
    """A layer's step over pages of each format, beside the same step over plain ones."""
    names = "attention_cuda_plain_int8_int4_all", "attention_cuda_plain_int8_int4"
    columns = {"batch": "{batch}", "context": "{context:,}"}
    points: dict[tuple[int, int], dict[str, Any]] = {}
    for name, told in zip(names, ("every page", "2,048 tokens"), strict=True):
        for row in _load(name)["rows"]:
            found = points.setdefault(
                (row["batch"], row["context"]), {"batch": row["batch"], "context": row["context"]}
            )
            found[f"{told}, {row['kv']}"] = row["sparse_us"]
            columns[f"{told}, {row['kv']}, us"] = f"{{{told}, {row['kv']}:.1f}}"
    return _table(columns, points.values()) + "".join(map(_source, names))


def _several_gpus() -> str:
    """A token of one sequence on so many GPUs, and where it goes."""
    names = [_GENERATE, *(f"several_gpus/generate_cuda_{ranks}_ranks" for ranks in (2, 4))]
    columns = {
        "GPUs": "{ranks}",
        "context": "{context:,}",
        "sparsekv, ms": "{ms_per_token:.1f}",
        "faster": "{speedup:.1f}x",
    }
    columns |= {part.replace("_", "-"): f"{{{part}:.1f}}" for part in ("attention", "gemm", "all_reduce", "host")}
    columns["GB a GPU"] = "{gigabytes:.1f}"
    rows = [row for name in names for row in _load(name)["rows"] if row["mode"] == "sparse"]
    found = [
        {**row, **row["split_ms"], "gigabytes": row["peak_bytes"] and row["peak_bytes"] / 1e9}
        for row in sorted(rows, key=lambda row: row["context"])
        if row["batch"] == 1 and row["context"] in (32768, 131072)
    ]
    return _table(columns, found) + "".join(map(_source, names))


def _default_cuda(is_short: bool = False) -> str:
    """A layer's step by min/max beside the default's, at the same budget, in the first row's geometry."""
    columns = {
        "batch": "{batch}",
        "context": "{context:,}",
        "SDPA, us": "{sdpa_us:.1f}",
        "min/max, us": "{minmax:.1f}",
        "sparsekv, us" if is_short else "default, us": "{sparse_us:.1f}",
        "faster": "{speedup:.1f}x",
        "floor, us": "{floor_us:.1f}",
    }
    rows = _load(_DEFAULT)["rows"]
    rows = [row for row in rows if _is_like(row, rows[0], "geometry")]
    minmax = {(row["batch"], row["context"]): row["sparse_us"] for row in rows if row["digest"] == "minmax"}
    found = [row | {"minmax": minmax[row["batch"], row["context"]]} for row in rows if row["digest"] != "minmax"]
    if is_short:
        del columns["min/max, us"]
        found = [row for row in found if row["context"] in (2048, 32768, 131072) and row["batch"] != 4]
    return _table(columns, found) + _source(_DEFAULT)


def _models_cuda() -> str:
    """A token of models in the sizes of published ones, unpatched and patched."""
    columns = {
        "sizes of": "{model}",
        "context": "{context:,}",
        "unpatched, ms": "{best_unpatched_ms:.1f}",
        "sparsekv, ms": "{ms_per_token:.1f}",
        "faster": "{speedup:.1f}x",
        "of reading the weights": "{over_weights:.1f}x",
        "first token, s": "{first_token_s:.1f}",
    }
    names = [name for name in MODELS if (RESULTS / f"generate_cuda_{name}.json").exists()]
    files = [_load(f"generate_cuda_{name}") for name in names]
    rows = [row for file in files for row in file["rows"] if row["mode"] == "sparse"]
    how = ", ".join(f"[{name}](evaluation/results/generate_cuda_{name}.json)" for name in names)
    where = {f"{file['gpu']}, torch {file['versions']['torch']}, {file['date']}" for file in files}
    return _table(columns, rows) + f"\n{'; '.join(sorted(where))}: {how}\n"


def _real_models(num_settings: int | None, form: str) -> str:
    """What some settings lose of two real models: nats of natural text and far back, points of needles.

    Args:
        num_settings: the first so many, or all; form: of nats, which may tell their standard error.
    """
    lines = []
    for told, method, setting in _REAL_SETTINGS[:num_settings]:
        line = [told, f"{setting.nbytes(setting.budget) / 2**20:.0f}"]
        for model in _REAL_MODELS:
            found = {row["task"].partition(":")[0]: row for row in _cells(model, method, setting.budget)}
            for task, digits in (("perplexity", 4), ("recall", 3)):
                lost, error = (float(found[task][name]) for name in ("nats_change", "nats_change_error"))
                line.append(form.format(lost=lost, error=error, digits=digits))
            line.append(f"{-100 * float(found['needle']['change']) + 0:.1f}")
        lines.append(line)
    header = ["setting", "MiB", "SmolLM2: natural", "far back", "needles", "Gemma 3: natural", "far back", "needles"]
    links = ", ".join(f"[{x}](evaluation/results/{x}/tables.md)" for x in _REAL_MODELS)
    return _markdown(header, lines) + f"\nAll figures, with intervals: {links}\n"


def _cells(run: str, method: str, budget: int) -> list[dict[str, str]]:
    """Of tasks that dense decoding solves, from short documents to long ones."""
    rows = list(csv.DictReader((RESULTS / run / "cells.csv").read_text().splitlines()))
    solved = {(x["task"], x["length"]) for x in rows if x["method"] == "dense" and float(x["score"] or 1) >= SOLVED}
    found = [x for x in rows if (x["method"], x["budget"]) == (method, str(budget))]
    return sorted((x for x in found if (x["task"], x["length"]) in solved), key=lambda x: int(x["length"]))


def _accuracy_testbed() -> str:
    """Accuracy and share of the bytes read, by method and budget: means of the tasks that all methods were run on."""
    found = Accuracy(_ACCURACY_LENGTH, folder=RESULTS)
    rows = [([name], found, name) for name in found.methods]
    return _accuracies(["budget"], rows, f"{len(found.tasks)} tasks, at least {found.fewest}", TESTBED_RUN)


def _dense_layers() -> str:
    """Accuracy and share of the bytes read, by the number of layers that read everything."""
    runs = {number: f"{TESTBED_RUN}_dense_layers_{number}" for number in (0, 1)} | {2: TESTBED_RUN}
    tasks = _load(f"{runs[0]}/manifest")["settings"]["tasks"]
    found = {number: Accuracy(_ACCURACY_LENGTH, run, tasks, RESULTS) for number, run in runs.items()}
    rows = [
        ([method, str(number)], of_run, method) for method in ("quest", "sketch") for number, of_run in found.items()
    ]
    what = f"{', '.join(tasks)}, at least {min(of_run.fewest for of_run in found.values())}"
    return _accuracies(["method", "`dense_layers`"], rows, what, runs[0])


def _accuracies(header: list[str], rows: list[tuple[list[str], Accuracy, str]], what: str, run: str) -> str:
    """A column per budget.

    Args:
        header, rows: what stands before the figures; of a row also the figures, and the method they are of.
        run: whose budgets are shown, and whose manifest tells where they were measured.
    """
    manifest = _load(f"{run}/manifest")
    budgets = manifest["settings"]["budgets"]
    lines = [
        [*start, *(f"{found.mean(method, b):.1%} ({found.mean(method, b, 'share'):.0%})" for b in budgets)]
        for start, found, method in rows
    ]
    where = f"{manifest['gpu']}, torch {manifest['versions']['torch']}, {manifest['date']}"
    how = f"`{of_today(manifest['command'])}`, {where}: [all figures](evaluation/results/{run}/tables.md)"
    return _markdown([*header, *(f"{b:,}" for b in budgets)], lines) + f"\nMeans of {what} questions each. {how}\n"


_TABLES: dict[str, Callable[[], str]] = {
    "demo": _demo,
    "attention_cpu": _attention_cpu,
    "attention_cuda": _attention_cuda,
    "waits": lambda: _waits(_GENERATE, _WAITS),
    "all_waits": lambda: _waits(_GENERATE),
    "first_tokens": _first_tokens,
    "waits_minmax": lambda: _waits(f"{_GENERATE}_minmax"),
    "default_cuda": _default_cuda,
    "default_cuda_short": lambda: _default_cuda(is_short=True),
    "several_gpus": _several_gpus,
    "formats_cuda": _formats_cuda,
    "models_cuda": _models_cuda,
    "real_models": lambda: _real_models(4, "{lost:+.{digits}f}"),
    "all_real_models": lambda: _real_models(None, "{lost:+.{digits}f} ± {error:.{digits}f}"),
    "accuracy_testbed": _accuracy_testbed,
    "dense_layers": _dense_layers,
}


def main(argv: list[str] | None = None) -> int:
    """Writes or checks README.md and docs/*.md; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a figure differs")
    args = parser.parse_args(argv)
    for page in PAGES:
        old = page.read_text()
        new = render(old, "" if page == README else "../")
        if args.check and new != old:
            print(f"{page.name} differs from the committed results: run python -m tools.readme", file=sys.stderr)
            return 1
        page.write_text(new)
    if not args.check:
        tokens_figure(_load(_GENERATE)["rows"]).savefig(RESULTS / f"{_GENERATE}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
