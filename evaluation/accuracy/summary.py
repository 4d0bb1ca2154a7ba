"""The folder of a run, read: the files of all processes and peers, checked and merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError

from .manifest import MANIFEST, OF_PEERS, read_json, read_manifest, runs_of
from .methods import DENSE, known
from .results import OF_PROBES, OF_RESULTS, PROBES, RESULTS, Key, Line, checked, read_lines


@dataclass(frozen=True)
class Run:
    """The folder of a run, read.

    Attributes:
        manifest: empty if there is none.
        lines: one per question, method and budget. What was measured goes before an error, later lines before earlier
            ones. One whose question is not dense's is an error.
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
        manifest = read_manifest(folder)
        notes += _notes_of(folder, manifest)
        found: dict[Key, Line] = {}
        for line in map(checked, _read(folder, RESULTS, OF_RESULTS, notes)):
            key = Key.of(line)
            if not (line["error"] and key in found and not found[key]["error"]):
                found[key] = line
        if not found:
            raise ConfigError(
                f"{folder} holds no results (results*.jsonl): `sparsekv eval run --out {folder}` first."
            )
        probes = tuple(_read(folder, PROBES, OF_PROBES, notes))
        return cls(folder, manifest or {}, tuple(_of_one_question(found)), probes, tuple(notes))

    @property
    def errors(self) -> list[Line]:
        """Lines of questions that were not measured."""
        return [line for line in self.lines if line["error"]]

    @property
    def model(self) -> str:
        return str(self.manifest.get("model", {}).get("name", "unknown model"))

    @property
    def tasks(self) -> list[str]:
        """All tasks, in the order of the settings; what they do not name at the end."""
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
        """All budgets; dense has none."""
        return sorted({line["budget"] for line in self.lines} - {None})

    @property
    def gpu(self) -> str | None:
        """What it was measured on: all of it, where lines do not say."""
        runs = runs_of(self.manifest) if self.manifest else []
        return ", ".join(dict.fromkeys(str(run.get("gpu") or "CPU") for run in runs)) or None

    def settings_of(self, method_name: str) -> tuple[str | None, int | None]:
        """Pooling and dense layers of a method, as far as they make a difference to it and are known."""
        found, settings = known(method_name), self.manifest.get("settings", {})
        if found is None:
            return None, None
        pooling, layers = settings.get("group_pooling", "max"), settings.get("dense_layers")
        return (
            (found.group_pooling or pooling) if found.is_pooled else None,
            None if found.is_dense else layers if found.dense_layers is None else found.dense_layers,
        )

    def _names(self, kind: str) -> list[str]:
        there = dict.fromkeys(line[kind] for line in self.lines)
        settings = [name for name in self.manifest.get("settings", {}).get(f"{kind}s", ()) if name in there]
        return list(dict.fromkeys([*settings, *there]))


def _read(folder: Path, pattern: str, names: Sequence[str], notes: list[str]) -> Iterator[Line]:
    for path in sorted(folder.glob(pattern)):
        yield from read_lines(folder, path.name, names)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            notes.append(
                f"The last line of {path.name} is half-written and left out: the run goes on, or was stopped."
            )


def _of_one_question(found: dict[Key, Line]) -> Iterator[Line]:
    """The lines; those that answer another question than dense at the same place (or, if that has not answered it,
    the first one there) as errors. Compared with it they would say nothing."""
    expected: dict[Any, Any] = {}
    for key, line in sorted(found.items(), key=lambda pair: pair[0].method != DENSE):
        if not line["error"]:
            expected.setdefault(key.place, line.get("expected"))
    for key, line in found.items():
        wanted = expected.get(key.place)
        if line["error"] or line.get("expected") == wanted:
            yield line
        else:
            yield {**line, "error": f"another question than others at this place, where {wanted!r} is expected"}


def _notes_of(folder: Path, manifest: Line | None) -> Iterator[str]:
    """What the manifests say that a reader should know."""
    if manifest is None:
        yield f"There is no {MANIFEST}: model, versions and settings are not known."
    else:
        if manifest.get("settings", {}).get("chat"):
            yield "Documents and questions are parts of a chat, by the model's chat template; perplexity's are not."
        yield from _differences(manifest)
        yield from _fallbacks(manifest)
    for path in sorted(folder.glob(OF_PEERS)):
        yield from _peer(path.name, read_json(path), manifest or {})


def _differences(manifest: Line) -> Iterator[str]:
    """Which parts were measured on other GPUs or with other versions."""
    runs = runs_of(manifest)
    gpus = dict.fromkeys(str(run.get("gpu") or "CPU") for run in runs)
    if len(gpus) > 1:
        yield f"Parts of it were measured on different processors: {', '.join(gpus)}."
    for name in dict.fromkeys(name for run in runs for name in _table(run, "versions")):
        versions = dict.fromkeys(str(_table(run, "versions").get(name, "none")) for run in runs)
        if len(versions) > 1:
            yield f"Parts of it were measured with different versions of {name}: {', '.join(versions)}."


def _fallbacks(manifest: Line) -> Iterator[str]:
    """Layers that choose no pages although nobody asked for that."""
    for some in manifest.get("layers_not_sparse", ()):
        if not some["is_asked_for"]:
            numbers = ", ".join(map(str, some["layers"]))
            yield f"Layers that choose no pages, and whose reads are not counted: {numbers} ({some['reason']})."


def _peer(name: str, told: Line, manifest: Line) -> Iterator[str]:
    """What is known of another program whose results are here."""
    versions = ", ".join(f"{program} {version}" for program, version in _table(told, "versions").items())
    yield f"{name}: some results are of another program ({versions or 'its versions are not known'})."
    ours, theirs = (str(_table(known, "model").get("sha256", "")) for known in (manifest, told))
    if ours and theirs and ours != theirs:
        yield f"{name}: its weights ({theirs[:12]}) are not those of this run ({ours[:12]})."


def _table(known: Line, name: str) -> Line:
    found = known.get(name)
    return found if isinstance(found, dict) else {}
