"""Which kernels there are: the shapes they are promised for, and the name of each instantiation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch

from sparsekv.ops.compiler import KernelSpec
from sparsekv.ops.formats import FORMATS, KEYS, VALUES, FormatKernel, PageFormat, Plain
from sparsekv.ops.formulas import DigestKernel, kernel_of, with_kernels

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_DIMS = (64, 96, 128, 256)
LATENT_DIMS = (288, 576)  # of keys that are the values, too: ranks of 256 and 512, and a rotary part
LATENT_CHANNELS = 144  # of a warp
PAGE_SIZES = (16, 32, 64)
MAX_GROUP = 16
MMA_HEADS = 8  # query heads of one matrix product
GROUPS = (MMA_HEADS // 2, MMA_HEADS, MAX_GROUP)  # those that differ in code
PROMPT_TILE = 64  # keys of a prompt that are multiplied at a time
MAX_PAGES, MAX_SELECTED = 65_536, 1_024  # of one sequence; in a selection
NO_DIGEST = DigestKernel("common/digest.cuh", "NoDigest", (), staged=lambda head_dim, heads: 0)


def head_tiles(group: int) -> int:
    """Matrix products that the query heads of one kv head need."""
    return -(-group // MMA_HEADS)


def heads_together(head_dim: int, group: int) -> int:
    """Query heads of a kv head that are served together: all, or of latents as many as divide them evenly."""
    sizes = range(1, MAX_GROUP + 1) if head_dim in LATENT_DIMS else [group]
    return max(size for size in sizes if group % size == 0)


def _heads(group: int) -> int:
    """Query heads that a digest's type has room for."""
    return max(4, 1 << (group - 1).bit_length())


def scorer_words(kernel: DigestKernel, head_dim: int, group: int) -> tuple[int, int]:
    """Words of 16 bytes that a query of a group takes when it is staged to be scored, and that each warp needs."""
    heads = _heads(group)
    return kernel.staged(head_dim, heads), kernel.room(head_dim, heads)


def append_kv(
    dtype: torch.dtype, head_dim: int, kernel: DigestKernel, format: type[PageFormat] = Plain
) -> KernelSpec:
    """Appending."""
    kind, pages = kernel.type_name.format(heads=_heads(1)), _pages(format, dtype, head_dim)
    expression = f"append_kv<{ELEMENTS[dtype]}, {head_dim}, {kind}, {pages.name}>"
    return KernelSpec("append_kv.cu", expression, (str(kernel.header), pages.header), pages.claim)


def read_pages(dtype: torch.dtype, head_dim: int, format: type[PageFormat]) -> KernelSpec:
    """Reading whole pages."""
    pages = _pages(format, dtype, head_dim)
    expression = f"read_pages<{ELEMENTS[dtype]}, {head_dim}, {pages.name}>"
    return KernelSpec("read_pages.cu", expression, (pages.header,), pages.claim)


def attend_pages(dtype: torch.dtype, head_dim: int, group: int, format: type[PageFormat] = Plain) -> KernelSpec:
    """Attending."""
    pages = _pages(format, dtype, head_dim)
    expression = f"attend_pages<{ELEMENTS[dtype]}, {head_dim}, {head_tiles(group)}, {pages.name}>"
    return KernelSpec("attend_pages.cu", expression, (pages.header,), pages.claim)


def attend_latents(dtype: torch.dtype, head_dim: int, group: int) -> KernelSpec:
    """Attending where keys are the values, too."""
    expression = f"attend_latents<{ELEMENTS[dtype]}, {head_dim}, {head_tiles(group)}>"
    return KernelSpec("attend_latents.cu", expression, claim=f"OF_WARP == {LATENT_CHANNELS}")


def merge_attention(dtype: torch.dtype, head_dim: int, group: int) -> KernelSpec:
    """Merging what several CTAs have attended to."""
    return KernelSpec("attend_pages.cu", f"merge_attention<{ELEMENTS[dtype]}, {head_dim}, {head_tiles(group)}>")


def score_pages(dtype: torch.dtype, head_dim: int, group: int, kernel: DigestKernel) -> KernelSpec:
    """Scoring digests."""
    shape, kind, claim = _scorer(dtype, head_dim, group, kernel)
    return KernelSpec("score_pages.cu", f"score_pages<{shape}, {kind}>", (str(kernel.header),), claim)


def sparse_decode(
    dtype: torch.dtype, head_dim: int, group: int, kernel: DigestKernel, format: type[PageFormat] = Plain
) -> KernelSpec:
    """The whole step."""
    (shape, kind, claim), pages = _scorer(dtype, head_dim, group, kernel), _pages(format, dtype, head_dim)
    expression, headers = f"sparse_decode<{shape}, {kind}, {pages.name}>", (str(kernel.header), pages.header)
    return KernelSpec("sparse_decode.cu", expression, headers, f"{claim} && {pages.claim}")


def _scorer(dtype: torch.dtype, head_dim: int, group: int, kernel: DigestKernel) -> tuple[str, str, str]:
    """The first template arguments of what scores digests, the digest's type, and what is claimed of it."""
    kind = kernel.type_name.format(heads=_heads(group))
    shape = f"{ELEMENTS[dtype]}, {head_dim}, {head_tiles(group)}"
    staged, room = scorer_words(kernel, head_dim, group)
    scorer = f"{kind}::Scorer<{shape}>"
    return shape, kind, f"{scorer}::STAGED == {staged} && {scorer}::ROOM == {room}"


class _Pages(NamedTuple):
    """The type of a format, its header, and what is claimed of it."""

    name: str
    header: str
    claim: str


@functools.lru_cache(256)  # as tokens may be appended at every step
def _pages(format: type[PageFormat], dtype: torch.dtype, head_dim: int) -> _Pages:
    kernel, claims = cast(FormatKernel, format.kernel), []
    if head_dim in LATENT_DIMS:
        return _Pages("Latents", str(kernel.header), "true")
    name = kernel.type_name
    for tiles in (1, 2):
        claims.append(f"{name}::query_words<{head_dim}>({tiles}) == {kernel.query_words(head_dim, tiles)}")
    for page_size in PAGE_SIZES:
        for which, part in ((KEYS, "key"), (VALUES, "value")):
            size, stored = format().record(page_size, head_dim, dtype, which)
            claims.append(f"{name}::{part}_record<{head_dim}>({page_size.bit_length() - 1}) == {size}")
    claims.append(f"sizeof({name}::Element) == {stored.itemsize}")
    return _Pages(name, str(kernel.header), " && ".join(claims))


def prompt_rows(head_dim: int, block_size: int) -> int:
    """Queries of a prompt that a CTA attends for: those of a warp are two tiles where registers allow it."""
    return 2 * PROMPT_TILE if head_dim <= 128 and block_size % (2 * PROMPT_TILE) == 0 else PROMPT_TILE


def prompt_attention(dtype: torch.dtype, head_dim: int, rows: int) -> KernelSpec:
    """A prompt's attention to listed blocks."""
    expression = f"prompt_attention<{ELEMENTS[dtype]}, {head_dim}, {rows // PROMPT_TILE}>"
    return KernelSpec("prompt_attention.cu", expression, claim=f"PROMPT_TILE == {PROMPT_TILE}")


def score_blocks(dtype: torch.dtype, head_dim: int, rows: int) -> KernelSpec:
    """Scores of a prompt's blocks; a row of a CTA is a query of one head."""
    expression = f"score_blocks<{ELEMENTS[dtype]}, {head_dim}, {rows // PROMPT_TILE}>"
    return KernelSpec("score_blocks.cu", expression, claim=f"PROMPT_TILE == {PROMPT_TILE}")


def prompt_tile(head_dim: int) -> int:
    """Keys of a prompt that come at a time on sm_90."""
    return 2 * PROMPT_TILE if head_dim <= 128 else PROMPT_TILE


def prompt_attention_sm90(dtype: torch.dtype, head_dim: int) -> KernelSpec:
    """The same on sm_90; compiled for another architecture it does nothing."""
    claim = f"PromptStage<{head_dim}>::TILE == {prompt_tile(head_dim)}"
    expression = f"prompt_attention_sm90<{ELEMENTS[dtype]}, {head_dim}>"
    return KernelSpec("prompt_attention_sm90.cu", expression, claim=claim)


def elementwise(name: str, dtype: torch.dtype) -> KernelSpec:
    """Rotary embeddings and RMS norms."""
    return KernelSpec(f"{name}.cu", f"{name}<{ELEMENTS[dtype]}>")


SELECT_PAGES = KernelSpec("select_pages.cu", "select_pages")


def of_model(
    dtype: torch.dtype, head_dim: int, group: int, kernel: DigestKernel, format: type[PageFormat] = Plain
) -> list[KernelSpec]:
    """All kernels that one geometry can need; its windows are plain."""
    around = [*(elementwise(name, dtype) for name in ("rotate", "rms_norm")), SELECT_PAGES]
    if head_dim in LATENT_DIMS:
        return around + _of_latents(dtype, head_dim, group, kernel)
    return [
        *(append_kv(dtype, head_dim, kept, format) for kept in (kernel, NO_DIGEST)),
        *around,
        score_pages(dtype, head_dim, group, kernel),
        sparse_decode(dtype, head_dim, group, kernel, format),
        attend_pages(dtype, head_dim, group, format),
        *([] if format is Plain else [read_pages(dtype, head_dim, format)]),
        merge_attention(dtype, head_dim, group),
        *(of(dtype, head_dim, prompt_rows(head_dim, 2 * PROMPT_TILE)) for of in (prompt_attention, score_blocks)),
        *([] if head_dim % PROMPT_TILE else [prompt_attention_sm90(dtype, head_dim)]),
    ]


def _of_latents(dtype: torch.dtype, head_dim: int, group: int, kernel: DigestKernel) -> list[KernelSpec]:
    """Those for pages of latents, which are plain."""
    return [
        append_kv(dtype, head_dim, NO_DIGEST),
        *([append_kv(dtype, head_dim, kernel)] if kernel.of_latents else []),
        *([score_pages(dtype, head_dim, group, kernel)] if kernel.of_latents else []),
        attend_latents(dtype, head_dim, group),
        merge_attention(dtype, head_dim, group),
    ]


def promised(formats: Sequence[str] = ("plain",)) -> list[KernelSpec]:
    """Every instantiation for pages of these formats, each once, for every digest that has a kernel.

    Raises:
        UnknownNameError: there is no such format.
    """
    digests, kinds = filter(None, map(kernel_of, with_kernels())), map(FORMATS.get, formats)
    geometries = itertools.product(ELEMENTS, HEAD_DIMS + LATENT_DIMS, GROUPS, digests, kinds)
    return list(dict.fromkeys(spec for geometry in geometries for spec in of_model(*geometry)))


def why_not(dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> str | None:
    """Why no kernel serves a geometry, or None if one does."""
    if dtype not in ELEMENTS:
        return f"{str(dtype).removeprefix('torch.')} (kernels: bfloat16, float16)"
    if head_dim not in HEAD_DIMS + LATENT_DIMS:
        latents = " and ".join(map(str, LATENT_DIMS))
        return f"head_dim {head_dim} (kernels: {', '.join(map(str, HEAD_DIMS))}; of latents {latents})"
    if group > MAX_GROUP and head_dim in HEAD_DIMS:
        return f"{group} query heads to a kv head (kernels: up to {MAX_GROUP})"
    if page_size not in PAGE_SIZES:
        return f"page_size {page_size} (kernels: {', '.join(map(str, PAGE_SIZES))})"
    return None


def why_not_blocks(dtype: torch.dtype, head_dim: int, value_dim: int, block_size: int) -> str | None:
    """Why no kernel serves a prompt's attention to listed blocks, or their scores, or None if one does."""
    reason = why_not(dtype, head_dim, 1, PAGE_SIZES[0])
    if head_dim in LATENT_DIMS:
        return f"head_dim {head_dim} (kernels: {', '.join(map(str, HEAD_DIMS))})"
    if reason is None and value_dim != head_dim:
        return f"values of {value_dim} channels beside keys of {head_dim} (kernels: as many)"
    if reason is None and block_size % PROMPT_TILE:
        return f"blocks of {block_size} tokens (kernels: multiples of {PROMPT_TILE})"
    return reason
