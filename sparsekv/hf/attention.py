"""The attention and mask functions that a patched model uses: dense for several tokens, sparse for one.

Dense work goes to the implementation the model had before, so that sinks, softcaps, sliding windows and masks stay
exactly what they were; only where a mask would be large, and we know all that the attention does, it is our own.
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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekv.cache import AttentionLayer, prefill, tagged_layer
from sparsekv.cache.handshake import layer_of_latents
from sparsekv.cache.masks import is_left_out, visible_columns, window_of
from sparsekv.hf import masks

LARGE_MASK = 1 << 24  # elements (of a batch) beyond which no mask is made
# Over so many keys, fewer queries than these count as so many: with a mask, all that comes before them is copied out
# of the pages at once.
LONG_KEYS, FEW_QUERIES = 1 << 14, 64

_needs_masks: ContextVar[bool] = ContextVar("sparsekv_needs_masks", default=True)

# Arguments that change which keys a query may see, or how: a layer whose kind does not understand them is left dense.
_SPECIAL_ARGUMENTS = ("position_bias", "indices", "block_indices", "sparse_indices", "sliding_window")


class AttentionName(str):
    """The attention that a model names itself, under which the interfaces find our functions.

    Model code asks which attention it runs with (`==`, `in ("eager", "sdpa")`, `"flash" in`), and does something else
    for each: so the text is the model's own answer. The hash is that of another text, `key`, to which the name is
    equal as well: so the interfaces, which are dictionaries, find our functions, and for plain strings those that
    were there. Their keys are plain strings, too, since `torch.compile` follows every model into them.

    Making one registers the functions; models whose config holds plain strings are not affected. It takes the place
    of the string in the config (which transformers never saves), so no attribute is added that could leak into a
    `config.json`, and a deep copy of a patched model works.

    Attributes:
        original: the text; None: the config named none.
        key: under which the interfaces have our functions.
        is_special: whether the model's attention has softcaps or sinks, for which transformers has only "eager".
    """

    original: str | None
    key: str
    is_special: bool

    def __new__(cls, original: str | None, is_special: bool = False) -> AttentionName:
        name = super().__new__(cls, original or "eager")
        name.original, name.is_special = None if original is None else str(original), is_special
        name.key = f"sparsekv:{name}"
        AttentionInterface.register(name.key, sparsekv_attention)
        AttentionMaskInterface.register(name.key, sparsekv_mask)
        return name

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or str.__eq__(self.key, other) is True

    def __reduce__(self) -> tuple[type[AttentionName], tuple[str | None, bool]]:
        return type(self), (self.original, self.is_special)

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


def _is_special_eager(config: Any) -> bool:
    """Whether the model has "eager" because nothing else does what its attention does."""
    name = config._attn_implementation
    return isinstance(name, AttentionName) and name.is_special and name == "eager"


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
    if layer is None and hasattr(module, "expand_kv"):
        layer = layer_of_latents(module, key, value)
    if layer is None:
        if attention_mask is None:  # it is the model's own business: keys may have room behind the tokens
            return _dense(module, query, key, value, None, **kwargs)
        return _over_all(module, query, key, value, attention_mask, **kwargs)
    return _served(layer, module, query, key, value, attention_mask, **kwargs)


def sparsekv_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, config: Any = None, **kwargs: Any
) -> Tensor | None:
    """The mask that the model's own implementation would get. Of a causal one that would be large, with or without a
    sliding window, only what `columns_only` tells, `[b, 1, 1, kv_length]` (some models slice masks) in a dtype that
    no mask has: `masks.whole` makes the rest of it where it is needed after all. None at all within
    `without_masks`."""
    if not _needs_masks.get():
        return None
    original = original_implementation(config)
    counted = max(q_length, FEW_QUERIES if kv_length >= LONG_KEYS else 0)
    large = q_length > 1 and batch_size * counted * kv_length > LARGE_MASK
    served = original == "sdpa" or _is_special_eager(config)
    if large and served and not args and masks.is_causal_only(q_length, kv_length, **kwargs):
        return masks.left_out(original, batch_size, q_length, kv_length, **kwargs)
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
    return _over_all(module, query, key, value, attention_mask, **kwargs)


def _over_all(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention to all keys and values that there are."""
    if attention_mask is not None and is_left_out(attention_mask) and _is_ours(module, query, key, value, **kwargs):
        scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap") or 0.0
        scaling = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        out = prefill.attend_all(query, key, value, attention_mask, scaling, softcap, kwargs.get("s_aux"))
        return out.transpose(1, 2).contiguous(), None
    attention_mask = masks.whole(original_implementation(module.config), query, key, attention_mask, module.config)
    return _dense(module, query, key, value, attention_mask, **kwargs)


def _is_plain(module: torch.nn.Module, **kwargs: Any) -> bool:
    """Whether the attention is softmax(q k^T) v and nothing else."""
    special = [kwargs.get(name) for name in ("s_aux", "softcap", "output_attentions")]
    return (
        original_implementation(module.config) == "sdpa"
        and not kwargs.get("dropout")
        and not any(x is not None and x is not False for x in special)
    )


def _is_ours(module: torch.nn.Module, *tensors: Tensor, **kwargs: Any) -> bool:
    """Whether `prefill.attend_all` gives all that the model's own implementation would: plain attention, or with
    softcaps and sinks; and no weights or gradients are asked for."""
    needs_more = kwargs.get("dropout") or kwargs.get("output_attentions")
    needs_more = needs_more or getattr(module.config, "output_attentions", False)
    needs_more = needs_more or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    others = [x for x in _SPECIAL_ARGUMENTS if x != "sliding_window" and kwargs.get(x) is not None]
    return not needs_more and not others and (_is_special_eager(module.config) or _is_plain(module, **kwargs))


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
        is_plain = window_of(attention_mask) is None and _is_plain(module, s_aux=s_aux, softcap=softcap, **kwargs)
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
