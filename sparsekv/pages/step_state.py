"""Where a cache is in a forward pass: one object for all who take part, the layers and the store of their pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

Read = tuple[int, Tensor | None]  # a layer that was read, and its slots `[b, hkv, k]`; None: all of it


class Stage(Enum):
    """What is being done."""

    EAGER = "eager"  # a pass as any other: the first layer makes room, each counts its tokens and what it reads
    BEGUN = "begun"  # a decode step, for whose token room was made before the first layer
    CAPTURED = "captured"  # the same, run to be captured: it changes tensors where they are, and nothing is counted


@dataclass
class StepState:
    """What is known of the pass that goes on, or went last.

    Attributes:
        stage: what is being done.
        reads: of a step that is being captured, what its layers have read so far; a replay writes to the same slots.
        past, end: columns before it and after it.
        valid: `[b, t]` bool of its columns, False for padding; None: no padding. The first layer finds it out.
    """

    stage: Stage = Stage.EAGER
    reads: list[Read] = field(default_factory=list)
    past: int = 0
    end: int = 0
    valid: Tensor | None = None
