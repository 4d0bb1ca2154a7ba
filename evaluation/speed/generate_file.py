"""The result file of `generate`, to which later runs may add: every row says how it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError

Row = dict[str, Any]
_SETTINGS = ("model", "dtype", "budget", "dense_layers", "new_tokens")


def rows_to_add_to(path: Path, here: Row) -> list[Row]:
    """The rows of a file. Each says in `measured` by what command, when and where; None: that is not known.

    Args:
        here: what the file of this run would hold.

    Raises:
        ConfigError: they were measured otherwise, or it is no such file.
    """
    there = _read(path)
    was, now = alike(there), alike(here)
    different = [f"{name} {was[name]!r} there, {now[name]!r} here" for name in now if was[name] != now[name]]
    if different:
        raise ConfigError(
            f"--add: {path} was measured otherwise ({'; '.join(different)}). Choose another --out, or the same "
            "settings on the same machine."
        )
    known = measured(there) if _is_of_one_run(there) else None
    return [{"measured": known, **row} for row in there["rows"]]


def alike(content: Row) -> Row:
    """What all rows of a file have in common, or they could not be compared."""
    found = {name: content["settings"][name] for name in _SETTINGS}
    return found | {"gpu": content["gpu"], "torch": content["versions"]["torch"]}


def measured(content: Row) -> Row:
    """By what command the rows of a run were measured, when and where."""
    told = {name: content[name] for name in ("command", "date", "gpu")}
    return {**told, "torch": content["versions"]["torch"]}


def _read(path: Path) -> Row:
    try:
        content: Row = json.loads(path.read_text(encoding="utf-8"))
        alike(content), measured(content), content["settings"]["num_points"], _points(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"--add: {path} is no file of this command ({error!r}). Choose another --out.") from error
    return content


def _is_of_one_run(content: Row) -> bool:
    """Earlier files told of the last command only, whatever it had added to: then there are more points than its."""
    return len(_points(content)) <= int(content["settings"]["num_points"])


def _points(content: Row) -> set[tuple[int, int]]:
    return {(row["batch"], row["context"]) for row in content["rows"]}
