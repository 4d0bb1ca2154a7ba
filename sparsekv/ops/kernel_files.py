"""Compiled kernels on disk: where they are kept, and files that are whole or not there.

cuda-core 1.2 has a cache of files too, which neither notices a damaged file nor keeps a kernel's symbol.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path

from sparsekv.user_cache import cache_directory

SUFFIX = ".kernel"
FORMAT = 1  # part of a kernel's key: an older format is never read

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel for one architecture."""

    code: bytes
    symbol: str  # the kernel's mangled name


def cache_usage() -> tuple[int, int]:
    """How many kernels the disk cache holds, and their bytes."""
    directory = cache_directory("kernels")
    sizes = [entry.stat().st_size for entry in directory.glob(f"*{SUFFIX}")] if directory else []
    return len(sizes), sum(sizes)


def sha256(content: bytes) -> bytes:
    """The hash by which files are told apart and checked."""
    return hashlib.sha256(content).digest()


def read(entry: Path) -> Cubin | None:
    """What a file holds; None if it is not there, or no longer whole."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    checksum, payload = content[:32], content[32:]
    if sha256(payload) != checksum:
        _log.info("%s is damaged and is replaced", entry)
        return None
    symbol, _, code = payload.partition(b"\0")
    return Cubin(code, symbol.decode())


def write(entry: Path, cubin: Cubin) -> None:
    """In one step, so that no other process ever sees a part of it. If it cannot be done, that is logged."""
    payload = cubin.symbol.encode() + b"\0" + cubin.code
    temporary = entry.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(sha256(payload) + payload)
            temporary.replace(entry)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warn_once(f"{entry.parent}: {error.strerror}")


@functools.cache
def warn_once(reason: str) -> None:
    """Says that kernels are not kept, and why."""
    remedy = "SPARSEKV_CACHE_DIR=... names a folder to keep them in"
    _log.warning("Every process compiles kernels anew, as they cannot be kept (%s). %s.", reason, remedy)
