"""The result file of `generate`, to which later runs may add: every row says how it was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sparsekv import SparseConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.report import file_name, result, save_json

from .generate_model import Subject
from .generate_points import MODES, Options
from .known_models import MODELS

Row = dict[str, Any]
_SETTINGS = ("model", "dtype", "budget", "dense_layers", "new_tokens")
_OTHERS = tuple(field.name for field in fields(SparseConfig))  # of which earlier files do not tell all


class ResultFile:
    """What a run writes and, with `--add`, what it leaves as it is.

    Attributes:
        kept: rows of an earlier run, at points that this one does not measure.

    Raises:
        ConfigError: what is there was measured otherwise, or is no such file. The model need not be loaded.
    """

    def __init__(self, subject: Subject, options: Options, device: torch.device, command: str) -> None:
        self.subject, self.options, self.command = subject, options, command
        is_usual = subject.source is not None or subject.name in (next(iter(MODELS)), list(MODELS)[-1])
        model = "" if is_usual else f"_{subject.name}"
        ranks = f"_{subject.ranks.size}_ranks" if subject.ranks.size > 1 else ""
        self.name = file_name("generate", device.type, [options.config]) + model + ranks
        self.settings = {
            "model": subject.name,
            "dtype": str(subject.dtype),
            **options.config.as_dict(),
            "new_tokens": options.new_tokens,
        }
        path, points = Path(options.out or "") / f"{self.name}.json", {(p.batch, p.context) for p in options.points}
        is_there = options.add and path.exists()
        earlier = rows_to_add_to(path, result("", self.settings, [])) if is_there else []
        self.kept = [row for row in earlier if not _points([row]) <= points]

    def save(self, rows: Sequence[Row]) -> Path | None:
        """Writes the kept rows and these, if files were asked for."""
        return None if self.options.out is None else save_json(self.options.out, self.name, self.content(rows))

    def content(self, rows: Sequence[Row]) -> Row:
        """What the file holds. Rows that do not say how they were measured were measured by this command."""
        options = self.options
        rows = sorted([*self.kept, *rows], key=lambda row: (row["batch"], row["context"]))  # modes in their order
        settings = {
            **self.settings,
            "random_weights": self.subject.source is None,
            "sizes_of": self.subject.sizes,
            "weight_bytes": self.subject.weight_bytes,
            "timed_tokens": options.timed_tokens,
            "num_points": len(_points(rows) | {(where.batch, where.context) for where in options.points}),
            "modes": [name for name in MODES if name in (*options.modes, *(row["mode"] for row in rows))],
        }
        content = result(self.command, settings, [])
        here = measured(content)
        return {**content, "rows": [{**row, "measured": row.get("measured", here)} for row in rows]}


def rows_to_add_to(path: Path, here: Row) -> list[Row]:
    """The rows of a file. Each says in `measured` by what command, when and where; None: that is not known.

    Args:
        here: what the file of this run would hold.

    Raises:
        ConfigError: they were measured otherwise, or it is no such file.
    """
    try:
        there: Row = json.loads(path.read_text(encoding="utf-8"))
        was, known = alike(there), measured(there)
        # Earlier files told of the last command only, whatever it had added to: then there are more points than its.
        is_of_one_run = len(_points(there["rows"])) <= int(there["settings"]["num_points"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"--add: {path} is no file of this command ({error!r}). Choose another --out.") from error
    now = {name: value for name, value in alike(here).items() if name in was}
    different = [f"{name} {was[name]!r} there, {now[name]!r} here" for name in now if was[name] != now[name]]
    if different:
        raise ConfigError(
            f"--add: {path} was measured otherwise ({'; '.join(different)}). Choose another --out, or the same "
            "settings on the same machine."
        )
    return [{"measured": known if is_of_one_run else None, **row} for row in there["rows"]]


def alike(content: Row) -> Row:
    """What all rows of a file have in common, or they could not be compared."""
    settings = content["settings"]
    found = {name: settings[name] for name in (*_SETTINGS, *(name for name in _OTHERS if name in settings))}
    return found | {"gpu": content["gpu"], "torch": content["versions"]["torch"]}


def measured(content: Row) -> Row:
    """By what command the rows of a run were measured, when, where and, if the file says so, with which kernels."""
    told: Row = {name: content[name] for name in ("command", "date", "gpu", "kernels") if name in content}
    return told | {"torch": content["versions"]["torch"]}


def _points(rows: Iterable[Row]) -> set[tuple[int, int]]:
    return {(row["batch"], row["context"]) for row in rows}
