"""Several ranks that hold one model (tensor parallelism): the same answers, the same decisions, and no hang.

`two_ranks/run.py` is run once for all tests, by torchrun; each test looks at what both ranks have written. What they
have not written when the time is up, they hang in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.hf.parallel import start
from sparsekv.hf.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")

LIMIT = 200  # seconds; a quiet core needs 20
ROUNDING = 1e-4
PROGRAM = Path(__file__).parent / "two_ranks" / "run.py"
Found = Callable[[str], list[Any]]


def launched(folder: Path, num_ranks: int, device: str) -> Found:
    """What `found("a case")` gives of every rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(PROGRAM), str(folder), device]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        _, told = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks, too
        _, told = process.communicate()
    lines = [
        dict(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        for path in sorted(folder.glob("*.jsonl"))
    ]

    def found(case: str) -> list[Any]:
        if len(lines) < num_ranks or not all(case in of_rank for of_rank in lines):
            pytest.fail(f"Not all ranks came out of {case}. {told[-3000:]}")
        return [of_rank[case] for of_rank in lines]

    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Of both ranks of two on a CPU."""
    return launched(tmp_path_factory.mktemp("ranks"), 2, "cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "qwen3_next", "gemma3_text", "deepseek_v2"])
def test_the_logits_are_those_of_a_model_held_alone(family: str, found: Found) -> None:
    """With a budget that holds all, and a small one: windows, states and latents, too."""
    for largest, small in found(family):
        assert largest < ROUNDING
        assert small < ROUNDING


def test_beams(found: Found) -> None:
    for alone, together in found("beams"):
        assert alone == together


def test_each_rank_keeps_its_own_heads(found: Found) -> None:
    assert found("heads_of_a_rank") == [1, 1]


def test_more_is_patched_only_where_there_are_several(found: Found) -> None:
    methods = ["_prefill", "_prepare_cache_for_generation", "_valid_auto_compile_criteria", "get_compiled_call"]
    always = [*methods, "_sparsekv_patch"]
    for during, after, alone in found("what_a_patch_changes"):
        assert during == sorted([*always, "_get_stopping_criteria", "generate"])
        assert (after, alone) == ([], sorted(always))


@pytest.mark.parametrize(
    ("case", "second_call"),
    [
        ("captured_twice", [True, 0, 6, None]),
        ("one_has_lost_its_graphs", [True, 1, 6, None]),
        ("another_weight_in_one", [True, 1, 5, None]),
        ("one_finds_its_graph_wrong", [True, 1, 1, "a captured step gives other logits than an eager one"]),
        (
            "one_has_no_memory_for_a_graph",
            [True, 0, 0, "memory ran out while a step was captured; the next call tries again"],
        ),
        ("one_cannot_capture", [True, 0, 0, "its forward cannot be captured (operation not permitted)"]),
        ("one_must_not_capture", [True, 0, 0, "a test"]),
    ],
)
def test_a_step_is_captured_believed_or_given_up_by_all(case: str, second_call: list[Any], found: Found) -> None:
    """Right tokens, captures, replays, and why the last step was eager. The other rank alone would have gone on."""
    assert found(case) == [[[True, 1, 5, None], second_call]] * 2


def test_all_are_dense_if_one_is(found: Found) -> None:
    assert found("one_was_given_a_cache") == [[True, 1], [True, 1]]


def test_all_stop_if_one_does(found: Found) -> None:
    assert found("one_stops") == [2, 2]


def test_a_criterion_that_fails_in_one_rank_fails_in_all_and_they_go_on(found: Found) -> None:
    assert found("a_criterion_fails") == [
        ["RankError: Rank 1 has failed: KeyError: 'of one rank'", 6],
        ["KeyError: 'of one rank'", 6],
    ]


def test_what_fails_alike_keeps_its_own_error(found: Found) -> None:
    for first, second, tokens in found("both_fail_alike"):
        assert first.startswith("CacheFullError: ")
        assert second.startswith("ValueError: ")
        assert tokens == 6


def test_the_first_rank_is_asked_for_all(found: Found) -> None:
    assert found("what_the_first_is_told") == [["a line", ""], ["a line", "Rank 0 has failed: EOFError"]]


def test_ranks_at_different_places_do_not_wait(found: Found) -> None:
    for told in found("one_is_elsewhere"):
        assert told.startswith("The ranks have come apart (rank 0 at there, rank 1 at here)")


def test_the_command_generate(found: Found) -> None:
    """The first rank alone is given the prompt, and says what a model held alone does."""
    (first, alone), (second, _) = found("the_command_generate")
    assert first[:2] == alone
    assert "layers 0-5: sparse" in first[2]
    assert second == [0, "", ""]


def test_the_command_chat(found: Found) -> None:
    first, second = found("the_command_chat")
    assert first[0] == 0
    assert len(first[1].splitlines()) == 2
    assert first[2].count(" tokens in the cache") == 2
    assert second == [0, "", ""]


def test_the_command_eval(found: Found) -> None:
    """The flag says that the processes share a model, not the documents."""
    assert found("the_command_eval") == [[0, ["manifest.json", "probes.jsonl", "results.jsonl"]], [0, []]]


def test_the_command_bench(found: Found) -> None:
    (code, rows), second = found("the_command_bench")
    assert code == 0
    assert [(mode, ranks) for mode, ranks, _ in rows] == [("sparse", 2), ("default", 2)]
    assert rows[1][2] == 2 * 6 * 64 * 4 * (300 + 8)  # keys and values of six layers: of two kv heads, one
    assert second == [0, []]


def test_a_command_that_fails_says_so_once(found: Found) -> None:
    first, second = found("a_command_that_fails_in_the_first")
    assert first == [1, "", "sparsekv: --prompt-file - is empty.\n"]
    assert second == [1, "", ""]


def test_what_cannot_be_divided_is_refused(found: Found) -> None:
    for heads, plan in found("what_cannot_be_divided"):
        assert "4 query heads and 1 kv heads cannot be divided among 2 ranks" in heads
        assert "no plan by which the layers of a gpt_oss could be divided, only one for its experts" in plan


def test_a_rank_without_memory_for_the_prompt_ends_the_wait_of_the_others(found: Found) -> None:
    other, own = found("one_has_no_memory_for_the_prompt")
    assert own == "OutOfMemoryError: CUDA out of memory."
    assert other == (
        "RankError: The ranks cannot go on together (rank 1: OutOfMemoryError: CUDA out of memory.). Start the "
        "processes anew."
    )


def test_alone_nothing_is_asked(tiny: Callable[..., Any]) -> None:
    ranks = Ranks.of(tiny("llama"))
    with ranks.together("a test"):
        assert ranks.gather("this", "a test") == ["this"]
        assert ranks.told(lambda: "that", "a test") == "that"
    assert (ranks.rank, ranks.size, Ranks.of_launch().size) == (0, 1, 1)


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({}, "auto", "needs a process for each GPU: torchrun --nproc-per-node N -m sparsekv"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "cuda:1", "each rank takes a GPU of its own. Leave it out."),
    ],
)
def test_what_cannot_be_started(
    environment: dict[str, str], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        start(device)


# -- on GPUs: `make test-multi-gpu`


@pytest.fixture(scope="module", params=[2, 4])
def on_gpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, int]:
    """Of all ranks, one a GPU, through NCCL."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs, and there are {torch.cuda.device_count()}")
    return launched(tmp_path_factory.mktemp("ranks"), request.param, "cuda"), request.param


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "qwen3_next", "gemma3_text", "deepseek_v2"])
def test_the_logits_on_gpus(family: str, on_gpus: tuple[Found, int]) -> None:
    found, _ = on_gpus
    for largest, small in found(family):
        assert largest < 10 * ROUNDING
        assert small < 10 * ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "obstacle"),
    [
        ("captured_twice", None),
        ("one_has_lost_its_graphs", None),
        ("another_weight_in_one", None),
        ("one_finds_its_graph_wrong", "a captured step gives other logits than an eager one"),
        ("one_has_no_memory_for_a_graph", "memory ran out while a step was captured; the next call tries again"),
        ("one_cannot_capture", "its forward cannot be captured (operation not permitted)"),
        ("one_must_not_capture", "a test"),
    ],
)
def test_captured_steps_on_gpus(case: str, obstacle: str | None, on_gpus: tuple[Found, int]) -> None:
    found, num_ranks = on_gpus
    results = found(case)
    assert results == [results[0]] * num_ranks
    (first_same, captures, replays, none), (second_same, *_, why) = results[0]
    assert first_same
    assert second_same
    assert (captures, replays > 0, none, why) == (1, True, None, obstacle)


@pytest.mark.gpu
def test_failures_on_gpus(on_gpus: tuple[Found, int]) -> None:
    found, num_ranks = on_gpus
    assert found("one_stops") == [2] * num_ranks
    assert [tokens for _, tokens in found("a_criterion_fails")] == [6] * num_ranks
    assert all("KeyError: 'of one rank'" in failure for failure, _ in found("a_criterion_fails"))
    assert all("OutOfMemoryError" in failure for failure in found("one_has_no_memory_for_the_prompt"))
