"""The `sparsekv` command: what each subcommand prints and writes, and how it fails."""

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekv.cli import _spelt_out, main
from sparsekv.command_line import Parser, PipeConsole, read_text, run_to_exit_code
from sparsekv.commands import chat, generate, model_options
from sparsekv.config import SparseConfig
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation.testbed import MODEL_DIR
from sparsekv.policies import POLICIES
from sparsekv.policies.top_k import TopK

COMMANDS = (
    "demo", "generate", "chat", "inspect", "calibrate", "eval", "lm-eval", "bench", "models", "documents", "doctor",
)  # fmt: skip
TESTBED = ["--model", str(MODEL_DIR), "--device", "cpu", "--dtype", "float32"]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert all(f"{code} " in printed.partition("exit codes:")[2] for code in (0, 1, 2, 130))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "lm-eval"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: sparsekv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "option"),
    [("attention", "--contexts"), ("generate", "--points"), ("prompt", "--densities"), ("documents", "--folder")],
)
def test_everything_that_is_timed_has_help(what: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    assert what in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["bench", what, "--help"])
    assert stop.value.code == 0
    assert option in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["eval", "run"], ["bench", "attention"], ["calibrate"]], ids=" ".join)
def test_help_shows_every_example_on_a_line_of_its_own(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    sparsekv ")]
    assert len(examples) >= 2
    assert all(line.count("sparsekv ") == 1 for line in examples)


def test_bench_without_a_word_times_attention() -> None:
    assert _spelt_out(["bench"]) == ["bench", "attention"]
    assert _spelt_out(["bench", "--device", "cpu"]) == ["bench", "attention", "--device", "cpu"]
    for arguments in (["bench", "--help"], ["bench", "generate", "--quick"], ["doctor", "--json"], []):
        assert _spelt_out(arguments) == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "command='genrate' is not known. Did you mean 'generate'"),
        (["bench", "genrate"], "what='genrate' is not known. Did you mean 'generate'?"),
        (["bench", "--budgt", "3"], "sparsekv bench attention: There is no option --budgt. Did you mean '--budget'"),
        (
            ["generate", "--bugdet=3"],
            "There is no option --bugdet. Did you mean '--budget'",
        ),  # not: --model is needed
        (["chat", "--dtype", "flaot32"], "--dtype='flaot32' is not known. Did you mean 'float32'"),
        (["eval", "run", "--json"], "There is no option --json. `sparsekv eval run --help` lists all."),
        (["eval", "export", "--batch-rows", "3"], "There is no option --batch-rows."),
        (["chat", "--zzz"], "There is no option --zzz. `sparsekv chat --help` lists all."),
        (["chat", "--budget", "much"], "'much' is no budget: 2048, 2k, or a fraction"),
        (["chat", "--budget-of", "much"], "'much' is no layer and its budget, as 5=2048"),
        (["--hlep"], "There is no option --hlep. Did you mean '--help'?"),
        (["generate"], "the following arguments are required: --model"),
        (["inspect", "--documnet", "x"], "There is no option --documnet. Did you mean '--document'"),
        (["models", "--jsn"], "There is no option --jsn. Did you mean '--json'?"),
        (["doctor", "now"], "unrecognized arguments: now."),
    ],
)
def test_a_misspelt_command_line_is_answered_in_one_line_and_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_parser_leaves_values_and_subcommands_to_those_they_belong_to() -> None:
    parser = Parser(prog="p")
    parser.add_argument("--count", type=int)
    commands = parser.add_subparsers()
    commands.add_parser("go").add_argument("--fast", action="store_true")
    assert parser.parse_args(["--cou", "3", "go", "--fast"]) == argparse.Namespace(count=3, fast=True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--count", "many", "go", "--fast"])


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ConfigError("no such thing"), 1, "p: no such thing\n"),
        (FileNotFoundError(2, "no such file", "x"), 1, "p: [Errno 2] no such file: 'x'\n"),
        (UnknownNameError("task", "neddle", ["needle"]), 2, "Did you mean 'needle'"),
        (KeyboardInterrupt(), 130, "p: interrupted\n"),
    ],
)
def test_what_stops_a_command_has_an_exit_code(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise error

    assert run_to_exit_code(run, "p") == code
    assert printed in capsys.readouterr().err


def test_a_table_into_a_pipe_that_is_closed_is_no_error() -> None:
    """rich would end the process with 1."""
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "w")
    with pytest.raises(BrokenPipeError):
        PipeConsole(file=file).print("a table")
    with contextlib.suppress(BrokenPipeError):
        file.close()


@pytest.mark.parametrize("end", [lambda: 3, sys.exit], ids=["a command", "--help"])
def test_output_into_a_pipe_that_is_closed_is_no_error(
    end: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        monkeypatch.setattr("sys.stdout", file)
        assert run_to_exit_code(lambda: print("said") or end(), "p") == 0
    assert capsys.readouterr().err == ""


def test_doctor_prints_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "what runs where" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]


def test_bench_prints_the_ratio_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--contexts", "512", "2048", "--budget", "256", "--repeats", "2"]
    assert main(["bench", *options, "--out", str(tmp_path)]) == 0
    assert "1 x 2k" in capsys.readouterr().out
    result = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert [row["context"] for row in result["rows"]] == [512, 2048]
    assert result["rows"][1]["share"] < 0.25  # 256 of 2,048 tokens and a sixteenth for the digests
    assert result["command"].startswith("sparsekv bench")
    assert result["versions"]["torch"]
    assert (tmp_path / "attention_cpu.png").stat().st_size > 5_000


@pytest.mark.wide
def test_demo_shows_dense_and_top_k_right_where_recent_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The promise of the project, in small: an eighth of the context answers what a window of that size cannot."""
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path / "new"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "top_k 512" in printed.err
    assert "cache read per token" in printed.err
    assert "demo --model smollm2" in printed.err
    result = json.loads(printed.out)
    assert result == json.loads((tmp_path / "new" / "demo.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["dense"]["right"] == 4
    assert rows["top_k 512"]["right"] >= 3
    assert rows["recent 512"]["right"] <= 1
    assert rows["top_k 512"]["stats"]["sparse_steps"] > 0
    assert rows["top_k 512"]["share"] < rows["dense"]["share"] == 1.0
    assert (tmp_path / "new" / "demo.png").stat().st_size > 20_000


def test_generate_streams_and_reports_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The old fox walked to the river . " * 60)
    command = ["generate", *TESTBED, "--prompt-file", str(prompt), "--budget", "128", "--max-new-tokens", "4"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert "layers 0-5: sparse" in printed.err
    assert "3 sparse and 0 dense steps" in printed.err  # the first of 4 tokens comes from the prefill

    forced = ["--sinks", "0", "--recent", "32", "--group-pooling", "sum"]
    assert main([*command, "--json", "--dense-layers", "3", *forced]) == 0
    result = json.loads((capsys.readouterr()).out)
    assert [result["settings"][name] for name in ("sinks", "recent", "group_pooling")] == [0, 32, "sum"]
    assert (result["prompt_tokens"], result["new_tokens"]) == (480, 4)
    assert result["text"].strip() == printed.out.strip()
    assert result["ms_per_token"] > 0
    assert (result["settings"]["budget"], result["settings"]["dense_layers"]) == (128, 3)
    assert (result["stats"]["sparse_steps"], result["stats"]["dense_passes"]) == (3, 1)
    assert result["command"].startswith("sparsekv generate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt-file", "no_such_file"], "--prompt-file no_such_file cannot be read: No such file"),
        (["--prompt-file", str(MODEL_DIR)], "cannot be read"),
        (["--prompt-file", str(MODEL_DIR / "model.safetensors")], "is no UTF-8 text"),
        (["--prompt", "x", "--policy", "topk"], "Did you mean 'top_k'"),
        (["--prompt", "x", "--budget", "3"], "budget=3 is below"),
        (["--prompt", "x", "--chat"], "no chat template"),
    ],
)
def test_generate_says_what_is_wrong(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *TESTBED, *options]) == (2 if "Did you mean" in message else 1)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    "files", [{}, {"config.json": '{"model_type": "nonsense"}'}], ids=["an empty folder", "an unknown kind of model"]
)
def test_a_model_that_cannot_be_loaded_is_one_line(
    command: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path
    for name, content in files.items():
        (folder / name).write_text(content)
    prompt = ["--prompt", "x"] if command == "generate" else []
    assert main([command, "--model", str(folder), *prompt]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sparsekv: --model {folder} cannot be loaded (")
    assert line.endswith("or a folder with its config, tokenizer and weights.")


@pytest.mark.parametrize("command", [generate, chat])
def test_settings_left_out_are_the_defaults_of_a_patch(command: Any) -> None:
    parser = Parser()
    command.add_arguments(parser)
    prompt = ["--prompt", "x"] if command is generate else []
    args = parser.parse_args(["--model", "testbed", *prompt])
    assert model_options.config_of(args) == SparseConfig()
    pooled = ["--group-pooling", "share", "--min-share", "0.01"]
    changed = parser.parse_args(["--model", "testbed", *prompt, "--sinks", "0", "--kv", "int8", *pooled])
    assert model_options.config_of(changed) == SparseConfig(sinks=0, group_pooling="share", min_share=0.01, kv="int8")
    sparse = parser.parse_args(["--model", "testbed", *prompt, "--prefill", "sparse", "--prefill-mass", ".9"])
    assert model_options.config_of(sparse) == SparseConfig(prefill="sparse", prefill_mass=0.9)


def test_options_go_over_a_file_of_settings(tmp_path: Path) -> None:
    """Single ones, and budgets of single layers, which go over those that the file has for them."""
    path, parser = tmp_path / "settings.json", Parser()
    SparseConfig(budget={3: 1024, "rest": 256}, sinks=8, dense_layers=(0,)).save(path)
    chat.add_arguments(parser)

    def config(*given: str) -> SparseConfig:
        return model_options.config_of(parser.parse_args(["--settings", str(path), *given]))

    assert config() == SparseConfig.load(path)
    assert config("--dense-layers", "1", "--budget", "2k") == SparseConfig(budget=2048, sinks=8, dense_layers=1)
    assert config("--budget-of", "3=512", "5=0.5").budget == ((3, 512), (5, 0.5), ("rest", 256))
    assert config("--budget", "512", "--budget-of", "5=2k").budget == ((5, 2048), ("rest", 512))
    with pytest.raises(ConfigError, match=r"budget\[5\]: budget=3 is below"):
        config("--budget-of", "5=3")


@pytest.mark.parametrize("command", [["generate"], ["chat"], ["eval", "run"]], ids=" ".join)
def test_help_tells_the_one_rule_for_dtypes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    rule = "for smollm2, gemma3-270m and testbed bfloat16 on a GPU and float32 on a CPU"
    assert f"(default: the checkpoint's own; {rule})" in told


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("Who?", encoding="utf-8-sig")
    assert read_text("--document", str(tmp_path / "text.txt")) == "Who?"
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffWho?"))
    assert read_text("--document", "-") == "Who?"


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Standard output, which must be JSON and nothing else."""
    capsys.readouterr()
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_bench_and_eval_print_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--device", "cpu", "--out", str(tmp_path), "--json"]
    attention = json_of(["bench", "--contexts", "512", "--budget", "256", "--repeats", "2", *sizes], capsys)
    assert attention == json.loads((tmp_path / "attention_cpu.json").read_text())
    tiny = ["--geometry", "tiny", "--points", "1x256", "--new-tokens", "8", "--budget", "128", "--modes", "sparse"]
    generate = json_of(["bench", "generate", *tiny, *sizes], capsys)
    assert generate == json.loads((tmp_path / "generate_cpu.json").read_text())
    run = ["--tasks", "needle", "--methods", "dense", "quest", "--budgets", "128", "--lengths", "512"]
    assert main(["eval", *run, "--examples", "2", "--device", "cpu", "--no-probe", "--out", str(tmp_path)]) == 0
    report = json_of(["eval", "report", str(tmp_path), "--json"], capsys)
    assert [(cell["method"], cell["budget"]) for cell in report["cells"]] == [("dense", None), ("quest", 128)]
    assert report["cells"][0]["score"].keys() == {"value", "low", "high", "error"}
    assert report["manifest"]["settings"]["tasks"] == ["needle"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "100"], "--context=100 is not allowed: 4096 to 32768"),
        (["--context", "65536"], "--context=65536 is not allowed"),
        (["--out", __file__], "is a file: name a folder"),
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


def test_bench_prints_no_speed_if_the_step_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with it: here the output is a tenth too large."""

    class Larger(TopK):
        def decode(self, *args: Any) -> tuple[Any, Any]:
            out, slots = super().decode(*args)
            return 1.1 * out, slots

    monkeypatch.setitem(POLICIES._classes, "top_k", Larger)
    assert main(["bench", "--device", "cpu", "--contexts", "512", "--budget", "256"]) == 1
    printed = capsys.readouterr()
    assert "allowed is" in printed.err
    assert "batch 1" not in printed.out


def test_a_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "quantum"]) == 1
    assert "device='quantum'" in capsys.readouterr().err
