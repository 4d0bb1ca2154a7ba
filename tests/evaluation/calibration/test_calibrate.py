"""The command on the small model that ships: what it measures, writes, keeps and refuses."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekv
from sparsekv import SparseConfig
from sparsekv.cli import main
from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.calibration.documents import CUE, MIN_LENGTH, Piece, length_for, pieces
from sparsekv.evaluation.calibration.measure import Measurer
from sparsekv.evaluation.tasks import Writer

SCORED = 8
LENGTH = MIN_LENGTH
BASE = SparseConfig(digest="minmax", dense_layers=0)
DENSE = BASE.with_(policy="all")


@pytest.fixture(scope="module")
def text() -> str:
    return " ".join(testbed.make_story(LENGTH, seed=i).text for i in range(4))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return testbed.load()


@pytest.fixture(scope="module")
def documents(loaded: Any, text: str) -> list[Piece]:
    writer = Writer(loaded[1])
    return pieces(writer.check(text), writer, LENGTH, SCORED)


def test_documents_are_whole_disjoint_and_from_all_of_the_text(loaded: Any, text: str) -> None:
    writer = Writer(loaded[1])
    ids = list(range(5 * LENGTH - 1))  # one token short of a fifth
    found = pieces(ids, writer, LENGTH, SCORED)
    whole = [piece.document[len(writer.prefix) :] + piece.natural.prompt + piece.natural.reference for piece in found]
    assert sorted(token for tokens in whole for token in tokens) == ids[: 4 * (LENGTH - len(writer.prefix))]
    assert whole[0][0] != 0  # not the first comes first
    for piece, tokens in zip(found, whole, strict=True):
        said = piece.recall.prompt + piece.recall.reference
        start = tokens.index(said[0])
        assert tokens[start : start + CUE + SCORED] == said
        assert start < len(tokens) // 2
        assert len(piece.recall.reference) == len(piece.natural.reference) == SCORED


@pytest.mark.parametrize(
    ("num_tokens", "context", "asked", "length"),
    [
        (1 << 20, 32768, None, 8192),
        (1 << 20, 2048, None, 2048),
        (9000, 8192, None, 2048),
        (1 << 20, None, 16384, 16384),
    ],
)
def test_documents_are_as_long_as_model_and_text_allow(
    num_tokens: int, context: Any, asked: Any, length: int
) -> None:
    assert length_for(num_tokens, context, asked) == length


@pytest.mark.parametrize(
    ("num_tokens", "asked", "message"),
    [
        (4095, None, "has 4,095 tokens and must have at least 4,096: 4 documents of 1,024"),
        (8000, 4096, "must have at least 16,384"),
        (1 << 20, 16384, "--length 16384 is not allowed: 1024 to the model's context"),
        (1 << 20, 512, "--length 512 is not allowed"),
    ],
)
def test_a_text_that_is_too_short_is_told_how_long_it_must_be(num_tokens: int, asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        length_for(num_tokens, 8192, asked)


@torch.inference_mode()
def _likelihoods(model: Any, piece: Piece) -> list[float]:
    """By one forward of the unpatched model."""
    found = []
    for turn in (piece.natural, piece.recall):
        ids = torch.tensor([[*piece.document, *turn.prompt, *turn.reference]])
        log_probs = model(ids).logits[0, -SCORED - 1 : -1].log_softmax(-1)
        found.append(-log_probs.gather(1, ids[0, -SCORED:, None]).mean().item())
    return found


def test_dense_is_what_the_model_says_unpatched_and_digests_are_exchanged(loaded: Any, documents: Any) -> None:
    """Of a cache whose pages are there already: it decodes as one that was prefilled with the other digest."""
    model = loaded[0]
    expected = [_likelihoods(model, piece) for piece in documents[:2]]
    sketch = BASE.with_(digest="sign_sketch", budget=128)
    with sparsekv.patch(model, BASE) as patch:
        fresh = Measurer(patch, documents, 2).nats(sketch, [0, 1])
        measurer = Measurer(patch, documents, 2)
        assert torch.tensor(measurer.nats(DENSE, [0, 1])) == pytest.approx(torch.tensor(expected), abs=1e-4)
        few = measurer.nats(BASE.with_(budget=128), [0, 1])
        assert torch.tensor(measurer.nats(sketch, [0, 1])) == pytest.approx(torch.tensor(fresh))
        assert torch.tensor(few) != pytest.approx(torch.tensor(fresh))
        settings = (DENSE, sketch, sketch.with_(budget=256), sketch.with_(budget={1: 256, "rest": 128}))
        dense, small, large, mixed = (measurer.bytes_per_token(config, [0, 1]) for config in settings)
        assert torch.tensor(measurer.nats(settings[3], [0, 1])) != pytest.approx(torch.tensor(fresh))
    page = 2 * 16 * 4 * model.config.head_dim * model.config.num_key_value_heads  # of a layer
    layers = model.config.num_hidden_layers
    assert dense == page * layers * -(-(len(documents[0].document) + 1) // 16)
    assert large - small == page * layers * 8
    assert mixed - small == page * 8


def calibrate(folder: Path, text: str, *options: str) -> int:
    (folder / "text.txt").write_text(text)
    command = ["calibrate", "--model", "testbed", "--text", str(folder / "text.txt"), "--device", "cpu"]
    command += ["--length", str(LENGTH), "--scored", str(SCORED), "--out", str(folder / "settings.json")]
    return main([*command, "--digests", "sign_sketch", *options])


def test_settings_a_table_and_a_picture_are_made_and_a_rerun_measures_nothing(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lavish = ["--tolerance", "3", "--recall-tolerance", "5", "--kv", "int8", "--prefill", "sparse"]
    assert calibrate(tmp_path, text, *lavish) == 0
    printed = capsys.readouterr().out
    assert "meets" in printed
    assert "sign_sketch, max, 48 tokens, prompts of mass 0.9: meets" in printed
    (share,) = re.findall(r"(\d+)% of a prompt's blocks", printed.partition("mass 0.9: ")[2].replace("\n", " "))
    assert 40 < int(share) < 100
    found = SparseConfig.load(tmp_path / "settings.json")
    assert (found.digest, found.budget, found.dense_layers, found.kv) == ("sign_sketch", 48, 0, "int8")
    assert (found.prefill, found.prefill_mass) == ("sparse", 0.9)
    assert (tmp_path / "settings.png").stat().st_size > 10_000
    lines = (tmp_path / "settings.calibration.jsonl").read_text()

    def fail(*args: Any) -> Sequence[Any]:
        raise AssertionError("measured again")

    monkeypatch.setattr(Measurer, "nats", fail)
    assert calibrate(tmp_path, text, *lavish) == 0
    assert (tmp_path / "settings.calibration.jsonl").read_text() == lines
    with pytest.raises(AssertionError, match="measured again"):
        calibrate(tmp_path, text, *lavish, "--digests", "minmax")


def test_what_was_cut_short_goes_on(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before the end is on the disk; a half-written line is not counted."""
    measured, original = [], Measurer.nats

    def interrupted(self: Measurer, config: SparseConfig, numbers: Sequence[int]) -> Any:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(config)
        return original(self, config, numbers)

    monkeypatch.setattr(Measurer, "nats", interrupted)
    assert calibrate(tmp_path, text) == 130
    assert (tmp_path / "settings.png").exists()
    record = tmp_path / "settings.calibration.jsonl"
    record.write_text(record.read_text() + '{"setting": "')
    again = []

    def noted(self: Measurer, config: SparseConfig, numbers: Sequence[int]) -> Any:
        again.append(config)
        return original(self, config, numbers)

    monkeypatch.setattr(Measurer, "nats", noted)
    calibrate(tmp_path, text)
    assert not set(measured) & set(again)
    assert [json.loads(line) for line in record.read_text().splitlines()]


def test_nothing_is_written_unless_it_is_known_to_meet_or_asked_for(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(tmp_path, text, "--tolerance", "1e-7") == 3
    printed = capsys.readouterr().out
    assert "No setting is known to meet the tolerance" in printed
    assert "undecided" in printed
    assert "tokens of text would tell" in printed
    assert not (tmp_path / "settings.json").exists()
    assert calibrate(tmp_path, text, "--tolerance", "1e-7", "--force") == 3
    found = SparseConfig.load(tmp_path / "settings.json")
    assert (found.digest, found.prefill) == ("sign_sketch", "dense")


def test_what_lies_there_of_something_else_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "settings.json"
    own.write_text("{}")
    assert calibrate(tmp_path, text) == 1
    assert "choose another name" in capsys.readouterr().err
    assert own.read_text() == "{}"
    own.unlink()
    record = tmp_path / "settings.calibration.jsonl"
    record.write_text(json.dumps({"calibration": {"model": "another"}}) + "\n")
    assert calibrate(tmp_path, text) == 1
    assert "is of another calibration (model was 'another' and is" in capsys.readouterr().err
    record.write_text('{"some": "thing"}\n')
    assert calibrate(tmp_path, text) == 1
    assert "is no record of a calibration" in capsys.readouterr().err
    assert record.read_text() == '{"some": "thing"}\n'
