"""Finds the setting that costs least among those that meet the tolerance, with as few measurements as can be.

Of every digest the budgets are bisected, first with few documents, then with more and more: all that a text has, at
last. What is decided is not measured again; what is not goes by its mean, until the next look. Several looks give an
error several chances, so each has a part of the 5 % (Bonferroni): the intervals hold at all looks together. They are
those of one setting: of many that just fail, one may pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsekv import SparseConfig
from sparsekv.errors import ConfigError
from sparsekv.layer_budgets import REST

from .verdicts import Loss, Outcome, Verdict

MAX_PARTS = 8  # of a model's layers, that get budgets of their own
MASSES = (0.9, 0.95, 0.98)  # of prompts that are read sparsely
_LEVEL = 0.95

Line = Sequence[SparseConfig]  # settings that differ in their budget, or in the mass of prompts, the smallest first


class Known(Protocol):
    """What the search asks: what was measured, or is now."""

    def measure(self, configs: Sequence[SparseConfig], count: int) -> None:
        """Measures several settings in the first `count` documents, which is cheaper than one after the other."""

    def changes(self, config: SparseConfig, count: int) -> tuple[list[float], list[float]]:
        """The losses above dense in the first `count` documents, natural and recall, in nats per token."""


@dataclass(frozen=True)
class Tolerance:
    """Nats per token above dense that are no loss."""

    natural: float
    recall: float


def budgets(config: SparseConfig, length: int) -> list[int]:
    """Powers of two and one and a half of them, in whole pages, that are allowed, and at most half of the length."""
    found = sorted({size for i in range(4, 31) for size in (1 << i, 3 << i >> 1) if size <= length // 2})
    return [size for size in found if size % config.page_size == 0 and _allows(config, size)]


def _allows(config: SparseConfig, budget: int) -> bool:
    try:
        config.with_(budget=budget)
    except ConfigError:
        return False
    return True


def looks(first: int, num_documents: int) -> list[int]:
    """After how many documents the search decides: each time after twice as many, and after all."""
    found = [min(first, num_documents)]
    while found[-1] < num_documents:
        found.append(min(2 * found[-1], num_documents))
    return found


class Search:
    """The search, and what it has found.

    Args:
        known: measures.
        lines: a line of settings for every digest and pooling.
        looks: numbers of documents, ascending.
        cost: of a setting.

    Attributes:
        outcomes: of the settings that were measured, by their budgets and names, as of the last look at each.
    """

    def __init__(
        self,
        known: Known,
        lines: Sequence[Line],
        looks: Sequence[int],
        tolerance: Tolerance,
        cost: Callable[[SparseConfig], float],
    ) -> None:
        self.known, self.lines, self.looks, self.tolerance, self.cost = known, lines, looks, tolerance, cost
        self._level = 1 - (1 - _LEVEL) / len(looks)
        self.outcomes: dict[SparseConfig, Outcome] = {}

    @property
    def best(self) -> Outcome | None:
        """The setting that costs least of those that are known to meet the tolerance."""
        meeting = [x for x in self.outcomes.values() if x.verdict is Verdict.MEETS]
        return min(meeting, key=lambda outcome: outcome.cost, default=None)

    @property
    def closest(self) -> Outcome:
        """The setting that loses least, in tolerances."""
        return min(self.outcomes.values(), key=lambda outcome: outcome.excess)

    @property
    def open(self) -> list[Outcome]:
        """Settings that may meet the tolerance and cost less than the best; of a digest none below one that fails."""
        return [
            x
            for line in self.lines
            for config in line[self._num_failing(line) :]
            if (x := self.outcomes.get(config)) and x.verdict is Verdict.UNDECIDED and self._is_cheaper(config)
        ]

    def by_digest(self, tell: Callable[[int], None] = lambda count: None) -> Iterator[int]:
        """Bisects every line; yields the number of documents after each look, until all is decided.

        Args:
            tell: is called with it after every line, of which the first gives an answer soon.
        """
        for count in self.looks:
            self.known.measure([outcome.config for outcome in self.open], count)
            for line in self.lines:
                self._bisect(line, count)
                tell(count)
            yield count
            if not self.open:
                return

    def by_layer(self, layers: Sequence[int]) -> None:
        """Halves the budgets of as many layers of the best setting as do with less, part by part.

        Args:
            layers: those that are sparse.
        """
        if self.best is not None and isinstance(self.best.config.budget, int) and len(layers) > 1:
            start, middle = dict.fromkeys(layers, self.best.config.budget), len(layers) // 2
            for half in (layers[:middle], layers[middle:]):  # of all layers, a smaller budget fails
                self._halve(self.best.config, start, half, -(-len(layers) // MAX_PARTS))

    def of_prompts(self, cost: Callable[[SparseConfig], float]) -> Search | None:
        """The search for the sparsest prompts that the best setting may follow; None: there is no best one."""
        if self.best is None:
            return None
        line = [self.best.config.with_(prefill="sparse", prefill_mass=mass) for mass in MASSES]
        return Search(self.known, [line], self.looks, self.tolerance, cost)

    # -- how

    def _bisect(self, line: Line, count: int) -> None:
        below, above = self._num_failing(line) - 1, sum(map(self._is_cheaper, line))
        while above - below > 1:
            middle = (below + above) // 2
            if self._look(line[middle], count).excess <= 1:
                above = middle
            else:
                below = middle

    def _look(self, config: SparseConfig, count: int) -> Outcome:
        """A setting's outcome with so many documents; what is decided stays so."""
        known = self.outcomes.get(config)
        if known is None or (known.verdict is Verdict.UNDECIDED and known.num_documents < count):
            natural, recall = self.known.changes(config, count)
            self.outcomes[config] = Outcome(
                config,
                Loss.of(natural, self.tolerance.natural, self._level),
                Loss.of(recall, self.tolerance.recall, self._level),
                self.cost(config),
            )
        return self.outcomes[config]

    def _num_failing(self, line: Line) -> int:
        """Settings of a line up to the largest that is known to fail."""
        failing = (x is not None and x.verdict is Verdict.FAILS for x in map(self.outcomes.get, line))
        return max((i + 1 for i, fails in enumerate(failing) if fails), default=0)

    def _is_cheaper(self, config: SparseConfig) -> bool:
        return self.best is None or self.cost(config) < self.best.cost

    def _halve(self, config: SparseConfig, of_layers: dict[int, int], part: Sequence[int], least: int) -> None:
        """Halves the budgets of a part, and again, as long as the tolerance is met; else those of its halves."""
        tried = of_layers | {layer: of_layers[layer] // 2 // config.page_size * config.page_size for layer in part}
        if _allows(config, min(tried.values())) and self._meets(with_budgets(config, tried)):
            of_layers.update(tried)
            self._halve(config, of_layers, part, least)
        elif len(part) > least:
            middle = len(part) // 2
            self._halve(config, of_layers, part[:middle], least)
            self._halve(config, of_layers, part[middle:], least)

    def _meets(self, config: SparseConfig) -> bool:
        for count in self.looks:
            outcome = self._look(config, count)
            if outcome.verdict is not Verdict.UNDECIDED:
                break
        return outcome.verdict is Verdict.MEETS


def with_budgets(config: SparseConfig, of_layers: Mapping[int, int]) -> SparseConfig:
    """A setting with a budget for each layer; most have the rest's."""
    values = list(of_layers.values())
    rest = max(dict.fromkeys(values), key=values.count)
    own = {layer: budget for layer, budget in of_layers.items() if budget != rest}
    return config.with_(budget={**own, REST: rest} if own else rest)
