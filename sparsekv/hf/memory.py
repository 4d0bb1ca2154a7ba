"""What a context takes of a GPU's memory, told before it is tried."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sparsekv.cache import heads_of, places, plain_layers
from sparsekv.cache.layer_kinds import Place
from sparsekv.cache.model_check import Heads
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError
from sparsekv.hf import forecast, support
from sparsekv.hf.chunks import chunk_size
from sparsekv.pages.formats import FORMATS
from sparsekv.pages.layer_pages import GROWTH_SLACK, RESERVE_SLACK
from sparsekv.pages.window_table import OF_LONG
from sparsekv.policies import POLICIES, Reads

GIB = 1 << 30
_RUNTIME = GIB  # what CUDA, its libraries, kernels and graphs take
_MAX_CONTEXT = 1 << 28  # tokens, beyond which no fitting context is looked for


@dataclass(frozen=True)
class Memory:
    """Bytes that `generate` takes on a GPU.

    Attributes:
        context, batch: tokens of a sequence, those that are to come counted, and sequences.
        kv: the format of keys and values.
        weights: of the model.
        pages: of keys and values, those of windows and what is allocated ahead counted.
        digests: of pages that are scored.
        rest: what lies between two layers while a prompt goes through, what a chunk of it is read against, logits,
            and what CUDA takes: an estimate.
        not_counted: layers whose cache is transformers' own.
        limit: of the device; None: not known.
        longest: tokens of a sequence that fit, of so many sequences; None: the limit is not known.
    """

    context: int
    batch: int
    kv: str
    weights: int
    pages: int
    digests: int
    rest: int
    not_counted: int = 0
    limit: int | None = None
    longest: int | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.pages + self.digests + self.rest

    @property
    def fits(self) -> bool | None:
        """Whether the device has so much; None: its limit is not known."""
        return None if self.limit is None else self.total <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "pages", "digests")}
        parts |= {"the rest, about": self.rest, "together": self.total}
        lines = [f"{self.batch} x {self.context:,} tokens, kv {self.kv}"]
        lines += [f"  {name:<16}{size / GIB:8.2f} GiB" for name, size in parts.items()]
        if self.limit is not None and self.longest is not None:
            fits = "fits" if self.fits else "does not fit"
            lines.append(f"  {fits} {self.limit / GIB:.1f} GiB; at most {self.batch} x {self.longest:,} tokens do")
        if self.not_counted:
            lines.append(f"  not counted: {self.not_counted} layers, whose cache is transformers' own")
        return "\n".join(lines)


def memory(
    model: PreTrainedModel,
    config: SparseConfig,
    context: int,
    batch: int = 1,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
) -> Memory:
    """What so many tokens take.

    Args:
        model: of which shapes alone are asked.
        config: settings that fit the model.
        context: tokens of a sequence, those to be generated counted; batch: sequences.
        limit: bytes of a device; None: not known.
        dtype: of the weights, keys and values; None: the model's.

    Raises:
        ConfigError: `context` or `batch` is below 1.
    """
    for name, value in (("context", context), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number, at least 1.")
    taken = _taken(model, config, context, batch, dtype or model.dtype)
    if limit is None:
        return taken
    fitting, too_long = 0, _MAX_CONTEXT // config.page_size  # in pages
    while too_long - fitting > 1:
        between = (fitting + too_long) // 2
        found = _taken(model, config, between * config.page_size, batch, dtype or model.dtype)
        fitting, too_long = (between, too_long) if found.total <= limit else (fitting, between)
    return replace(taken, limit=limit, longest=fitting * config.page_size)


def forecast_memory(
    model_config: PretrainedConfig,
    config: SparseConfig,
    context: int,
    batch: int = 1,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
) -> Memory:
    """`memory` of a model that is not there, by its config.

    Args:
        dtype: None: that of the checkpoint, or bfloat16.

    Raises:
        ConfigError, UnknownNameError, UnsupportedModelError: as `sparsekv.supports`, or as `memory`.
    """
    model = support.generating(forecast.without_weights(model_config))
    settled, _ = support.examine(model, config)
    told = getattr(model_config, "dtype", None)
    return memory(model, settled, context, batch, limit, dtype or (told if told is not None else torch.bfloat16))


def _taken(model: PreTrainedModel, config: SparseConfig, context: int, batch: int, dtype: torch.dtype) -> Memory:
    all_layers, dense = places(model.config), config.dense_among(plain_layers(model.config))
    keeps_digests = POLICIES.get(config.policy).reads is Reads.DIGESTS
    pages = digests = not_counted = 0
    for i, place in enumerate(all_layers):
        heads = heads_of(place.config) or heads_of(model.config)
        if place.kind is None or not place.kind.in_pages or heads is None:
            not_counted += 1
            continue
        a_page, a_digest = _of_page(heads, config, place.kind.is_sparse, dtype)
        count = heads.num_kv_heads * _num_pages(place, config, context, batch)
        pages += count * a_page
        digests += count * a_digest if place.kind.is_sparse and keeps_digests and i not in dense else 0
    tensors = (*model.parameters(), *model.buffers())
    weights = sum(x.numel() * (dtype.itemsize if x.is_floating_point() else x.itemsize) for x in tensors)
    rest = _rest(model, config, context, batch, dtype)
    return Memory(context, batch, config.page_format, weights, pages, digests, rest, not_counted)


def _of_page(heads: Heads, config: SparseConfig, is_sparse: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a page of one kv head, and of its digest. Pages of windows are plain."""
    kind, shape = FORMATS.get(config.page_format if is_sparse else "plain")(), (config.page_size, heads.head_dim)
    record, stored = kind.mean_record(*shape, dtype)
    fields = DIGESTS.get(config.digest)().fields(*shape)
    a_digest = sum(math.prod(field.shape) * (field.dtype or dtype).itemsize for field in fields)
    return 2 * config.page_size * record * stored.itemsize, a_digest


def _num_pages(place: Place, config: SparseConfig, context: int, batch: int) -> int:
    """Pages that are allocated: where all tokens are kept, their number is reserved."""
    window = getattr(place.plain, "sliding_window", None)
    if window and place.kind is not None and not place.kind.is_sparse:
        held = config.pages_for(min(context, window - 1 + OF_LONG))
        count = batch * max(held, config.pages_for(window - 1) + 1)
        return count + count // GROWTH_SLACK
    count = batch * config.pages_for(context)
    return count + min(count // GROWTH_SLACK, RESERVE_SLACK)


def _rest(model: PreTrainedModel, config: SparseConfig, context: int, batch: int, dtype: torch.dtype) -> int:
    text, heads = support.text_config(model), heads_of(model.config)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    chunk = chunk_size(batch, context)
    between = batch * (chunk or context) * (6 * text.hidden_size + 3 * inner) * dtype.itemsize
    logits = 2 * batch * text.vocab_size * 4
    read = 0
    if chunk is not None and heads is not None:  # a sequence's keys and values as they are
        read = 2 * heads.num_kv_heads * heads.head_dim * context * dtype.itemsize
    return _RUNTIME + between + logits + read
