"""What a mask says of columns, whatever kind of mask it is."""

from __future__ import annotations

import torch
from torch import Tensor

# The dtype of a mask `[b, 1, 1, n]` that only says which columns hold tokens. The rest of it is causal.
COLUMNS_ONLY = torch.uint8


def visible_columns(attention_mask: Tensor | None) -> Tensor | None:
    """Which kv positions are no padding, `[b or 1, n]` bool: what the last query of any kind of mask may see."""
    if attention_mask is None:
        return None
    row = attention_mask[:, 0, -1] if attention_mask.ndim == 4 else attention_mask
    return row > -1 if row.is_floating_point() else row.bool()
