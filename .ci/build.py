"""Builds the sdist and, from it, the wheel: the same bytes for the same commit, whoever builds.

python .ci/build.py [FOLDER]  # default: dist

The time in the archives is that of the last commit, or SOURCE_DATE_EPOCH if it is set.
"""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EARLIEST = 315532800  # 1980, before which a zip file knows no time: for a tree that is no checkout


def commit_time() -> int:
    """Seconds since 1970."""
    if "SOURCE_DATE_EPOCH" in os.environ:
        return int(os.environ["SOURCE_DATE_EPOCH"])
    asked = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return int(asked.stdout) if asked.returncode == 0 and asked.stdout.strip() else EARLIEST


def build(kind: str, tree: Path, out: Path, when: int) -> Path:
    """Builds `sdist` or `wheel` of a tree with the tools that are installed; nothing is fetched."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": str(when)}, stdout=subprocess.DEVNULL)
    (found,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


def repack(sdist: Path, when: int) -> None:
    """Rewrites it sorted, with one time, one owner and plain modes: what differs between machines."""
    with tarfile.open(sdist) as old:
        members = sorted(old.getmembers(), key=lambda member: member.name)
        content = [old.extractfile(member).read() if member.isfile() else b"" for member in members]
    with gzip.GzipFile(sdist, "wb", mtime=when) as file, tarfile.open(fileobj=file, mode="w") as new:
        for member, data in zip(members, content, strict=True):
            member.mtime, member.uid, member.gid, member.uname, member.gname = when, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, io.BytesIO(data) if member.isfile() else None)


def main(out: Path) -> None:
    """Leaves exactly one sdist and one wheel in the folder."""
    os.umask(0o022)
    when = commit_time()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as spare:
        sdist = build("sdist", ROOT, Path(spare, "sdist"), when)
        repack(sdist, when)
        with tarfile.open(sdist) as archive:
            archive.extractall(spare, filter="data")
        wheel = build("wheel", Path(spare, sdist.name.removesuffix(".tar.gz")), Path(spare, "wheel"), when)
        for made in (sdist, wheel):
            (out / made.name).write_bytes(made.read_bytes())
            print(f"Written: {out / made.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve())
