"""Tensors and facts in one safetensors file, whose every byte is covered by a checksum.

The data is cut into pieces of whole rows. The last tensor, `checksums` `[pieces + 1, 8]` bytes, has those of the
pieces and then the header's: so a file is written from its beginning to its end, and pieces are read and checked
beside one another, straight out of the memory that the file is mapped to.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsekv.errors import CacheFileError, CacheStateError
from sparsekv.pages.checksums import CHECKSUMS, FASTEST
from sparsekv.user_cache import appearing_file

FORMAT = 1  # of what a file means, pages and digests included
PIECE = 16 << 20  # bytes that are copied and checked at once, but for a row that is larger
THREADS = min(16, os.cpu_count() or 1)
Progress = Callable[[int], object]  # called with the number of bytes that are done since the last call

_MARK, _CHECKSUMS, _META, _WORD = "sparsekv_cache", "checksums", "__metadata__", 8
_MAX_HEADER = 100 << 20  # bytes; safetensors' own limit
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Spec(NamedTuple):
    """What a tensor of a file looks like; it has at least one dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def told(cls, shape: Any, dtype: str) -> Spec:
        """As a header tells it. Raises KeyError, TypeError or ValueError if that makes no sense."""
        if not shape or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"a shape of {shape}")
        return cls(tuple(shape), _DTYPES[dtype])

    @property
    def row_nbytes(self) -> int:
        """Bytes of one entry of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.shape[0] * self.row_nbytes


class Source(NamedTuple):
    """A tensor to be saved; `read(first, last)` gives its rows from `first` to before `last`, on any device."""

    spec: Spec
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Source:
        """A tensor that is there as a whole. It stays one that can be resized: what numpy looks into does not."""
        return cls(Spec(tuple(tensor.shape), tensor.dtype), lambda first, last: tensor[first:last].clone())


class Target(NamedTuple):
    """Where a tensor goes that is loaded; `write(first, last, rows)` takes its rows from `first` to before `last`.
    It is called from several threads. The rows are on the CPU, in memory that a GPU copies from by itself, and the
    caller's again when it has done so."""

    spec: Spec
    device: torch.device
    write: Callable[[int, int, Tensor], object]

    @classmethod
    def of(cls, tensor: Tensor) -> Target:
        """A tensor that is there."""
        return cls(
            Spec(tuple(tensor.shape), tensor.dtype),
            tensor.device,
            lambda first, last, rows: tensor[first:last].copy_(rows, non_blocking=True),
        )


class _Piece(NamedTuple):
    name: str
    first: int
    last: int
    start: int  # in the data
    nbytes: int


# -- writing


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
    pieces, checksum = _pieces(specs, PIECE), CHECKSUMS[FASTEST]
    with appearing_file(Path(path)) as file, ThreadPoolExecutor(THREADS) as pool, _ToDisk(file) as to_disk:
        header = _header(facts, specs, len(pieces))
        file.write(header)
        checks: list[Future[int]] = []
        for content in _on_host(sources[piece.name].read(piece.first, piece.last) for piece in pieces):
            checks.append(pool.submit(checksum, content))
            file.write(content.data)
            to_disk.go_on()
            if len(checks) > THREADS:
                checks[-THREADS].result()  # then what it was of may be overwritten
            progress(content.nbytes)
        checks.append(pool.submit(checksum, header))
        file.write(b"".join(check.result().to_bytes(_WORD, "little") for check in checks))


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
    marks = {_MARK: str(FORMAT), "checksum": FASTEST, "piece": str(PIECE), "facts": json.dumps(facts)}
    content: dict[str, Any] = {_META: marks}
    start = 0
    for name, spec in {**specs, _CHECKSUMS: Spec((num_pieces + 1, _WORD), torch.uint8)}.items():
        if spec.dtype not in _NAMES:
            raise CacheStateError(f"A cache cannot be saved that has tensors of dtype {spec.dtype} ({name}).")
        end = start + spec.nbytes
        content[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _WORD)
    return len(text).to_bytes(_WORD, "little") + text


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
        buffer = torch.empty(max(len(flat), PIECE), dtype=torch.uint8, device="cpu", pin_memory=True)
    buffers.append(buffer)
    with torch.cuda.device(flat.device):
        fetched, event = buffer[: len(flat)].copy_(flat, non_blocking=True), torch.cuda.Event()
        event.record()
    return fetched, event


def _bytes_of(fetched: Tensor, event: Any) -> np.ndarray[Any, Any]:
    if event is not None:
        event.synchronize()
    return fetched.numpy()


# -- reading


class PieceFile:
    """A file that `write` has written, mapped to memory. Its header is checked; its pieces are when they are read.

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
        start = _WORD + int.from_bytes(self._bytes[:_WORD].tobytes(), "little")
        if not _WORD < start <= min(self.nbytes, _MAX_HEADER):
            raise self._torn("its header has no end")
        self._data = self._bytes[start:]
        try:
            self._read_header(self._bytes[:start])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise error if isinstance(error, CacheFileError) else self._torn("its header cannot be read") from error

    def _read_header(self, header: np.ndarray[Any, Any]) -> None:
        content = json.loads(header[_WORD:].tobytes())
        marks = content.pop(_META)
        if marks[_MARK] != str(FORMAT):
            raise CacheFileError(
                f"{self.path} is a cache in format {marks[_MARK]!r}, and this version of sparsekv reads {FORMAT}."
            )
        if marks["checksum"] not in CHECKSUMS:
            raise CacheFileError(
                f"{self.path} has checksums of kind {marks['checksum']!r}, and only {', '.join(CHECKSUMS)} can be "
                "checked here: xxh3_64 needs the package xxhash."
            )
        self._checksum = CHECKSUMS[marks["checksum"]]
        if self._checksum(header) != int.from_bytes(self._data[-_WORD:].tobytes(), "little"):
            raise self._torn("its header is not what was written, or its end is missing")
        specs = {name: Spec.told(told["shape"], told["dtype"]) for name, told in content.items()}
        if sum(spec.nbytes for spec in specs.values()) != len(self._data):
            raise self._torn("it is not as long as its header says")
        self._checks = np.frombuffer(self._data[-specs.pop(_CHECKSUMS).nbytes :].tobytes(), "<u8").tolist()
        self.specs, self._pieces = specs, _pieces(specs, int(marks["piece"]))
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


def _pieces(specs: Mapping[str, Spec], size: int) -> list[_Piece]:
    """The pieces of tensors that lie one behind the other."""
    found, start = [], 0
    for name, spec in specs.items():
        step = max(1, size // max(1, spec.row_nbytes))
        for first in range(0, spec.shape[0] if spec.nbytes else 0, step):
            last = min(first + step, spec.shape[0])
            found.append(_Piece(name, first, last, start, (last - first) * spec.row_nbytes))
            start += found[-1].nbytes
    return found
