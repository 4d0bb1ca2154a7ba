"""How long one layer's decode step takes on a CPU: a whole cache layer, sparse beside dense, on the same inputs.

The competitor is PyTorch's scaled_dot_product_attention over the same cache, contiguous and without its append, which
favours it. Before anything is timed, the sparse step is compared with it, masked to the tokens of the selected pages;
no speed is printed if that fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sparsekv import DecodeStats, DecodeStep, SparseConfig
from sparsekv.cache import PagedLayer
from sparsekv.errors import ConfigError, SparseKVError
from sparsekv.evaluation.report import new_console, result, save_json
from sparsekv.pages.page_store import PageStore
from sparsekv.testing.timing import median_ms

from .plots import step_figure


@dataclass(frozen=True)
class Shape:
    """One attention layer: batch, query heads, kv heads, head size."""

    batch: int = 1
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64

    def __post_init__(self) -> None:
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"--q-heads={self.num_q_heads} must be a multiple of --kv-heads={self.num_kv_heads}: every kv head "
                "serves as many query heads."
            )

    def __str__(self) -> str:
        return f"{self.num_q_heads} query and {self.num_kv_heads} kv heads of {self.head_dim}"

    @property
    def scaling(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one decode step at one context length.

    The parts are timed one by one, over and over, which keeps them in the processor's cache: together they are less
    than `sparse_ms`.
    """

    context: int
    dense_ms: float
    sparse_ms: float
    append_ms: float
    score_ms: float
    select_ms: float
    attend_ms: float
    share: float  # of the cache's bytes that the sparse step reads

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.sparse_ms


class Bench:
    """One layer with a cache of random keys and values, and one decode step of it, sparse and dense.

    Raises:
        SparseKVError: the step disagrees with the dense competitor over the same tokens.
    """

    def __init__(self, shape: Shape, context: int, config: SparseConfig, device: torch.device, dtype: torch.dtype):
        self.shape, self.context, self.device = shape, context, device
        generator = torch.Generator(device).manual_seed(context)

        def random(heads: int, tokens: int) -> Tensor:
            size = (shape.batch, heads, tokens, shape.head_dim)
            return torch.randn(size, device=device, generator=generator).to(dtype)

        self.query = random(shape.num_q_heads, 1)
        self.new = random(shape.num_kv_heads, 1), random(shape.num_kv_heads, 1)
        self.past = random(shape.num_kv_heads, context), random(shape.num_kv_heads, context)
        self.stats = DecodeStats()
        self.layer = PagedLayer(PageStore(config), 0, config.with_(dense_layers=0), self.stats, [self._observe])
        self.layer.update(*self.past)
        self.layer.commit(None)

    def append(self) -> None:
        """The new token into its page."""
        self.layer.update(*self.new)
        self.layer.commit(None)

    def sparse(self) -> Tensor:
        """A whole sparse step, bookkeeping included."""
        self.layer.update(*self.new)
        out = self.layer.decode(self.query, self.shape.scaling, 0.0, None)
        assert isinstance(out, Tensor)
        return out

    def dense(self) -> Tensor:
        """The competitor's attention over the past tokens."""
        return F.scaled_dot_product_attention(self.query, *self.past, enable_gqa=True)

    def check(self) -> None:
        """The step that will be timed must give what the competitor gives over the pages it selected."""
        out = self.sparse()
        keys, values = (torch.cat(pair, 2) for pair in zip(self.past, self.new, strict=True))
        expected = F.scaled_dot_product_attention(
            self.query, keys, values, attn_mask=self._selected_tokens(keys.shape[2]), enable_gqa=True
        )
        error = ((out - expected).float().norm() / expected.float().norm()).item()
        allowed = 1e-4 if out.dtype == torch.float32 else 1e-2
        if not error < allowed:
            raise SparseKVError(
                f"The sparse step is {error:.1e} off dense attention; allowed is {allowed}: no speed."
            )

    def measure(self, repeats: int) -> Timing:
        """Times the step and its parts."""
        self.check()
        self.stats.reset()
        sparse_ms = median_ms(self.sparse, self.device, repeats)
        share = self.stats.share
        step = self.step
        scores = step.digest_scores()
        slots = step.select(scores)
        return Timing(
            context=self.context,
            dense_ms=median_ms(self.dense, self.device, repeats),
            sparse_ms=sparse_ms,
            append_ms=median_ms(self.append, self.device, repeats),
            score_ms=median_ms(step.digest_scores, self.device, repeats),
            select_ms=median_ms(lambda: step.select(scores), self.device, repeats),
            attend_ms=median_ms(lambda: self._attend(step, slots), self.device, repeats),
            share=share,
        )

    def _observe(self, step: DecodeStep, slots: Tensor | None) -> None:
        self.step, self.slots = step, slots

    def _selected_tokens(self, num_tokens: int) -> Tensor | None:
        """Which tokens the last step read, `[b, hq, 1, n]` bool; None: all."""
        if self.slots is None:
            return None
        page_size = self.step.config.page_size
        num_pages = -(-num_tokens // page_size)
        listed = torch.zeros(*self.slots.shape[:2], num_pages + 1, dtype=torch.bool, device=self.device)
        listed.scatter_(2, self.slots.long() % (num_pages + 1), True)  # -1, no page, falls on the spare place
        tokens = listed[..., :num_pages].repeat_interleave(page_size, 2)[..., :num_tokens]
        return tokens.repeat_interleave(self.shape.num_q_heads // self.shape.num_kv_heads, 1)[:, :, None]

    @staticmethod
    def _attend(step: DecodeStep, slots: Tensor) -> None:
        step.ops.attend_pages(
            step.query, step.kv_pool, step.block_table, step.seq_lens, slots, step.scaling, 0.0, None
        )


def run(
    shape: Shape,
    config: SparseConfig,
    contexts: Sequence[int],
    repeats: int,
    device: torch.device,
    command: str,
    out: str | None = None,
) -> dict[str, Any]:
    """Measures, prints the table and writes the files asked for; returns what the JSON file holds."""
    console = new_console()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    timings = []
    with torch.inference_mode():
        for context in track(contexts, "Measuring", console=console, transient=True):
            timings.append(Bench(shape, context, config, device, dtype).measure(repeats))
    console.print(_table(timings, shape, config, device, dtype))
    settings = {"shape": asdict(shape), "config": asdict(config), "dtype": str(dtype), "device": str(device)}
    where = {"geometry": str(shape), "batch": shape.batch, "budget": config.budget}
    rows = [{**where, **asdict(t), "speedup": t.speedup} for t in timings]
    content = result(command, settings, rows)
    if out:
        path = save_json(out, f"attention_{device.type}", content)
        step_figure(rows).savefig(path.with_suffix(".png"))
        console.print(f"Written: {path} and .png")
    return content


def _table(
    timings: list[Timing], shape: Shape, config: SparseConfig, device: torch.device, dtype: torch.dtype
) -> Table:
    title = (
        f"One layer's decode step on {device.type}: batch {shape.batch}, {shape}, "
        f"{str(dtype).removeprefix('torch.')}, "
        f"budget {config.budget}"
    )
    table = Table(
        title=title, caption="Milliseconds, medians; parts timed alone. Dense: PyTorch SDPA over the same cache."
    )
    for name in ("context", "dense", "sparse", "append", "score", "select", "attend", "cache read", "faster"):
        table.add_column(name, justify="right")
    for t in timings:
        parts = (t.dense_ms, t.sparse_ms, t.append_ms, t.score_ms, t.select_ms, t.attend_ms)
        table.add_row(f"{t.context:,}", *(f"{ms:.3f}" for ms in parts), f"{t.share:.1%}", f"{t.speedup:.1f}x")
    return table
