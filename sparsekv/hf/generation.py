"""Which cache a patched model's `generate` and plain forward get."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparsekv.cache import PagedCache
from sparsekv.errors import CacheStateError

MakeCache = Callable[[int], PagedCache]  # tokens to reserve -> cache

_DYNAMIC = (None, "dynamic")
_STATIC = ("static",)


def prepare_cache(
    model: PreTrainedModel,
    make_cache: MakeCache,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's `_prepare_cache_for_generation`: a PagedCache where generate would make its default or static one.

    A cache given by the user, `use_cache=False`, training mode and other cache implementations go to the model's own.
    """
    wanted = generation_config.cache_implementation
    if _wants_own_cache(model, generation_config, model_kwargs):
        model_class: Any = type(model)
        return model_class._prepare_cache_for_generation(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
        )
    rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    cache = make_cache(rows * max_cache_length if wanted in _STATIC else 0)
    if getattr(generation_config, "is_assistant", False):
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache
    return None


def _wants_own_cache(model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False or model.training:
        return True
    wanted = generation_config.cache_implementation
    if wanted in _DYNAMIC + _STATIC:
        return False
    warnings.warn(
        f"cache_implementation={wanted!r} is transformers' own cache: this call decodes densely. Leave it out "
        "(or use 'static') to decode sparsely.",
        stacklevel=4,
    )
    return True


def fill_in_cache(
    make_cache: MakeCache,
    parameters: tuple[str, ...],
    module: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The decoder's forward pre-hook: gives a plain forward a PagedCache, and refuses what would not fit in one.

    Args:
        parameters: names of the forward's parameters, in order.
    """
    named = dict(zip(parameters, args, strict=False)) | kwargs
    if named.get("past_key_values") is None and not module.training and _uses_cache(module, named):
        named["past_key_values"] = make_cache(0)
    if isinstance(named.get("past_key_values"), PagedCache):
        _check_input(module, named)
    return args[len(parameters) :], named


def _uses_cache(module: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    use_cache = arguments.get("use_cache")
    return bool(getattr(module.config, "use_cache", True) if use_cache is None else use_cache)


def _check_input(module: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Before the first layer writes anything: there must be room, and nobody may expect gradients."""
    if module.training:
        raise CacheStateError("A PagedCache carries no gradients: call model.eval(), or train without a cache.")
    embeds = arguments.get("inputs_embeds")
    inputs = embeds if embeds is not None else arguments.get("input_ids")
    mask = arguments.get("attention_mask")
    if inputs is not None:
        batch_size, num_new = inputs.shape[:2]
        valid = mask[:, -num_new:] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        arguments["past_key_values"].check_room(batch_size, num_new, valid)
