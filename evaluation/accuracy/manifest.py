"""The manifest of a run: its settings and model, and under which circumstances each of its parts was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekv.cache import heads_of
from sparsekv.command_line import circumstances
from sparsekv.errors import ConfigError
from sparsekv.evaluation.tasks import Task
from sparsekv.hf.fingerprint import model_hash
from sparsekv.hf.support import text_config

from .methods import method
from .results import Line, read_text

MANIFEST = "manifest.json"
OF_PEERS = "manifest-*.json"

# What may differ when a run goes on: more tasks, lengths, methods, budgets and examples. All else must be the same.
_GROWING = ("tasks", "lengths", "methods", "budgets")
# What was not asked of earlier runs, and stood for this.
_ADDED = {"chat": None, "group_pooling": "max", "kv": "plain"}
_HASHED = {"data": "content", "code": "code"}  # of tasks, of methods
_CIRCUMSTANCES = ("command", "date", "gpu", "cpu_threads", "versions")


def describe(
    name: str, model: Any, prefix_ids: Sequence[int], settings: Line, tasks: Mapping[str, Task], command: str
) -> Line:
    """The manifest of a run that begins.

    Args:
        name: the model's.
        prefix_ids: tokens before every document.
        settings: as `RunOptions.settings` gives them; of methods that do not ship, the code is told by its hash.
        tasks: by name; of those that read files, the content is told by its hash.
    """
    heads = heads_of(model.config)
    return {
        **circumstances(command),
        "model": {
            "name": name,
            "sha256": model_hash(model),
            "num_layers": text_config(model).num_hidden_layers,
            "num_kv_heads": heads and heads.num_kv_heads,
            "head_dim": heads and heads.head_dim,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "prefix_ids": list(prefix_ids),
        "settings": settings,
        "data": {name: task.sha256 for name, task in tasks.items() if task.sha256 is not None},
        "code": {name: code for name in settings["methods"] if (code := method(name).own_code()) is not None},
    }


def read_manifest(folder: Path) -> Line | None:
    """The manifest of a run's folder; None if there is none.

    Raises:
        ConfigError: it is no manifest.
    """
    path = folder / MANIFEST
    return read_json(path) if path.exists() else None


def read_json(path: Path) -> Line:
    """Names and values from a file that a run has written.

    Raises:
        ConfigError: it is something else.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON: {error}. Mend or delete it.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold names and values. Mend or delete it.")
    return content


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Whether a run may go on in this folder. Changes nothing.

    Raises:
        ConfigError: the folder holds a run of something else.
    """
    _continued(folder, manifest)


def save_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, or adds to the one that is there: all runs' circumstances stay in it.

    Raises:
        ConfigError: the folder holds a run of something else.
    """
    path, content = folder / MANIFEST, _continued(folder, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def runs_of(manifest: Mapping[str, Any]) -> list[Line]:
    """The circumstances of all runs that a folder's results are from, the first one first; as far as they are known:
    earlier manifests told of the last one only."""
    told = manifest.get("runs")
    last = {name: manifest[name] for name in _CIRCUMSTANCES if name in manifest}
    return list(told) if isinstance(told, list) and told else [last]


def _continued(folder: Path, new: Mapping[str, Any]) -> Line:
    """What the manifest says when the run has gone on."""
    content = {**new, "runs": runs_of(new)}
    old = read_manifest(folder)
    if old is None:
        return content
    old = _validated(folder / MANIFEST, old)
    different = _different(old, new)
    if different:
        told = "; ".join(f"{name} was {was!r} and is {now!r}" for name, was, now in different)
        raise ConfigError(
            f"{folder / MANIFEST} is of another run ({told}). Choose another --out, or the same settings."
        )
    was, now = old["settings"], new["settings"]
    grown = {name: list(dict.fromkeys([*was[name], *now[name]])) for name in _GROWING}
    return {
        **content,
        "settings": {**now, **grown, "num_examples": max(was["num_examples"], now["num_examples"])},
        **{kind: {**old.get(kind, {}), **new.get(kind, {})} for kind in _HASHED},
        "layers_not_sparse": new.get("layers_not_sparse") or old.get("layers_not_sparse", []),
        "runs": [*runs_of(old), *(run for run in runs_of(new) if run not in runs_of(old))],
    }


def _different(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What is not as it was: name, before, now."""
    was, now = _fixed(old), _fixed(new)
    found = [(name, was.get(name), now[name]) for name in now if was.get(name) != now[name]]
    for kind, what in _HASHED.items():
        before, here = old.get(kind, {}), new.get(kind, {})
        changed = [name for name in here if before.get(name, here[name]) != here[name]]
        found += [(f"the {what} of {name}", before[name], here[name]) for name in changed]
    return found


def _fixed(manifest: Mapping[str, Any]) -> Line:
    settings = {**_ADDED, **manifest["settings"]}
    fixed = {name: settings[name] for name in settings if name not in (*_GROWING, "num_examples")}
    return {"model": manifest["model"], "prefix_ids": manifest.get("prefix_ids", []), **fixed}


def _validated(path: Path, manifest: Line) -> Line:
    """What a run that goes on needs of the manifest is there.

    Raises:
        ConfigError: it is not.
    """
    parts = [manifest.get("model"), manifest.get("settings"), *(manifest.get(kind, {}) for kind in _HASHED)]
    if all(isinstance(part, dict) for part in parts):
        kinds = {**dict.fromkeys(_GROWING, list), "num_examples": int}
        if all(isinstance(manifest["settings"].get(name), kind) for name, kind in kinds.items()):
            return manifest
    raise ConfigError(
        f"{path} is no manifest of a run: it must hold 'model', and 'settings' with {', '.join(_GROWING)} and "
        "num_examples. Mend it, or choose another --out."
    )
