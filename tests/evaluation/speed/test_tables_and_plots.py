"""Options, tables and plots of the speed measurements, from made-up rows."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsekv.command_line import circumstances, tokens
from sparsekv.evaluation.report import short
from sparsekv.evaluation.speed.plots import accuracy_figure, parts_figure, step_figure
from sparsekv.evaluation.speed.tables import print_steps
from tools import readme


@pytest.mark.parametrize(("text", "number"), [("4000", 4000), ("32k", 32768), ("1M", 1048576), ("2K", 2048)])
def test_tokens_may_be_counted_in_k_and_m(text: str, number: int) -> None:
    assert tokens(text) == number
    assert tokens(short(number).replace(",", "")) == number


@pytest.mark.parametrize("text", ["0", "0k", "k", "", "1.5k", "32kk", "-1k", "many"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        tokens(text)


def row(batch: int, context: int, **changes: Any) -> dict[str, Any]:
    times = {"sparse": 10.0, "composed": 14.0, "append": 1.5, "score": 5.0, "select": 3.0, "attend": 4.5}
    times |= {"dense": 40.0, "flashinfer": 42.0, "sdpa": 38.0, "shelf": 50.0}
    where = {"geometry": "llama-3.1-8b", "batch": batch, "context": context, "budget": 2048, "share": 0.125}
    where |= {"digest": "sign_sketch", "tokens_read": 2048}
    floors = {"floor_us": 3.8, "dense_floor_us": 30.5, "of_floor": 0.38, "speedup": 3.8, "best_dense_us": 38.0}
    speeds = {"score_tb_per_s": 2.5, "attend_tb_per_s": None, "quest_us": None}
    return where | {f"{name}_us": us for name, us in times.items()} | floors | speeds | changes


ROWS = [
    row(1, 32768),
    row(1, 131072, flashinfer_us=None, flashinfer_note="flashinfer is not installed", shelf_us=None),
    row(16, 32768, geometry="mha", quest_us=64.9, dense_us=1955.1, sdpa_us=1955.1, flashinfer_us=1955.1),
    {key: row(64, 1 << 20)[key] for key in ("geometry", "batch", "context", "digest", "tokens_read")}
    | {"error": "out of memory"},
]


def printed(rows: list[dict[str, Any]], check_only: bool = False) -> str:
    console = Console(width=118, record=True, file=io.StringIO())
    print_steps(console, rows, 4.39, check_only)
    return console.export_text()


def test_the_tables_fit_a_pipe_and_say_what_is_missing() -> None:
    text = printed(ROWS)
    assert "…" not in text  # nothing is cut off at 118 characters
    assert "out of memory (llama-3.1-8b 64 x 1M)" in text
    assert "4.39 TB/s" in text
    assert "FlashInfer: flashinfer is not installed (llama-3.1-8b 1 x 128k)" in text
    assert "64.9 us (mha 16 x 32k)" in text
    (line,) = [line for line in text.splitlines() if "1 x 32k" in line and "3.8x" in line]
    assert line.split()[4:] == "sign_sketch 2k 10.0 42.0 38.0 50.0 40.0 3.8x 3.8 38% 12%".split()


def test_after_checks_alone_there_is_no_table() -> None:
    assert "faster" not in printed(ROWS, check_only=True)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[3:], [row(1, 4096, speedup=None)]], ids=len)
def test_the_plot_is_drawn_from_whatever_was_measured(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for draw in (step_figure, parts_figure):
        draw(rows).savefig(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 3_000


def test_accuracy_is_drawn_against_time() -> None:
    rows = [row(1, 32768, budget=budget, sparse_us=float(budget)) for budget in (512, 4096, 1024)]
    figure = accuracy_figure({512: 0.5, 1024: 0.9, 2048: 1.0}, rows, 1.0, "a title")
    (ours, dense) = figure.axes[0].lines
    assert ours.get_xydata().tolist() == [[512, 50], [1024, 90]]  # budgets that both know, in their order
    assert dense.get_xydata().tolist() == [[38, 100]]


def test_the_readme_can_show_the_gpus_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {**circumstances("the command"), "rows": ROWS}
    (tmp_path / "attention_cuda_minmax.json").write_text(json.dumps(result))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    shown = readme.render("<!-- figures: attention_cuda -->\n<!-- end of figures -->")
    assert "| 1 | 32,768 | 42.0 | 38.0 | 50.0 | 10.0 | 3.8x | 3.8 |" in shown
    assert "| 1 | 131,072 | - | 38.0 | - | 10.0 | 3.8x | 3.8 |" in shown
    assert "the command" in shown
    assert "16 |" not in shown


def test_the_readme_can_show_a_cpus_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    rows = [row(1, 4096, speedup=4.0, sdpa_us=40.0)]
    (tmp_path / "attention_cpu.json").write_text(json.dumps({**circumstances("the command"), "rows": rows}))
    shown = readme.render("<!-- figures: attention_cpu -->\n<!-- end of figures -->")
    assert "| 4,096 | 0.04 | 0.01 | 4.0x | 12.5% |" in shown
