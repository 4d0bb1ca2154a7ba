"""Documents that commands have read: loaded the next time, listed, deleted, and never more than there is room for."""

from __future__ import annotations

import argparse
import io
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import sparsekv
from sparsekv.cli import main
from sparsekv.commands import reading, shelf
from sparsekv.commands.shelf import Shelf
from sparsekv.evaluation import testbed
from sparsekv.hf import documents, models
from sparsekv.hf.ranks import Ranks

STORY = testbed.make_story(512, tasks=("needle",), num_questions=1, seed=0)
ASKED = STORY.questions[0].prompt.removeprefix("Question : ").removesuffix(" ? Answer :") + "?"
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return testbed.load()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shelf for each test; the model need not be loaded again."""
    monkeypatch.setenv("SPARSEKV_CACHE_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(models, "load", lambda *names: loaded)
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text(STORY.text)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were read, each time."""
    seen: list[int] = []
    read = documents.read

    def noted(model: Any, ids: Tensor, *more: Any) -> None:
        seen.append(ids.shape[1])
        read(model, ids, *more)

    monkeypatch.setattr(documents, "read", noted)
    return seen


def generate(*options: str) -> int:
    words = ["--model", "some/model", "--document", "story.txt", "--prompt", STORY.questions[0].prompt]
    return main(["generate", *words, "--budget", "128", "--max-new-tokens", "8", *options])


def chat(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED}\n"))
    return main(["chat", "--document", "story.txt", "--budget", "128", "--max-new-tokens", "8", *options])


def test_a_document_is_read_once(reads: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    """By both commands together, where their words around it are the same; the answers do not change."""
    for command, kept in ((generate, [1]), (partial(chat, monkeypatch), [])):
        said = []
        for options in (["--no-keep"], [], [], ["--budget", "256"], ["--no-keep"]):
            assert command(*options) == 0
            said.append(capsys.readouterr())
        assert {printed.out for printed in said} == {said[0].out}
        assert STORY.questions[0].answer in said[0].out
        assert [i for i, printed in enumerate(said) if "Kept for the next time in" in printed.err] == kept
        assert [i for i, printed in enumerate(said) if "Loaded, as it has been read" in printed.err] == (
            [2, 3] if kept else [1, 2, 3]
        )
        assert len(reads) == 2 + len(kept)
        reads.clear()


def test_other_documents_and_settings_are_read(reads: list[int], loaded: tuple[Any, Any]) -> None:
    for options in ([], ["--page-size", "32"], ["--kv", "int8"], ["--prefill", "sparse"]):
        assert generate(*options) == 0
    Path("story.txt").write_text(STORY.text + " more .")
    assert generate() == 0
    assert len(reads) == 5


def test_what_is_damaged_is_read_anew(reads: list[int], capsys: Printed) -> None:
    assert generate() == 0
    (document,) = Shelf.of_user().documents()
    document.path.write_bytes(document.path.read_bytes()[:-1])
    assert main(["documents"]) == 0
    assert "damaged" in capsys.readouterr().out
    assert generate() == 0
    assert "The document is read anew." in capsys.readouterr().err
    assert generate() == 0
    assert len(reads) == 2


def test_what_cannot_be_kept_is_answered_all_the_same(
    reads: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    Path("home").write_text("no folder")
    assert generate() == 0
    assert "The document is not kept: " in capsys.readouterr().err
    Path("home").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1 << 26, total=1 << 31))
    assert generate() == 0
    assert "and the disk has 0.1 left" in capsys.readouterr().err
    assert len(reads) == 2


def test_several_ranks_keep_nothing(reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    shelf.add_arguments(parser)
    assert shelf.chosen(parser.parse_args([])) is not None
    monkeypatch.setattr(Ranks, "size", 2)
    assert shelf.chosen(parser.parse_args([])) is None


def test_what_was_used_longest_ago_goes_first(loaded: tuple[Any, Any], tmp_path: Path, capsys: Printed) -> None:
    model, _ = loaded
    with sparsekv.patch(model, budget=128) as patch:
        kept = Shelf(tmp_path / "shelf")
        for first in range(3):
            reading.cache_of(patch, list(range(first, first + 64)), 0, kept, f"number {first}")
            for place in kept.folder.iterdir():
                os.utime(place, (place.stat().st_atime - 100, place.stat().st_mtime - 100))
        one = max(document.nbytes for document in kept.documents())
        reading.cache_of(patch, list(range(64)), 0, kept)  # the oldest is used again
        assert [document.title for document in kept.documents()] == ["number 0", "number 2", "number 1"]
        stale = kept.folder / ".killed.partial"
        stale.touch()
        os.utime(stale, (0, 0))
        kept.limit = int(3.5 * one)
        reading.cache_of(patch, list(range(9, 73)), 0, kept, "new")
        assert sorted(document.title for document in kept.documents()) == ["new", "number 0", "number 2"]
        assert not stale.exists()
        kept.limit = one // 2
        reading.cache_of(patch, list(range(5, 69)), 0, kept, "too large")
        assert "GiB, and 0.0 are allowed" in capsys.readouterr().err
        assert len(kept.documents()) == 3


def test_documents_are_listed_and_deleted(capsys: Printed) -> None:
    assert main(["documents"]) == 0
    assert "0 documents in" in capsys.readouterr().out
    for options in ([], ["--page-size", "32"]):
        assert generate(*options) == 0
    capsys.readouterr()
    assert main(["documents", "--json"]) == 0
    printed = capsys.readouterr()
    listed = json.loads(printed.out)["documents"]
    assert [document["title"] for document in listed] == ["story.txt"] * 2
    assert "story.txt" in printed.err
    assert all(Path(document["path"]).stat().st_size == document["nbytes"] for document in listed)
    assert main(["documents", "--delete", "nothing"]) == 1
    assert "'nothing' names 0 documents" in capsys.readouterr().err
    assert main(["documents", "--delete", listed[0]["name"][:12]]) == 0
    assert "1 documents deleted" in capsys.readouterr().out
    assert [document.name for document in Shelf.of_user().documents()] == [listed[1]["name"]]
    assert main(["documents", "--delete-all"]) == 0
    assert not Shelf.of_user().documents()
