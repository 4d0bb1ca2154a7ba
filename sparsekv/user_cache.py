"""Where what is made or fetched once is kept for later runs: compiled kernels, models."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
