"""What a mask says anew of columns whose tokens are in the pages already."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekv.errors import CacheStateError


def hidden_last(known: Tensor, visible: Tensor | None) -> Tensor | None:
    """How many of each row's last tokens a mask hides that were visible, `[b]` int64; None: it says what was known.
    Where a row ended early, `generate` fills it with tokens that are padding to the next turn.

    Args:
        known: `[b, n]` bool, False for padding.
        visible: `[b, n]` bool; None: no column is hidden.

    Raises:
        CacheStateError: it changes something else. Pages hold the tokens of a row without gaps.
    """
    visible = torch.ones_like(known) if visible is None else visible
    if torch.equal(visible, known):
        return None
    hidden = (known & ~visible).sum(1)
    if not torch.equal(visible, without_last(known, hidden)):
        raise CacheStateError(
            "The attention mask of tokens that are in the cache already has changed (no mask means that none is "
            "hidden). Pages hold the tokens that were visible when they were appended; only the last of a row can be "
            "hidden later. Pass the same mask again, start from a new cache, or unpatch the model for such masks."
        )
    return hidden


def without_last(columns: Tensor, counts: Tensor) -> Tensor:
    """`[b, n]` bool without the last `counts [b]` that are True in each row."""
    from_end = columns.flip(1).cumsum(1).flip(1)
    return columns & (from_end > counts[:, None])
