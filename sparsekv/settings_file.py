"""Settings as a JSON file: every value is written, so that the file means the same when defaults have changed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError, UnknownNameError

REVISION = 1  # of what names and values mean
_MARK = "sparsekv_settings"


def write(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Writes all of a file, or leaves the one that is there as it is."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(json.dumps({_MARK: REVISION, **settings}, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)


def read(path: str | os.PathLike[str], known: Collection[str]) -> dict[str, Any]:
    """The values in a file. One written by hand may leave names out.

    Raises:
        ConfigError: it cannot be read, holds no settings, those of a later version, or a name that is not known.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise ConfigError(f"{path} is damaged, or no settings file: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f'{path} must hold names and values, as {{"budget": 512}}.')
    revision = content.pop(_MARK, REVISION)
    if revision != REVISION:
        raise ConfigError(
            f"{path} has revision {revision!r} of the settings, and this version of sparsekv reads {REVISION}."
        )
    for name in content:
        if name not in known:
            # Not as it is: the command line is right, so the exit code is not that of a misspelt one.
            raise ConfigError(str(UnknownNameError(f"{path}: setting", name, known)))
    return content
