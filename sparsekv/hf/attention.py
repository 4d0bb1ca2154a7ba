"""The attention and mask functions that a patched model uses: dense for several tokens, sparse for one.

All dense work goes to the implementation the model had before, so that sinks, softcaps, sliding windows and masks
stay exactly what they were.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekv.cache import AttentionLayer, tagged_layer
from sparsekv.cache.masks import COLUMNS_ONLY, visible_columns

LARGE_MASK = 1 << 24  # elements (of a batch) beyond which no mask is made

_needs_masks: ContextVar[bool] = ContextVar("sparsekv_needs_masks", default=True)

# Arguments that change which keys a query may see, or how: a layer whose kind does not understand them is left dense.
_SPECIAL_ARGUMENTS = ("position_bias", "indices", "block_indices", "sparse_indices", "sliding_window")


class AttentionName(str):
    """The attention that a model names itself, under which the interfaces find our functions.

    Model code asks which attention it runs with (`==`, `in ("eager", "sdpa")`, `"flash" in`), and does something else
    for each: so the text is the model's own answer. Only the hash differs, by which the interfaces, which are
    dictionaries, find our functions, and for plain strings those that were there.

    Making one registers the functions; models whose config holds plain strings are not affected. It takes the place
    of the string in the config (which transformers never saves), so no attribute is added that could leak into a
    `config.json`, and a deep copy of a patched model works.
    """

    original: str | None

    def __new__(cls, original: str | None) -> AttentionName:
        name = super().__new__(cls, original or "eager")
        name.original = None if original is None else str(original)
        AttentionInterface.register(name, sparsekv_attention)
        AttentionMaskInterface.register(name, sparsekv_mask)
        return name

    def __hash__(self) -> int:
        return hash(("sparsekv", str(self)))

    def __reduce__(self) -> tuple[type[AttentionName], tuple[str | None]]:
        return type(self), (self.original,)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionName:
        return self


def is_patched(config: Any) -> bool:
    """Whether the config leads to our functions."""
    return isinstance(config._attn_implementation, AttentionName)


def is_served(implementation: str) -> bool:
    """Whether an attention implementation of transformers takes the masks and tensors that are handed on here: flash
    attentions, the hub's too, have `flash` in their names; flex attention has masks of its own kind."""
    return implementation in ("eager", "sdpa") or ("flash" in implementation and "|" not in implementation)


def original_implementation(config: Any) -> str:
    """What the model used before the patch, or uses if it is not patched: a plain string, which leads to the model's
    own functions."""
    return str(config._attn_implementation or "eager")


def sparsekv_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query `[b, hq, t, d]`, key and value `[b, hkv, n, d]` -> `[b, t, hq, d]`, in
    the query's dtype, and the weights `[b, hq, t, n]` if the model's own implementation gives any. Of a layer
    that is served key and value are the new tokens alone (n = t), and what it gives itself has no weights.

    Raises:
        CacheStateError: the tokens do not continue what is in the pages; CacheFullError: there is no room for them.
    """
    layer = tagged_layer(key, value)
    if layer is None:
        if attention_mask is not None:  # else it is the model's own business: keys may have room behind the tokens
            attention_mask = _own_mask(module, query, key, attention_mask)
        return _dense(module, query, key, value, attention_mask, **kwargs)
    return _served(layer, module, query, key, value, attention_mask, **kwargs)


def sparsekv_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, config: Any = None, **kwargs: Any
) -> Tensor | None:
    """The mask that the model's own implementation would get. Of a plain causal one that would be large, only which
    columns are no padding, `[b, 1, 1, kv_length]` (some models slice masks) in a dtype that no mask has: `_own_mask`
    makes the rest of it where it is needed after all. None at all within `without_masks`."""
    if not _needs_masks.get():
        return None
    original = original_implementation(config)
    large = q_length > 1 and batch_size * q_length * kv_length > LARGE_MASK
    if large and original == "sdpa" and not args and _is_causal_only(q_length, kv_length, **kwargs):
        return _columns_only(batch_size, q_length, kv_length, kwargs.get("attention_mask"), kwargs.get("device"))
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[original](
        batch_size, q_length, kv_length, *args, config=config, **kwargs
    )
    return mask


@contextlib.contextmanager
def without_masks() -> Iterator[None]:
    """Within it no masks are made: for decode steps of which every layer lives in pages, where no padding is."""
    before = _needs_masks.set(False)
    try:
        yield
    finally:
        _needs_masks.reset(before)


def _is_causal_only(
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> bool:
    """Whether a mask says no more than padding, and that the last tokens see what is before them. (A static cache has
    room behind them.)"""
    newest = isinstance(q_offset, int) and (q_offset + q_length, kv_offset) == (kv_length, 0)
    known = attention_mask is None or attention_mask.shape[-1] >= kv_length
    plain = mask_function is causal_mask_function and local_size is None and allow_is_causal_skip
    return newest and known and plain


def _columns_only(
    batch_size: int, q_length: int, kv_length: int, padding: Tensor | None, device: torch.device | str | None
) -> Tensor | None:
    visible = None if padding is None else padding[:, :kv_length].bool()
    if visible is None or bool(visible.all()):
        if q_length == kv_length:
            return None  # as sdpa would have it
        visible = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    return visible[:, None, None].to(COLUMNS_ONLY)


@torch.compiler.disable  # it moves page tables, which no graph can hold
def _served(
    layer: AttentionLayer,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    special = [x for x in _SPECIAL_ARGUMENTS if kwargs.get(x) is not None and x not in layer.understands]
    if special:
        layer.refuse(f"its attention uses {', '.join(special)}")
    attended: Tensor | tuple[Tensor, Tensor] = (key, value)
    if not layer.is_dense:
        attended = _ask(layer, module, query, key, value, attention_mask, **kwargs)
    if isinstance(attended, Tensor):
        return attended.transpose(1, 2).contiguous(), None
    key, value = attended
    return _dense(module, query, key, value, _own_mask(module, query, key, attention_mask), **kwargs)


def _is_plain(module: torch.nn.Module, **kwargs: Any) -> bool:
    """Whether the attention is softmax(q k^T) v and nothing else."""
    special = [kwargs.get(name) for name in ("s_aux", "softcap", "output_attentions")]
    return (
        original_implementation(module.config) == "sdpa"
        and not kwargs.get("dropout")
        and not any(x is not None and x is not False for x in special)
    )


def _ask(
    layer: AttentionLayer,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """What the layer gives: the output, or what the model's own attention is to run over."""
    scaling = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if query.shape[2] > 1:
        is_plain = _is_plain(module, s_aux=s_aux, softcap=softcap, **kwargs)
        return layer.prefill(query, key, value, attention_mask, scaling, is_plain)
    if original_implementation(module.config) == "sdpa":
        softcap = None  # transformers' sdpa path has no softcap: stay equal to it
    return layer.decode(query, scaling, softcap or 0.0, s_aux, visible_columns(attention_mask))


def _dense(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    name = original_implementation(module.config)
    if name in FLASH_ATTN_KERNEL_FALLBACK:  # there, transformers would look for the config's name, of another hash
        lazy_import_flash_attention(name)
    implementation: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    result: tuple[Tensor, Tensor | None] = implementation(module, query, key, value, attention_mask, **kwargs)
    return result


def _own_mask(module: torch.nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask for the model's own implementation, made whole where `sparsekv_mask` has left it out."""
    (b, _, t, _), n = query.shape, key.shape[2]
    left_out = n > t > 1 if attention_mask is None else attention_mask.dtype == COLUMNS_ONLY
    if not left_out or original_implementation(module.config) != "sdpa":
        return attention_mask
    visible = None if attention_mask is None else attention_mask[:, 0, 0].bool()
    made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        b, t, n, n - t, attention_mask=visible, device=query.device, config=module.config
    )
    return made
