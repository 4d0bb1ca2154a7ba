"""How tensors and facts lie in one safetensors file, whose every byte is covered by a checksum.

The data is cut into pieces of whole rows. The last tensor, `checksums` `[pieces + 1, 8]` bytes, has those of the
pieces and then the header's: so a file is written from its beginning to its end (`piece_writer`), and pieces are read
and checked beside one another, straight out of the memory that the file is mapped to (`piece_file`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = 1  # of what a file means, pages and digests included
PIECE = 16 << 20  # bytes that are copied and checked at once, but for a row that is larger
THREADS = min(16, os.cpu_count() or 1)
Progress = Callable[[int], object]  # called with the number of bytes that are done since the last call

MARK, CHECKS, META = "sparsekv_cache", "checksums", "__metadata__"  # names in a header
WORD = 8  # bytes of a checksum, and of what says how long the header is
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """What a tensor of a file looks like; it has at least one dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def told(cls, shape: Any, dtype: str) -> Spec:
        """As a header tells it. Raises KeyError, TypeError or ValueError if that makes no sense."""
        if not shape or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"a shape of {shape}")
        return cls(tuple(shape), DTYPES[dtype])

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


class Piece(NamedTuple):
    """Rows of a tensor, from `first` to before `last`, and where they lie in the data, in bytes."""

    name: str
    first: int
    last: int
    start: int
    nbytes: int


def pieces_of(specs: Mapping[str, Spec], size: int) -> list[Piece]:
    """The pieces of tensors that lie one behind the other."""
    found, start = [], 0
    for name, spec in specs.items():
        step = max(1, size // max(1, spec.row_nbytes))
        for first in range(0, spec.shape[0] if spec.nbytes else 0, step):
            last = min(first + step, spec.shape[0])
            found.append(Piece(name, first, last, start, (last - first) * spec.row_nbytes))
            start += found[-1].nbytes
    return found
