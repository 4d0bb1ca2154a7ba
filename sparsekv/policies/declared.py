"""What a policy declares of itself, checked before a cache is made for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsekv.config import SparseConfig
from sparsekv.errors import ConfigError
from sparsekv.policies.base import Policy, Remembered

_WIDTHS = ((1, 1), (8, 512))  # of a selection and a table: the least there are, and some that are common


def check_declared(config: SparseConfig, policy: type[Policy], layers: Sequence[int]) -> None:
    """Checks `period`, `memory` and `keeper` of the policy that the settings name.

    Args:
        layers: those that it decides for, in order.

    Raises:
        ConfigError: one of them cannot be followed; the message says what is allowed.
    """
    where = f"policy={config.policy!r} ({policy.__name__})"
    if not _is_whole(policy.period, 1):
        raise ConfigError(
            f"{where} declares period={policy.period!r}. Set it to the decode steps after which it begins anew, a "
            "whole number of at least 1."
        )
    made = policy()
    for k, max_pages in _WIDTHS:
        fields = made.memory(k, max_pages)
        if not isinstance(fields, list) or not all(map(_is_possible, fields)):
            raise ConfigError(
                f"{where} cannot remember what memory(k={k}, max_pages={max_pages}) returns: {fields!r}. Return a "
                "list of Remembered(shape, dtype, fill): sizes that are whole numbers of at least 0 for every k and "
                "max_pages, and a fill that the dtype can hold (from sparsekv.policies import Remembered)."
            )
    for ordinal, layer_idx in enumerate(layers):
        keeper = made.keeper(ordinal)
        if not (_is_whole(keeper, 0) and keeper <= ordinal and made.keeper(keeper) == keeper):
            raise ConfigError(
                f"{where} says keeper({ordinal}) = {keeper!r}. Return the ordinal of the layer itself, or of an "
                f"earlier one that keeps its own memory: 0 to {ordinal}."
            )
        kept_by = layers[keeper]
        if config.at(kept_by) != config.at(layer_idx) and _grows_with_k(made):
            raise ConfigError(
                f"{where} remembers as much as a budget has pages, and layer {layer_idx} shares what layer {kept_by} "
                "remembers: give both the same budget."
            )


def _is_possible(field: object) -> bool:
    """Whether there can be such a tensor."""
    if not isinstance(field, Remembered) or not isinstance(field.shape, tuple):
        return False
    try:
        torch.full((), field.fill, dtype=field.dtype or torch.float32, device="cpu")
    except (RuntimeError, TypeError):
        return False
    return all(_is_whole(size, 0) for size in field.shape)


def _grows_with_k(policy: Policy) -> bool:
    k, max_pages = _WIDTHS[-1]
    return [x.shape for x in policy.memory(k, max_pages)] != [x.shape for x in policy.memory(2 * k, max_pages)]


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
