"""Budgets that differ by layer: how they may be given, how a config keeps them, and how they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import TypeAlias

from sparsekv.errors import ConfigError

REST = "rest"  # the key for all layers that are not named

Budget: TypeAlias = int | float
ByLayer: TypeAlias = tuple[tuple[int | str, Budget], ...]
Budgets: TypeAlias = Budget | ByLayer | Mapping[int | str, Budget] | Callable[[int], Budget]


def canonical(budgets: Budgets) -> Budgets:
    """A mapping as pairs in the order of the layers, the rest at the end: the same budgets, the same value. What is
    neither a mapping nor such pairs stays as it is.

    Raises:
        ConfigError: a key is neither a layer's index nor "rest", a value is no number, or there is none.
    """
    if not isinstance(budgets, (Mapping, tuple)):
        return budgets
    try:
        given = dict(budgets)
    except (TypeError, ValueError) as error:  # a tuple of something else
        raise ConfigError(f"budget={budgets!r}: several budgets are a mapping from layers to budgets.") from error
    by_layer = {_key(key): value for key, value in given.items()}
    if not by_layer:
        raise ConfigError("budget={} names no layer: give every layer a budget, or all of them one number.")
    for key, value in by_layer.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"budget[{key!r}]={value!r} must be a number of tokens (int) or a fraction (float).")
    return tuple(sorted(by_layer.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))


def as_mapping(budgets: Budgets) -> dict[int | str, Budget]:
    """The budget of every layer that is named, and of the rest.

    Raises:
        ConfigError: it is a function, which only a model's layers can be given to.
    """
    if callable(budgets):
        raise ConfigError(
            "budget is a function of the layer, which is asked when a patch or a cache is made: patch.config and "
            "cache.config have what it gave."
        )
    return {REST: budgets} if isinstance(budgets, (int, float)) else dict(budgets)


def check_layers(budgets: Budgets, possible: Iterable[int], num_layers: int) -> None:
    """Whether budgets by layer are those of a model.

    Args:
        possible: the layers that can be sparse, in order.

    Raises:
        ConfigError: a layer is named that the model does not have, or that cannot be sparse; or one is left out, and
            there is none for the rest.
    """
    named, known = as_mapping(budgets), list(possible)
    wrong = [layer for layer in named if layer != REST and layer not in known]
    if wrong:
        raise ConfigError(
            f"budget names {', '.join(map(str, wrong))}, and of the model's layers 0 to {num_layers - 1} only "
            f"{spans(known) or 'none'} can be sparse. Name some of these; {REST!r} stands for all others."
        )
    missing = [layer for layer in known if layer not in named]
    if missing and REST not in named:
        raise ConfigError(f"budget has none for {spans(missing)}: name all that can be sparse, or add {REST!r}.")


def told(budgets: Budgets) -> str:
    """Budgets in a few words."""
    if isinstance(budgets, float):
        return f"{budgets:.0%} of the context"
    return f"{budgets} tokens" if isinstance(budgets, int) else "by layer"


def spans(layers: Iterable[int]) -> str:
    """`0-2, 5` for 0, 1, 2 and 5."""
    found = sorted(layers)
    ends = [i for i, (one, next_one) in enumerate(pairwise(found), 1) if next_one > one + 1]
    runs = [found[start:end] for start, end in zip([0, *ends], [*ends, len(found)], strict=True) if end > start]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _key(key: object) -> int | str:
    if isinstance(key, str) and key.isdecimal():  # JSON has no other keys
        key = int(key)
    if key == REST or (isinstance(key, int) and not isinstance(key, bool) and key >= 0):
        return key
    raise ConfigError(f"budget has the key {key!r}: allowed are indices of layers, from 0 on, and {REST!r}.")
