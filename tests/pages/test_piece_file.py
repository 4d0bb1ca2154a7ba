"""Files of pieces: what is written is what is read; what is cut short leaves the file that was there."""

from __future__ import annotations

import os
import resource
import signal
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsekv.errors import CacheFileError, CacheStateError
from sparsekv.pages import checksums, piece_file, piece_writer, pieces
from sparsekv.pages.piece_file import PieceFile
from sparsekv.pages.piece_writer import write
from sparsekv.pages.pieces import Source, Spec, Target

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "halves": torch.randn(9, 3, 5).bfloat16(),
    "wide": torch.randn(3, 4, dtype=torch.float64),
    "flags": torch.tensor([[True, False]]),
    "none": torch.zeros(0, 4),
}


def save(path: Path, tensors: dict[str, Tensor] = TENSORS, **facts: object) -> None:
    write(path, facts, {name: Source.of(tensor) for name, tensor in tensors.items()})


def load(path: Path) -> dict[str, Tensor]:
    file = PieceFile(path)
    found = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in file.specs.items()}
    file.fill({name: Target.of(tensor) for name, tensor in found.items()})
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.mark.parametrize("checksum", checksums.CHECKSUMS)
@pytest.mark.parametrize("piece", [1, 64, 1 << 20])
def test_what_is_written_is_read(checksum: str, piece: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_writer, "FASTEST", checksum)
    monkeypatch.setattr(pieces, "PIECE", piece)
    done: list[int] = []
    write(path, {"a": [1, None]}, {name: Source.of(x) for name, x in TENSORS.items()}, done.append)
    assert sum(done) == sum(x.nbytes for x in TENSORS.values())
    file, found, others = PieceFile(path), load(path), load_file(path)
    assert (file.facts, file.nbytes) == ({"a": [1, None]}, path.stat().st_size)
    for name, tensor in TENSORS.items():
        for other in (found[name], file.tensor(name), others[name]):
            assert torch.equal(other, tensor)
            assert other.dtype == tensor.dtype


def test_every_bit_counts(path: Path) -> None:
    save(path)
    whole = path.read_bytes()
    for byte in range(len(whole)):
        content = bytearray(whole)
        content[byte] ^= 1 << byte % 8
        path.write_bytes(content)
        with pytest.raises(CacheFileError, match=r"is torn|in format|has checksums of kind"):
            load(path)


def test_what_is_no_such_file_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, reason in ((b"", "is empty"), (b"text", "is torn, or no saved cache"), (b"\xff" * 99, "no end")):
        path.write_bytes(content)
        with pytest.raises(CacheFileError, match=reason):
            PieceFile(path)
    with pytest.raises(CacheFileError, match="cannot be read: Is a directory"):
        PieceFile(path.parent)
    with pytest.raises(CacheFileError, match="cannot be read: No such file"):
        PieceFile(path.parent / "nowhere")
    monkeypatch.setattr(pieces, "FORMAT", 2)
    save(path)
    monkeypatch.undo()
    with pytest.raises(CacheFileError, match="in format '2', and this version of sparsekv reads 1"):
        PieceFile(path)
    save(path)
    monkeypatch.setattr(piece_file, "CHECKSUMS", {})
    with pytest.raises(CacheFileError, match="has checksums of kind"):
        PieceFile(path)


def test_tensors_that_are_not_as_they_must_be(path: Path) -> None:
    save(path)
    for name, like in (("wide", torch.zeros(3, 5, dtype=torch.float64)), ("other", torch.zeros(1))):
        with pytest.raises(CacheFileError, match=f"{name} is .*and must be"):
            PieceFile(path).fill({name: Target.of(like)})
    with pytest.raises(CacheFileError, match="it has no other"):
        PieceFile(path).tensor("other")
    with pytest.raises(CacheStateError, match=r"dtype torch\.complex64"):
        save(path, {"a": torch.zeros(1, dtype=torch.complex64)})
    assert load(path).keys() == TENSORS.keys()


# -- interrupted


def only(path: Path) -> None:
    """The folder holds the file that was there, and nothing else."""
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert torch.equal(load(path)["wide"], TENSORS["wide"])


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(path, {"large": torch.zeros(1 << 21, dtype=torch.uint8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    only(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, CacheFileError])
def test_what_is_interrupted_leaves_the_old_file(error: type[BaseException], path: Path) -> None:
    def fail(first: int, last: int) -> Tensor:
        raise error

    save(path)
    with pytest.raises(error):
        write(path, {}, {"wide": Source.of(torch.zeros(9)), "last": Source(Spec((1,), torch.uint8), fail)})
    only(path)


def test_a_kill_leaves_the_old_file(path: Path) -> None:
    """And what is left beside it has a name that says so."""

    def kill(first: int, last: int) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    save(path)
    child = os.fork()
    if not child:
        write(path, {}, {"wide": Source.of(torch.zeros(9)), "last": Source(Spec((1,), torch.uint8), kill)})
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = path.parent.glob(".file-*.partial")
    left.unlink()
    only(path)


def test_writers_beside_one_another(path: Path) -> None:
    """Whoever reads finds what one of them has written, all of it."""
    save(path, {"wide": torch.zeros(4096)})

    def keep_writing(number: int) -> None:
        for _ in range(8):
            save(path, {"wide": torch.full((4096,), float(number))})

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(keep_writing, number) for number in range(4)]
        while not all(future.done() for future in writing):
            assert len(load(path)["wide"].unique()) == 1
    for future in writing:
        future.result()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_replaced_while_it_is_read(path: Path) -> None:
    save(path)
    file = PieceFile(path)
    save(path, {"wide": torch.zeros(9)})
    assert torch.equal(file.tensor("wide"), TENSORS["wide"])


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder with a file, in which nothing can be written, not even by root's tests."""
    folder = Path(tempfile.mkdtemp())
    save(folder / "file")
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    os.seteuid(65534 if is_root else os.geteuid())
    yield folder
    os.seteuid(0 if is_root else os.geteuid())
    folder.chmod(stat.S_IRWXU)
    (folder / "file").unlink()
    folder.rmdir()


def test_a_read_only_folder(read_only: Path) -> None:
    with pytest.raises(PermissionError):
        save(read_only / "file")
    only(read_only / "file")
