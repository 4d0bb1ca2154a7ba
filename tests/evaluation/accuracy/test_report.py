"""Tables, pictures and the page of a run, from made-up results as a run writes them."""

import csv
import html
import io
import json
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from sparsekv.cli import main
from sparsekv.evaluation.accuracy.attention_plot import by_head
from sparsekv.evaluation.accuracy.cells import Cell, cells, means
from sparsekv.evaluation.accuracy.heatmaps import save_heatmaps
from sparsekv.evaluation.accuracy.intervals import Estimate
from sparsekv.evaluation.accuracy.page import failures, save_plots, write_report
from sparsekv.evaluation.accuracy.plots import pareto, styles
from sparsekv.evaluation.accuracy.summary import Run
from sparsekv.evaluation.accuracy.tables import terminal_tables

METHODS = ("dense", "quest", "recent", "oracle")
_SKILL = {"dense": 3.0, "quest": 2.0, "sketch": 2.4, "recent": -1.5, "oracle": 2.8, "random": -2.0}
_SCORING = {"dense": 0, "recent": 0, "random": 0, "oracle": 1 / 2}  # read to choose pages, as a share of the cache
HOSTILE = "<script>alert('x')</script> & \ud800 | `code`"


def write_run(
    folder: Path,
    tasks: Sequence[str] = ("needle", "multi_key", "perplexity"),
    methods: Sequence[str] = METHODS,
    budgets: Sequence[int] = (256, 1024),
    lengths: Sequence[int] = (4096, 16384),
    num_documents: int = 6,
    num_layers: int = 6,
) -> Path:
    """A run's folder: two processes' results, the probes, and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    cells = [(m, b) for m in methods for b in ((None,) if m == "dense" else budgets)]
    files: list[list[str]] = [[], []]
    for task in tasks:
        for length in lengths:
            for method, budget in cells:
                for line in _lines(rng, task, length, method, budget, num_documents, num_layers):
                    files[line["document"] % 2].append(json.dumps(line))
    for rank, texts in enumerate(files):
        (folder / f"results-{rank:05d}.jsonl").write_text("".join(f"{text}\n" for text in texts))
    probes = [
        {"task": task, "length": length, "method": method, "budget": budget, **line}
        for task in tasks for length in lengths for method, budget in cells if budget
        for line in _probe(rng, method, budget / length, num_layers)
    ]  # fmt: skip
    (folder / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probes))
    settings = {"tasks": tasks, "lengths": lengths, "methods": methods, "budgets": budgets, "dense_layers": 2}
    model = {"name": "made-up", "sha256": "ab12" * 16, "num_layers": num_layers, "num_kv_heads": 2, "head_dim": 64}
    circumstances = {"command": "sparsekv eval run --out it", "date": "2026-01-01", "gpu": None, "cpu_threads": 2}
    versions = {"sparsekv": "0.1", "torch": "2.13"}
    manifest = {**circumstances, "versions": versions, "model": model, "settings": settings}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _lines(
    rng: Any, task: str, length: int, method: str, budget: int | None, num_documents: int, num_layers: int
) -> Iterator[dict[str, Any]]:
    share, is_text = min((budget or length) / length, 1), task.startswith(("perplexity", "recall"))
    skill = _SKILL.get(method, 1.0) + (2.5 * np.log2(share) / 4 + 1.5 if budget else 0)
    dense_bytes = num_layers * 2 * 64 * 2 * 4.0 * length
    read = (2 + (num_layers - 2) * (share + _SCORING.get(method, 1 / 32))) / num_layers
    shared = {
        "task": task, "length": length, "method": method, "budget": budget, "num_scored": 128 if is_text else None,
        "expected": [["4711"]], "num_tokens": 21, "bytes_per_token": dense_bytes * read,
        "dense_bytes_per_token": dense_bytes, "pages_per_token": share * length / 16, "error": None,
    }  # fmt: skip
    for document in range(num_documents):
        ease = rng.normal(0, 1)
        for question in range(1 if is_text else 5):
            p = 1 / (1 + np.exp(-skill - ease))
            is_right = float(rng.random() < p)
            yield {
                **shared, "document": document, "question": question,
                "score": None if is_text else is_right,
                "nll": 2.2 + 0.8 * (1 - p) + 0.1 * ease if is_text else None,
                "said": [" 4 7 1 1 ." if is_right else HOSTILE],
                "details": {"depth": 25 * question} if task == "needle" else {},
            }  # fmt: skip


def _probe(rng: Any, method: str, share: float, num_layers: int) -> Iterator[dict[str, Any]]:
    for layer in range(2, num_layers):
        reach = {"oracle": 0.97, "quest": 0.85, "recent": 0.4}.get(method, 0.6)
        mass = np.clip(reach * (1 - 0.3 * np.exp(-20 * share)) + rng.normal(0, 0.04, 2), 0, 1)
        yield {"layer": layer, "steps": 4, "mass": mass.tolist(), "overlap": (mass**2).tolist()}


# -- a whole report


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Changes a file's lines, or leaves them out."""
    lines = [change(json.loads(text)) for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Path]]:
    """Of a run in which some results are errors, some are missing, and one is half-written."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    first, second = (folder / f"results-0000{rank}.jsonl" for rank in range(2))

    def change(line: dict[str, Any]) -> dict[str, Any] | None:
        if (line["method"], line["task"]) == ("quest", "multi_key"):
            return None
        is_error = (line["method"], line["task"], line["budget"]) == ("oracle", "needle", 256)
        return {**line, "score": None, "error": HOSTILE} if is_error else line

    rewrite(second, change)
    second.write_text(second.read_text() + '{"half')
    rewrite(first, lambda x: None if (x["method"], x["task"], x["length"]) == ("quest", "multi_key", 16384) else x)
    return Run.read(folder), write_report(folder)


def test_a_report_has_every_part(report: tuple[Run, list[Path]]) -> None:
    names = {path.name for path in report[1]}
    lengths = {f"{kind}_{length}.png" for kind in ("accuracy", "attention") for length in (4096, 16384)}
    heatmaps = {"needle_depths_256.png", "needle_depths_1024.png"}
    assert names == {"report.html", "tables.md", "cells.csv", "bytes.png", "losses.png"} | lengths | heatmaps
    assert all(path.parent == report[0].folder / "report" for path in report[1])
    for path in report[1]:
        if path.suffix == ".png":
            has_picture(path)


def has_picture(path: Path) -> None:
    pixels = imread(path)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 500
    assert pixels[..., :3].std() > 0.05  # not one color
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 1).all()  # nothing is cut off


def test_the_csv_holds_every_cell(report: tuple[Run, list[Path]]) -> None:
    rows = list(csv.DictReader((report[0].folder / "report" / "cells.csv").open(encoding="utf-8")))
    found = cells(report[0])
    assert len(rows) == len(found)
    for row, cell in zip(rows, found, strict=True):
        assert (row["task"], int(row["length"]), row["method"]) == (cell.task, cell.length, cell.method)
        assert row["budget"] == ("" if cell.budget is None else str(cell.budget))
        assert int(row["num_errors"]) == cell.num_errors
        for name, estimate in (
            ("score", cell.score),
            ("perplexity", cell.perplexity),
            ("change", cell.change),
            ("nats_change", cell.nats_change),
        ):
            values = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
            if estimate is None:
                assert values == ["", "", ""]
            else:
                assert [float(x) for x in values] == [estimate.value, estimate.low, estimate.high]
        assert float(row["share"]) == cell.share
        assert row["nats_change_error"] == ("" if cell.nats_change is None else str(cell.nats_change.error))
        assert (row["pooling"] or None, row["gpu"]) == (cell.pooling, "CPU")
        assert row["dense_layers"] == ("" if row["method"] == "dense" else "2")


def test_what_is_missing_is_blank_and_errors_are_loud(report: tuple[Run, list[Path]]) -> None:
    text = (report[0].folder / "report" / "tables.md").read_text()
    of_4k, of_16k = text.split("\n## ")[1:]
    header = row(of_16k, "| method")
    wanted = row(of_16k, "| quest | 256")
    assert header[2:5] == ["needle (n=30)", "multi_key (n=30)", "mean"]
    assert wanted[2] != ""
    assert wanted[3:6] == ["", "", ""]  # never measured; so no mean and no difference
    assert row(of_4k, "| quest | 256")[3].endswith(", n=15")
    assert row(of_4k, "| oracle | 256")[2].endswith(", n=15, 15 errors")
    assert "30 of " in text.split("\n## ")[0]
    assert "results-00001.jsonl is half-written" in text


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [part.strip() for part in line.strip("|").split("|")]


class _Tags(HTMLParser):
    """What a browser would take for markup."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]


def test_the_page_stands_alone_runs_nothing_and_shows_all(report: tuple[Run, list[Path]]) -> None:
    text = (report[0].folder / "report" / "report.html").read_text(encoding="utf-8")
    page = _Tags()
    page.feed(text)
    assert not {"script", "b"} & set(page.tags)
    assert page.tags.count("img") == sum(path.suffix == ".png" for path in report[1])
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http://" not in text
    assert "https://" not in text
    shown = html.unescape(text)
    assert "<script>alert('x')</script> & " in shown
    assert "30 of " in shown
    assert "\\ud800" in shown  # half a surrogate pair cannot be written as it is
    assert "ab12" * 16 in shown
    assert "sparsekv eval run --out it" in shown
    assert "15 errors" in shown
    assert page.tags.count("details") == len(METHODS)


def test_failures_are_of_every_method_and_task(report: tuple[Run, list[Path]]) -> None:
    found = failures(report[0], 4)
    assert set(found) == set(METHODS)
    assert {line["task"] for line in found["recent"]} == {"needle", "multi_key"}
    assert all(line["score"] < 1 and not line["error"] for lines in found.values() for line in lines)


# -- smaller ones


@pytest.mark.parametrize(
    ("changes", "pictures"),
    [
        ({"methods": ("dense",)}, {"bytes.png", "needle_depths.png"}),
        ({"methods": ("quest",), "budgets": (256,)}, {"bytes.png", "accuracy_4096.png", "needle_depths_256.png"}),
        ({"tasks": ("perplexity",), "num_documents": 2}, {"bytes.png", "losses.png", "accuracy_4096.png"}),
        (
            {"tasks": ("recall:/a/b.txt",), "methods": ("dense", "quest", "quest+sum", "quest+dense0", "x/y+z")},
            {"bytes.png", "losses.png", "accuracy_4096.png"},
        ),
        (
            {"tasks": ("longbench:/a $b$/c.jsonl",), "methods": ("dense", "<b>_$x|y")},
            {"bytes.png", "accuracy_4096.png"},
        ),
    ],
    ids=["only dense", "one method and budget", "only perplexity", "several settings", "odd names"],
)
def test_partial_runs_have_a_report(changes: dict[str, Any], pictures: set[str], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", **{"tasks": ("needle",), "lengths": (4096,), **changes})
    (folder / "probes.jsonl").unlink()
    (folder / "manifest.json").unlink()
    written = write_report(folder, tmp_path / "out")
    assert {path.name for path in written if path.suffix == ".png"} == pictures
    for name in pictures:
        has_picture(tmp_path / "out" / name)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "There is no manifest.json" in text
    assert "nan" not in (tmp_path / "out" / "cells.csv").read_text()


def test_a_run_of_errors_only_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path, tasks=("needle",), lengths=(4096,))
    (folder / "probes.jsonl").unlink()
    for path in folder.glob("*.jsonl"):
        rewrite(path, lambda line: {**line, "score": None, "error": "killed"})
    assert [path.name for path in write_report(folder)] == ["report.html", "tables.md", "cells.csv"]


def test_terminal_tables_fit_and_show_every_task(tmp_path: Path) -> None:
    tasks = ("needle", *(f"variable_tracking_{i}" for i in range(12)), "[red]task", "perplexity")
    made = write_run(tmp_path, tasks=tasks, methods=METHODS[1:], lengths=(4096,), num_documents=1)
    run = Run.read(made)
    console = Console(width=100, record=True, file=io.StringIO())
    for table in terminal_tables(run, 100):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("variable") == 12
    assert "[red]task" in text


def test_nothing_is_compared_in_a_task_that_dense_does_not_solve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of that length: it is marked and named, and counts in no mean. Perplexity is never solved."""
    tasks = ("needle", "multi_key", "perplexity")
    folder = write_run(tmp_path, tasks, methods=("dense", "quest"), budgets=(256,), num_documents=4)
    score_dense(folder, lambda task, length: float((task, length) != ("needle", 4096)))
    (folder / "probes.jsonl").unlink()
    assert main(["eval", "report", str(folder), "--json"]) == 0
    text = (folder / "report" / "tables.md").read_text()
    of_4k, of_16k = text.split("\n## ")[1:]
    assert row(of_4k, "| method")[2:4] == ["needle (n=20, unsolved)", "multi_key (n=20)"]
    told = "Dense itself solves less than 80% of needle (0.0 %): nothing is compared there, no mean counts it."
    assert told in of_4k
    assert told in (folder / "report" / "report.html").read_text(encoding="utf-8")
    for method in ("| dense |", "| quest | 256"):
        assert row(of_4k, method)[4] == row(of_4k, method)[3]  # the mean is of the task that is left
    assert "solve" not in of_16k
    assert row(of_16k, "| dense |")[4].startswith("100.0")
    printed = capsys.readouterr()
    assert "Dense itself solves less than 80%" in printed.err
    assert json.loads(printed.out)["unsolved"] == [{"length": 4096, "task": "needle"}]
    assert main(["eval", "report", str(folder / "none")]) == 1
    assert "There is no folder" in capsys.readouterr().err


def test_where_dense_solves_nothing_there_are_no_means(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ("multi_key", "perplexity"), methods=("dense", "quest"), lengths=(4096,))
    score_dense(folder, lambda task, length: 0.7)
    run = Run.read(folder)
    assert not any(cell.score or cell.change for cell in means(cells(run)))
    assert {path.name for path in save_plots(run, tmp_path)} >= {"bytes.png", "accuracy_4096.png"}


def score_dense(folder: Path, score: Callable[[str, int], float]) -> None:
    """Rewrites what dense has answered."""
    for path in folder.glob("results*.jsonl"):
        rewrite(
            path,
            lambda line: (
                {**line, "score": score(line["task"], line["length"])}
                if line["method"] == "dense" and line["score"] is not None
                else line
            ),
        )


def test_settings_of_its_own_change_a_methods_marker_and_line(tmp_path: Path) -> None:
    names = ("dense", "sketch", "sketch+sum", "sketch+dense0", "quest+sum+dense0", "recent", "kvpress/one")
    looks = styles(Run.read(write_run(tmp_path, tasks=("needle",), methods=names, lengths=(4096,))))
    assert list(looks) == list(names[1:])
    of_sketch = [looks[name] for name in names[1:4]]
    assert len({look["color"] for look in of_sketch}) == 1
    assert of_sketch[0]["marker"] == of_sketch[2]["marker"] != of_sketch[1]["marker"] == looks[names[4]]["marker"]
    lines = [look["linestyle"] for look in looks.values()]
    assert lines == ["-", "-", "--", "--", "-", "-"]


def test_the_front_is_what_nothing_beats() -> None:
    def cell(bytes_read: float, score: float) -> Cell:
        return Cell("mean", 1, "m", 1, 1, 1, 0, score=Estimate(score), bytes_per_token=bytes_read)

    points = [cell(4, 0.9), cell(1, 0.2), cell(2, 0.5), cell(3, 0.4), cell(2, 0.3), cell(5, 0.9)]
    assert pareto(points) == [points[1], points[2], points[0]]


def test_probes_of_several_processes_are_averaged_by_steps() -> None:
    lines = [{"layer": 2, "steps": 3, "mass": [0.2, 1.0]}, {"layer": 2, "steps": 1, "mass": [0.6, 0.0]}]
    (found,) = by_head([*lines, {"layer": 2, "steps": 0, "mass": [0.0, 0.0]}], "mass").values()
    assert found == pytest.approx([0.3, 0.75])


def test_heatmaps_of_many_depths_are_in_tenths(tmp_path: Path) -> None:
    folder = write_run(tmp_path, tasks=("needle",), lengths=(4096,), budgets=(256,), methods=("quest",))
    depths = iter(np.linspace(0, 100, 15))
    rewrite(folder / "results-00000.jsonl", lambda line: {**line, "details": {"depth": next(depths)}})
    (picture,) = save_heatmaps(Run.read(folder), tmp_path)
    has_picture(picture)
