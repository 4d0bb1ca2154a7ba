"""The page of what a model reads: what is recorded, what the page holds, and that its script makes of it what Python
does."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sparsekv
from sparsekv import ConfigError, PatchError
from sparsekv.cli import main
from sparsekv.evaluation import testbed
from sparsekv.hf import wording
from sparsekv.hf.inspection import Page
from sparsekv.hf.inspection.recorder import NO_LEVEL, OCTAVES, READ, Recorder, budgets_up_to
from sparsekv.policies import POLICIES, DecodeStep
from sparsekv.policies.base import Policy, Remembered
from sparsekv.testing import naive
from sparsekv.testing.cache_pair import CachePair

STORY = testbed.make_story(1024, tasks=("many_keys",), num_questions=1, seed=0)
QUESTION = STORY.questions[0].prompt.removeprefix("Question : ").removesuffix(" Answer :")
BUDGET = 192
STAND_IN = Path(__file__).with_name("page_stand_in.js")


# -- what is recorded


@pytest.mark.parametrize(("policy", "kv"), [("top_k", "plain"), ("recent", "int8")])
def test_what_is_recorded_is_what_naive_attention_gives(policy: str, kv: str) -> None:
    pair = CachePair(policy=policy, kv=kv, budget=24, page_size=4, sinks=2, dense_layers=1)
    pair.forward(101)
    recorder = Recorder(budgets_up_to(pair.paged.config, 102), frozenset([1]))
    steps: list[tuple[DecodeStep, Any]] = []
    pair.paged.observers = [recorder, lambda step, slots: steps.append((step, slots))]
    pair.forward(1)
    assert list(recorder.steps) == [102]
    assert list(recorder.steps[102]) == [1]
    reading, (step, slots) = recorder.steps[102][1], steps[1]
    assert reading.pages.shape == (2, 2, 26)  # 2 kv heads, 26 pages
    assert recorder.budgets[0] == 8
    assert recorder.budgets[-1] == 96

    keys = step.keys()[0].double().permute(1, 0, 2, 3).flatten(1, 2)[:, :102]  # [hkv, 102, d]
    logits = torch.einsum("hgd,hnd->hgn", step.query[0].double().unflatten(0, (2, 2)), keys) * step.scaling
    mass = torch.nn.functional.pad(logits.softmax(-1).mean(1), (0, 2)).unflatten(1, (26, 4)).sum(-1)
    coded = reading.pages[:, 1]
    # Half a step of 24 octaves in 255 is 3.4%.
    told = 2 ** ((coded.double() / 255 - 1) * OCTAVES)
    torch.testing.assert_close(told[coded > 0], mass[coded > 0], rtol=0.034, atol=0)
    room = recorder.budgets[-1] // 4
    assert torch.equal(coded > 0, mass >= mass.sort(descending=True).values[:, [room - 1]])

    scores = step.digest_scores() if policy == "top_k" else torch.arange(26.0).expand(1, 2, -1)
    for place, budget in enumerate([*recorder.budgets, 24]):
        expected = naive.select_pages(scores, step.seq_lens, 4, budget // 4, 2, budget // 8)[0]
        read = reading.pages[:, 0] >= READ if place == len(recorder.budgets) else _levels(reading.pages) <= place
        for head in range(2):
            listed = [slot for slot in expected[head].tolist() if slot >= 0]
            assert read[head].nonzero()[:, 0].tolist() == listed
            most = mass[head].sort(descending=True).values[: len(listed)].sum()
            share = torch.stack([mass[head, listed].sum(), most])
            torch.testing.assert_close(reading.shares[head, place].double(), share, rtol=1e-4, atol=1e-5)
    assert torch.equal(slots, naive.select_pages(scores, step.seq_lens, 4, 6, 2, 3))


def _levels(pages: torch.Tensor) -> torch.Tensor:
    return pages[:, 0] % READ


def test_where_all_is_read_smaller_budgets_choose() -> None:
    pair = CachePair(num_layers=1, budget=256, page_size=4, sinks=2)
    pair.forward(60)
    recorder = Recorder(budgets_up_to(pair.paged.config, 61), frozenset([0]))
    pair.paged.observers = [recorder]
    pair.forward(1)
    reading = recorder.steps[61][0]
    assert (reading.pages[:, 0] >= READ).all()
    assert (_levels(reading.pages) == NO_LEVEL).any()
    torch.testing.assert_close(reading.shares[:, -1], torch.ones(2, 2))


def test_a_policy_that_remembers_goes_on_as_unobserved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Policy):
        """It reads pages by how often it was asked."""

        def memory(self, k: int, max_pages: int) -> list[Remembered]:
            return [Remembered((1,), torch.float32)]

        def select(self, step: DecodeStep) -> torch.Tensor:
            step.memory[0].add_(1)
            pages = torch.arange(step.block_table.shape[1])
            return step.select((step.memory[0] * 7919 * (pages + 1)) % 101)

    monkeypatch.setitem(POLICIES._classes, "counting", Counting)
    read: list[list[Any]] = [[], []]
    for seen, extra in zip(read, ([], [Recorder([12, 48], frozenset([0]))]), strict=True):
        torch.manual_seed(0)
        pair = CachePair(num_layers=1, policy="counting", budget=24, page_size=4, sinks=2)
        pair.forward(80)
        pair.paged.observers = [*extra, lambda step, slots, seen=seen: seen.append(slots.tolist())]
        pair.forward(1)
        pair.forward(1)
    assert read[0] == read[1]


# -- the page


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return testbed.load()


@pytest.fixture(scope="module")
def made(loaded: tuple[Any, Any]) -> tuple[Page, Any]:
    """The page, and the counters of its steps."""
    model, tokenizer = loaded
    with sparsekv.patch(model, budget=BUDGET, dense_layers=1) as patch:
        return patch.inspect(tokenizer, STORY.text, QUESTION, 8, wording.of_testbed()), patch.stats


class Held:
    """What a page holds, as a browser would find it."""

    def __init__(self, text: str) -> None:
        scripts = re.findall(r'<script type="[\w/]+" (?:id|class)="(\w+)">(.*?)</script>', text, re.DOTALL)
        self.about = json.loads(dict(scripts)["about"])
        self.num_cells = sum(layer["heads"] for layer in self.about["layers"])
        shape = (len(self.about["answer"]), self.num_cells, len(self.about["budgets"]) + 1, 2)
        self.shares = np.frombuffer(self._bytes(dict(scripts)["shares"]), np.float32).reshape(shape)
        steps = [np.frombuffer(self._bytes(coded), np.uint8) for name, coded in scripts if name == "step"]
        self.steps = [step.reshape(self.num_cells, 2, -1) for step in steps]  # [cells, 2, pages]

    def _bytes(self, coded: str) -> bytes:
        return zlib.decompress(base64.b64decode(coded, validate=True))


def test_the_page_holds_the_text_the_answer_and_what_each_token_read(made: tuple[Page, Any]) -> None:
    page, stats = made
    held = Held(page.html)
    assert page.answer.strip() == STORY.questions[0].answer
    assert "".join(held.about["answer"]).startswith(page.answer)
    assert held.about["layers"] == [{"index": layer, "heads": 2} for layer in range(1, 6)]
    whole = f"{STORY.text} Question : {QUESTION} Answer :" + "".join(held.about["answer"][:-1])
    assert "".join(held.about["pages"]) == whole
    assert len(held.steps) == len(held.about["answer"])
    num_given = len(f"{STORY.text} Question : {QUESTION} Answer :".split())
    assert [step.shape[2] for step in held.steps] == [-(-(num_given + i) // 16) for i in range(len(held.steps))]
    assert sum(int((step[:, 0] >= READ).sum()) for step in held.steps) == stats.pages_read - _dense(held)
    assert (held.shares[..., 0] <= held.shares[..., 1] + 1e-5).all()
    assert (np.diff(held.shares[:, :, :-1, 1], axis=2) >= -1e-6).all()


def _dense(held: Held) -> int:
    """Pages that layer 0 has read: all of them in two kv heads."""
    return sum(2 * step.shape[2] for step in held.steps)


def test_an_answer_ends_where_its_wording_says(loaded: tuple[Any, Any], made: tuple[Page, Any]) -> None:
    model, tokenizer = loaded
    words = replace(wording.of_testbed(), end=made[0].answer.split()[1])
    with sparsekv.patch(model, budget=BUDGET) as patch:
        page = patch.inspect(tokenizer, STORY.text, QUESTION, 8, words)
    assert page.answer.split() == made[0].answer.split()[:2]


def test_it_loads_nothing_and_runs_nothing_of_a_document(loaded: tuple[Any, Any], made: tuple[Page, Any]) -> None:
    assert "default-src 'none'" in made[0].html
    assert not re.search(r"https?:|<link|<img|@import|\bsrc=", made[0].html)
    model, tokenizer = loaded
    evil = "</script><script>alert(1)</script> &amp; <b>"
    with sparsekv.patch(model, budget=BUDGET) as patch:
        page = patch.inspect(tokenizer, f"{evil} {STORY.text[:2000]}", evil, max_new_tokens=1)
    assert "alert(1)</script>" not in page.html
    assert Held(page.html).about["pages"][0].startswith("</script><script>alert(1)</script> &amp; <b>")
    shown = page._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', shown)[1]) == page.html


def test_what_cannot_be_shown_is_an_error(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with sparsekv.patch(model, budget=BUDGET) as patch:
        for document, question in (("  ", "who ?"), (STORY.text, "\n")):
            with pytest.raises(ConfigError, match="must hold more than blanks"):
                patch.inspect(tokenizer, document, question)
        with pytest.raises(ConfigError, match="and the model was made for 40,960"):
            patch.inspect(tokenizer, "the " * 41_000, "who ?")
        with pytest.raises(ConfigError, match="does not tell where in a text its tokens are"):
            patch.inspect(SimpleNamespace(is_fast=False), "the", "who ?", words=wording.of_testbed())
    with pytest.raises(PatchError, match="undone"):
        patch.inspect(tokenizer, "the", "who ?")
    with sparsekv.patch(model, budget=1.0) as patch, pytest.raises(ConfigError, match="No layer of this model"):
        patch.inspect(tokenizer, "the", "who ?")


# -- the script


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the page's script")
def test_the_script_finds_what_was_recorded(made: tuple[Page, Any], tmp_path: Path) -> None:
    held = Held(made[0].html)
    made[0].save(tmp_path / "page.html")
    views = [(2, None, 1, 0), (0, 3, 4, 1), (1, None, -1, -1)]  # token, budget, layer, head; -1: all
    command = ["node", str(STAND_IN), str(tmp_path / "page.html"), json.dumps(views)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    for (token, budget, layer, head), seen in zip(views, json.loads(printed), strict=True):
        cells = range(held.num_cells) if layer < 0 else [2 * layer + head]
        kinds, place = np.zeros((3, seen["numPages"])), -1 if budget is None else budget
        for cell in cells:
            levels, coded = held.steps[token][cell]
            read = levels >= READ if budget is None else levels % READ <= budget
            wanted = np.zeros_like(read)
            wanted[np.argsort(-coded.astype(int), kind="stable")[: read.sum()]] = True
            wanted &= coded > 0
            kinds += np.stack([read & wanted, read & ~wanted, ~read & wanted]) / len(cells)
        np.testing.assert_allclose([seen[kind] for kind in ("found", "spare", "missed")], kinds, atol=1e-5)
        assert seen["inside"] == pytest.approx(held.shares[token, list(cells), place, 0].mean(), rel=1e-5)
        assert seen["most"] == pytest.approx(held.shares[token, list(cells), place, 1].mean(), rel=1e-5)
        assert sum(seen["mass"]) == pytest.approx(1, abs=0.05)


# -- the command


@pytest.fixture
def story(tmp_path: Path) -> list[str]:
    (tmp_path / "story.txt").write_text(STORY.text)
    return ["inspect", "--document", str(tmp_path / "story.txt"), "--budget", str(BUDGET), "--max-new-tokens", "8"]


def test_the_command_answers_and_writes_the_page(
    story: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main([*story, "--question", QUESTION, "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == STORY.questions[0].answer
    assert f"What it read: {out}" in printed.err
    assert Held(out.read_text(encoding="utf-8")).about["budget"] == f"{BUDGET} tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--question", "who ?", "--out", "."], "--out=. is a folder"),
        (["--question", "who ?", "--out", "nowhere/page.html"], "or in none that exists"),
        (["--question", " "], "must hold more than blanks"),
        (["--question", "who ?", "--parallel", "tensor"], "leave it out"),
        (["--question", "who ?", "--budget", "3"], "budget=3 is below"),
    ],
)
def test_what_the_command_cannot_do_is_said_and_nothing_is_written(
    options: list[str],
    message: str,
    story: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*story, *options]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["story.txt"]
