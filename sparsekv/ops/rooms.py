"""The dynamic shared memory of every kernel, in bytes: this file counts it, and the kernels lay it out.

A debug build checks on the device that both agree: with SPARSEKV_DEBUG=1 a kernel stops unless what it has laid out
ends where its shared memory does (`check_shared_end` of cuda/common/device.cuh).
"""

from __future__ import annotations

from sparsekv.ops.formats import PageFormat, Plain
from sparsekv.ops.instances import LATENT_CHANNELS, MMA_HEADS, PROMPT_TILE, head_tiles

UNIT = 16  # tokens that a warp attends to at a time; pages that it scores at a time; bytes of a word


def query_bytes(head_dim: int, group: int, format: type[PageFormat]) -> int:
    """`query_words` of a format's type: a query staged for attention."""
    return UNIT * format.kernel.query_words(head_dim, head_tiles(group)) if format.kernel else 0


def merge_bytes(head_dim: int, group: int, ctas: int, warps: int) -> tuple[int, int]:
    """`MergeBuffers` of cuda/common/merge.cuh: the merge's own, and the warps' sums, which may take the place of what
    is not needed any more."""
    words = head_tiles(group) * head_dim // 2 * ((min(group, MMA_HEADS) + 1) // 2)
    of_heads = 8 * head_tiles(group) * MMA_HEADS  # a largest logit and a sum of weights for each
    return (ctas + warps) * of_heads + UNIT * ctas * (-(-words // ctas) + 1), UNIT * warps * words


def attend_bytes(head_dim: int, group: int, ctas: int, warps: int, format: type[PageFormat]) -> int:
    """Of cuda/attend_pages.cu, by `ctas` in a cluster."""
    own, sums = merge_bytes(head_dim, group, ctas, warps)
    return own + max(sums, query_bytes(head_dim, group, format))


def latent_bytes(head_dim: int) -> int:
    """Of cuda/attend_latents.cu: three units of keys, and the dot products of every warp, twice."""
    return 3 * UNIT * 2 * (head_dim + 8) + 2 * head_dim // LATENT_CHANNELS * 4 * UNIT * UNIT


def prompt_bytes(head_dim: int, rows: int) -> int:
    """Of cuda/prompt_attention.cu and score_blocks.cu: so many queries, and two tiles of keys or values."""
    return 2 * head_dim * (rows + 2 * PROMPT_TILE)


def prompt_sm90_bytes(head_dim: int, rows: int, tile: int) -> int:
    """Of cuda/prompt_attention_sm90.cu: so many queries, two tiles of keys and two of values, and ten barriers."""
    return 2 * head_dim * (rows + 4 * tile) + 80


def select_bytes(max_pages: int, k: int) -> int:
    """Of cuda/select_pages.cu: keys of tiles, candidates, tiles and pages that were chosen."""
    return UNIT * -(-max_pages // (4 * UNIT)) + 4 * k * (UNIT + 2)


def kept_bytes(group: int, tiles: int) -> int:
    """Scores by head of so many tiles of pages, `KeptScores` of cuda/common/share.cuh."""
    return 4 * UNIT * tiles * max(4, 1 << (group - 1).bit_length())


def kept_tiles(max_pages: int, ctas: int, warps: int) -> int:
    """The most tiles of sixteen pages that the warps of one CTA score."""
    return -(-max_pages // (UNIT * ctas * warps)) * warps


def step_bytes(
    head_dim: int,
    group: int,
    ctas: int,
    warps: int,
    scorer: tuple[int, int],
    max_pages: int,
    k: int,
    direct: bool,
    kept: int = 0,
    format: type[PageFormat] = Plain,
) -> int:
    """`StepShared` of cuda/sparse_decode.cu.

    Args:
        scorer: words of 16 bytes of a query that is staged to be scored, and of every warp that scores.
        direct: whether the keys and ids of all pages lie there.
        kept: bytes of scores that lie there until they can become shares.
        format: of the pages.
    """
    own, sums = merge_bytes(head_dim, group, ctas, warps)
    selected = UNIT * -(-k // 4)
    keys = UNIT * -(-(max_pages if direct else -(-max_pages // UNIT)) // 4)
    select = selected + keys + (keys if direct else selected + 4 * UNIT * k) + kept
    staged, room = scorer
    return query_bytes(head_dim, group, format) + UNIT * staged + max(UNIT * warps * room + select, sums) + own
