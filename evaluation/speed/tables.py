"""What the speed measurements print: a layer's step and its parts, a token of `generate`, and why something is
missing. Each takes the rows of a result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sparsekv.evaluation.report import short

Row = dict[str, Any]

_COMPARED = {"sparse": "sparse", "flashinfer": "FlashInfer", "sdpa": "SDPA", "shelf": "shelf", "dense": "dense"}
_OF_STEP = ("b x n", "digest", "tokens")
_PARTS = ("sparse", "composed", "append", "score", "select", "attend")
_SPLIT = {"attention": "attention", "gemm": "matrix products", "all_reduce": "all-reduces", "rest": "rest",
          "gaps": "gaps", "host": "host"}  # fmt: skip
_OF_TOKEN = ("ms/token", "faster", "over floor", "tokens per s", "first token s", "first steps s", "cache read",
             "TB/s", "peak GB", "beside cache")  # fmt: skip


# -- one layer's decode step


def step_line(row: Row) -> str:
    """A point as soon as it is known."""
    where = f"{row['geometry']} batch {row['batch']} context {short(row['context'])} {row['digest']}"
    where += f" budget {row['budget']}"
    if "sparse_us" not in row:
        return f"{where}: {row.get('error', 'checked')}"
    faster = f", {row['speedup']:.1f}x the faster dense" if row["speedup"] else ""
    read = f", {short(row['tokens_read'])} tokens read"
    return f"{where}: {row['sparse_us']:.1f} us{read}{faster}, {row['of_floor']:.0%} of the memory's speed"


def print_steps(console: Console, rows: Sequence[Row], tb_per_s: float, check_only: bool) -> None:
    """Both tables and the notes; after checks alone, the notes."""
    if not check_only:
        console.print(_steps(rows, tb_per_s), _parts(rows))
    found = [
        (f"{label}: {row[f'{name}_note']}", _layer(row))
        for row in rows
        for name, label in _COMPARED.items()
        if row.get(f"{name}_note")
    ]
    found += [(row["error"], _layer(row)) for row in rows if "error" in row]
    separately = "Quest's own kernels, measured separately (speed/attention_points.py)"
    found += [(f"{separately}: {row['quest_us']} us", _layer(row)) for row in rows if row.get("quest_us")]
    for note, places in _by_note(found).items():
        console.print(f"{note} ({'everywhere' if len(places) == len(rows) else ', '.join(places)})")


def _steps(rows: Sequence[Row], tb_per_s: float) -> Table:
    """The step beside dense attention, parts off the shelf, and the memory's speed."""
    compared = {name: label for name, label in _COMPARED.items() if any(f"{name}_us" in row for row in rows)}
    table = _table(
        "One layer's decode step, microseconds (medians)",
        "faster: than the faster of FlashInfer and SDPA. floor: what the step has to read at "
        f"{tb_per_s:.3g} TB/s; read: as a share of the cache. dense: our own attention to all pages. tokens: in the "
        "pages that the step was seen to list, of a sequence and kv head (mean).",
        ["geometry"],
        [*_OF_STEP, *compared.values(), "faster", "floor", "of\nfloor", "read"],
    )
    for row in rows:
        times = [_microseconds(row.get(f"{name}_us")) for name in compared]
        ratios = [
            _number(row.get("speedup"), ".1f", "x"),
            _number(row.get("floor_us"), ".1f"),
            _number(row.get("of_floor"), ".0%"),
            _number(row.get("share"), ".0%"),
        ]
        table.add_row(*_where_of_step(row), *times, *ratios)
    return table


def _parts(rows: Sequence[Row]) -> Table:
    """The step's parts, each timed alone."""
    table = _table(
        "Its parts, microseconds",
        "composed: the four operators one after the other. TB/s: -, where a part alone would read from L2.",
        ["geometry"],
        [*_OF_STEP, *_PARTS, "score\nTB/s", "attend\nTB/s"],
    )
    for row in rows:
        if "error" not in row:
            speeds = [_number(row.get(f"{name}_tb_per_s"), ".3g") for name in ("score", "attend")]
            table.add_row(*_where_of_step(row), *(_microseconds(row.get(f"{name}_us")) for name in _PARTS), *speeds)
    return table


def _microseconds(value: float | None) -> str:
    return _number(value, ".1f" if value is None or value < 1e3 else ".0f")


def _where_of_step(row: Row) -> list[str]:
    kv = row.get("kv", "plain")
    digest = row["digest"] if kv == "plain" else f"{row['digest']}, {kv}"
    return [row["geometry"], _where(row), digest, short(row["tokens_read"])]


def _layer(row: Row) -> str:
    return f"{row['geometry']} {_where(row)}"


# -- a token of generate


def token_line(row: Row) -> str:
    """A mode at a point as soon as it is known."""
    where = f"{_where(row)} {row['mode']}"
    if row["ms_per_token"] is None:
        return f"{where}: {row.get('error') or row.get('note')}"
    return f"{where}: {row['ms_per_token']:.2f} ms a token, first token after {row['first_token_s']:.2f} s"


def print_tokens(console: Console, rows: Sequence[Row]) -> None:
    """The tables and the notes."""
    console.print(_tokens(rows))
    if any(row.get("split_ms") for row in rows):
        console.print(_split(rows))
    found = [(f"{row['mode']}: {row['note']}", _where(row)) for row in rows if row.get("note")]
    for note, places in _by_note(found).items():
        console.print(f"{note} ({', '.join(places)})", markup=False)


def _tokens(rows: Sequence[Row]) -> Table:
    """Every mode at every point."""
    table = _table(
        f"A token of generate: {rows[0]['model']}, budget {rows[0]['budget']}" if rows else None,
        "faster: than the faster unpatched mode. over floor: times what reading the weights takes that a "
        "token needs. "
        "first token: the prefill included; first steps: from there "
        "to the first timed token. cache read: share of its bytes. TB/s: weights and what is read of the cache. "
        "peak: memory beyond the weights; beside cache: of it, what is not keys, values and digests.",
        ["b x context", "mode"],
        _OF_TOKEN,
    )
    for i, row in enumerate(rows):
        is_last = i + 1 == len(rows) or _where(rows[i + 1]) != _where(row)
        cells = [row.get("error", "-")] if row["ms_per_token"] is None else _of_token(row)
        table.add_row(_where(row), row["mode"], *cells, end_section=is_last)
    return table


def _of_token(row: Row) -> list[str]:
    peak, cache = row.get("peak_bytes"), row.get("cache_bytes")
    beside = None if peak is None or cache is None else peak - cache
    return [
        _number(row["ms_per_token"], ".2f"),
        _number(row.get("speedup"), ".1f", "x"),
        _number(row.get("over_weights"), ".2f", "x"),
        _number(row["tokens_per_s"], ",.0f"),
        _number(row["first_token_s"], ".2f"),
        _number(row["first_steps_s"], ".2f"),
        _number(row["stats"]["share"] if "stats" in row else 1.0, ".1%"),
        _number(row.get("tb_per_s"), ".2f"),
        _number(peak and peak / 1e9, ".1f"),
        _number(beside and beside / 1e9, ".1f"),
    ]


def _split(rows: Sequence[Row]) -> Table:
    """Where the time of the captured steps goes."""
    caption = "Kernel times of replays; gaps: between a replay's kernels; host: what a token takes beyond a replay."
    split = [row["split_ms"] for row in rows if row.get("split_ms")]
    names = {name: told for name, told in _SPLIT.items() if any(name in parts for parts in split)}
    table = _table("A captured step's parts, ms", caption, ["b x context", "mode"], [*names.values(), "token"])
    for row in rows:
        if row.get("split_ms"):
            parts = [f"{row['split_ms'].get(name, 0):.2f}" for name in names]
            table.add_row(_where(row), row["mode"], *parts, f"{row['ms_per_token']:.2f}")
    return table


# -- both


def _table(title: str | None, caption: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """A table with these columns; the first right-hand one keeps its line, as it may say why there is no figure."""
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in left:
        table.add_column(name, no_wrap=True)
    for i, name in enumerate(right):
        table.add_column(name, justify="right", no_wrap=i == 0)
    return table


def _where(row: Row) -> str:
    return f"{row['batch']} x {short(row['context'])}"


def _by_note(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Where each note holds."""
    notes: dict[str, list[str]] = {}
    for note, place in found:
        notes.setdefault(note, []).append(place)
    return notes


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit
