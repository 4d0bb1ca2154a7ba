"""Where what is made or fetched once is kept for later runs: compiled kernels, models, documents."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # what a file in the making is called at the end


def cache_directory(what: str) -> Path | None:
    """`$SPARSEKV_CACHE_DIR/what`, else `sparsekv/what` in the user's cache directory; None without a home.

    It need not exist, nor be writable.
    """
    # platformdirs does the same, and would be one more dependency for two lines.
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("SPARSEKV_CACHE_DIR") or f"{caches}/sparsekv"
    try:
        return Path(chosen, what).expanduser()
    except RuntimeError:
        return None


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Fills a folder out of sight, so that it is whole or not there.

    Yields:
        An empty folder, which becomes `folder` in one step if nothing is raised; another for what is thrown away.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        new, scratch = Path(beside, "new"), Path(beside, "scratch")
        new.mkdir()
        scratch.mkdir()
        yield new, scratch
        try:
            new.replace(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


@contextlib.contextmanager
def appearing_file(path: Path) -> Iterator[BinaryIO]:
    """Writes a file out of sight, in the same folder, so that whoever reads it finds all of it, or what was there.

    Yields:
        An open file, which becomes `path` in one step if nothing is raised, when the disk has all of it; else nothing
        is left of it. A process that is killed leaves it behind, as `.NAME-....partial`.
    """
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Sees to it that a new name in a folder outlives a power cut, where folders can be asked for that."""
    with contextlib.suppress(OSError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
