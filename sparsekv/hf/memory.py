"""What a context takes of a GPU's memory, told before it is tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sparsekv.cache.prefill import MAX_TOGETHER
from sparsekv.config import SparseConfig
from sparsekv.errors import ConfigError
from sparsekv.hf import forecast, support
from sparsekv.hf.chunks import chunk_size
from sparsekv.hf.needs import Needs, needs_of
from sparsekv.pages.layer_pages import GROWTH_SLACK, RESERVE_SLACK
from sparsekv.pages.window_table import OF_LONG

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
        states: of linear attention, convolutions and state-space models.
        rest: what lies between two layers while a prompt goes through, what a chunk of it is read against, logits,
            and what CUDA takes: an estimate.
        not_counted: layers whose cache is transformers' own, or whose states only a run tells.
        limit: of the device; None: not known.
        longest: tokens of a sequence that fit, of so many sequences; None: the limit is not known.
    """

    context: int
    batch: int
    kv: str
    weights: int
    pages: int
    digests: int
    states: int
    rest: int
    not_counted: int = 0
    limit: int | None = None
    longest: int | None = None

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.pages + self.digests + self.states + self.rest

    @property
    def fits(self) -> bool | None:
        """Whether the device has so much; None: its limit is not known."""
        return None if self.limit is None else self.total <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "pages", "digests", "states")}
        parts = {name: size for name, size in parts.items() if size or name != "states"}
        parts |= {"the rest, about": self.rest, "together": self.total}
        lines = [f"{self.batch} x {self.context:,} tokens, kv {self.kv}"]
        lines += [f"  {name:<16}{size / GIB:8.2f} GiB" for name, size in parts.items()]
        if self.limit is not None and self.longest is not None:
            fits = "fits" if self.fits else "does not fit"
            lines.append(f"  {fits} {self.limit / GIB:.1f} GiB; at most {self.batch} x {self.longest:,} tokens do")
        if self.not_counted:
            lines.append(f"  not counted: {self.not_counted} layers, which are not in pages")
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
    take = partial(_taken, needs_of(model, config, dtype or model.dtype), config)
    taken = take(context, batch)
    if limit is None:
        return taken
    fitting, too_long = 0, _MAX_CONTEXT // config.page_size  # in pages
    while too_long - fitting > 1:
        between = (fitting + too_long) // 2
        fits = take(between * config.page_size, batch).total <= limit
        fitting, too_long = (between, too_long) if fits else (fitting, between)
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


def _taken(model: Needs, config: SparseConfig, context: int, batch: int) -> Memory:
    pages = digests = 0
    for layer in model.layers:
        count = _num_pages(layer.window, config, context, batch)
        pages, digests = pages + count * layer.page, digests + count * layer.digest + layer.fitted
    chunk = chunk_size(batch, context, bool(model.expanded))
    rest = _RUNTIME + batch * ((chunk or context) * model.in_pass + context * model.expanded + model.logits)
    if chunk is not None:  # keys and values of a sequence, or of several short ones, as they are
        rest += max(context, min(batch * context, MAX_TOGETHER)) * model.read
    states = batch * model.states
    return Memory(context, batch, config.page_format, model.weights, pages, digests, states, rest, model.not_counted)


def _num_pages(window: int | None, config: SparseConfig, context: int, batch: int) -> int:
    """Pages that are allocated: where all tokens are kept, their number is reserved."""
    if window is not None:
        held = config.pages_for(min(context, window - 1 + OF_LONG))
        count = batch * max(held, config.pages_for(window - 1) + 1)
        return count + count // GROWTH_SLACK
    count = batch * config.pages_for(context)
    return count + min(count // GROWTH_SLACK, RESERVE_SLACK)
