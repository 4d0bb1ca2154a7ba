"""The small operators between a model's matrix products, each in one launch: rotary embeddings and RMS norms.

First what they mean, in plain torch (names as in `reference.py`), then the launches.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsekv.ops import instances
from sparsekv.ops.launch import launch, readable, usable


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, channel i turning with channel i + d/2, as transformers' Llama applies it.

    Source: Su et al., "RoFormer" (2021), section 3.2; the pairing is GPT-NeoX's.

    Args:
        query, key: `[b, hq, t, d]`, `[b, hkv, t, d]`.
        cos, sin: `[b or 1, t, d]` of each position, in the same dtype; or `[b or 1, t, d / 2]` for both halves.

    Returns:
        The turned query and key, in new contiguous tensors.
    """
    copies = query.shape[3] // cos.shape[2]
    cos, sin = (x.repeat(1, 1, copies).unsqueeze(1) for x in (cos, sin))
    first, second = (x * cos + _quarter_turn(x) * sin for x in (query, key))
    return first.contiguous(), second.contiguous()


def _quarter_turn(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """Channels divided by their root mean square in float32, times a weight, as transformers' Llama does it, or with
    an offset as its Gemma does.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), section 4.

    Args:
        x: `[..., d]`.
        weight: `[d]`, in the same dtype.
        epsilon: added to the mean of the squares.
        offset: added to the weight; what is normalised is then not rounded before it meets the weight.

    Returns:
        `[..., d]`, contiguous.
    """
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if offset:
        return (normal * (offset + weight.float())).to(x.dtype).contiguous()
    return (weight * normal.to(x.dtype)).contiguous()


def rotate_on_gpu(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` in one launch."""
    tensors = (query, key, cos.contiguous(), sin.contiguous())  # gpt-oss has turns whose channels lie apart
    (b, num_q_heads, t, d), num_kv_heads, turns = query.shape, key.shape[1], cos.shape[2]
    aligned = all(
        x.stride(-1) == 1 and x.data_ptr() % 4 == 0 and not any(n % 2 for n in x.stride()[:-1]) for x in tensors
    )
    alike = query.dtype in instances.ELEMENTS and all(x.dtype == query.dtype for x in tensors)
    whole = cos.shape == sin.shape and query.shape[2] == key.shape[2] == cos.shape[1] and query.numel()
    if not (aligned and alike and whole) or d % 4 or not usable(query.device.index):
        return rotate(query, key, cos, sin)
    turned = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    rows = 0 if len(cos) == 1 else t * turns
    strides = [np.int64(n) for n in (*query.stride()[:3], *key.stride()[:3], rows)]
    args, warps = [*tensors, *turned, *strides, num_q_heads, num_kv_heads, d, turns], 8
    grid = (t, -(-(num_q_heads + num_kv_heads) // warps), b)  # a prompt may have more tokens than y and z allow
    launch(instances.elementwise("rotate", query.dtype), query, grid, warps, args)
    return turned[0], turned[1]


def rms_norm_on_gpu(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """`rms_norm` in one launch."""
    d = x.shape[-1]
    served = x.dtype in instances.ELEMENTS and weight.dtype == x.dtype and d % 8 == 0 and weight.is_contiguous()
    if not served or not x.numel() or weight.data_ptr() % 16 or not usable(x.device.index):
        return rms_norm(x, weight, epsilon, offset)
    rows = readable(x.reshape(-1, d))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args = [rows, weight, out, np.int64(rows.stride(0)), d, float(epsilon), float(offset)]
    warps = min(max(-(-d // (8 * 32)), 1), 32)
    launch(instances.elementwise("rms_norm", x.dtype), x, (len(rows), 1, 1), warps, args)
    return out
