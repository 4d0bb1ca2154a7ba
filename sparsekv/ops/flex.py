"""`prompt_attention` by PyTorch's FlexAttention, and `score_blocks`, which Triton compiles at the first use; without
Triton, or where it fails, in plain torch."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparsekv.ops import prompt

MIN_TILE, MAX_TILE = 16, 128  # tokens that Triton multiplies at once

_failures: dict[torch.device, str] = {}


def why_plain(device: torch.device, block_size: int) -> str | None:
    """Why blocks of a prompt are attended to in plain torch on a GPU, as half a sentence; None: they are not, as far
    as is known before the first time."""
    if block_size % MIN_TILE:
        return f"blocks of {block_size} tokens do not divide by {MIN_TILE}"
    return _failures.get(device) or (None if importlib.util.find_spec("triton") else "Triton is not installed")


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, block_size: int, scaling: float
) -> Tensor:
    """As in `prompt.py`."""
    return _tried(by_flex, prompt.prompt_attention, query, key, value, counts, indices, block_size, scaling)


def score_blocks(query: Tensor, key: Tensor, positions: Sequence[int], block_size: int, scaling: float) -> Tensor:
    """As in `prompt.py`."""
    compiled = functools.partial(prompt.score_blocks, by_block=_compiled_logsumexp())
    return _tried(compiled, prompt.score_blocks, query, key, positions, block_size, scaling)


def _tried(compiled: Any, plain: Any, query: Tensor, *given: Any) -> Tensor:
    """What Triton compiles, or else plain torch, for good. The last but one argument is the size of a block."""
    if why_plain(query.device, given[-2]) is None:
        try:
            return cast(Tensor, compiled(query, *given))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton and its compilers raise whatever they do
            _failures[query.device] = f"PyTorch cannot compile it ({' '.join(str(error).split())[:200]})"
    return cast(Tensor, plain(query, *given))


def by_flex(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, block_size: int, scaling: float
) -> Tensor:
    """As in `prompt.py`, on any device that FlexAttention compiles for."""
    hq, t = query.shape[1:3]
    past = key.shape[2] - t
    lacking = past % block_size, -key.shape[2] % block_size  # of the first block of queries, and of the last
    blocks = block_mask(counts, indices, hq, key.shape[2], past // block_size, block_size)
    tile = min(block_size & -block_size, MAX_TILE)  # which must divide a block
    options = {} if tile == MAX_TILE else {"BLOCK_M": tile, "BLOCK_N": min(tile, MAX_TILE // 2)}
    whole = F.pad(query, (0, 0, *lacking))
    out = _compiled()(whole, key, value, blocks, scaling, hq != key.shape[1], options)
    # The heads of a token side by side.
    return out[:, :, lacking[0] : lacking[0] + t].transpose(1, 2).contiguous().transpose(1, 2)


def block_mask(
    counts: Tensor, indices: Tensor, num_q_heads: int, num_keys: int, first_block: int, block_size: int
) -> BlockMask:
    """The lists of `prompt_attention` as FlexAttention takes them: a block's own needs a mask, those before are full.

    Args:
        first_block: the block of keys that the first block of queries is.
    """
    counts, indices = (x.repeat_interleave(num_q_heads // x.shape[1], dim=1) for x in (counts, indices))
    own = torch.arange(first_block, first_block + counts.shape[2], dtype=torch.int32, device=counts.device)
    # A tensor, or each would be compiled for; made on the device, so that it may be captured.
    start = torch.full((), first_block * block_size, dtype=torch.int64, device=counts.device)

    def is_causal(b: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q + start >= kv

    return BlockMask.from_kv_blocks(
        torch.ones_like(counts),
        F.pad(own[:, None], (0, indices.shape[3] - 1)).expand_as(indices).contiguous(),
        counts - 1,
        indices,
        BLOCK_SIZE=block_size,
        mask_mod=is_causal,
        seq_lengths=(counts.shape[2] * block_size, num_keys),
        compute_q_blocks=False,  # which only a backward pass needs
    )


@functools.cache
def _compiled_logsumexp() -> Any:
    return torch.compile(prompt.logsumexp_by_block, dynamic=True)


@functools.cache
def _compiled() -> Any:
    """FlexAttention, compiled once for all lengths."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, scaling: float, is_grouped: bool, options: Any
    ) -> Any:
        return flex_attention(
            query, key, value, block_mask=blocks, scale=scaling, enable_gqa=is_grouped, kernel_options=options
        )

    return torch.compile(attend, dynamic=True)
