"""What rows of `generate` say beyond one measurement: what failed, and how those of one point compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .generate_points import MODES

Row = dict[str, Any]


def is_out_of_memory(error: Exception) -> bool:
    """Also where a library or a compiler has wrapped it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def failure(error: Exception) -> Row:
    """A failed mode's part of its row."""
    if is_out_of_memory(error):
        return {"error": "out of memory"}
    return {"error": "failed", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}


def around(before: Row | None, after: Row) -> Row:
    """The faster of two measurements of the unpatched model, before and after the patched one, with both times; None:
    there is but one."""
    if before is None:
        return after
    times = [row["ms_per_token"] for row in (before, after)]
    return {**min(before, after, key=lambda row: row["ms_per_token"] or math.inf), "unpatched_ms": times}


def compare(rows: Sequence[Row]) -> None:
    """Fills in what the rows of one point say together: the unpatched model's times before and after the patched one,
    and how much faster each is than the faster unpatched mode."""
    unpatched = [row["ms_per_token"] for row in rows if not MODES[row["mode"]].is_patched and row["ms_per_token"]]
    best = min(unpatched, default=None)
    both = next((row["unpatched_ms"] for row in rows if row.get("unpatched_ms")), None)
    for row in rows:
        row["unpatched_ms"], row["best_unpatched_ms"] = both, best
        row["speedup"] = best / row["ms_per_token"] if best and row["ms_per_token"] else None
