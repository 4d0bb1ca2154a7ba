"""Writes a file of pieces, or leaves the one that is there: see `pieces`."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sparsekv.errors import CacheStateError
from sparsekv.pages import pieces
from sparsekv.pages.checksums import CHECKSUMS, FASTEST
from sparsekv.pages.pieces import CHECKS, DTYPE_NAMES, MARK, META, THREADS, WORD, Progress, Source, Spec, pieces_of
from sparsekv.user_cache import appearing_file


def write(
    path: str | os.PathLike[str],
    facts: Mapping[str, Any],
    sources: Mapping[str, Source],
    progress: Progress = lambda nbytes: None,
) -> None:
    """Writes a file, or leaves the one that is there as it is.

    Args:
        facts: what JSON can hold.

    Raises:
        CacheStateError: there is a tensor of a dtype that files cannot have.
        OSError: the file cannot be written.
    """
    sources = dict(sorted(sources.items(), key=lambda item: -item[1].spec.dtype.itemsize))  # so all are aligned
    specs = {name: source.spec for name, source in sources.items()}
    parts, checksum = pieces_of(specs, pieces.PIECE), CHECKSUMS[FASTEST]
    with appearing_file(Path(path)) as file, ThreadPoolExecutor(THREADS) as pool, _ToDisk(file) as to_disk:
        header = _header(facts, specs, len(parts))
        file.write(header)
        checks: list[Future[int]] = []
        for content in _on_host(sources[piece.name].read(piece.first, piece.last) for piece in parts):
            checks.append(pool.submit(checksum, content))
            file.write(content.data)
            to_disk.go_on()
            if len(checks) > THREADS:
                checks[-THREADS].result()  # then what it was of may be overwritten
            progress(content.nbytes)
        checks.append(pool.submit(checksum, header))
        file.write(b"".join(check.result().to_bytes(WORD, "little") for check in checks))


class _ToDisk:
    """Sends what has been written to the disk while more is being written, instead of all of it at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._pool = file, ThreadPoolExecutor(1)
        self._going: Future[None] | None = None

    def go_on(self) -> None:
        """Begins, unless it is still at it. Raises OSError if the disk has failed before: it says so only once."""
        if self._going is None or self._going.done():
            self._wait()
            self._going = self._pool.submit(getattr(os, "fdatasync", os.fsync), self._file.fileno())

    def _wait(self) -> None:
        if self._going is not None:
            self._going.result()

    def __enter__(self) -> _ToDisk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()


def _header(facts: Mapping[str, Any], specs: Mapping[str, Spec], num_pieces: int) -> bytes:
    marks = {MARK: str(pieces.FORMAT), "checksum": FASTEST, "piece": str(pieces.PIECE), "facts": json.dumps(facts)}
    content: dict[str, Any] = {META: marks}
    start = 0
    for name, spec in {**specs, CHECKS: Spec((num_pieces + 1, WORD), torch.uint8)}.items():
        if spec.dtype not in DTYPE_NAMES:
            raise CacheStateError(f"A cache cannot be saved that has tensors of dtype {spec.dtype} ({name}).")
        end = start + spec.nbytes
        content[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % WORD)
    return len(text).to_bytes(WORD, "little") + text


def _on_host(parts: Iterator[Tensor]) -> Iterator[np.ndarray[Any, Any]]:
    """The bytes of tensors. Those of a GPU are fetched one ahead, into memory that is used again `THREADS` later."""
    buffers: deque[Tensor] = deque()
    ahead: deque[tuple[Tensor, Any]] = deque()
    for part in parts:
        ahead.append(_fetched(part, buffers))
        if len(ahead) > 1:
            yield _bytes_of(*ahead.popleft())
    for last in ahead:
        yield _bytes_of(*last)


def _fetched(part: Tensor, buffers: deque[Tensor]) -> tuple[Tensor, Any]:
    """The same on the CPU, and the event after which it is there."""
    flat = part.detach().contiguous().flatten().view(torch.uint8)
    if flat.device.type != "cuda":
        return flat.cpu(), None
    buffer = buffers.popleft() if len(buffers) >= THREADS + 2 else flat.new_empty(0, device="cpu")
    if len(buffer) < len(flat):
        buffer = torch.empty(max(len(flat), pieces.PIECE), dtype=torch.uint8, device="cpu", pin_memory=True)
    buffers.append(buffer)
    with torch.cuda.device(flat.device):
        fetched, event = buffer[: len(flat)].copy_(flat, non_blocking=True), torch.cuda.Event()
        event.record()
    return fetched, event


def _bytes_of(fetched: Tensor, event: Any) -> np.ndarray[Any, Any]:
    if event is not None:
        event.synchronize()
    return fetched.numpy()
