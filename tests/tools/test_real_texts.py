"""Plain English out of packages: what is kept of HTML, Perl's and R's files, and of what a .deb holds."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from pathlib import Path

import pytest

from tools import real_texts
from tools.real_texts import files_of, from_html, from_pod, from_rdb, is_prose, main, prose, runs

SENTENCE = "It was in the evening that she came to the house of her brother, and he was not there to see it."


def test_a_page_gives_its_paragraphs_alone() -> None:
    page = f"<head>No</head><ul><li>{SENTENCE}</ul><pre>x = 1</pre><table><tr><td>No</table><p>A <b>b</b>."
    assert [text.strip() for text in from_html(page.encode()) if text.strip()] == [SENTENCE, "A b."]


def test_perls_marks_are_taken_off() -> None:
    pod = b"=head1 NAME\n\nSee L<the B<manual>|perlre> and C<< $x >>.\n\n    code();\n\nDone."
    assert from_pod(pod) == ["See the manual and $x.", "Done."]


def test_rs_strings_are_lines() -> None:
    def entry(*lines: bytes) -> bytes:
        strings = b"".join(b"\0\4\0\x09" + len(line).to_bytes(4, "big") + line for line in lines)
        return len(strings).to_bytes(4, "big") + zlib.compress(strings)

    assert from_rdb(entry(b"One line", b"and its end.", b"") + entry(b"Two.")) == ["One line\nand its end.", "Two."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENTENCE, True),
        (SENTENCE[:-1], False),
        ("It is so.", False),
        ("if (x[i] == 0) { return the_map[i]; } " * 3 + ".", False),
        ("Der Hund und die Katze sind nicht im Haus, denn sie sind mit dem Kind am See.", False),
        ("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi.", False),
    ],
)
def test_prose_is_told_from_code_and_other_languages(text: str, expected: bool) -> None:
    assert is_prose(text) is expected


def test_what_was_seen_is_left_out_and_so_is_a_short_file() -> None:
    seen: set[str] = set()
    text = "\n\n".join(f"{SENTENCE[:-1]} {'again ' * i}." for i in range(20))
    assert len(prose("a.txt.gz", gzip.compress(text.encode()), seen)) == 20
    assert prose("b.txt", f"{text}\n\nIt is new, and {SENTENCE}".encode(), seen) == []


def deb(path: Path, **files: str) -> Path:
    def tarred(content: dict[str, str]) -> bytes:
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:xz") as tar:
            for name, text in content.items():
                (info := tarfile.TarInfo(f"./{name}")).size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
        return file.getvalue()

    parts = {"control.tar.xz": tarred({"control": "Package: a-book\nVersion: 1.0\n"}), "data.tar.xz": tarred(files)}
    packed = b"".join(f"{name:<48}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
                      for name, data in parts.items())  # fmt: skip
    path.write_bytes(b"!<arch>\n" + packed)
    return path


def test_a_package_is_read_in_running_order(tmp_path: Path) -> None:
    files = {"b/2.html": "two", "b/1.html": "one", "b/2.txt": "two", "fr/1.html": "un", "b/changelog.html": ""}
    package = deb(tmp_path / "book.deb", **files)
    assert files_of(package) == ("a-book 1.0", [("./b/1.html", b"one"), ("./b/2.html", b"two")])
    for name, text in files.items():
        (tmp_path / "book" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "book" / name).write_text(text)
    assert files_of(tmp_path / "book") == ("book", [("b/1.html", b"one"), ("b/2.html", b"two")])


def test_runs_are_shuffled_and_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_texts, "MIN_FILE", 1)
    blocks = [f"{SENTENCE[:-1]} {sign}." for sign in "abcdefgh"]
    package = deb(tmp_path / "book.deb", **{"a.html": "".join(f"<p>{block}</p>" for block in blocks)})
    main([str(package), "--out", str(tmp_path / "out.txt"), "--run", "150"])
    assert runs(blocks, 150) == ["\n\n".join(blocks[i : i + 2]) for i in range(0, 8, 2)]
    written = (tmp_path / "out.txt").read_text().removesuffix("\n").split("\n\n")
    assert written != blocks
    assert sorted(written) == blocks
    assert all(written[i] < written[i + 1] for i in range(0, 8, 2))
    said = capsys.readouterr().out
    assert "a-book 1.0: 784 characters" in said
    assert "SHA-256" in said
