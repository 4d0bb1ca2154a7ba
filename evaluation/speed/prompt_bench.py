"""How long one layer's attention of a prompt's chunk takes over listed blocks, beside dense attention.

    sparsekv bench prompt --device cuda
    sparsekv bench prompt --device cuda --densities .1 --context 512k --out results

Each block of queries lists a share of the causal blocks, at random, the first, its own and the one before among them,
for every query head others. TFLOP/s are of what is computed: of all blocks that are listed, the last one whole. On a
GPU FlexAttention gets the same lists. Beside them stand what a dense prompt takes here, and cuDNN's attention without
a mask, which computes twice as much of the chunk itself. A result is compared with plain torch before it is timed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsekv.cache import prefill
from sparsekv.command_line import add_json_option, choose_device, new_console, positive, tokens
from sparsekv.errors import ConfigError, KernelError
from sparsekv.evaluation.report import result, save_json, short
from sparsekv.ops import flex, prompt

from .graph_timer import Timer, free

K = 1024
TOLERANCE = 0.1  # of the outputs' root mean square, which is small: they are means of thousands of values
# Queries, keys, query heads, kv heads.
SHAPES = {"cuda": (16 * K, 128 * K, 32, 8), "cpu": (K, 4 * K, 4, 1)}

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv bench prompt`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0], metavar="SHARE",
                        help="of the causal blocks that are listed (default .1 .25 .5 1)")  # fmt: skip
    parser.add_argument("--queries", type=tokens, help="tokens of the chunk (default 16k, on a CPU 1k)")
    parser.add_argument("--context", type=tokens, help="keys, the chunk's among them (default 128k, on a CPU 4k)")
    parser.add_argument("--q-heads", type=positive, help="query heads (default 32, on a CPU 4)")
    parser.add_argument("--kv-heads", type=positive, help="kv heads (default 8, on a CPU 1)")
    parser.add_argument("--head-dim", type=positive, default=128, help="channels per head (default 128)")
    parser.add_argument("--block", type=positive, default=128, help="tokens of a block (default 128)")
    parser.add_argument("--repeats", type=positive, default=10, help="timed calls, whose median counts (default 10)")
    parser.add_argument("--out", metavar="DIR", help="write DIR/prompt_DEVICE.json")
    add_json_option(parser)


def run(args: argparse.Namespace, command: str) -> Row:
    """Measures, prints the table and writes the file asked for; returns what the file holds."""
    device = choose_device(args.device)
    given = (args.queries, args.context, args.q_heads, args.kv_heads)
    t, n, hq, hkv = (asked or usual for asked, usual in zip(given, SHAPES[device.type], strict=True))
    if t > n or hq % hkv or not all(0 < share <= 1 for share in args.densities):
        raise ConfigError(
            f"{t} queries of {n} keys, {hq} query heads of {hkv} kv heads, densities {args.densities}: give no more "
            "queries than keys, kv heads that divide the query heads, and densities above 0 up to 1."
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, length, heads, args.head_dim, dtype=dtype, device=device).transpose(1, 2)
        for heads, length in ((hq, t), (hkv, n), (hkv, n))
    )
    made, timer, scaling = (query, key, value), Timer(device, args.repeats), args.head_dim**-0.5
    pairs = t * n - t * t / 2
    rows = [_row("dense", None, timer, lambda: prefill.causal(query, key, value, scaling), _flops(query, pairs))]
    if device.type == "cuda":
        without = _flops(query, t * n)
        rows.append(_row("cudnn, no mask", None, timer, lambda: _cudnn(query, key, value, scaling), without))
    for density in args.densities:
        rows += _over_blocks(made, density, args.block, scaling, timer)
        free(device)
    settings = {"queries": t, "context": n, "q_heads": hq, "kv_heads": hkv, "head_dim": args.head_dim,
                "block": args.block, "dtype": str(dtype).removeprefix("torch."), "repeats": args.repeats}  # fmt: skip
    new_console().print(_table(rows, f"{short(t)} queries over {short(n)} keys, blocks of {args.block}"))
    content = result(command, settings, rows)
    if args.out:
        print(f"Written: {save_json(args.out, f'prompt_{device.type}', content)}")
    return content


def random_blocks(num_heads: int, first: int, num_blocks: int, density: float, device: torch.device) -> Tensor:
    """Blocks as `lists_of` takes them, `[1, num_heads, num_blocks - first, num_blocks]` bool: of the causal ones of
    each block of queries, from block `first` on, this share, rounded up."""
    own = torch.arange(first, num_blocks, device=device)[:, None]
    block = torch.arange(num_blocks, device=device)
    order = torch.rand(1, num_heads, num_blocks - first, num_blocks, device=device)
    for which, place in ((block == 0) | (block == own - 1), 2.0), (block == own, 3.0), (block > own, -1.0):
        order.masked_fill_(which, place)
    wanted = ((own + 1) * density).ceil().clamp_min(1)
    rank = order.argsort(-1, descending=True).argsort(-1)
    return (rank < wanted) & (block <= own)


def _over_blocks(
    made: tuple[Tensor, Tensor, Tensor], density: float, size: int, scaling: float, timer: Timer
) -> list[Row]:
    """The op, and FlexAttention where it works."""
    (hq, t), n = made[0].shape[1:3], made[1].shape[2]
    blocks = random_blocks(hq, (n - t) // size, -(-n // size), density, timer.device)
    inputs: tuple[Any, ...] = (*made, *prompt.lists_of(blocks), size, scaling)
    flops = _flops(made[0], float(blocks.sum()) / hq * size * size)
    competitors: dict[str, Callable[..., Tensor]] = {"sparsekv": torch.ops.sparsekv.prompt_attention}
    if timer.device.type == "cuda" and flex.why_plain(timer.device, size) is None:
        competitors["flex"] = flex.by_flex
    expected, rows = prompt.prompt_attention(*inputs), []
    for name, attention in competitors.items():
        error = float((attention(*inputs) - expected).abs().max() / expected.float().square().mean().sqrt())
        if not error <= TOLERANCE:
            raise KernelError(f"{name} at density {density} beside plain torch: {error} off (limit: {TOLERANCE}).")
        rows.append(_row(name, density, timer, functools.partial(attention, *inputs), flops))
    return rows


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)


def _flops(query: Tensor, pairs: float) -> float:
    """Of two products, for so many pairs of a query and a key in every query head."""
    return 4.0 * query.shape[1] * query.shape[3] * pairs


def _row(name: str, density: float | None, timer: Timer, attention: Callable[[], Tensor], flops: float) -> Row:
    spread = timer(lambda i: attention(), 1, flops / 1e9)  # 1 PFLOP/s: so that few calls make a graph
    return {"what": name, "density": density, "ms": spread.median / 1e3, "ms_low": spread.low / 1e3,
            "ms_high": spread.high / 1e3, "tflops": flops / spread.median / 1e6}  # fmt: skip


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, caption="TFLOP/s of what is computed", box=SIMPLE_HEAD)
    for name in ("", "density", "ms", "TFLOP/s", "faster than dense"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        density = "" if row["density"] is None else f"{row['density']:g}"
        faster = f"{rows[0]['ms'] / row['ms']:.2f}x"
        table.add_row(row["what"], density, f"{row['ms']:.2f}", f"{row['tflops']:.1f}", faster)
    return table
