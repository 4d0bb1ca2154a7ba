"""What a measurement of `generate` prints: the modes at every point, where a captured step's time goes, notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparsekv.evaluation.report import short

Row = dict[str, Any]

_COLUMNS = (
    "ms/token",
    "faster",
    "tokens/s",
    "first token s",
    "first steps s",
    "cache read",
    "TB/s",
    "peak GB",
    "beside cache",
)
_PARTS = {"attention": "attention", "gemm": "matrix products", "rest": "rest", "idle": "gaps"}


def print_result(console: Console, rows: Sequence[Row]) -> None:
    """The tables and the notes."""
    console.print(comparison(rows))
    if any(row.get("split_ms") for row in rows):
        console.print(split(rows))
    for note in notes(rows):
        console.print(note, markup=False)


def line(row: Row) -> str:
    """A row as soon as it is known."""
    where = f"{_where(row)} {row['mode']}"
    if row["ms_per_token"] is None:
        return f"{where}: {row.get('error') or row.get('note')}"
    return f"{where}: {row['ms_per_token']:.2f} ms a token, first token after {row['first_token_s']:.2f} s"


def comparison(rows: Sequence[Row]) -> Table:
    """Every mode at every point."""
    table = Table(
        title=f"A token of generate: {rows[0]['model']}, budget {rows[0]['budget']}" if rows else None,
        caption="faster: than the faster unpatched mode. first token: the prefill included; first steps: from there "
        "to the first timed token. cache read: share of its bytes. TB/s: weights and what is read of the cache. "
        "peak: memory beyond the weights; beside cache: of it, what is not keys, values and digests.",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    _add_columns(table, ("mode",), _COLUMNS)
    for i, row in enumerate(rows):
        is_last = i + 1 == len(rows) or _where(rows[i + 1]) != _where(row)
        cells = _cells(row) if row["ms_per_token"] is not None else [row.get("error", "-")]
        table.add_row(_where(row), row["mode"], *cells, end_section=is_last)
    return table


def split(rows: Sequence[Row]) -> Table:
    """Where the time of the captured steps goes."""
    table = Table(
        title="A captured step's parts, ms",
        caption="Kernel times of replays; gaps: what of a token's time no kernel accounts for.",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    _add_columns(table, ("mode",), (*_PARTS.values(), "token"))
    for row in rows:
        if row.get("split_ms"):
            parts = [f"{row['split_ms'][name]:.2f}" for name in _PARTS]
            table.add_row(_where(row), row["mode"], *parts, f"{row['ms_per_token']:.2f}")
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the figures should know, and where it holds."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            found.setdefault(f"{row['mode']}: {row['note']}", []).append(_where(row))
    return [f"{text} ({', '.join(places)})" for text, places in found.items()]


def _cells(row: Row) -> list[str]:
    peak, cache = row.get("peak_bytes"), row.get("cache_bytes")
    beside = None if peak is None or cache is None else peak - cache
    share = row["stats"]["share"] if "stats" in row else 1.0
    return [
        f"{row['ms_per_token']:.2f}",
        _number(row.get("speedup"), ".1f", "x"),
        f"{row['tokens_per_s']:,.0f}",
        f"{row['first_token_s']:.2f}",
        f"{row['first_steps_s']:.2f}",
        f"{share:.1%}",
        _number(row.get("tb_per_s"), ".2f"),
        _number(peak and peak / 1e9, ".1f"),
        _number(beside and beside / 1e9, ".1f"),
    ]


def _add_columns(table: Table, left: Sequence[str], right: Sequence[str]) -> None:
    for name in ("batch x context", *left):
        table.add_column(name, no_wrap=True)
    for i, name in enumerate(right):
        table.add_column(name, justify="right", no_wrap=i == 0)  # the first may say why there is no figure


def _where(row: Row) -> str:
    return f"{row['batch']} x {short(row['context'])}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit
