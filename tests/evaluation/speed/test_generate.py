"""How `generate` is timed, run on the CPU with a tiny model: what is measured, checked, written and refused."""

import argparse
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, PretrainedConfig

from sparsekv import SparseConfig
from sparsekv.cache import plain_layers
from sparsekv.cli import main
from sparsekv.command_line import circumstances
from sparsekv.errors import ConfigError, SparseKVError
from sparsekv.evaluation import speed
from sparsekv.evaluation.speed import generate_bench, generate_file
from sparsekv.evaluation.speed.generate_bench import GenerateBench, sweep
from sparsekv.evaluation.speed.generate_clock import Clock, check_counts, parts
from sparsekv.evaluation.speed.generate_model import Subject
from sparsekv.evaluation.speed.generate_points import MODES, PRESETS, Options, Point, add_arguments, options_of, point
from sparsekv.evaluation.speed.generate_rows import around, compare
from sparsekv.evaluation.speed.known_models import MODELS, KnownModel
from sparsekv.evaluation.speed.plots import memory_figure, split_figure, tokens_figure
from sparsekv.evaluation.speed.tables import print_tokens
from sparsekv.evaluation.testbed import MODEL_DIR
from tools import readme

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ["--device", "cpu", "--points", "1x200", "2x300", "--budget", "128", "--new-tokens", "12"]


@pytest.fixture(scope="module")
def tiny() -> Subject:
    subject = Subject(None, "tiny")
    subject.load(CPU)
    return subject


def options(*points: Point, **changes: Any) -> Options:
    return Options(SparseConfig(budget=128), points or (Point(1, 200),), new_tokens=12, **changes)


def rows_of(bench: GenerateBench) -> list[dict[str, Any]]:
    return sweep(bench, lambda rows: None, Console(quiet=True))


def test_the_whole_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", *SMALL, "--modes", "default", "all", "sparse", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 x 200 sparse" in printed
    assert "first token" in printed
    result = json.loads((tmp_path / "generate_cpu.json").read_text())
    assert result["command"].startswith("sparsekv bench generate")
    assert result["settings"]["modes"] == ["sparse", "all", "default"]
    assert result["settings"]["timed_tokens"] == 8
    rows = result["rows"]
    assert [(row["batch"], row["mode"]) for row in rows] == [
        (batch, mode) for batch in (1, 2) for mode in ("sparse", "all", "default")
    ]
    for row in rows:
        assert min(row[name] for name in ("ms_per_token", "first_token_s", "first_steps_s")) > 0
        assert row["over_weights"] == pytest.approx(row["ms_per_token"] / row["weights_ms"])
        assert row["best_unpatched_ms"] == min(row["unpatched_ms"])  # before the others, and after them
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 1e3 / row["ms_per_token"])
        assert row["speedup"] == pytest.approx(row["best_unpatched_ms"] / row["ms_per_token"])
    for sparse, all_pages, default in (rows[:3], rows[3:]):
        assert sparse["stats"]["sparse_steps"] == 11
        assert all_pages["stats"]["sparse_steps"] == 0
        assert all_pages["stats"]["dense_steps"] == 11
        assert sparse["stats"]["share"] < all_pages["stats"]["share"] == 1
        assert sparse["bytes_per_token"] < all_pages["bytes_per_token"]
        assert default["cache_bytes"] == all_pages["cache_bytes"] < sparse["cache_bytes"]
        assert "stats" not in default
    assert (tmp_path / "generate_cpu.png").stat().st_size > 5_000


def test_every_mode_leaves_the_model_as_it_was(tiny: Subject) -> None:
    bench = GenerateBench(tiny, options(modes=list(MODES)), CPU)
    assert [row["mode"] for row in rows_of(bench)] == list(MODES)
    assert not bench.is_warm  # the static mode's leavings were forgotten, and with them what else was compiled
    assert not hasattr(tiny.model, "_sparsekv_patch")
    assert not hasattr(tiny.model, "_previous_max_cache_length")  # else the next static cache would be as long


def test_random_weights_say_that_a_least_share_leaves_out_nearly_all(tiny: Subject) -> None:
    for share, says in ((0.5, True), (0.0, False)):
        config = SparseConfig(budget=128, group_pooling="share", min_share=share)
        bench = GenerateBench(tiny, replace(options(modes=["sparse", "all"]), config=config), CPU)
        sparse, all_pages = rows_of(bench)
        assert ("random weights" in (sparse["note"] or "")) == says
        assert all_pages["note"] is None


def test_a_file_of_settings_is_followed_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    settings = SparseConfig(budget={3: 96, "rest": 128}, dense_layers=(0,), recent=16)
    settings.save(path)
    command = ["generate", "--model", str(MODEL_DIR), "--settings", str(path), "--device", "cpu"]
    command += ["--points", "1x200", "--modes", "sparse", "--new-tokens", "8"]
    result = speed.measure(shlex.join([*command, "--out", str(tmp_path)]))
    assert result["settings"].items() >= settings.as_dict().items()
    assert result["rows"][0]["stats"]["sparse_steps"] == 7
    changed = shlex.join([*command, "--dense-layers", "1", "--add", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"dense_layers \[0\] there, 1 here"):
        speed.measure(changed)


def test_a_model_in_a_folder_is_timed(tmp_path: Path) -> None:
    command = ["generate", "--model", str(MODEL_DIR), *SMALL, "--points", "1x200", "--modes", "sparse"]
    result = speed.measure(shlex.join([*command, "--out", str(tmp_path)]))
    assert result == json.loads((tmp_path / "generate_cpu.json").read_text())
    assert result["command"] == shlex.join(["sparsekv", "bench", *command, "--out", str(tmp_path)])
    assert not result["settings"]["random_weights"]
    assert result["rows"][0]["speedup"] is None  # nothing unpatched was measured


def test_the_device_is_waited_for_at_three_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(
        "sparsekv.evaluation.speed.generate_clock.synchronize", lambda device: waits.append(clock.num_tokens)
    )
    clock = Clock(CPU, (1, 4, 12), lambda: {"steps": clock.num_tokens})
    clock.start()
    scores = torch.zeros(1, 3)
    assert all(clock(torch.zeros(1, 1), scores) is scores for _ in range(12))
    assert waits == [0, 1, 4, 12]
    assert len(clock.times) == 4
    assert clock.counted == {"steps": 8}


def test_what_did_not_run_gets_no_speed() -> None:
    assert check_counts({"sparse_steps": 8, "replays": 8}, 8, None) is None
    assert check_counts({}, 8, "a reason") is None  # a mode that promises nothing
    with pytest.raises(SparseKVError, match=r"Only 0 of 8 timed steps were sparse.*no speed"):
        check_counts({"sparse_steps": 0}, 8, None)
    with pytest.raises(SparseKVError, match="Only 7 of 8"):
        check_counts({"sparse_steps": 7, "replays": 8}, 8, "a reason")
    with pytest.raises(SparseKVError, match="None of 8 timed steps was the replay"):
        check_counts({"sparse_steps": 8, "replays": 0}, 8, None)


def test_what_ran_otherwise_than_a_reader_would_think_is_noted() -> None:
    assert check_counts({"replays": 0}, 8, "its forward cannot be captured") == (
        "decodes eagerly: its forward cannot be captured"
    )
    assert check_counts({"replays": 6}, 8, None) == "only 6 of 8 timed steps were replays"


def test_a_sparse_mode_that_decodes_densely_stops_the_run(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODES, "sparse", MODES["all"])
    bench = GenerateBench(tiny, options(modes=["sparse"]), CPU)
    assert bench.row(Point(1, 200), "sparse")["ms_per_token"] > 0  # the policy `all` promises nothing
    monkeypatch.undo()
    monkeypatch.setattr(generate_bench, "_count", lambda patch: {"sparse_steps": 0, "replays": 0})
    with pytest.raises(SparseKVError, match="no speed"):
        bench.row(Point(1, 200), "sparse")
    assert bench.row(Point(1, 100), "sparse")["note"] is None  # within the budget nothing is chosen


def test_a_mode_without_memory_says_so_and_the_others_go_on(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = GenerateBench._measure

    def short_of_memory(bench: GenerateBench, where: Point, name: str, patch: Any) -> Any:
        if (where.batch, name) == (2, "default"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if name == "static":
            raise RuntimeError("backend='inductor' raised:\nno compiler")
        return measure(bench, where, name, patch)

    monkeypatch.setattr(GenerateBench, "_measure", short_of_memory)
    bench = GenerateBench(tiny, options(Point(2, 200), Point(1, 200), modes=["sparse", "default", "static"]), CPU)
    rows = rows_of(bench)
    assert rows[1]["error"] == "out of memory"
    assert rows[1]["ms_per_token"] is None
    assert rows[0]["speedup"] is None  # nothing to compare with
    assert rows[2]["error"] == "failed"
    assert rows[2]["note"] == "RuntimeError: backend='inductor' raised: no compiler"
    assert rows[3]["speedup"] == pytest.approx(rows[4]["ms_per_token"] / rows[3]["ms_per_token"])


def test_an_error_of_a_patched_mode_stops_the_run(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(GenerateBench, "_measure", broken)
    with pytest.raises(RuntimeError, match="broken"):
        GenerateBench(tiny, options(), CPU).row(Point(1, 200), "sparse")


def test_limits_leave_modes_out_with_a_note() -> None:
    limited = options(unpatched_up_to=1 << 20, static_up_to=32 << 10, modes=list(MODES))
    big, middle, small = Point(16, 128 << 10), Point(1, 128 << 10), Point(1, 32 << 10)
    assert [name for name in MODES if limited.why_not(name, small) is None] == list(MODES)
    assert limited.why_not("static", middle) == "not measured (--static-up-to 32k)"
    assert limited.why_not("default", middle) is None
    assert limited.why_not("default", big) == "not measured (--unpatched-up-to 1M)"
    assert limited.why_not("static", big) == "not measured (--unpatched-up-to 1M)"
    assert limited.why_not("sparse", big) is None


def arguments(*given: str) -> Any:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


def test_what_is_not_given_is_chosen_for_the_device() -> None:
    on_gpu, on_cpu = options_of(arguments(), CUDA), options_of(arguments(), CPU)
    assert [str(where) for where in on_gpu.points] == ["1 x 1k", "1 x 32k", "1 x 128k"]
    assert on_gpu.modes == ("sparse", "default", "static")
    assert on_gpu.split
    assert on_gpu.first_tokens == 21
    assert not on_cpu.split
    assert not options_of(arguments("--no-split"), CUDA).split
    assert not options_of(arguments("--modes", "static", "default"), CUDA).split
    assert [str(where) for where in options_of(arguments("--quick"), CUDA).points] == ["1 x 1k", "1 x 32k"]
    twice = arguments("--points", "1x32k", "8x128k", "1x32k")
    assert options_of(twice, CUDA).points == (Point(1, 32 << 10), Point(8, 128 << 10))
    assert all(point(text) for points in PRESETS.values() for text in points)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--points", "32k"], "'32k' is no point: batch x context, as 1x32k"),
        (["--points", "0x32k"], "at least 1"),
        (["--points", "1xmany"], "is no number of tokens"),
        (["--quick", "--points", "1x1k"], "not allowed with"),
        (["--model", "x", "--geometry", "tiny"], "not allowed with"),
        (["--new-tokens", "0"], "at least 1"),
        (["--dtype", "int8"], "--dtype='int8' is not known"),
    ],
)
def test_options_that_cannot_be_read_exit_with_2(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "generate", *given])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--modes", "sparce"], "--modes='sparce' is not known. Did you mean 'sparse'"),
        (["--geometry", "llama"], "Did you mean 'llama-3.1-8b'"),
        (["--new-tokens", "7"], "--new-tokens=7 is not allowed: at least 8"),
        (["--budget", "16"], "budget=16 is below"),
        (["--device", "quantum"], "device='quantum'"),
        (["--device", "cpu", "--split"], "--split profiles a captured step"),
        (["--model", "no/such/folder"], "--model no/such/folder: there is no folder"),
        (["--points", "1x2M"], "tiny takes 1,048,576 tokens, and 2,097,152 are asked for"),
    ],
)
def test_bad_options_are_named_before_anything_is_loaded(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Subject, "load", lambda *args: pytest.fail("loaded"))
    device = [] if "--device" in given else ["--device", "cpu"]
    assert main(["bench", "generate", *device, *given]) == (2 if "Did you mean" in message else 1)
    assert message in capsys.readouterr().err


def test_options_that_need_another_one_say_which() -> None:
    with pytest.raises(ConfigError, match="add sparse or sparse-unfused to --modes"):
        options(modes=["default"], split=True)
    with pytest.raises(ConfigError, match="--add adds to the result file in --out"):
        options(add=True)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded or timed."""
    times = dict.fromkeys(("ms_per_token", "first_token_s", "first_steps_s", "tokens_per_s"), 1.0)
    monkeypatch.setattr(Subject, "load", lambda subject, device: None)
    monkeypatch.setattr(Subject, "weight_bytes", 1)
    monkeypatch.setattr(GenerateBench, "warm_up", lambda bench: None)
    monkeypatch.setattr(GenerateBench, "_measure", lambda bench, where, name, patch: dict(times))


def added(tmp_path: Path, *arguments: str) -> int:
    command = ["bench", "generate", "--device", "cpu", "--geometry", "tiny", "--out", str(tmp_path), "--add"]
    usual = {"--modes": "default", "--budget": "128", "--new-tokens": "8"}
    given = usual | dict(zip(arguments[::2], arguments[1::2], strict=True))
    return main([*command, *(word for option, value in given.items() for word in (option, *value.split()))])


@pytest.mark.usefixtures("instant")
def test_every_row_says_how_it_was_measured(tmp_path: Path) -> None:
    """Points that are measured again are replaced, the others stay. Of earlier files the last command alone is
    known."""
    path = tmp_path / "generate_cpu.json"
    assert added(tmp_path, "--points", "1x256 2x200") == 0
    assert added(tmp_path, "--points", "1x200 2x200", "--modes", "static") == 0
    result = json.loads(path.read_text())
    assert [(row["batch"], row["context"], row["mode"]) for row in result["rows"]] == [
        (1, 200, "static"), (1, 256, "default"), (2, 200, "static")
    ]  # fmt: skip
    second, first, _ = (row["measured"] for row in result["rows"])
    assert "1x256" in first["command"]
    assert second["command"] == result["command"]
    assert first.keys() == {"command", "date", "gpu", "kernels", "torch"}
    assert (result["settings"]["num_points"], result["settings"]["modes"]) == (3, ["default", "static"])
    for row in result["rows"]:
        del row["measured"]
    for num_points, command in ((3, result["command"]), (2, None)):
        result["settings"]["num_points"] = num_points
        path.write_text(json.dumps(result))
        assert added(tmp_path, "--points", "1x200") == 0
        told = [row["measured"] and row["measured"]["command"] for row in json.loads(path.read_text())["rows"]]
        assert told[1:] == [command, command]
        assert "1x200" in told[0]


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--dtype": "bfloat16"}, "dtype 'torch.float32' there, 'torch.bfloat16' here"),
        ({"--dense-layers": "2"}, "dense_layers 0 there, 2 here"),
        ({"--new-tokens": "9"}, "new_tokens 8 there, 9 here"),
        ({"--budget": "144"}, "budget 128 there, 144 here"),
        ({"gpu": "a GPU"}, "gpu 'a GPU' there"),
        ({"versions": {"torch": "1.0"}}, "torch '1.0' there"),
        ({"settings": {}}, "is no file of this command"),
        ({"rows": [3]}, "is no file of this command"),
    ],
    ids=str,
)
def test_rows_that_were_measured_otherwise_are_not_mixed(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They are refused before a model is loaded."""
    path = tmp_path / "generate_cpu.json"
    assert added(tmp_path, "--points", "1x200") == 0
    options = [word for pair in changes.items() for word in pair if pair[0].startswith("--")]
    content = json.loads(path.read_text()) | {k: v for k, v in changes.items() if not k.startswith("--")}
    path.write_text(json.dumps(content))
    capsys.readouterr()
    monkeypatch.setattr(Subject, "load", lambda *args: pytest.fail("loaded"))
    assert added(tmp_path, "--points", "1x256", *options) == 1
    assert message in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


def test_the_committed_file_can_be_added_to() -> None:
    content = json.loads((readme.RESULTS / "generate_cuda_minmax.json").read_text())
    assert set(generate_file.alike(content)) == {
        "model", "dtype", "budget", "dense_layers", "new_tokens", "gpu", "torch"
    }  # fmt: skip


def test_learned_positions_must_hold_the_new_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "gpt2", KnownModel("gpt2", lambda: GPT2Config(n_positions=256)))
    Subject(None, "gpt2").check(200, 56)
    Subject(None, "tiny").check(1 << 20, 64)  # rotary ones may go on
    with pytest.raises(ConfigError, match="gpt2 takes 256 tokens, and 257"):
        Subject(None, "gpt2").check(200, 57)


@pytest.mark.parametrize(("name", "billions"), [("llama-3.1-8b", 8.03), ("qwen3-32b", 32.8)])
def test_geometries_have_the_sizes_of_their_namesakes(name: str, billions: float) -> None:
    subject = Subject(None, name, torch.bfloat16)
    subject.load(torch.device("meta"))
    assert subject.weight_bytes / 2e9 == pytest.approx(billions, rel=0.01)
    text = subject.text
    assert subject.step_bytes(1) == subject.weight_bytes - 2 * text.vocab_size * text.hidden_size
    tokens, config = 1 << 15, SparseConfig(digest="minmax", dense_layers=2)
    kv = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * tokens
    assert subject.cache_bytes(tokens, None) == subject.cache_bytes(tokens, config.with_(policy="all")) == kv
    digests = kv * (text.num_hidden_layers - 2) // text.num_hidden_layers // 16
    assert subject.cache_bytes(tokens, config) == kv + digests
    sketches = digests * 3 // 4  # of a page, whose minimum and maximum take 512 bytes, 384
    assert subject.cache_bytes(tokens, config.with_(digest="sign_sketch")) == kv + sketches


@pytest.mark.parametrize(
    ("name", "whole", "billions", "active"),
    [
        ("qwen3-30b-a3b", {"num_hidden_layers": 48}, 30.5, 3.3),
        ("gemma-3-12b", {"num_hidden_layers": 48}, 11.8, 11.8),
        ("gpt-oss-20b", {}, 20.9, 4.2),
        ("qwen3-next", {"num_hidden_layers": 48, "num_experts": 512}, 79.7, 3.9),
        ("llama-4-scout", {"num_hidden_layers": 48, "num_local_experts": 16}, 107.8, 17.2),
        ("granite-4-h-tiny", {}, 6.94, 1.47),
        ("deepseek-v2-lite", {}, 15.7, 2.66),
    ],
)
def test_models_are_known_by_what_a_token_reads(
    name: str, whole: dict[str, int], billions: float, active: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch so large that every expert has a token, all is read."""
    known = MODELS[name]
    monkeypatch.setitem(MODELS, name, KnownModel(known.source, lambda: known.make(**whole)))
    subject = Subject(None, name, torch.bfloat16)
    subject.load(torch.device("meta"))
    text, embedding = subject.text, subject.model.get_input_embeddings().weight.nbytes
    unread = 0 if text.tie_word_embeddings else embedding
    assert subject.weight_bytes / 2e9 == pytest.approx(billions, rel=0.01)
    assert (subject.step_bytes(1) + unread) / 2e9 == pytest.approx(active, rel=0.02)
    assert subject.step_bytes(10_000) == subject.weight_bytes - unread
    is_alike = name == "qwen3-30b-a3b"
    assert (subject.cache_bytes(100, None) is None) == (not is_alike)  # windows, states and latents


def test_experts_that_cannot_be_told_are_not_guessed(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.config, "num_experts", 8, raising=False)
    assert tiny.step_bytes(1) is None


FEW: dict[str, dict[str, Any]] = {
    "gemma-3-12b": {"sliding_window": 32},  # of six layers only one is full, and two would have to be dense
    "gpt-oss-20b": {"num_local_experts": 4, "sliding_window": 32},
    "qwen3-next": {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "moe_intermediate_size": 32,
                   "shared_expert_intermediate_size": 32, "num_experts": 16,
                   "layer_types": ["linear_attention"] * 3 + ["full_attention"] * 3},
    "deepseek-v2-lite": {"kv_lora_rank": 32, "moe_intermediate_size": 32, "n_routed_experts": 8},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:sparsekv")
@pytest.mark.parametrize("name", FEW)
def test_known_models_are_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones of their kinds. One of which no layer can be sparse says so instead."""
    sizes = {"hidden_size": 64, "vocab_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "num_hidden_layers": 6} | FEW[name]
    config: PretrainedConfig = MODELS[name].make(**sizes)
    monkeypatch.setitem(MODELS, name, KnownModel("small", lambda: config))
    subject = Subject(None, name)
    subject.load(CPU)
    sparse, default = rows_of(GenerateBench(subject, options(modes=["sparse", "default"]), CPU, tb_per_s=0.01))
    assert sparse["ms_per_token"] * default["ms_per_token"] * sparse["over_weights"] > 0
    is_dense = len(plain_layers(config)) <= SparseConfig().dense_layers
    assert (sparse["stats"]["sparse_steps"] == 0) == ("decodes densely" in (sparse["note"] or "")) == is_dense


def test_of_two_times_of_the_unpatched_model_the_faster_counts() -> None:
    rows = [made_row(1, 1024, "default", ms) for ms in (5.0, 4.0, None)]
    assert around(rows[0], rows[1])["ms_per_token"] == around(rows[1], rows[2])["ms_per_token"] == 4.0
    both = [made_row(1, 1024, "sparse", 2.0), around(*rows[:2])]
    compare(both)
    assert [(row["unpatched_ms"], row["speedup"]) for row in both] == [([5.0, 4.0], 2.0), ([5.0, 4.0], 1.0)]


def test_a_static_cache_that_cannot_be_made_is_left_out(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.config, "layer_types", ["a kind of their own"] * 4, raising=False)
    row = GenerateBench(tiny, options(modes=["static"]), CPU).row(Point(1, 200), "static")
    assert "transformers makes no static cache for it: KeyError" in row["note"]


def test_a_step_is_split_by_the_names_of_its_kernels() -> None:
    kernels = [("void sparse_decode<__nv_bfloat16>", 600.0), ("merge_attention", 60.0), ("nvjet_sm90_tst", 3000.0)]
    kernels += [("cublasLt::splitKreduce_kernel", 30.0), ("gemvx::kernel", 270.0), ("elementwise_kernel", 90.0)]
    found = parts(kernels, 3, ms_per_step=1.6, ms_per_token=2.0)
    assert found == pytest.approx({"attention": 0.22, "gemm": 1.1, "rest": 0.03, "gaps": 0.25, "host": 0.4})
    of_ranks = [*kernels, ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 300.0)]
    with_ranks = parts(of_ranks, 3, ms_per_step=1.6, ms_per_token=2.0)
    assert with_ranks == pytest.approx({**found, "all_reduce": 0.1, "gaps": 0.15})


def made_row(batch: int, context: int, mode: str, ms: float | None, **changes: Any) -> dict[str, Any]:
    where = {"model": "llama-3.1-8b", "batch": batch, "context": context, "mode": mode, "budget": 2048}
    times = {"ms_per_token": ms, "first_token_s": 123.45, "first_steps_s": 41.5}
    sizes = {"peak_bytes": 40 << 30, "cache_bytes": 30 << 30, "tb_per_s": 3.21, "over_weights": 1.5}
    return where | times | sizes | {"tokens_per_s": ms and batch * 1e3 / ms} | changes


def made_rows() -> list[dict[str, Any]]:
    split = {"attention": 0.6, "gemm": 4.0, "rest": 1.0, "gaps": 0.1, "host": 0.3}
    rows = [
        made_row(1, 1 << 17, "sparse", 6.0, stats={"share": 0.08}, split_ms=split),
        made_row(1, 1 << 17, "default", 46.0),
        made_row(1, 1 << 17, "static", None, note="not measured (--static-up-to 32k)"),
        made_row(16, 1 << 17, "sparse", 12.0, stats={"share": 0.08}, note="decodes eagerly: a reason"),
        made_row(16, 1 << 17, "default", None, error="out of memory"),
    ]
    compare(rows[:3]), compare(rows[3:])
    return rows


def test_the_tables_fit_a_pipe_and_say_what_is_missing() -> None:
    console = Console(width=118, record=True, file=io.StringIO())
    print_tokens(console, made_rows())
    text = console.export_text()
    assert "…" not in text
    assert "out of memory" in text
    (line,) = [line for line in text.splitlines() if "7.7x" in line]
    assert line.split()[3:] == [
        "sparse",
        "6.00",
        "7.7x",
        "1.50x",
        "167",
        "123.45",
        "41.50",
        "8.0%",
        "3.21",
        "42.9",
        "10.7",
    ]
    (line,) = [line for line in text.splitlines() if line.split()[-1:] == ["6.00"]]
    assert line.split()[3:] == ["sparse", "0.60", "4.00", "1.00", "0.10", "0.30", "6.00"]
    assert "static: not measured (--static-up-to 32k) (1 x 128k)" in text
    assert "sparse: decodes eagerly: a reason (16 x 128k)" in text


@pytest.mark.parametrize("rows", [made_rows(), made_rows()[:3], made_rows()[3:], made_rows()[4:], []], ids=len)
def test_the_plot_is_drawn_from_whatever_was_measured(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for draw in (tokens_figure, split_figure, memory_figure):
        draw(rows).savefig(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 3_000


def test_the_readme_can_show_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    section = "<!-- figures: all_waits -->\nas before\n<!-- end of figures -->"
    rows = made_rows()
    rows[0]["stats"] = {"sparse_steps": 9, "dense_steps": 1, "bytes_total": 160e9}
    rows[0] |= {"weights_ms": 3.0, "memory_tb_per_s": 4.0}
    (tmp_path / "generate_cuda.json").write_text(json.dumps({**circumstances("the command"), "rows": rows}))
    shown = readme.render(section)
    assert "| 1 x 128k | 123.45 → 123.45 | 46.0 | **6.0** | 7.0 | 40.0 → 40.0 |" in shown
    assert "| 16 x 128k | 123.45 → 123.45 | out of memory | **12.0** | - | 40.0 → 40.0 |" in shown
    assert "the command" in shown
    assert all(text not in shown for text in ("as before", "static", "all pages")), "columns without a figure"


@pytest.mark.gpu
def test_generate_on_a_gpu(tmp_path: Path) -> None:
    command = ["bench", "generate", "--device", "cuda", "--geometry", "tiny", "--points", "1x1k", "2x4k"]
    modes = ["--modes", "sparse", "sparse-eager", "all", "default"]
    assert main([*command, *modes, "--budget", "1k", "--new-tokens", "24", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "generate_cuda.json").read_text())["rows"]
    assert all(row["ms_per_token"] > 0 and row["peak_bytes"] > row["cache_bytes"] for row in rows)
    for sparse, eager in (rows[:2], rows[4:6]):
        assert sparse["replays"] >= 16
        assert eager["replays"] == 0
        assert sparse["split_ms"]["attention"] > 0
        assert sparse["split_ms"]["gemm"] > 0
    assert rows[4]["stats"]["sparse_steps"] == 23
