"""The `sparsekv` command: what each subcommand prints and writes, and how it fails."""

import json
from pathlib import Path

import pytest

from sparsekv.cache import PagedLayer
from sparsekv.cli import _spelt_out, main
from sparsekv.evaluation.testbed import MODEL_DIR


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "generate", "bench", "doctor"))


@pytest.mark.parametrize("command", ["demo", "generate", "bench", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: sparsekv" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "option"), [("attention", "--contexts"), ("generate", "--points")])
def test_everything_that_is_timed_has_help(what: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    assert what in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["bench", what, "--help"])
    assert stop.value.code == 0
    assert option in capsys.readouterr().out


def test_bench_without_a_word_times_attention() -> None:
    assert _spelt_out(["bench"]) == ["bench", "attention"]
    assert _spelt_out(["bench", "--device", "cpu"]) == ["bench", "attention", "--device", "cpu"]
    for arguments in (["bench", "--help"], ["bench", "generate", "--quick"], ["doctor", "--json"], []):
        assert _spelt_out(arguments) == arguments


def test_a_misspelt_option_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--budgt", "3"])
    assert stop.value.code == 2
    assert "--budgt" in capsys.readouterr().err


def test_doctor_prints_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "what runs where" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]


def test_bench_prints_the_ratio_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--contexts", "512", "2048", "--budget", "256", "--repeats", "2"]
    assert main(["bench", *options, "--out", str(tmp_path)]) == 0
    assert "2,048" in capsys.readouterr().out
    result = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert [row["context"] for row in result["rows"]] == [512, 2048]
    assert result["rows"][1]["share"] < 0.25  # 256 of 2,048 tokens and a sixteenth for the digests
    assert result["command"].startswith("sparsekv bench")
    assert result["versions"]["torch"]
    assert (tmp_path / "attention_cpu.png").stat().st_size > 5_000


@pytest.mark.slow
def test_demo_shows_dense_and_top_k_right_where_recent_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The promise of the project, in small: an eighth of the context answers what a window of that size cannot."""
    picture = tmp_path / "demo.png"
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(picture), "--json", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "top_k 512" in printed
    assert "share of the cache" in printed
    rows = {row["method"]: row for row in json.loads((tmp_path / "demo.json").read_text())["rows"]}
    assert rows["dense"]["right"] == 4
    assert rows["top_k 512"]["right"] >= 3
    assert rows["recent 512"]["right"] <= 1
    assert rows["top_k 512"]["stats"]["sparse_steps"] > 0
    assert rows["top_k 512"]["share"] < rows["dense"]["share"] == 1.0
    assert picture.stat().st_size > 20_000


def test_generate_streams_and_reports_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The old fox walked to the river . " * 60)
    options = ["--budget", "128", "--max-new-tokens", "4", "--device", "cpu", "--dtype", "float32"]
    assert main(["generate", "--model", str(MODEL_DIR), "--prompt-file", str(prompt), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert "layers 2-5: sparse" in printed.err
    assert "3 sparse and 0 dense steps" in printed.err  # the first of 4 tokens comes from the prefill


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt-file", "no_such_file"], "no_such_file"),
        (["--prompt", "x", "--policy", "topk"], "Did you mean 'top_k'"),
        (["--prompt", "x", "--budget", "3"], "budget=3 is below"),
        (["--prompt", "x", "--chat"], "no chat template"),
    ],
)
def test_generate_says_what_is_wrong(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(MODEL_DIR), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "100"], "--context=100 is not allowed: 4096 to 32768"),
        (["--context", "65536"], "--context=65536 is not allowed"),
        (["--out", "picture.doc"], "must end in .png"),
        (["--out", "no_such_folder/picture.png"], "there is no folder no_such_folder"),
    ],
)
def test_demo_refuses_before_it_starts(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["demo", "--questions", "0"], ["bench", "--contexts", "0"], ["bench", "--repeats", "-1"]]
)
def test_a_count_is_at_least_one(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err


def test_bench_refuses_heads_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--q-heads", "6", "--kv-heads", "4"]) == 1
    assert "q-heads=6" in capsys.readouterr().err


def test_bench_prints_no_speed_if_the_step_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with it: here the output is a tenth too large."""
    step = PagedLayer.decode
    monkeypatch.setattr(PagedLayer, "decode", lambda layer, query, *rest: 1.1 * step(layer, query, *rest))
    assert main(["bench", "--device", "cpu", "--contexts", "512", "--budget", "256"]) == 1
    printed = capsys.readouterr()
    assert "allowed is" in printed.err
    assert "512" not in printed.out


def test_a_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "quantum"]) == 1
    assert "device='quantum'" in capsys.readouterr().err
