"""How much a setting may lose to count as good as dense."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekv.errors import ConfigError


@dataclass(frozen=True)
class Tolerances:
    """How much may be lost: nats per token, and points of needles and of the small model's tasks.

    Raises:
        ConfigError: one is not above zero.
    """

    natural: float = 0.01
    recall: float = 0.03
    needles: float = 2.0
    testbed: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name}={value} is not allowed: what may be lost must be more than nothing.")

    def nats(self, task: str) -> float | None:
        """Of a task that scores a file's text; None: it does not."""
        kind, _, file = task.partition(":")
        return {"perplexity": self.natural, "recall": self.recall}.get(kind) if file else None
