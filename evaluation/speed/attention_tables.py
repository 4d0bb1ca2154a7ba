"""What a run on a GPU prints: the step beside its competitors, the step's parts, and why something is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparsekv.evaluation.report import short

Row = dict[str, Any]

_TIMES = {"sparse": "sparse", "flashinfer": "FlashInfer", "sdpa": "SDPA", "shelf": "shelf", "dense": "dense"}
_PARTS = ("sparse", "composed", "append", "score", "select", "attend")


def print_result(console: Console, rows: Sequence[Row], tb_per_s: float, check_only: bool) -> None:
    """Both tables and the notes; after checks alone, the notes."""
    if not check_only:
        console.print(comparison(rows, tb_per_s), parts(rows))
    for note in notes(rows):
        console.print(note)


def comparison(rows: Sequence[Row], tb_per_s: float) -> Table:
    """The step beside dense attention, parts off the shelf, and the memory's speed."""
    table = Table(
        title="One layer's decode step on a GPU, microseconds (medians)",
        caption=f"faster: than the faster of FlashInfer and SDPA. floor: digests and the budget's keys and values "
        f"at {tb_per_s:.2f} TB/s. dense: our own kernel.",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    _add_columns(table, (*_TIMES.values(), "faster", "floor", "of floor"))
    for row in rows:
        times = [_us(row.get(f"{name}_us")) for name in _TIMES]
        ratios = [_ratio(row.get("speedup")), _us(row.get("floor_us")), _percent(row.get("of_floor"))]
        table.add_row(*_where(row), *([row["error"]] if "error" in row else [*times, *ratios]))
    return table


def parts(rows: Sequence[Row]) -> Table:
    """The step's parts, each timed alone."""
    table = Table(
        title="Its parts, microseconds",
        caption="composed: the four operators one after the other. TB/s: -, where a part alone would read from L2.",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    _add_columns(table, (*_PARTS, "score TB/s", "attend TB/s"))
    for row in rows:
        if "error" not in row:
            speeds = [_number(row.get(f"{name}_tb_per_s"), ".2f") for name in ("score", "attend")]
            table.add_row(*_where(row), *(_us(row.get(f"{name}_us")) for name in _PARTS), *speeds)
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """Why a competitor is missing, and what was measured separately."""
    found: dict[str, list[str]] = {}
    for row in rows:
        where = " ".join(_where(row)[:2])
        for name, label in _TIMES.items():
            if row.get(f"{name}_note"):
                found.setdefault(f"{label}: {row[f'{name}_note']}", []).append(where)
        if row.get("quest_us"):
            found[f"Quest's own kernels, measured separately (speed/attention_points.py): {row['quest_us']} us"] = [
                where
            ]
    return [f"{text} ({'everywhere' if len(places) == len(rows) else ', '.join(places)})"
            for text, places in found.items()]  # fmt: skip


def _add_columns(table: Table, names: Sequence[str]) -> None:
    table.add_column("geometry", no_wrap=True)
    for name in ("batch x context", "budget", *names):
        table.add_column(name, justify="right")


def _where(row: Row) -> list[str]:
    return [row["geometry"], f"{row['batch']} x {short(row['context'])}", short(row["budget"])]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _us(value: float | None) -> str:
    return _number(value, ".1f")


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _percent(value: float | None) -> str:
    return _number(value, ".0%")
