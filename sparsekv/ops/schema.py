"""The ops as PyTorch operators: signatures, shapes under tracing, and the implementation for every device.

`torch.ops.sparsekv.*` is the backend switch: kernels serve CUDA (`sparsekv/ops/cuda.py`), the reference all else.
What each op means is said in `sparsekv/ops/reference.py`, `step.py`, `prompt.py` and
`around.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekv.ops import around, cuda, prompt, prompt_cuda, reference, step

NAMESPACE = "sparsekv"

SCHEMAS = {
    "append_kv": (
        "(Tensor key, Tensor value, Tensor? valid, Tensor block_table, Tensor seq_lens, "
        "Tensor(a!) kv_pool, Tensor(b!)[] summary, Tensor[] state, str digest, str format='plain') -> ()"
    ),
    "read_pages": ("(Tensor pages, int batch, int head_dim, ScalarType dtype, str format='plain') -> Tensor[]"),
    "score_pages": (
        "(Tensor query, Tensor[] summary, Tensor[] state, Tensor block_table, Tensor seq_lens, "
        "int page_size, str digest, str group_pooling, float scaling) -> Tensor"
    ),
    "select_pages": (
        "(Tensor scores, Tensor seq_lens, int page_size, int k, int sink_tokens, int recent_tokens, "
        "Tensor? limits=None, float? min_score=None, int whole_tokens=0) -> Tensor"
    ),
    "attend_pages": (
        "(Tensor query, Tensor kv_pool, Tensor block_table, Tensor seq_lens, Tensor? slots, "
        "float scaling, float softcap=0.0, Tensor? sinks=None, str format='plain', Tensor? first=None) "
        "-> (Tensor, Tensor)"
    ),
    "sparse_decode": (
        "(Tensor query, Tensor? key, Tensor? value, Tensor block_table, Tensor seq_lens, Tensor(a!) kv_pool, "
        "Tensor(b!)[] summary, Tensor[] state, Tensor? limits, str digest, str group_pooling, int k, "
        "int sink_tokens, int recent_tokens, float scaling, float softcap=0.0, Tensor? sinks=None, "
        "str format='plain', float? min_score=None, int whole_tokens=0) -> (Tensor, Tensor, Tensor)"
    ),
    "prompt_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor counts, Tensor indices, int block_size, float scaling) "
        "-> Tensor"
    ),
    "score_blocks": "(Tensor query, Tensor key, int[] positions, int block_size, float scaling) -> Tensor",
    "rotate": "(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    "rms_norm": "(Tensor x, Tensor weight, float epsilon, float offset=0.0) -> Tensor",
}


def _fake_append_kv(*args: object) -> None:
    return None


def _fake_read_pages(pages: Tensor, batch: int, head_dim: int, dtype: torch.dtype, *args: object) -> list[Tensor]:
    count, num_halves, num_kv_heads, page_size, _ = pages.shape
    shape = (batch, num_kv_heads, count // batch * page_size, head_dim)
    return [pages.new_empty(shape, dtype=dtype) for _ in range(num_halves)]


def _fake_score_pages(
    query: Tensor, summary: list[Tensor], state: list[Tensor], block_table: Tensor, *args: object
) -> Tensor:
    num_kv_heads = summary[0].shape[1]
    return query.new_empty(query.shape[0], num_kv_heads, block_table.shape[1], dtype=torch.float32)


def _fake_select_pages(scores: Tensor, seq_lens: Tensor, page_size: int, k: int, *args: object) -> Tensor:
    return scores.new_empty(scores.shape[0], scores.shape[1], k, dtype=torch.int32)


def _fake_attend_pages(query: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=wide)


def _fake_sparse_decode(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = step.StepArguments(*args)
    query, num_kv_heads = given.query, given.kv_pool.shape[2]
    slots = query.new_empty(query.shape[0], num_kv_heads, given.k, dtype=torch.int32)
    return *_fake_attend_pages(query), slots


def _fake_prompt_attention(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    (b, num_q_heads, t, _), d = query.shape, value.shape[3]
    return query.new_empty(b, t, num_q_heads, d).transpose(1, 2)


def _fake_score_blocks(query: Tensor, key: Tensor, positions: object, block_size: int, scaling: float) -> Tensor:
    num_blocks = -(-key.shape[2] // block_size)
    return query.new_empty(*query.shape[:3], num_blocks, dtype=torch.float32)


def _fake_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _fake_rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    return x.new_empty(x.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "append_kv": _fake_append_kv,
    "read_pages": _fake_read_pages,
    "score_pages": _fake_score_pages,
    "select_pages": _fake_select_pages,
    "attend_pages": _fake_attend_pages,
    "sparse_decode": _fake_sparse_decode,
    "prompt_attention": _fake_prompt_attention,
    "score_blocks": _fake_score_blocks,
    "rotate": _fake_rotate,
    "rms_norm": _fake_rms_norm,
}


PLAIN: dict[str, Callable[..., Any]] = {
    "append_kv": reference.append_kv,
    "read_pages": reference.read_pages,
    "score_pages": reference.score_pages,
    "select_pages": reference.select_pages,
    "attend_pages": reference.attend_pages,
    "sparse_decode": step.sparse_decode,
    "prompt_attention": prompt.prompt_attention,
    "score_blocks": prompt.score_blocks,
    "rotate": around.rotate,
    "rms_norm": around.rms_norm,
}

_ON_GPU: dict[str, Callable[..., Any]] = {
    "append_kv": cuda.append_kv,
    "read_pages": cuda.read_pages,
    "score_pages": cuda.score_pages,
    "select_pages": cuda.select_pages,
    "attend_pages": cuda.attend_pages,
    "sparse_decode": cuda.sparse_decode,
    "prompt_attention": prompt_cuda.prompt_attention,
    "score_blocks": prompt_cuda.score_blocks,
    "rotate": around.rotate_on_gpu,
    "rms_norm": around.rms_norm_on_gpu,
}


def _define_ops() -> None:
    for name, schema in SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, "CompositeExplicitAutograd", PLAIN[name])
        torch.library.impl(qualified, "CUDA", _ON_GPU[name])
        torch.library.register_fake(qualified, _FAKES[name])


_define_ops()
