"""Makes one large text of plain English out of Debian's text and documentation packages, to measure real models on.

    packages="r-cran-janeaustenr anarchism jargon-text debian-handbook gimp-help-en apache2-doc perl-doc
        python3.11-doc postgresql-doc-15 python-django-doc debian-policy debian-reference-en developers-reference
        installation-guide-amd64 harden-doc debian-history debian-faq shorewall-doc exim4-doc-html bacula-doc
        renpy-doc libreoffice-help-en-us aptitude-doc-en git-doc"
    apt-get download $packages
    python -m tools.real_texts $(for name in $packages; do ls ${name}_*.deb; done) --out real.txt

Debian 12 gives 42 MB so. Only paragraphs that read as English prose are kept: code, tables, lists of names, indexes
and other languages are left out, and so is a paragraph that was there before. A package's files are joined in their
running order and cut into runs of about `--run` characters; the runs of all packages are then shuffled, so that
pieces of the text are of many kinds while each reads on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import random
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

MIN_WORDS = 12  # of a paragraph
MIN_COMMON = 0.22  # of a paragraph's words are among the most common ones of English; of code, hardly any
MIN_LETTERS = 0.92  # of its characters are letters, spaces or the signs of prose
MIN_FILE = 1500  # characters of prose: with less, a file is an index or a reference of names
_COMMON = frozenset(
    "the of and to a in is that it was for on be with as i his he at by not this but from or have an are they which "
    "you had her she all if will their there we him one been has would when so no what can more your my who its were "
    "do them than then into up out some other".split()
)
_SENTENCE_END = tuple(".!?:;\"'”’)—")
_NOT_PROSE = re.compile(r"[^\w\s.,;:!?'\"“”‘’()—–-]|[\d_]")
_LEFT_OUT = re.compile(r"changelog|copyright|(^|/)(man/|genindex|index-|search|NEWS|README)", re.I)
_OTHER_LANGUAGE = re.compile(
    r"(^|/)(?!en[/_-])[a-z]{2}([_-][A-Za-z]{2,4})?/|\.(?!en\b)[a-z]{2}([_-][a-z]{2})?\.(html|txt)"
)


class _Paragraphs(HTMLParser):
    """The text of a page by paragraphs, without what stands in code, tables and menus."""

    DROPPED = frozenset(("script", "style", "pre", "table", "nav", "head", "svg", "math", "dt", "footer"))
    INLINE = frozenset(
        "a abbr acronym b bdi big cite code del dfn em font i img ins kbd mark q s samp small span strong sub sup tt "
        "u var wbr".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._dropped: list[str] = []
        self._parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._border(tag)
        if tag in self.DROPPED:
            self._dropped.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._border(tag)
        if tag in self._dropped:
            del self._dropped[self._dropped.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self._parts.append(data)

    def close(self) -> None:
        super().close()
        self._border("html")

    def _border(self, tag: str) -> None:
        if tag not in self.INLINE:
            self.found.append("".join(self._parts))
            self._parts = []


def from_html(data: bytes) -> list[str]:
    parser = _Paragraphs()
    parser.feed(_decoded(data))
    parser.close()
    return parser.found


def from_text(data: bytes) -> list[str]:
    """Paragraphs are set apart by empty lines."""
    return re.split(r"\n\s*\n", _decoded(data))


def from_pod(data: bytes) -> list[str]:
    """Perl's documentation: `B<bold>`, `=head1` and, indented, code."""
    blocks = [block for block in from_text(data) if not re.match(r"=|\s", block)]
    for _ in range(3):  # commands stand inside others
        blocks = [re.sub(r"\bL<([^<>|]*)\|[^<>]*>", r"\1", block) for block in blocks]
        blocks = [re.sub(r"\b[A-Z]<+\s*([^<>]*?)\s*>+", r"\1", block) for block in blocks]
    return blocks


def from_rdb(data: bytes) -> list[str]:
    """R's data files: compressed vectors of strings, of which each is a line of a book here."""
    lines: list[str] = []
    while data:
        entry = zlib.decompressobj()
        lines += _r_strings(entry.decompress(data[4:]))  # behind four bytes that say how long it will be
        data = entry.unused_data
    return re.split(r"\n\s*\n", "\n".join(lines))


def _r_strings(data: bytes) -> Iterator[str]:
    """Strings are a mark of the type, their length and their bytes."""
    end = 0
    for mark in re.finditer(rb"\0[\x04\0][\0\x80]\x09(?s:(....))", data):
        if mark.start() >= end:
            end = mark.end() + int.from_bytes(mark[1], "big")
            yield data[mark.end() : end].decode("utf-8", "replace")


READERS = {".html": from_html, ".htm": from_html, ".txt": from_text, ".pod": from_pod, ".rdb": from_rdb}


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def is_prose(paragraph: str) -> bool:
    words = re.findall(r"[a-z]+", paragraph.lower())
    return (
        len(words) >= MIN_WORDS
        and paragraph.endswith(_SENTENCE_END)
        and sum(word in _COMMON for word in words) >= MIN_COMMON * len(words)
        and len(_NOT_PROSE.findall(paragraph)) <= (1 - MIN_LETTERS) * len(paragraph)
    )


def prose(name: str, data: bytes, seen: set[str]) -> list[str]:
    """A file's paragraphs that read as English and were not seen before."""
    blocks = READERS[_suffix(name)](gzip.decompress(data) if name.endswith(".gz") else data)
    plain = [" ".join(unicodedata.normalize("NFC", block).split()) for block in blocks]
    kept = [block for block in dict.fromkeys(plain) if block not in seen and is_prose(block)]
    seen.update(kept)
    return kept if sum(map(len, kept)) >= MIN_FILE else []


def files_of(source: Path) -> tuple[str, list[tuple[str, bytes]]]:
    """What a package or a folder is called, and its files that can be read, in running order: their names and bytes.
    Where there are pages of HTML, plain text is left out: it is the same once more, or their source."""
    if source.is_dir():
        name, paths = source.name, sorted(path for path in source.rglob("*") if path.is_file())
        files = [(path.relative_to(source).as_posix(), path.read_bytes()) for path in paths if _suffix(path.name)]
    else:
        parts = dict(_members(source.read_bytes()))
        control = dict(_unpacked(parts["control"]))["./control"].decode()
        name = " ".join(re.findall(r"^(?:Package|Version): (.*)$", control, re.M))
        files = sorted(file for file in _unpacked(parts["data"]) if _suffix(file[0]))
    files = [file for file in files if not _LEFT_OUT.search(file[0]) and not _OTHER_LANGUAGE.search(file[0])]
    if sum(_suffix(file) == ".html" for file, _ in files) > 1:
        files = [(file, data) for file, data in files if _suffix(file) != ".txt"]
    return name, files


def _suffix(name: str) -> str:
    """How a file is read; empty: it is not."""
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS else ""


def _members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """The parts of a .deb, which is an `ar` archive of tar files: `control` and `data`."""
    start = len(b"!<arch>\n")
    while start < len(archive):
        name, size = archive[start : start + 16].decode().strip(), int(archive[start + 48 : start + 58])
        yield name.partition(".")[0], archive[start + 60 : start + 60 + size]
        start += 60 + size + size % 2


def _unpacked(archive: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file and (_suffix(member.name) or member.name == "./control"):
                yield member.name, file.read()


def runs(blocks: list[str], size: int) -> list[str]:
    """Paragraphs that follow each other, joined to about so many characters."""
    found: list[list[str]] = [[]]
    for block in blocks:
        if sum(map(len, found[-1])) >= size:
            found.append([])
        found[-1].append(block)
    return ["\n\n".join(run) for run in found if run]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help=".deb files, or folders of unpacked ones")
    parser.add_argument("--out", type=Path, required=True, help="the text")
    parser.add_argument("--run", type=int, default=100_000, help="characters that are kept together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the runs (%(default)s)")
    options = parser.parse_args(args)
    seen: set[str] = set()
    pieces: list[str] = []
    for source in options.sources:
        name, files = files_of(source)
        blocks = [block for file, data in files for block in prose(file, data, seen)]
        print(f"{name}: {sum(map(len, blocks)):,} characters", flush=True)
        pieces += runs(blocks, options.run)
    random.Random(options.seed).shuffle(pieces)
    data = ("\n\n".join(pieces) + "\n").encode()
    options.out.write_bytes(data)
    print(f"{options.out}: {len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
