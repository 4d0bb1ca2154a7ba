"""The results that ship with sparsekv: measured once, with the circumstances in the files."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TESTBED_RUN = "testbed"
ALL_BUDGETS = ""  # the budget of dense attention in `cells.csv`


def load(name: str, folder: Path | None = None) -> dict[str, Any]:
    """The content of `NAME.json`: command, date, GPU, versions, settings, rows."""
    content: dict[str, Any] = json.loads(((folder or RESULTS) / f"{name}.json").read_text(encoding="utf-8"))
    return content


class Accuracy:
    """How the small model answered at one length: means over the tasks that all methods were run on.

    Args:
        length: tokens of the documents.
        run: folder of a run among the results.
        tasks: these alone.
        folder: of the results, if not those that ship.

    Attributes:
        methods, tasks: their names; perplexity is no task here.
    """

    def __init__(
        self, length: int, run: str = TESTBED_RUN, tasks: Collection[str] = (), folder: Path | None = None
    ) -> None:
        path = (folder or RESULTS) / run / "cells.csv"
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if int(row["length"]) == length and row["score"]]
        self.methods = list(dict.fromkeys(row["method"] for row in rows))
        of_methods = ({row["task"] for row in rows if row["method"] == name} for name in self.methods)
        self.tasks = set.intersection(*of_methods, *([set(tasks)] if tasks else []))
        self._cells: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in rows:
            if row["task"] in self.tasks:
                self._cells.setdefault((row["method"], row["budget"]), []).append(row)

    @property
    def fewest(self) -> int:
        """Questions of the cell that has the fewest."""
        return min(int(row["num_examples"]) for some in self._cells.values() for row in some)

    def mean(self, method: str, budget: int, key: str = "score") -> float:
        """Share of right answers, or with `share` as the key, of the cache's bytes that a token read.

        Raises:
            KeyError: the method was not run at this budget.
        """
        some = self._cells.get((method, str(budget))) or self._cells[method, ALL_BUDGETS]
        return sum(float(row[key]) for row in some) / len(some)

    def by_budget(self, method: str) -> dict[int, float]:
        """Share of right answers at every budget in tokens."""
        budgets = sorted(int(budget) for name, budget in self._cells if name == method and budget)
        return {budget: self.mean(method, budget) for budget in budgets}
