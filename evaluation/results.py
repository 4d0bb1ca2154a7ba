"""The folder of a run: what was measured, line by line, and under which circumstances.

    manifest.json    settings, versions, the model and its hash
    results*.jsonl   one line per question, method and budget; a file per process
    probes*.jsonl    one line per layer, method and budget: what was read of the true attention

A line is on the disk before the next is begun, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError

MANIFEST = "manifest.json"
Line = dict[str, Any]

# What may differ when a run goes on: more tasks, lengths, methods, budgets and examples. All else must be the same.
_GROWING = ("tasks", "lengths", "methods", "budgets", "num_examples")


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


class LineFile:
    """A file of JSON lines that is only ever added to.

    Opening it removes a half-written last line, which a killed run may have left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_half_line(path)

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


def _drop_half_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def read_lines(folder: Path, pattern: str) -> Iterator[Line]:
    """The lines of all files of a kind, in the order of the files' names; a half-written last line is left out.

    Raises:
        ConfigError: another line is no JSON.
    """
    for path in sorted(folder.glob(pattern)):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, text in enumerate(lines[:-1], 1):
            try:
                yield json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number} is no JSON: {error}. Mend or delete that line.") from error


def finished(folder: Path) -> set[Key]:
    """What is in a run's folder already; lines with an error are to be measured again."""
    return {Key.of(line) for line in read_lines(folder, "results*.jsonl") if not line["error"]}


def save_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, or adds to the one that is there.

    Raises:
        ConfigError: the folder holds a run of something else.
    """
    path = folder / MANIFEST
    content = dict(manifest)
    if path.exists():
        content = _continued(path, json.loads(path.read_text(encoding="utf-8")), content)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _continued(path: Path, old: Line, new: Line) -> Line:
    was, now = _fixed(old), _fixed(new)
    different = [name for name in now if was.get(name) != now[name]]
    if different:
        told = "; ".join(f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in different)
        raise ConfigError(f"{path} is of another run ({told}). Choose another --out, or the same settings.")
    settings = dict(new["settings"])
    for name in _GROWING:
        before, here = old["settings"][name], settings[name]
        settings[name] = max(before, here) if name == "num_examples" else list(dict.fromkeys([*before, *here]))
    return {**new, "settings": settings}


def _fixed(manifest: Line) -> Line:
    fixed = {name: value for name, value in manifest["settings"].items() if name not in _GROWING}
    return {"model": manifest["model"], **fixed}


def model_hash(model: Any) -> str:
    """SHA-256 over the names, shapes and a sample of every parameter's values: the same weights, the same hash,
    without reading gigabytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // 4096, 1)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample)
    return digest.hexdigest()
