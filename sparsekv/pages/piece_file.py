"""Reads a file of pieces: see `pieces`."""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekv.errors import CacheFileError
from sparsekv.pages.checksums import CHECKSUMS
from sparsekv.pages.pieces import CHECKS, FORMAT, MARK, META, PIECE, THREADS, WORD, Progress, Spec, Target, pieces_of

_MAX_HEADER = 100 << 20  # bytes; safetensors' own limit


class PieceFile:
    """A file that `piece_writer.write` has written, mapped to memory. Its header is checked; pieces are when they are
    read.

    Attributes:
        facts: as they were given; specs: what tensors there are.
        nbytes: of the file.

    Raises:
        CacheFileError: it cannot be read, is none of ours, or is not whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._local = path, threading.local()
        self._bytes = _mapped(path)
        self.nbytes = len(self._bytes)
        start = WORD + int.from_bytes(self._bytes[:WORD].tobytes(), "little")
        if not WORD < start <= min(self.nbytes, _MAX_HEADER):
            raise self._torn("its header has no end")
        self._data = self._bytes[start:]
        try:
            self._read_header(self._bytes[:start])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise error if isinstance(error, CacheFileError) else self._torn("its header cannot be read") from error

    def _read_header(self, header: np.ndarray[Any, Any]) -> None:
        content = json.loads(header[WORD:].tobytes())
        marks = content.pop(META)
        if marks[MARK] != str(FORMAT):
            raise CacheFileError(
                f"{self.path} is a cache in format {marks[MARK]!r}, and this version of sparsekv reads {FORMAT}."
            )
        if marks["checksum"] not in CHECKSUMS:
            raise CacheFileError(
                f"{self.path} has checksums of kind {marks['checksum']!r}, and only {', '.join(CHECKSUMS)} can be "
                "checked here: xxh3_64 needs the package xxhash."
            )
        self._checksum = CHECKSUMS[marks["checksum"]]
        if self._checksum(header) != int.from_bytes(self._data[-WORD:].tobytes(), "little"):
            raise self._torn("its header is not what was written, or its end is missing")
        specs = {name: Spec.told(told["shape"], told["dtype"]) for name, told in content.items()}
        if sum(spec.nbytes for spec in specs.values()) != len(self._data):
            raise self._torn("it is not as long as its header says")
        self._checks = np.frombuffer(self._data[-specs.pop(CHECKS).nbytes :].tobytes(), "<u8").tolist()
        self.specs, self._pieces = specs, pieces_of(specs, int(marks["piece"]))
        self.facts: dict[str, Any] = json.loads(marks["facts"])
        if len(self._checks) != len(self._pieces) + 1 or not isinstance(self.facts, dict):
            raise self._torn("its header says what cannot be")

    def tensor(self, name: str) -> Tensor:
        """A small tensor, on the CPU.

        Raises:
            CacheFileError: there is none of that name, or it is not what was written.
        """
        if name not in self.specs:
            raise self._torn(f"it has no {name}")
        spec = self.specs[name]
        found = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
        for i, piece in enumerate(self._pieces):
            if piece.name == name:
                self._fill(i, Target.of(found))
        return found

    def fill(self, targets: Mapping[str, Target], progress: Progress = lambda nbytes: None) -> None:
        """Reads tensors, in several threads, and checks all pieces.

        Raises:
            CacheFileError: a tensor is missing or looks otherwise, before anything is written; or a piece is not what
                was written.
        """
        for name, target in targets.items():
            if self.specs.get(name) != target.spec:
                raise self._torn(f"{name} is {self.specs.get(name)}, and must be {target.spec}")
        with ThreadPoolExecutor(THREADS) as pool:
            filling = [pool.submit(self._fill, i, targets.get(x.name)) for i, x in enumerate(self._pieces)]
            try:
                for piece, done in zip(self._pieces, filling, strict=True):
                    done.result()
                    progress(piece.nbytes)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    @torch.no_grad()
    def _fill(self, index: int, target: Target | None) -> None:
        """Checks a piece and writes it to its place."""
        piece = self._pieces[index]
        content = self._data[piece.start : piece.start + piece.nbytes]
        on_gpu = target is not None and target.device.type == "cuda"
        content = self._pinned(content) if on_gpu else content
        if self._checksum(content) != self._checks[index]:
            raise self._torn(f"rows {piece.first} to {piece.last - 1} of {piece.name} are not what was written")
        if target is None:
            return
        shape = (piece.last - piece.first, *target.spec.shape[1:])
        target.write(piece.first, piece.last, torch.from_numpy(content).view(target.spec.dtype).view(shape))
        if on_gpu:
            with torch.cuda.device(target.device):
                event = torch.cuda.Event()
                event.record()
            event.synchronize()

    def _pinned(self, content: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A copy that a GPU can copy from by itself, in memory of this thread."""
        if len(getattr(self._local, "buffer", ())) < len(content):
            size = max(len(content), PIECE)
            self._local.buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        held: np.ndarray[Any, Any] = self._local.buffer.numpy()[: len(content)]
        np.copyto(held, content)  # one thread's work, whatever torch's threads do
        return held

    def _torn(self, reason: str) -> CacheFileError:
        return CacheFileError(f"{self.path} is torn, or no saved cache: {reason}.")


def _mapped(path: str | os.PathLike[str]) -> np.ndarray[Any, Any]:
    """The bytes of a file, which stays the same even if another takes its name."""
    try:
        with open(path, "rb") as file:
            # Copied where it is written to, which it never is: torch wants no memory that cannot be.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CacheFileError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CacheFileError(f"{path} is empty.") from error
    return np.frombuffer(mapped, np.uint8)
