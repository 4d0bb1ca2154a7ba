"""The search, on losses that are made up: what it finds, how little it measures, and what it says where it cannot."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from sparsekv import SparseConfig
from sparsekv.evaluation.calibration.search import Search, Tolerance, budgets, looks, with_budgets
from sparsekv.evaluation.calibration.verdicts import Loss, Verdict

BASE = SparseConfig(dense_layers=0)
COSTS = {"minmax": 64, "sign_sketch": 26}  # of a digest, as if in pages
SCALES = {"minmax": 20.0, "sign_sketch": 5.0}  # a loss is the scale over the budget


class Made:
    """Losses that fall with the budget, and differ from document to document.

    Args:
        noise: standard deviation of a document's loss.
        of_layers: the least budgets of layers, below which the loss is 1.
        of_prompts: the loss of a sparse prompt of mass 0.
    """

    def __init__(
        self, noise: float, scales: dict[str, float] = SCALES, of_layers: Sequence[int] = (), of_prompts: float = 0.0
    ) -> None:
        self.noise, self.scales, self.of_layers, self.of_prompts = noise, scales, of_layers, of_prompts
        self.measured: list[tuple[SparseConfig, int]] = []
        self._draws = np.random.default_rng(0).standard_normal(256)

    def measure(self, configs: Sequence[SparseConfig], count: int) -> None:
        pass

    def changes(self, config: SparseConfig, count: int) -> tuple[list[float], list[float]]:
        self.measured.append((config, count))
        own = self._of_layers(config)
        loss = self.scales[config.digest] / max(own)
        loss += sum(least > budget for least, budget in zip(self.of_layers, own, strict=False))
        loss += self.of_prompts * (1 - config.prefill_mass) if config.prefill == "sparse" else 0
        natural = loss + self.noise * self._draws[:count]
        return natural.tolist(), (2 * natural).tolist()

    def bytes_per_token(self, config: SparseConfig) -> float:
        return COSTS[config.digest] + float(np.mean(self._of_layers(config)))

    def _of_layers(self, config: SparseConfig) -> list[int]:
        return [config.at(i).budget for i in range(max(len(self.of_layers), 1))]


def search(made: Made, tolerance: float = 0.01, num_documents: int = 64, digests: Sequence[str] = ()) -> Search:
    sizes = budgets(BASE, 8192)
    lines = [[BASE.with_(digest=name, budget=size) for size in sizes] for name in digests or SCALES]
    return Search(made, lines, looks(8, num_documents), Tolerance(tolerance, 3 * tolerance), made.bytes_per_token)


def test_budgets_are_powers_of_two_and_half_as_much_again() -> None:
    assert budgets(BASE, 1024) == [48, 64, 96, 128, 192, 256, 384, 512]
    assert budgets(BASE.with_(page_size=64), 2048) == [192, 256, 384, 512, 768, 1024]


def test_documents_are_doubled_until_there_are_no_more() -> None:
    assert looks(8, 50) == [8, 16, 32, 50]
    assert looks(8, 5) == [5]


def test_the_smallest_budget_that_meets_is_found_by_bisection() -> None:
    made = Made(noise=1e-4)
    found = search(made)
    assert list(found.by_digest()) == [8]
    assert found.best.config == BASE.with_(digest="sign_sketch", budget=512)  # 5 / 512 < .01 < 5 / 384
    assert found.best.verdict is Verdict.MEETS
    assert not found.open
    assert len(made.measured) <= 8  # of 26


def test_a_digest_that_would_read_more_is_not_measured_on() -> None:
    """Once 512 tokens of the sketch meet, min/max is tried with less alone: all of it fails."""
    made, told = Made(noise=1e-4), []
    found = search(made, digests=["sign_sketch", "minmax"])
    list(found.by_digest(lambda count: told.append((count, {config.digest for config in found.outcomes}))))
    assert told == [(8, {"sign_sketch"}), (8, {"sign_sketch", "minmax"})]  # an answer after each
    assert found.best.config.digest == "sign_sketch"
    assert max(config.budget for config, _ in made.measured if config.digest == "minmax") < 512


def test_noise_asks_for_more_documents_and_only_of_what_is_not_decided() -> None:
    made = Made(noise=0.004)
    found = search(made)
    assert list(found.by_digest())[:2] == [8, 16]
    again = [config for config, count in made.measured if count == 16]
    assert 0 < len(again) < len(made.measured) / 2
    for config in again:
        natural, recall = made.changes(config, 8)
        verdicts = [Loss.of(natural, 0.01, 1 - 0.05 / 4).verdict, Loss.of(recall, 0.03, 1 - 0.05 / 4).verdict]
        assert Verdict.UNDECIDED in verdicts


def test_what_a_text_cannot_decide_is_undecided_and_says_how_much_would() -> None:
    made = Made(noise=0.05, scales={"sign_sketch": 5.0})
    found = search(made, num_documents=16, digests=["sign_sketch"])
    assert list(found.by_digest()) == [8, 16]
    assert found.best is None
    nearest = min(found.open, key=lambda outcome: outcome.documents_needed)
    assert nearest.verdict is Verdict.UNDECIDED
    assert 16 < nearest.documents_needed < math.inf


def test_the_documents_that_are_said_to_be_needed_are_enough() -> None:
    draws = np.random.default_rng(1).standard_normal(100_000)
    few = Loss.of((0.005 + 0.03 * draws[:30]).tolist(), 0.01, 0.95)
    assert few.verdict is Verdict.UNDECIDED
    more = Loss.of((few.mean + 0.03 * draws[: 2 * math.ceil(few.documents_needed)]).tolist(), 0.01, 0.95)
    assert more.verdict is Verdict.MEETS


def test_where_nothing_meets_the_closest_is_told() -> None:
    found = search(Made(noise=1e-4, scales={"minmax": 800.0, "sign_sketch": 400.0}))
    assert list(found.by_digest()) == [8]
    assert found.best is None
    assert not found.open
    assert found.closest.config == BASE.with_(digest="sign_sketch", budget=4096)
    assert found.closest.excess == pytest.approx(400 / 4096 / 0.01, rel=0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_few_documents_decide_nothing(count: int) -> None:
    loss = Loss.of([0.001, 0.009][:count], 0.01, 0.95)
    assert loss.verdict is Verdict.UNDECIDED
    assert math.isinf(loss.reach) == (count == 1)


def test_layers_that_do_with_less_get_less() -> None:
    """One of eight needs all of its budget, its neighbour half; the others a quarter or less."""
    least = [64, 64, 512, 256, 64, 64, 64, 64]
    made = Made(noise=1e-5, scales={"sign_sketch": 5.0}, of_layers=least)
    found = search(made, digests=["sign_sketch"])
    list(found.by_digest())
    before, measured = found.best, len(made.measured)
    found.by_layer(range(8))
    assert found.best.cost < 0.5 * before.cost
    assert [found.best.config.at(i).budget for i in range(8)] == [64, 64, 512, 256, 64, 64, 64, 64]
    assert len(made.measured) - measured < 20


def test_the_sparsest_prompts_that_meet_are_found() -> None:
    """Behind the best setting, whose loss of 5 / 512 leaves .0002 of the tolerance."""
    found = search(Made(noise=1e-5, scales={"sign_sketch": 5.0}, of_prompts=0.004), digests=["sign_sketch"])
    assert found.of_prompts(lambda config: config.prefill_mass) is None  # nothing meets yet
    list(found.by_digest())
    of_prompts = found.of_prompts(lambda config: config.prefill_mass)
    list(of_prompts.by_digest())
    masses = {config.prefill_mass: outcome.verdict for config, outcome in of_prompts.outcomes.items()}
    assert masses == {0.9: Verdict.FAILS, 0.95: Verdict.MEETS}
    assert of_prompts.best.config == found.best.config.with_(prefill="sparse", prefill_mass=0.95)


def test_most_layers_have_the_rests_budget() -> None:
    assert with_budgets(BASE, {0: 512, 1: 256, 2: 256}).budget == ((0, 512), ("rest", 256))
    assert with_budgets(BASE, dict.fromkeys(range(3), 256)).budget == 256
