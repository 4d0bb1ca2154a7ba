"""The folder of a run: what was measured, line by line.

    manifest.json    settings, versions, the model and its hash (see `manifest.py`)
    results*.jsonl   one line per question, method and budget; a file per process
    probes*.jsonl    one line per layer, method and budget: what was read of the true attention

Questions that are decoded together, those of a batch by one method at one budget, are finished together: their lines
are on the disk before the next are begun. So a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError

Line = dict[str, Any]

RESULTS, PROBES = "results*.jsonl", "probes*.jsonl"
OF_RESULTS = ("task", "length", "method", "budget", "document", "question", "error")
OF_PROBES = ("task", "length", "method", "budget", "layer", "steps", "mass", "overlap")
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
class Key:
    """What identifies a line."""

    task: str
    length: int
    method: str
    budget: int | None
    document: int
    question: int

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Key:
        return cls(**{name: line[name] for name in cls.__dataclass_fields__})

    @property
    def place(self) -> tuple[str, int, int, int]:
        """The question, whoever answers it."""
        return self.task, self.length, self.document, self.question


class LineFile:
    """A file of JSON lines that is only ever added to.

    Opening it removes a half-written last line, which a killed run may have left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        if not content.endswith(b"\n") and content:
            os.truncate(path, content.rfind(b"\n") + 1)

    def add(self, lines: Iterable[Line]) -> None:
        """Writes lines and waits until they are on the disk.

        Raises:
            OSError: they are not (a full disk, say); then none of them is in the file.
        """
        text = "".join(json.dumps(line) + "\n" for line in lines)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if self.path.exists():
                os.truncate(self.path, size)
            raise


def read_lines(folder: Path, pattern: str, names: Sequence[str] = ()) -> Iterator[Line]:
    """The lines of all files of a kind, in the order of the files' names; a half-written last line is left out.

    Args:
        names: what every line must hold, as `OF_RESULTS`.

    Raises:
        ConfigError: another line is no JSON, or lacks something; or a file is no text.
    """
    for path in sorted(folder.glob(pattern)):
        for number, text in enumerate(read_text(path).split("\n")[:-1], 1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number} is no JSON: {error}. Mend or delete that line.") from error
            wrong = _wrong(line, names) if names else None
            if wrong:
                raise ConfigError(f"{path}, line {number} {wrong}. Mend or delete that line.")
            yield line


def read_text(path: Path) -> str:
    """A file that we wrote.

    Raises:
        ConfigError: it is no UTF-8, so something else wrote it.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text: {error}. Mend or delete it.") from error


def finished(folder: Path) -> dict[Key, Line]:
    """What is in a run's folder already; what is an error, or no figure, is to be measured again.

    Raises:
        ConfigError: a line is no result.
    """
    found = map(checked, read_lines(folder, RESULTS, OF_RESULTS))
    return {Key.of(line): line for line in found if not line["error"]}


def _wrong(line: Any, names: Sequence[str]) -> str | None:
    """What keeps a line from being used, or None."""
    if not isinstance(line, dict):
        return "is no object of names and values"
    lacking = [name for name in names if name not in line]
    if lacking:
        return f"lacks {', '.join(lacking)}"
    odd = [name for name in names if not isinstance(line[name], _KINDS[name])]
    return f"has {odd[0]}={line[odd[0]]!r}, which is of the wrong type" if odd else None


def checked(line: Line) -> Line:
    """A result's line, as an error if it holds nothing that can be averaged."""
    if line["error"]:
        return line
    score, nll, count = (line.get(name) for name in ("score", "nll", "num_scored"))
    if score is None and nll is None:
        return {**line, "error": "neither a score nor a likelihood was written"}
    if score is not None and not 0 <= _number(score) <= 1:
        return {**line, "error": f"score={score!r} is not between 0 and 1"}
    if nll is not None and not (math.isfinite(_number(nll)) and _number(count) > 0):
        return {**line, "error": f"nll={nll!r} of {count!r} tokens is no likelihood"}
    return line


def _number(value: Any) -> float:
    """NaN if it is none."""
    return float(value) if isinstance(value, (int, float)) else math.nan
