"""What a mask says, whatever kind of mask it is."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

# The dtype of a mask `[b, 1, 1, n]` that only says how many tokens see each column, from its own on: of padding none.
# The rest of it is causal.
COLUMNS_ONLY = torch.int32
_ALL = torch.iinfo(COLUMNS_ONLY).max
_TOLD = "_sparsekv_told"


class Told(NamedTuple):
    """What such a mask says. Its tensor has it as an attribute, so that no layer waits for the device to tell; a
    slice or a copy of it has not."""

    window: int | None
    is_padded: bool


def columns_only(visible: Tensor, window: int | None = None) -> Tensor:
    """A mask that is not made whole.

    Args:
        visible: `[b, n]` bool, False for padding.
        window: how many tokens see a column, its own included; None: all that come after it.
    """
    mask = visible[:, None, None].to(COLUMNS_ONLY) * (window or _ALL)
    setattr(mask, _TOLD, Told(window, not bool(visible.all())))
    return mask


def is_left_out(attention_mask: Tensor | None) -> bool:
    """Whether a mask is one of `columns_only`."""
    return attention_mask is not None and attention_mask.dtype == COLUMNS_ONLY


def window_of(attention_mask: Tensor | None) -> int | None:
    """How many tokens a query sees at most, by a mask that is not made whole; None: all before it."""
    return _told(attention_mask).window if attention_mask is not None and is_left_out(attention_mask) else None


def padded_columns(attention_mask: Tensor) -> Tensor | None:
    """As `visible_columns`, of a mask that is not made whole; None: there is no padding."""
    return visible_columns(attention_mask) if _told(attention_mask).is_padded else None


def _told(attention_mask: Tensor) -> Told:
    told = cast("Told | None", getattr(attention_mask, _TOLD, None))
    if told is not None:
        return told
    least, most = (int(x) for x in attention_mask.aminmax())
    return Told(most if 0 < most < _ALL else None, least == 0)


def visible_columns(attention_mask: Tensor | None) -> Tensor | None:
    """Which kv positions are no padding, `[b or 1, n]` bool: what the last query of any kind of mask may see."""
    if attention_mask is None:
        return None
    row = attention_mask[:, 0, -1] if attention_mask.ndim == 4 else attention_mask
    return row > -1 if row.is_floating_point() else row.bool()


def seen_columns(attention_mask: Tensor | None) -> Tensor | None:
    """Which kv positions any query of a mask may see, `[b or 1, n]` bool: through a window its last one does not see
    all that are no padding."""
    if attention_mask is None or attention_mask.ndim < 4:
        return visible_columns(attention_mask)
    return visible_columns(attention_mask.amax(-2, keepdim=True))


def is_causal(attention_mask: Tensor | None, num_new: int) -> bool:
    """Whether a mask of the newest tokens says no more than padding, and that each sees the tokens up to itself."""
    if attention_mask is None or is_left_out(attention_mask):
        return True
    if attention_mask.dtype != torch.bool or attention_mask.shape[-2] != num_new:
        return False
    n = attention_mask.shape[-1]
    causal = torch.ones(num_new, n, dtype=torch.bool, device=attention_mask.device).tril(n - num_new)
    return torch.equal(attention_mask, (causal & attention_mask[:, :1, -1:]).expand_as(attention_mask))
