"""Which setting is chosen, from made-up runs: by what it loses in all of them, then by what it reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsekv.cli import main
from sparsekv.errors import ConfigError
from sparsekv.evaluation.accuracy.choose import Candidate, Setting, best, candidates, told
from sparsekv.evaluation.accuracy.summary import Run
from sparsekv.evaluation.accuracy.tolerances import Tolerances

LIMITS = Tolerances()
SETTINGS = {"page_size": 16, "group_pooling": "max", "dense_layers": 0}


def folder_of(
    path: Path, model: str, lost: Mapping[tuple[str, str, int], float], read: Mapping[int, float] | None = None,
    **settings: Any,
) -> Path:  # fmt: skip
    """A run in which methods lose so much, in nats or as a share: by task, method and budget, at 8k and 4k. What they
    read is counted if it is told by length."""
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"model": {"name": model}, "settings": SETTINGS | settings}))
    lines = [
        line
        for (task, method, budget), loss in lost.items()
        for number in range(250)
        for length in (4096, 8192)
        for line in (_line(task, length, "dense", None, number, 0), _line(task, length, method, budget, number, loss))
    ]
    for line in lines if read else ():
        line["tokens_read"] = None if line["budget"] is None else read[line["length"]]
    (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _line(task: str, length: int, method: str, budget: int | None, number: int, loss: float) -> dict[str, Any]:
    place = {"task": task, "length": length, "method": method, "budget": budget, "document": number, "question": 0}
    if ":text" in task and "needle" not in task:
        return {**place, "nll": 2 + number / 100 + loss * (0.5 + number % 2), "num_scored": 128, "error": None}
    is_hard = length == 8192 and "needle" in task and number % 2
    return {**place, "score": float(number >= 250 * loss and not is_hard), "error": None}


def found(*folders: Path) -> dict[tuple[str, int], Candidate]:
    return {(c.setting.name, c.setting.budget): c for c in candidates([Run.read(f) for f in folders], LIMITS)}


NATURAL, RECALL, NEEDLES = "perplexity:text", "recall:text", "needle:text"
MINMAX, SKETCH = "minmax/top_k+max+dense0", "sign_sketch/top_k+max+dense0"


def test_the_fewest_bytes_of_all_that_meet_every_tolerance_in_every_run(tmp_path: Path) -> None:
    """Runs may call the same setting by other names."""
    lost = {(task, "quest", budget): 0.001 for task in (NATURAL, RECALL) for budget in (512, 1024)}
    lost |= {(task, "sketch", budget): 0.001 for task in (NATURAL, RECALL) for budget in (256, 512)}
    one = folder_of(tmp_path / "one", "small", lost | {(RECALL, "sketch", 256): 0.05, (NEEDLES, "recent", 256): 0.5})
    names = {"quest": "minmax/top_k+max", "sketch": "sketch+dense0"}
    other = {(task, names[method], budget): loss for (task, method, budget), loss in lost.items()}
    two = folder_of(tmp_path / "two", "large", other | {(NATURAL, names["quest"], 512): 0.02}, dense_layers=0)
    both = found(one, two)
    assert {place: candidate.meets for place, candidate in both.items()} == {
        (MINMAX, 512): False, (MINMAX, 1024): True, (SKETCH, 256): False, (SKETCH, 512): True
    }  # fmt: skip
    assert [str(c) for c in both[MINMAX, 512].losses] == [
        "perplexity of small at 8k", "recall of small at 8k", "perplexity of large at 8k", "recall of large at 8k"
    ]  # fmt: skip
    chosen, is_met = best(list(both.values()))
    assert is_met
    assert chosen is both[SKETCH, 512]
    assert told(chosen, is_met).startswith(f"The fewest bytes of all that meet every tolerance: {SKETCH} at 512 tok")


def test_if_nothing_meets_the_closest_is_told_and_by_how_much_not(tmp_path: Path) -> None:
    lost = {(NATURAL, "quest", 256): 0.2, (NATURAL, "quest", 512): 0.012, (RECALL, "quest", 512): 0.001}
    one = found(folder_of(tmp_path / "one", "small", lost | {(RECALL, "quest", 256): 0.01}))
    chosen, is_met = best(list(one.values()))
    assert not is_met
    assert chosen is one[MINMAX, 512]
    high = next(iter(chosen.losses.values())).high
    assert f"perplexity of small at 8k loses at most {high:.3g} nats, where 0.01 are allowed" in told(chosen, is_met)


def test_what_the_interval_leaves_open_is_undecided(tmp_path: Path) -> None:
    lost = {(NATURAL, "quest", 256): 0.0099, (NATURAL, "quest", 512): 0.0001}
    one = found(folder_of(tmp_path / "one", "small", lost))
    assert [one[MINMAX, budget].meets for budget in (256, 512)] == [None, True]


def test_needles_count_where_dense_finds_them_and_the_small_models_tasks_together(tmp_path: Path) -> None:
    needles = {(NEEDLES, "quest", 256): 0.1, (NEEDLES, "quest", 512): 0.0}
    tasks = {(task, "quest", budget): 0.0 for task in ("multi_key", "chain") for budget in (256, 512)}
    both = found(
        folder_of(tmp_path / "one", "small", needles),
        folder_of(tmp_path / "two", "testbed", {**tasks, ("chain", "quest", 256): 0.04}),
    )
    assert [(str(c), c.unit) for c in both[MINMAX, 256].losses] == [
        ("needle of small at 4k", "points"), ("all tasks of testbed at 8k", "points")
    ]  # fmt: skip
    values = [loss.value for loss in both[MINMAX, 256].losses.values()]
    assert values == pytest.approx([10, 2])
    assert [loss.value for loss in both[MINMAX, 512].losses.values()] == [0, 0]


def test_bytes_are_those_of_one_geometry() -> None:
    """By hand: pages of 16 tokens x 128 channels x K and V x 2 bytes, of which min/max keeps 2 x 128 x 2 bytes."""
    page, num_pages, heads = 16 * 128 * 2 * 2, 2048, 8
    sparse, dense = 32 * page + num_pages * 512, num_pages * page
    assert Setting("minmax", "top_k", "max", 0, 512, 16).nbytes(512) == 32 * heads * sparse
    assert Setting("minmax", "top_k", "sum", 2, 512, 16).nbytes(512) == heads * (30 * sparse + 2 * dense)


def test_with_a_least_share_it_counts_what_was_read(tmp_path: Path) -> None:
    """In the run that read most, at its longest length, and not the budget, which is the most that may be read."""
    share, whole = "sketch2/top_k+share.001", "sketch2/top_k+share"
    lost = {(NATURAL, method, budget): 0.001 for method in (share, whole) for budget in (1024, 6144)}
    one = folder_of(tmp_path / "one", "small", lost, {8192: 700.5, 4096: 6000.0})
    two = folder_of(tmp_path / "two", "large", lost, {8192: 300.0, 4096: 200.0})
    both = found(one, two)
    least, most = f"{share}+dense0", f"{whole}+dense0"
    assert {budget: both[least, budget].num_tokens for budget in (1024, 6144)} == {1024: 700.5, 6144: 700.5}
    assert {budget: both[most, budget].num_tokens for budget in (1024, 6144)} == {1024: 1024, 6144: 6144}
    assert both[most, 1024].nbytes - both[least, 1024].nbytes == 32 * 8 * 512 * (1024 - 700.5)
    assert both[least, 1024].setting.min_share == 0.001
    chosen, is_met = best(list(both.values()))
    assert f"{least} at 1,024 tokens, of which it reads 70" in told(chosen, is_met)


def test_what_a_least_share_reads_must_have_been_counted(tmp_path: Path) -> None:
    """It is not in the files of earlier runs, nor where no layer chose."""
    lost = {(NATURAL, "sketch2/top_k+share.001", 512): 0.0, (NATURAL, "quest", 512): 0.0}
    assert list(found(folder_of(tmp_path / "one", "small", lost))) == [(MINMAX, 512)]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = folder_of(tmp_path / "one", "small", {(NATURAL, "quest", 512): 0.02})
    assert (
        main(["eval", "choose", str(one), "--json", "--natural", "0.05", "--out", str(tmp_path / "choice.md")]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["is_met"], told["chosen"]["budget"], told["candidates"][0]["meets"]) == (True, 512, True)
    assert (told["chosen"]["min_share"], told["candidates"][0]["num_tokens"]) == (0, 512)
    assert "| minmax/top_k+max+dense0 | 512 | 512 |" in (tmp_path / "choice.md").read_text()
    assert main(["eval", "choose", str(one), "--natural", "0"]) == 1


@pytest.mark.parametrize(
    ("tasks", "told"),
    [(("multi_key",), "Nothing here says what is lost"), ((NATURAL, RECALL), "No setting was measured by all of")],
)
def test_runs_that_say_too_little(tasks: tuple[str, ...], told: str, tmp_path: Path) -> None:
    lost = {(task, "quest", 256 << place): 0.0 for place, task in enumerate(tasks)}
    with pytest.raises(ConfigError, match=told):
        found(folder_of(tmp_path / "one", "small", lost))
