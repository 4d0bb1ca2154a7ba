"""The folder of a run, read: the files of all processes and peers, checked and merged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError

from .methods import DENSE
from .results import MANIFEST, Key, Line, read_lines

_OF_RESULTS = ("task", "length", "method", "budget", "document", "question", "error")
_OF_PROBES = ("task", "length", "method", "budget", "layer", "steps", "mass", "overlap")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "method": str,
    "length": int,
    "document": int,
    "question": int,
    "layer": int,
    "steps": int,
    "budget": (int, type(None)),
    "error": (str, type(None)),
    "mass": list,
    "overlap": list,
}


@dataclass(frozen=True)
class Run:
    """The folder of a run, read.

    Attributes:
        manifest: empty if there is none.
        lines: one per question, method and budget. What was measured goes before an error, later lines before earlier
            ones.
        probes: as in the files.
        notes: what a reader of the figures should know.
    """

    folder: Path
    manifest: Line
    lines: tuple[Line, ...]
    probes: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Reads the files of all processes.

        Raises:
            ConfigError: there are no results, or a line that is no result.
        """
        notes: list[str] = []
        manifest = _read_manifest(folder, notes)
        found: dict[Key, Line] = {}
        for line in map(_checked, _read(folder, "results*.jsonl", _OF_RESULTS, notes)):
            key = Key.of(line)
            if not (line["error"] and key in found and not found[key]["error"]):
                found[key] = line
        if not found:
            raise ConfigError(
                f"{folder} holds no results (results*.jsonl): `sparsekv eval run --out {folder}` first."
            )
        probes = tuple(_read(folder, "probes*.jsonl", _OF_PROBES, notes))
        return cls(folder, manifest, tuple(found.values()), probes, tuple(notes))

    @property
    def errors(self) -> list[Line]:
        """Lines of questions that were not measured."""
        return [line for line in self.lines if line["error"]]

    @property
    def model(self) -> str:
        return str(self.manifest.get("model", {}).get("name", "unknown model"))

    @property
    def tasks(self) -> list[str]:
        """In the order of the settings; what they do not name at the end."""
        return self._names("task")

    @property
    def methods(self) -> list[str]:
        """Dense first."""
        return sorted(self._names("method"), key=lambda name: name != DENSE)

    @property
    def lengths(self) -> list[int]:
        return sorted({line["length"] for line in self.lines})

    @property
    def budgets(self) -> list[int]:
        """Without dense's None."""
        return sorted({line["budget"] for line in self.lines} - {None})

    def _names(self, kind: str) -> list[str]:
        there = dict.fromkeys(line[kind] for line in self.lines)
        settings = [name for name in self.manifest.get("settings", {}).get(f"{kind}s", ()) if name in there]
        return list(dict.fromkeys([*settings, *there]))


def _read_manifest(folder: Path, notes: list[str]) -> Line:
    path = folder / MANIFEST
    if not path.exists():
        notes.append(f"There is no {MANIFEST}: model, versions and settings are not known.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}. Mend or delete it.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold names and values. Mend or delete it.")
    return content


def _read(folder: Path, pattern: str, names: Sequence[str], notes: list[str]) -> list[Line]:
    found = []
    for path in sorted(folder.glob(pattern)):
        for number, line in enumerate(read_lines(folder, path.name), 1):
            wrong = _wrong(line, names)
            if wrong:
                raise ConfigError(f"{path}, line {number} {wrong}. Mend or delete that line.")
            found.append(line)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            notes.append(
                f"The last line of {path.name} is half-written and left out: the run goes on, or was stopped."
            )
    return found


def _wrong(line: Any, names: Sequence[str]) -> str | None:
    """What keeps a line from being used, or None."""
    if not isinstance(line, dict):
        return "is no object of names and values"
    lacking = [name for name in names if name not in line]
    if lacking:
        return f"lacks {', '.join(lacking)}"
    odd = [name for name in names if not isinstance(line[name], _KINDS[name])]
    return f"has {odd[0]}={line[odd[0]]!r}, which is of the wrong type" if odd else None


def _checked(line: Line) -> Line:
    """The line, as an error if it holds nothing that can be averaged."""
    if line["error"]:
        return line
    score, nll = line.get("score"), line.get("nll")
    if score is None and nll is None:
        return {**line, "error": "neither a score nor a likelihood was written"}
    if score is not None and not (_is_finite(score) and 0 <= score <= 1):
        return {**line, "error": f"score={score!r} is not between 0 and 1"}
    if nll is not None and not (_is_finite(nll) and (line.get("num_scored") or 0) > 0):
        return {**line, "error": f"nll={nll!r} of {line.get('num_scored')!r} tokens is no likelihood"}
    return line


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
