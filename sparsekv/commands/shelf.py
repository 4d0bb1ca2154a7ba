"""Documents that were read once, kept in the user's cache folder for the next time they are asked."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsekv import PagedCache, Patch
from sparsekv.cache.saving import what_pages_follow_from
from sparsekv.command_line import positive
from sparsekv.errors import CacheFileError, ConfigError
from sparsekv.hf.fingerprint import fingerprint
from sparsekv.hf.memory import GIB
from sparsekv.hf.ranks import Ranks
from sparsekv.pages.piece_file import PieceFile
from sparsekv.pages.pieces import Progress
from sparsekv.user_cache import PARTIAL, cache_directory

SUFFIX = ".safetensors"
LIMIT = 64  # GiB
_LEFT_FREE = 20  # one part in so many of the disk is
_STALE = 24 * 3600  # seconds after which nobody writes to what is not finished


@dataclass(frozen=True)
class Document:
    """A file on the shelf.

    Attributes:
        name: that it is deleted by.
        title, model, num_tokens: as the file says; empty if it is damaged.
        nbytes: of the file.
        used: seconds since 1970.
    """

    path: Path
    name: str
    title: str
    model: str
    num_tokens: int
    nbytes: int
    used: float


class Shelf:
    """A folder of documents of limited size: what was used longest ago goes first.

    Args:
        folder: need not exist.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int = LIMIT * GIB) -> None:
        self.folder, self.limit = folder, limit

    @classmethod
    def of_user(cls, limit: int = LIMIT * GIB) -> Shelf | None:
        """That of the user; None without a home."""
        folder = cache_directory("documents")
        return None if folder is None else cls(folder, limit)

    def place(self, patch: Patch, ids: Tensor) -> Path:
        """Where a document `[1, n]` is, or is to be, as this model reads it under these settings."""
        model = {name: x for name, x in fingerprint(patch.model).items() if name != "name"}
        told = model, what_pages_follow_from(patch.config), ids.shape
        known = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        known.update(ids.cpu().numpy().tobytes())
        return self.folder / f"{known.hexdigest()[:32]}{SUFFIX}"

    def take(self, patch: Patch, path: Path, reserve_tokens: int, progress: Progress) -> PagedCache:
        """What is kept there. Raises as `Patch.load`."""
        cache = patch.load(path, reserve_tokens=reserve_tokens, progress=progress)
        with contextlib.suppress(OSError):  # the folder may be one that cannot be written to
            os.utime(path)
        return cache

    def keep(self, cache: PagedCache, path: Path, title: str, progress: Progress) -> None:
        """Keeps a document, after there is room for it.

        Raises:
            ConfigError: there is none. OSError: it cannot be written. CacheStateError: it cannot be saved.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what was read
        self._make_room(cache.nbytes, path)
        cache.save(path, title=title, progress=progress)

    def documents(self) -> list[Document]:
        """All that is kept; what was used last comes first."""
        found = []
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                found.append(_read(path))
        return sorted(found, key=lambda document: -document.used)

    def delete(self, names: list[str]) -> list[Document]:
        """Deletes those of these names, or beginnings of names, and returns them.

        Raises:
            ConfigError: a name is that of none, or of several. Nothing is deleted then.
        """
        kept = self.documents()
        found = {}
        for name in names:
            meant = [document for document in kept if document.name.startswith(name)]
            if len(meant) != 1:
                raise ConfigError(f"{name!r} names {len(meant)} documents: `sparsekv documents` lists all.")
            found[meant[0].name] = meant[0]
        for document in found.values():
            document.path.unlink(missing_ok=True)
        return list(found.values())

    # -- how

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{SUFFIX}"))

    def _make_room(self, nbytes: int, path: Path) -> None:
        for left in self.folder.glob(f".*{PARTIAL}"):  # by processes that were killed
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
        if nbytes > self.limit:
            raise ConfigError(f"it takes {nbytes / GIB:.1f} GiB, and {self.limit / GIB:.1f} are allowed")
        others = [(used, size, other) for used, size, other in self._usage() if other != path]
        taken = sum(size for _, size, _ in others)
        for _, size, oldest in sorted(others):
            if taken + nbytes <= self.limit:
                break
            oldest.unlink(missing_ok=True)
            taken -= size
        disk = shutil.disk_usage(self.folder)
        if nbytes > disk.free - disk.total // _LEFT_FREE:
            raise ConfigError(f"it takes {nbytes / GIB:.1f} GiB, and the disk has {disk.free / GIB:.1f} left")

    def _usage(self) -> Iterator[tuple[float, int, Path]]:
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_mtime, status.st_size, path


def _read(path: Path) -> Document:
    status = path.stat()
    try:
        facts = PieceFile(path).facts
        told = str(facts["title"]), str(facts["model"]["name"] or facts["model"]["class"]), int(facts["num_tokens"])
    except (CacheFileError, KeyError, TypeError, ValueError):
        told = "", "", 0
    return Document(path, path.stem, *told, status.st_size, status.st_mtime)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--no-keep` and `--keep-at-most`."""
    parser.add_argument(
        "--no-keep", action="store_true",
        help="read the document anew, and do not keep what is read (several ranks never do)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-at-most", type=positive, default=LIMIT, metavar="GIB",
        help="of all documents; those used longest ago go first (default %(default)s)",
    )  # fmt: skip


def chosen(args: argparse.Namespace) -> Shelf | None:
    """The shelf that the options ask for; None: nothing is kept."""
    if args.no_keep or Ranks.of_launch().size > 1:
        return None
    return Shelf.of_user(args.keep_at_most * GIB)
