"""The demo on plain English: facts in a text, and what is printed and written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from sparsekv.cli import main
from sparsekv.commands import english
from sparsekv.errors import ConfigError
from sparsekv.evaluation.testbed import MODEL_DIR

PARAGRAPHS = [f"Paragraph {i} tells of rain,\nwind and the long road home." for i in range(400)]


class Letters:
    """A tokenizer of letters, with a start token."""

    chat_template, eos_token_id = None, None
    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [ord(letter) for letter in text])


@pytest.fixture(autouse=True)
def _text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(english, "plain_english", lambda: "\n\n".join(PARAGRAPHS))


def test_facts_stand_where_their_evidence_says() -> None:
    text, facts = english.hide(Letters(), 4096, 3, seed=1)
    assert 4096 - 100 < len(text) <= 4096
    model = SimpleNamespace(
        config=LlamaConfig(max_position_embeddings=8192), generation_config=SimpleNamespace(eos_token_id=7)
    )
    scene = english.scene_of(model, Letters(), text, facts, 4096)
    assert scene.document == [0, *map(ord, text)]
    assert (scene.budgets, scene.stop_ids) == ([256, 1024], {7})
    for i, (fact, asked) in enumerate(zip(facts, scene.asks, strict=True)):
        ((start, end),) = asked.evidence
        assert "".join(map(chr, scene.document[start:end])) == f" {fact.told}"
        assert start / len(text) == pytest.approx((i + 1) / 4, abs=0.05)
        assert fact.question in "".join(map(chr, asked.turn.prompt))
        assert scene.is_right(f" {fact.answer.upper()}, it says.\nAnother line", asked.expected)
        assert not scene.is_right(f"I do not know.\n{fact.answer}", asked.expected)
    assert english.hide(Letters(), 4096, 3, seed=2)[0] != text


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8 about plain English"):
        english.hide(Letters(), 4096, 9, seed=0)
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=2048))
    with pytest.raises(ConfigError, match="the model was made for 2,048 tokens"):
        english.scene_of(model, Letters(), *english.hide(Letters(), 2048, 1, seed=0), 2048)


def test_the_demo_of_a_named_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--context", "1k", "--questions", "1", "--device", "cpu", "--out", str(tmp_path), "--json"]
    assert main(["demo", "--model", str(MODEL_DIR), *options]) == 0
    printed = capsys.readouterr()
    assert "tokens of plain English:" in printed.err
    assert "What is the" in printed.err
    content = json.loads(printed.out)
    assert content == json.loads((tmp_path / "demo.json").read_text())
    assert content["settings"] == {"model": str(MODEL_DIR), "context": 1024, "seed": 0}
    assert [row["method"].split()[0] for row in content["rows"]] == ["dense", "top_k", "top_k", "recent"]
    assert content["rows"][1]["share"] < 1
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    assert main(["demo", "--model", str(MODEL_DIR), "--context", "100"]) == 1
    assert "--context=100 is not allowed: 1024 to" in capsys.readouterr().err
