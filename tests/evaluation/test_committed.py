"""What ships as results can be read, and adds up."""

import pytest

from sparsekv.evaluation.committed import RESULTS, Accuracy, load


@pytest.mark.parametrize("length", [4096, 16384, 32768])
def test_every_cell_of_the_small_models_run_has_two_hundred_questions(length: int) -> None:
    found = Accuracy(length)
    assert found.methods == ["dense", "quest", "sketch", "recent", "oracle", "random"]
    assert len(found.tasks) == 11  # and perplexity
    assert found.fewest >= 200


def test_means_are_of_the_tasks_asked_for() -> None:
    one, both = Accuracy(32768, tasks=["needle"]), Accuracy(32768, tasks=["needle", "multi_key"])
    other = Accuracy(32768, tasks=["multi_key"])
    assert both.tasks == {"needle", "multi_key"}
    assert both.mean("quest", 128) == pytest.approx((one.mean("quest", 128) + other.mean("quest", 128)) / 2)
    assert list(one.by_budget("quest")) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert one.mean("dense", 128) == one.mean("dense", 64) > 0.99
    assert one.mean("quest", 64, "share") < one.mean("dense", 64, "share") == 1


def test_a_budget_that_was_not_run_has_no_mean() -> None:
    with pytest.raises(KeyError):
        Accuracy(32768).mean("quest", 100)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_says_how_it_came_about(path) -> None:  # type: ignore[no-untyped-def]
    assert {"command", "date", "versions"} <= load(path.stem).keys()
