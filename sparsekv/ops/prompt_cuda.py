"""`prompt_attention` on a CUDA device: our own kernel where it serves a call, else FlexAttention or plain torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekv.ops import flex, instances, rooms
from sparsekv.ops.launch import STATIC_SHARED, gpu, launch, readable, usable

WARPS = 4  # of a CTA


def why_plain(query: Tensor, value_dim: int, block_size: int) -> str | None:
    """Why blocks of a prompt are attended to in plain torch on a GPU, as half a sentence; None: they are not, as far
    as is known before the first time."""
    is_served = why_not(query, value_dim, block_size) is None
    return None if is_served else flex.why_plain(query.device, block_size)


def why_not(query: Tensor, value_dim: int, block_size: int) -> str | None:
    """Why our kernel does not serve a prompt, or None if it does; warns once if none can run on this device."""
    dtype, head_dim = query.dtype, query.shape[3]
    reason = instances.why_not_blocks(dtype, head_dim, value_dim, block_size)
    if reason is not None or not usable(query.device.index):
        return reason or "kernels cannot run"
    room = gpu(query.device.index).shared + STATIC_SHARED  # of which this kernel has none
    needed = rooms.prompt_bytes(head_dim, instances.prompt_rows(head_dim, block_size))
    return None if needed <= room else f"{needed} bytes of shared memory (this GPU: {room})"


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, block_size: int, scaling: float
) -> Tensor:
    """See `prompt.prompt_attention`."""
    alike = query.dtype == key.dtype == value.dtype and scaling > 0
    if not alike or why_not(query, value.shape[3], block_size) is not None:
        return flex.prompt_attention(query, key, value, counts, indices, block_size, scaling)
    (b, num_q_heads, t, d), (_, num_kv_heads, n, _), (_, lists, num_blocks, width) = (
        x.shape for x in (query, key, indices)
    )
    out = torch.empty(b, t, num_q_heads, d, dtype=query.dtype, device=query.device)
    rows, tensors = instances.prompt_rows(d, block_size), [readable(x) for x in (query, key, value)]
    args: list[Any] = [*tensors, *(x.to(torch.int32).contiguous() for x in (counts, indices)), out]
    args += [np.int64(stride) for x in tensors for stride in x.stride()[:3]]
    args += [t, n, block_size, num_kv_heads, lists, width, scaling / math.log(2)]
    grid = (num_blocks * (block_size // rows), num_q_heads, b)
    spec = instances.prompt_attention(query.dtype, d, rows)
    launch(spec, query, grid, WARPS, args, rooms.prompt_bytes(d, rows))
    return out.transpose(1, 2)
