"""The ops on a CUDA device: which kernel serves a call, over how many CTAs, with which arguments.

What a kernel does not serve (another dtype or shape, another digest) runs in plain torch: `why_reference` says why.
Nothing here waits for the device or depends on a length, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sparsekv.ops import compiler, instances, reference, rooms
from sparsekv.ops.formats import FORMATS, PageFormat, Plain, formats_with_kernels
from sparsekv.ops.formulas import MAX_TENSORS, DigestKernel, kernel_of, with_kernels
from sparsekv.ops.launch import launch, readable, usable
from sparsekv.ops.plans import UNIT, Split, attend_plan, merge_ctas, score_plan, selectable, step_plan
from sparsekv.ops.step import Result, StepArguments, step_by_step

POOLINGS = {"max": 0, "sum": 1}
PER_HEAD = 2  # in place of a pooling: a score for every query head
STEP_POOLINGS = POOLINGS | {"share": 3}  # of the whole step


def why_reference(
    device: torch.device,
    dtype: torch.dtype,
    geometry: tuple[int, int] | None,
    page_size: int,
    digest: str,
    page_format: str = "plain",
) -> str | None:
    """Why a model runs in plain torch on a device, or None if kernels serve it.

    Args:
        dtype: of the model.
        geometry: head_dim and query heads of a kv head; None: not the same in all layers.
        page_size: in tokens.
        digest, page_format: their names.
    """
    if device.type != "cuda":
        return f"there are kernels for CUDA, and the device is {device.type}"
    head_dim, group = geometry or (instances.HEAD_DIMS[0], 1)
    reason = compiler.unavailable(device.index or 0) or instances.why_not(dtype, head_dim, group, page_size)
    digests, formats = with_kernels(), formats_with_kernels()
    if head_dim in instances.LATENT_DIMS:
        digests, formats = [name for name in digests if cast(DigestKernel, kernel_of(name)).of_latents], ["plain"]
    if reason is None and digest not in digests:
        known = ", ".join(map(repr, digests))
        return f"digest {digest!r} is appended and scored in plain torch (kernels: {known})"
    if reason is None and page_format not in formats:
        known = ", ".join(map(repr, formats))
        return f"pages of format {page_format!r} are written and read in plain torch (kernels: {known})"
    return reason


def _served(query: Tensor, kv_pool: Tensor, format: str) -> type[PageFormat] | None:
    """The pages' format, if kernels serve it in these shapes; warns once if none can run on this device."""
    if not usable(query.device.index):
        return None
    kind, group = FORMATS.get(format), query.shape[1] // kv_pool.shape[2]
    return kind if _reads(kv_pool, kind, query.dtype, query.shape[-1], group) else None


def _reads(kv_pool: Tensor, kind: type[PageFormat], dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether kernels read such pages, for so many query heads of a kv head."""
    _, num_halves, _, page_size, record = kv_pool.shape
    if instances.why_not(dtype, head_dim, group, page_size) is not None:
        return False
    if kind.kernel is None or not kv_pool.is_contiguous():
        return False
    is_latent = head_dim in instances.LATENT_DIMS
    if is_latent != (num_halves == 1) or (is_latent and kind is not Plain):
        return False
    return kind().mean_record(page_size, head_dim, dtype, num_halves) == (record, kv_pool.dtype)


def append_kv(
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    kv_pool: Tensor,
    summary: Sequence[Tensor],
    state: Sequence[Tensor],
    digest: str,
    format: str = "plain",
) -> None:
    """See `reference.append_kv`."""
    kernel = _kernel(digest, summary, state, key) if summary else instances.NO_DIGEST
    kind = None if kernel is None else _served(key, kv_pool, format)
    if kernel is None or kind is None:
        reference.append_kv(key, value, valid, block_table, seq_lens, kv_pool, summary, state, digest, format)
        return
    key, value = readable(key), readable(value)
    (b, num_kv_heads, t, head_dim), page_size = key.shape, kv_pool.shape[3]
    columns = num_new = None
    if valid is not None:
        num_new = valid.sum(1, dtype=torch.int32)
        columns = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    touched = max(t + page_size - 2, 0) // page_size + 1
    is_latent = head_dim in instances.LATENT_DIMS  # a CTA takes a page; else a warp does
    warps = 8 if is_latent else 4
    grid = (-(-touched * num_kv_heads // (1 if is_latent else warps)), b, 1)
    strides = [np.int64(stride) for tensor in (key, value) for stride in tensor.stride()[:3]]
    args: list[Any] = [key, value, columns, num_new, _int32s(block_table), _int32s(seq_lens), kv_pool]
    args += [*_digests(summary, state), *strides, t, num_kv_heads, _log2(page_size), block_table.shape[1], touched]
    launch(instances.append_kv(key.dtype, head_dim, kernel, kind), kv_pool, grid, warps, args)


def read_pages(pages: Tensor, batch: int, head_dim: int, dtype: torch.dtype, format: str = "plain") -> list[Tensor]:
    """See `reference.read_pages`. Plain pages are copied, which is torch's work."""
    (count, _, num_kv_heads, page_size, _), kind = pages.shape, FORMATS.get(format)
    if kind is Plain or not count or not usable(pages.device.index) or not _reads(pages, kind, dtype, head_dim, 1):
        return reference.read_pages(pages, batch, head_dim, dtype, format)
    shape = (batch, num_kv_heads, count // batch * page_size, head_dim)
    both = [torch.empty(shape, dtype=dtype, device=pages.device) for _ in range(2)]
    args: list[Any] = [pages, *both, count, count // batch, num_kv_heads, _log2(page_size)]
    warps = 4
    launch(instances.read_pages(dtype, head_dim, kind), pages, (-(-count * num_kv_heads // warps), 1, 1), warps, args)
    return both


def score_pages(
    query: Tensor,
    summary: Sequence[Tensor],
    state: Sequence[Tensor],
    block_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    digest: str,
    group_pooling: str,
    scaling: float,
) -> Tensor:
    """See `reference.score_pages`."""
    num_kv_heads, max_pages = reference.kv_heads_of(summary), block_table.shape[1]
    b, num_q_heads, head_dim = query.shape
    group, pooling = num_q_heads // num_kv_heads, POOLINGS.get(group_pooling, PER_HEAD)
    served, kernel = instances.why_not(query.dtype, head_dim, group, page_size) is None, None
    if served and usable(query.device.index):
        kernel = _kernel(digest, summary, state, query)
    if kernel is None:
        return reference.score_pages(
            query, summary, state, block_table, seq_lens, page_size, digest, group_pooling, scaling
        )
    group = instances.heads_together(head_dim, group)
    rows = num_q_heads // group
    of_heads = (b, num_q_heads if pooling == PER_HEAD else rows, max_pages)
    scores = torch.empty(of_heads, dtype=torch.float32, device=query.device)
    plan = score_plan(query.device.index, query.dtype, b, rows, head_dim, group, kernel, max_pages)
    args: list[Any] = [query.contiguous(), *_digests(summary, state), _int32s(block_table), _int32s(seq_lens), scores]
    args += [rows, plan.heads, group, rows // num_kv_heads, _log2(page_size), max_pages, pooling, float(scaling)]
    launch(plan.spec, query, (rows // plan.heads, plan.chunks, b), plan.warps, args, plan.shared)
    apart = scores.unflatten(1, (num_kv_heads, -1))  # by head, or by heads that were scored together
    if pooling == PER_HEAD:
        return reference.pool_group(apart, seq_lens, page_size, group_pooling)
    return scores if rows == num_kv_heads else apart.amax(2) if group_pooling == "max" else apart.sum(2)


def _kernel(digest: str, summary: Sequence[Tensor], state: Sequence[Tensor], like: Tensor) -> DigestKernel | None:
    """How kernels keep and score these tensors of a digest, or None if they do not."""
    kernel = kernel_of(digest)
    if kernel is None or (like.shape[-1] in instances.LATENT_DIMS and not kernel.of_latents):
        return None
    return kernel if kernel.serves([*summary, *state], like) else None


def _digests(summary: Sequence[Tensor], state: Sequence[Tensor]) -> list[Any]:
    """`Digests` of cuda/common/digest.cuh."""
    tensors = [*summary, *state]
    return [*tensors, *[None] * (MAX_TENSORS - len(tensors))]


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    k: int,
    sink_tokens: int,
    recent_tokens: int,
    limits: Tensor | None = None,
    min_score: float | None = None,
    whole_tokens: int = 0,
) -> Tensor:
    """See `reference.select_pages`."""
    b, num_kv_heads, max_pages = scores.shape
    served = page_size in instances.PAGE_SIZES and selectable(max_pages, k) and scores.dtype == torch.float32
    if not served or not usable(scores.device.index):
        forced, least = (sink_tokens, recent_tokens), (min_score, whole_tokens)
        return reference.select_pages(scores, seq_lens, page_size, k, *forced, limits, *least)
    slots = torch.empty(b, num_kv_heads, k, dtype=torch.int32, device=scores.device)
    args: list[Any] = [scores.contiguous(), _int32s(seq_lens), None if limits is None else _int32s(limits), slots]
    args += [torch.empty_like(scores), _log2(page_size), max_pages, k, sink_tokens, recent_tokens]
    args += [whole_tokens, _least(min_score)]
    launch(instances.SELECT_PAGES, scores, (num_kv_heads, b, 1), 16, args, rooms.select_bytes(max_pages, k))
    return slots


def attend_pages(
    query: Tensor,
    kv_pool: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor | None,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    format: str = "plain",
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.attend_pages`."""
    kind = _served(query, kv_pool, format)
    if kind is None:
        where = (block_table, seq_lens)
        return reference.attend_pages(query, kv_pool, *where, slots, scaling, softcap, sinks, format, first)
    (b, num_q_heads, head_dim), num_kv_heads, page_size = query.shape, kv_pool.shape[2], kv_pool.shape[3]
    max_pages, k = block_table.shape[1], block_table.shape[1] if slots is None else slots.shape[2]
    group = instances.heads_together(head_dim, num_q_heads // num_kv_heads)
    rows, units = num_q_heads // group, k * page_size // UNIT
    plan = attend_plan(query.device.index, query.dtype, b * rows, head_dim, group, units, kind)
    split = plan.split
    out, lse = _outputs(query)
    partials = None if split.clustered else _partials(query, b * rows, split, group)
    sinks, wide = _sink_logits(sinks, query)
    slots, first = (None if x is None else _int32s(x) for x in (slots, first))
    args: list[Any] = [query.contiguous(), kv_pool, _int32s(block_table), _int32s(seq_lens), first, slots]
    if head_dim in instances.LATENT_DIMS:
        args += [
            partials,
            group,
            rows // num_kv_heads,
            _log2(page_size),
            max_pages,
            k,
            float(scaling),
            float(softcap),
        ]
    else:
        args += [
            sinks,
            out,
            lse,
            partials,
            group,
            _log2(page_size),
            max_pages,
            k,
            float(scaling),
            float(softcap),
            wide,
        ]
    launch(plan.spec, query, (split.ctas, rows, b), split.warps, args, plan.shared, split.cluster)
    if partials is not None:
        args = [partials, sinks, out, lse, split.ctas, group, wide]
        spec = instances.merge_attention(query.dtype, head_dim, group)
        launch(spec, query, (merge_ctas(head_dim, group), rows, b), 8, args)
    return out, lse


def sparse_decode(*args: Any) -> Result:
    """See `step.sparse_decode`: one kernel where it serves the call, else the ops one after the other."""
    step = StepArguments(*args)
    query, kv_pool, max_pages = step.query, step.kv_pool, step.block_table.shape[1]
    (b, num_q_heads, head_dim), num_kv_heads = query.shape, kv_pool.shape[2]
    group, plan = num_q_heads // num_kv_heads, None
    kernel = _kernel(step.digest, step.summary, step.state, query)
    kind = None if kernel is None else _served(query, kv_pool, step.format)
    shares = step.group_pooling == "share"
    is_fused = shares or (step.group_pooling in POOLINGS and step.min_score is None)
    if kernel is not None and kind is not None and is_fused and head_dim in instances.HEAD_DIMS:
        shape, fits = (b * num_kv_heads, head_dim, group), not step.chooses
        plan = step_plan(query.device.index, query.dtype, *shape, kernel, max_pages, step.k, kind, shares, fits)
    if plan is None:
        return step_by_step(torch.ops.sparsekv, step)
    out, lse = _outputs(query)
    slots = torch.empty(b, num_kv_heads, step.k, dtype=torch.int32, device=query.device)
    keys = kept = None
    if not plan.direct:
        keys = torch.empty(b, num_kv_heads, max_pages, dtype=torch.int32, device=query.device)
    if plan.spills:
        size = rooms.kept_bytes(group, b * num_kv_heads * -(-max_pages // UNIT)) // 4
        kept = torch.empty(size, dtype=torch.float32, device=query.device)
    params, split = _step_params(step, keys, kept, slots, out, lse), plan.split
    launch(plan.spec, query, (split.ctas, num_kv_heads, b), split.warps, params, plan.shared, split.ctas)
    return out, lse, slots


def _step_params(
    step: StepArguments, keys: Tensor | None, kept: Tensor | None, slots: Tensor, out: Tensor, lse: Tensor
) -> list[Any]:
    """`StepParams` of cuda/sparse_decode.cu."""
    (_, num_q_heads, _), (_, _, num_kv_heads, page_size, _) = step.query.shape, step.kv_pool.shape
    key, value = (None if x is None else readable(x.to(step.query.dtype)) for x in (step.key, step.value))
    strides = [np.int64(stride) for x in (key, value) for stride in ((0, 0) if x is None else x.stride()[:2])]
    sinks, wide = _sink_logits(step.sinks, step.query)
    limits = None if step.limits is None else _int32s(step.limits)
    return [
        *(step.query.contiguous(), key, value, _int32s(step.block_table), _int32s(step.seq_lens), step.kv_pool),
        *_digests(step.summary, step.state),
        *(limits, sinks, keys, kept, slots, out, lse),
        *strides,
        *(num_q_heads // num_kv_heads, _log2(page_size), step.block_table.shape[1], step.k),
        *(step.sink_tokens, step.recent_tokens, STEP_POOLINGS[step.group_pooling], wide, step.whole_tokens),
        *(float(step.scaling), float(step.softcap), _least(step.min_score)),
    ]


def _partials(query: Tensor, rows: int, split: Split, group: int) -> Tensor:
    """Scratch for `Partial` of cuda/common/merge.cuh."""
    heads = instances.head_tiles(group) * instances.MMA_HEADS
    size = heads + heads * query.shape[2]
    return torch.empty(rows, split.ctas, size, dtype=torch.float32, device=query.device)


def _outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)


def _sink_logits(sinks: Tensor | None, query: Tensor) -> tuple[Tensor | None, int]:
    """The sinks as a kernel reads them, and whether they are float32."""
    if sinks is None:
        return None, 0
    readable = sinks if sinks.dtype == query.dtype else sinks.float()
    return readable.contiguous(), int(readable.dtype == torch.float32)


def _least(min_score: float | None) -> float:
    return -math.inf if min_score is None else float(min_score)


def _log2(page_size: int) -> int:
    return page_size.bit_length() - 1


def _int32s(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()
