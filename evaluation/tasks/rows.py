"""Rows of data sets, from local JSON lines or from the hub, with messages that say which row is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError

# LongBench on the hub is one archive of JSON lines, and a script, which `datasets` no longer runs.
_ARCHIVES = {"longbench": "zip://data/{subset}.jsonl::hf://datasets/THUDM/LongBench/data.zip"}
_SUFFIXES = (".json", ".jsonl")  # of files, whether they are there or not; names on the hub have dots, too
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """One line of a data set.

    Attributes:
        where: names it in messages.
    """

    where: str
    fields: dict[str, Any]

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def text(self, name: str) -> str:
        """A field that is a text.

        Raises:
            ConfigError: it is not there, or is something else.
        """
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: {name!r} must be a text; got {_short(value)}. {self._has()}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of texts or numbers, or one of them.

        Raises:
            ConfigError: it is not there, empty, or something else.
        """
        value = self.fields.get(name)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(item, str | int | float) for item in values):
            raise ConfigError(f"{self.where}: {name!r} must be a list of texts; got {_short(value)}. {self._has()}")
        return tuple(map(str, values))

    def _has(self) -> str:
        return f"The row has {', '.join(map(repr, self.fields)) or 'nothing'}."


def rows_of(kind: str, source: str) -> list[Row]:
    """The rows of a file of JSON lines, or of a data set on the hub.

    Raises:
        ConfigError: there is no such file or data set, or it cannot be read.
    """
    path = Path(source)
    if path.exists() or path.suffix in _SUFFIXES:
        rows = list(_json_lines(path))
    elif kind in _ARCHIVES and "/" not in source:
        rows = _hub("json", f"{kind}:{source}", data_files=_ARCHIVES[kind].format(subset=source), split="train")
    elif _HUB_NAME.fullmatch(source):
        owner, name, *config = source.split("/")
        rows = _hub(f"{owner}/{name}", f"{kind}:{source}", *config, split="test")
    else:
        raise ConfigError(
            f"{kind}:{source} is no file: name JSON lines ({kind}:data.jsonl) or OWNER/NAME on the hub."
        )
    if not rows:
        raise ConfigError(f"{source} is empty: it must hold a JSON object per line.")
    return rows


def read(path: Path) -> str:
    """A text file.

    Raises:
        ConfigError: it is missing, or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is no JSON: {error}. Each line must hold one object.") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{where} must hold a JSON object; got {_short(fields)}.")
        yield Row(where, fields)


def _hub(loader: str, source: str, *config: str, **options: Any) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{source} is no file here, and data sets of the hub need more: pip install '.[eval]' in the clone"
        ) from error
    try:
        return [
            Row(f"{source}, row {i}", dict(row)) for i, row in enumerate(load_dataset(loader, *config, **options))
        ]
    except Exception as error:  # whatever a network and a library do not like
        raise ConfigError(
            f"{source} is no file here, and cannot be loaded from the hub: {' '.join(str(error).split())[:300]}"
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
