"""Which kernels there are: the shapes they are promised for, and the name of each instantiation."""

from __future__ import annotations

import itertools

import torch

from sparsekv.ops.compiler import KernelSpec

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_DIMS = (64, 96, 128, 256)
PAGE_SIZES = (16, 32, 64)
MAX_GROUP = 16
MMA_HEADS = 8  # query heads of one matrix product
MAX_PAGES, MAX_SELECTED = 65_536, 1_024  # of one sequence; in a selection
DIGESTS = ("minmax", "sign_sketch")  # those the kernels keep and score


def head_tiles(group: int) -> int:
    """Matrix products that the query heads of one kv head need."""
    return -(-group // MMA_HEADS)


def _kind(digest: str, group: int) -> str:
    """The kernels' type for a digest; that of the sketch says how many query heads it has room for."""
    return "MinMax" if digest == "minmax" else f"Sketch<{max(4, 1 << (group - 1).bit_length())}>"


def append_kv(dtype: torch.dtype, head_dim: int, digest: str) -> KernelSpec:
    """Appending."""
    return KernelSpec("append_kv.cu", f"append_kv<{ELEMENTS[dtype]}, {head_dim}, {_kind(digest, 1)}>")


def grouped(name: str, dtype: torch.dtype, head_dim: int, group: int, source: str | None = None) -> KernelSpec:
    """What works on the query heads of a kv head together and needs no digest: attending and merging."""
    return KernelSpec(f"{source or name}.cu", f"{name}<{ELEMENTS[dtype]}, {head_dim}, {head_tiles(group)}>")


def scoring(name: str, dtype: torch.dtype, head_dim: int, group: int, digest: str) -> KernelSpec:
    """What scores digests: `score_pages`, and the whole step."""
    shape = f"{ELEMENTS[dtype]}, {head_dim}, {head_tiles(group)}, {_kind(digest, group)}"
    return KernelSpec(f"{name}.cu", f"{name}<{shape}>")


def elementwise(name: str, dtype: torch.dtype) -> KernelSpec:
    """Rotary embeddings and RMS norms."""
    return KernelSpec(f"{name}.cu", f"{name}<{ELEMENTS[dtype]}>")


SELECT_PAGES = KernelSpec("select_pages.cu", "select_pages")


def of_model(dtype: torch.dtype, head_dim: int, group: int, digest: str) -> list[KernelSpec]:
    """All kernels that one geometry can need."""
    return [
        append_kv(dtype, head_dim, digest),
        *(elementwise(name, dtype) for name in ("rotate", "rms_norm")),
        SELECT_PAGES,
        *(scoring(name, dtype, head_dim, group, digest) for name in ("score_pages", "sparse_decode")),
        grouped("attend_pages", dtype, head_dim, group),
        grouped("merge_attention", dtype, head_dim, group, source="attend_pages"),
    ]


def promised() -> list[KernelSpec]:
    """Every instantiation, each once."""
    groups = (MMA_HEADS // 2, MMA_HEADS, MAX_GROUP)
    geometries = itertools.product(ELEMENTS, HEAD_DIMS, groups, DIGESTS)
    return list(dict.fromkeys(spec for geometry in geometries for spec in of_model(*geometry)))


def why_not(dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> str | None:
    """Why no kernel serves a geometry, or None if one does."""
    if dtype not in ELEMENTS:
        return f"{str(dtype).removeprefix('torch.')} (kernels: bfloat16, float16)"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} (kernels: {', '.join(map(str, HEAD_DIMS))})"
    if group > MAX_GROUP:
        return f"{group} query heads to a kv head (kernels: up to {MAX_GROUP})"
    if page_size not in PAGE_SIZES:
        return f"page_size {page_size} (kernels: {', '.join(map(str, PAGE_SIZES))})"
    return None
