"""What measured losses say of a setting: their interval, a verdict, and how much more would tell.

A loss is what a token of a document costs above dense decoding, in nats. Documents are what is drawn: the interval is
Student's, of the mean of their paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import stats

from sparsekv import SparseConfig


class Verdict(Enum):
    """Whether the tolerance lies above the interval, below it, or within."""

    MEETS = "meets"
    FAILS = "fails"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Loss:
    """A mean loss beside what is tolerated, in nats per token.

    Attributes:
        reach: of its interval, to both sides.
        num_documents: documents that were measured.
    """

    mean: float
    reach: float
    tolerance: float
    num_documents: int

    @classmethod
    def of(cls, changes: Sequence[float], tolerance: float, level: float) -> Loss:
        """The loss in documents of which each has lost so much; of one document nothing follows.

        Args:
            level: of the interval, as .95.
        """
        count, reach = len(changes), math.inf
        if count > 1:
            error = float(np.std(changes, ddof=1)) / math.sqrt(count)
            reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
        return cls(float(np.mean(changes)), reach, tolerance, count)

    @property
    def verdict(self) -> Verdict:
        """What the interval says."""
        if self.mean + self.reach <= self.tolerance:
            return Verdict.MEETS
        return Verdict.FAILS if self.mean - self.reach > self.tolerance else Verdict.UNDECIDED

    @property
    def excess(self) -> float:
        """The mean in tolerances: up to 1 it seems to meet it."""
        return self.mean / self.tolerance

    @property
    def documents_needed(self) -> float:
        """About how many would tell, if the mean stays: an interval shrinks with the root of their number."""
        if self.verdict is not Verdict.UNDECIDED:
            return self.num_documents
        gap = abs(self.tolerance - self.mean)
        return self.num_documents * (self.reach / gap) ** 2 if gap else math.inf

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.reach:.4f}"


@dataclass(frozen=True)
class Outcome:
    """What is known of one setting.

    Attributes:
        natural: the loss in what follows on a text.
        recall: the loss where the text repeats an early passage of itself.
        cost: what the search makes small. Of decoding it is bytes that a token reads of the cache, in all layers,
            digests counted; of prompts the share of blocks that is computed.
    """

    config: SparseConfig
    natural: Loss
    recall: Loss
    cost: float

    @property
    def verdict(self) -> Verdict:
        """It meets the tolerances if both losses do, and fails if one does."""
        verdicts = {self.natural.verdict, self.recall.verdict}
        if Verdict.FAILS in verdicts:
            return Verdict.FAILS
        return Verdict.UNDECIDED if Verdict.UNDECIDED in verdicts else Verdict.MEETS

    @property
    def excess(self) -> float:
        """The larger of both mean losses, in tolerances."""
        return max(self.natural.excess, self.recall.excess)

    @property
    def num_documents(self) -> int:
        """Documents that were measured."""
        return self.natural.num_documents

    @property
    def documents_needed(self) -> float:
        """About how many would tell."""
        return max(self.natural.documents_needed, self.recall.documents_needed)
