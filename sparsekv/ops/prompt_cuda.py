"""`prompt_attention` and `score_blocks` on a CUDA device: our own kernels where they serve a call, else what Triton
compiles or plain torch."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsekv.errors import KernelError
from sparsekv.ops import flex, instances, rooms
from sparsekv.ops.compiler import KernelSpec
from sparsekv.ops.launch import STATIC_SHARED, Gpu, gpu, launch, readable, usable

PANEL = 64  # channels of a box of a tensor
SCORED_TOKENS = 2048  # keys that a CTA scores: enough to be worth reading queries, few enough to occupy all SMs


class PromptPlan(NamedTuple):
    """What is launched: the kernel, the queries and warps of a CTA, its bytes of shared memory, and the keys that the
    hardware copies at a time, on sm_90; elsewhere 0."""

    spec: KernelSpec
    rows: int
    warps: int
    shared: int
    tile: int = 0


def prompt_plan(facts: Gpu, dtype: torch.dtype, head_dim: int, block_size: int) -> PromptPlan:
    """The kernel for a prompt on a GPU."""
    rows, tile = 2 * instances.PROMPT_TILE, instances.prompt_tile(head_dim)
    if facts.capability == (9, 0) and head_dim % PANEL == 0 and block_size % rows == 0:
        spec = instances.prompt_attention_sm90(dtype, head_dim)
        return PromptPlan(spec, rows, 12, rooms.prompt_sm90_bytes(head_dim, rows, tile), tile)
    rows = instances.prompt_rows(head_dim, block_size)
    return PromptPlan(instances.prompt_attention(dtype, head_dim, rows), rows, 4, rooms.prompt_bytes(head_dim, rows))


def why_plain(query: Tensor, value_dim: int, block_size: int) -> str | None:
    """Why blocks of a prompt are attended to in plain torch on a GPU, as half a sentence; None: they are not, as far
    as is known before the first time."""
    is_served = why_not(query, value_dim, block_size) is None
    return None if is_served else flex.why_plain(query.device, block_size)


def why_not(query: Tensor, value_dim: int, block_size: int) -> str | None:
    """Why our kernel does not serve a prompt, or None if it does; warns once if none can run on this device."""
    dtype, head_dim, device = query.dtype, query.shape[3], query.device.index
    reason = instances.why_not_blocks(dtype, head_dim, value_dim, block_size)
    if reason is not None or not usable(device):
        return reason or "kernels cannot run"
    facts = gpu(device)
    room, needed = facts.shared + STATIC_SHARED, prompt_plan(facts, dtype, head_dim, block_size).shared
    return None if needed <= room else f"{needed} bytes of shared memory (this GPU: {room})"


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, indices: Tensor, block_size: int, scaling: float
) -> Tensor:
    """See `prompt.prompt_attention`."""
    alike = query.dtype == key.dtype == value.dtype and scaling > 0
    if not alike or why_not(query, value.shape[3], block_size) is not None:
        return flex.prompt_attention(query, key, value, counts, indices, block_size, scaling)
    (b, num_q_heads, t, d), (_, lists, num_blocks, width) = query.shape, indices.shape
    plan = prompt_plan(gpu(query.device.index), query.dtype, d, block_size)
    out = torch.empty(b, t, num_q_heads, d, dtype=query.dtype, device=query.device)
    tensors = [readable(x.contiguous() if 0 in x.stride() else x) for x in (query, key, value)]
    args: list[Any] = [*tensors, *(x.to(torch.int32).contiguous() for x in (counts, indices)), out]
    args += [np.int64(stride) for x in tensors for stride in x.stride()[:3]]
    args += [t, key.shape[2], block_size, key.shape[1], lists, width, scaling / math.log(2)]
    maps = b"".join(map(tensor_map, tensors, (plan.rows, plan.tile, plan.tile))) if plan.tile else b""
    grid = (num_blocks * (block_size // plan.rows), num_q_heads, b)
    launch(plan.spec, query, grid, plan.warps, args, plan.shared, maps=maps)
    return out.transpose(1, 2)


def score_blocks(query: Tensor, key: Tensor, positions: Sequence[int], block_size: int, scaling: float) -> Tensor:
    """See `prompt.score_blocks`."""
    (b, num_q_heads, m, d), (num_kv_heads, n) = query.shape, key.shape[1:3]
    alike = query.dtype == key.dtype and scaling > 0 and query.numel() > 0
    # It takes no more shared memory than `prompt_attention` of such blocks.
    if not alike or why_not(query, d, block_size) is not None:
        return flex.score_blocks(query, key, positions, block_size, scaling)
    rows, group, num_blocks = instances.prompt_rows(d, block_size), num_q_heads // num_kv_heads, -(-n // block_size)
    out = torch.empty(b, num_q_heads, m, num_blocks, dtype=torch.float32, device=query.device)
    tensors, blocks = [readable(query), readable(key)], max(1, SCORED_TOKENS // block_size)
    args: list[Any] = [*tensors, _on_device(tuple(positions), query.device), out]
    args += [np.int64(stride) for x in tensors for stride in x.stride()[:3]]
    args += [m, n, block_size, num_kv_heads, group, blocks, scaling / math.log(2)]
    grid = (-(-m * group // rows), -(-num_blocks // blocks), b * num_kv_heads)
    launch(instances.score_blocks(query.dtype, d, rows), query, grid, 4, args, rooms.prompt_bytes(d, rows))
    return out


@functools.lru_cache(16)  # every layer asks for the same ones
def _on_device(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32, device=device)


def tensor_map(tokens: Tensor, rows: int) -> bytes:
    """`TensorMap` of cuda/common/hopper.cuh: `[b, h, t, d]` of 16 bits in boxes of 64 channels and so many tokens.

    Raises:
        KernelError: the driver refuses it.
    """
    from cuda.bindings import driver

    kind = {
        torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }[tokens.dtype]
    # Where there is one row or head, its stride is arbitrary, and may be one that the driver does not take.
    strides = [s if n > 1 else tokens.shape[3] for n, s in zip(tokens.shape[:3], tokens.stride()[:3], strict=True)]
    status, found = driver.cuTensorMapEncodeTiled(
        kind,
        4,
        tokens.data_ptr(),
        [driver.cuuint64_t(n) for n in reversed(tokens.shape)],
        [driver.cuuint64_t(tokens.element_size() * n) for n in reversed(strides)],
        [driver.cuuint32_t(n) for n in (PANEL, rows, 1, 1)],
        [driver.cuuint32_t(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        shape, strides = tuple(tokens.shape), list(tokens.stride())
        raise KernelError(f"Tokens {shape} with strides {strides} cannot be copied by the hardware: {status.name}")
    return ctypes.string_at(found.getPtr(), 128)
