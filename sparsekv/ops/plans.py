"""How work is split over a GPU.

Plans depend on shapes alone, never on lengths, which live on the device: a captured launch stays right while its
sequences grow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sparsekv.ops import instances, rooms
from sparsekv.ops.compiler import DEBUG, KernelSpec
from sparsekv.ops.formats import PageFormat, Plain
from sparsekv.ops.formulas import DigestKernel
from sparsekv.ops.launch import Gpu, capacity, gpu
from sparsekv.ops.rooms import UNIT

MAX_SPLITS = 128  # parts that merge_attention puts together
LONG = 1024  # units of a sequence beyond which a second launch is worth an even load
DIRECT_PAGES = 8192  # pages whose keys and ids the fused kernel keeps in shared memory
FITTING = 8  # CTAs, and warps of each, that attend to all of a short sequence
# Tables are planned for in steps of so many pages, so that a growing one seldom needs another plan.
WIDTHS = 1 if DEBUG else 512


@dataclass(frozen=True)
class Split:
    """CTAs that share one (sequence, kv head), whether they form a cluster, and the warps of each."""

    ctas: int
    clustered: bool
    warps: int

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.ctas if self.clustered else 1


def max_warps(head_dim: int, group: int) -> int:
    """Warps of a CTA for which the attention kernels have registers."""
    return 16 if head_dim * instances.head_tiles(group) <= 128 else 8


def split_attention(facts: Gpu, rows: int, units: int, warps: int) -> Split:
    """How `rows` (sequence, kv head) pairs with up to `units` of sixteen tokens each are attended to.

    A cluster merges in the same launch. It is placed less freely, so long work is split over lone CTAs and merged in
    a second launch.
    """
    slots = facts.sms * 16 // 8  # CTAs of 8 warps that run at once
    if units >= LONG and slots // rows > 1:
        return Split(min(slots // rows, MAX_SPLITS), False, min(warps, 8))
    wanted = min(-(-units // 8), max(1, slots // rows))
    if facts.max_cluster == 1 and wanted > 1:
        return Split(min(wanted, MAX_SPLITS), False, min(warps, 8))
    return Split(min(_power_of_two(wanted), facts.max_cluster), True, min(warps, 8))


def split_latents(facts: Gpu, rows: int, units: int, head_dim: int) -> Split:
    """How latents are attended to: by lone CTAs, of which up to two run on an SM at once, of two units or more."""
    at_once = facts.sms * min(2, facts.shared // rooms.latent_bytes(head_dim))
    ctas = max(1, min(at_once // rows, -(-units // 2)))
    return Split(ctas, False, head_dim // instances.LATENT_CHANNELS)


def fitted(split: Split, facts: Gpu, shared: Callable[[Split], int]) -> Split:
    """The same split with as many warps as shared memory has room for; `shared` says what a split needs, in bytes.

    Not below two: a merge wants a warp for each tile of query heads.
    """
    while shared(split) > facts.shared and split.warps > 2:
        split = replace(split, warps=split.warps // 2)
    return split


def split_step(facts: Gpu, rows: int, warps: int, capacity: Callable[[int, int], int], fits: bool = False) -> Split:
    """How the fused step splits `rows` (sequence, kv head) pairs: into the largest clusters of which all run at once.

    Args:
        fits: nothing is chosen: the work is short, and fewer warps merge sooner.
        capacity: how many clusters of so many CTAs, of so many warps each, the GPU runs at once. It is not what the
            number of SMs suggests: a cluster lies within one part of the GPU, and the parts differ in size.
    """
    if fits:
        warps = min(warps, FITTING)
    for ctas in range(min(facts.max_cluster, FITTING) if fits else facts.max_cluster, 0, -1):
        if capacity(ctas, warps) >= rows:
            return Split(ctas, True, warps)
    return Split(1, True, min(warps, 8))


def _power_of_two(number: int) -> int:
    """The largest that is not larger."""
    return 1 << (max(number, 1).bit_length() - 1)


@dataclass(frozen=True)
class Plan:
    """A launch that splits rows.

    Attributes:
        shared: bytes.
        direct: whether the fused kernel has all pages' keys in shared memory.
        spills: whether it has scores that are to become shares elsewhere.
    """

    spec: KernelSpec
    split: Split
    shared: int
    direct: bool = False
    spills: bool = False


def planned_attention(
    split: Split, dtype: torch.dtype, head_dim: int, group: int, format: type[PageFormat] = Plain
) -> Plan:
    """attend_pages over a given split."""
    spec = instances.attend_pages(dtype, head_dim, group, format)
    return Plan(spec, split, rooms.attend_bytes(head_dim, group, split.cluster, split.warps, format))


def planned_latents(split: Split, dtype: torch.dtype, head_dim: int, group: int) -> Plan:
    """attend_latents over a given split."""
    return Plan(instances.attend_latents(dtype, head_dim, group), split, rooms.latent_bytes(head_dim))


@functools.lru_cache(1024)
def attend_plan(
    device: int,
    dtype: torch.dtype,
    rows: int,
    head_dim: int,
    group: int,
    units: int,
    format: type[PageFormat] = Plain,
) -> Plan:
    """attend_pages for `rows` (sequence, kv head) pairs of up to `units` of sixteen tokens. Of latents it is
    attend_latents, and rows are of a sequence and query heads that are served together."""
    facts = gpu(device)
    if head_dim in instances.LATENT_DIMS:
        return planned_latents(split_latents(facts, rows, units, head_dim), dtype, head_dim, group)
    split = split_attention(facts, rows, units, max_warps(head_dim, group))
    split = fitted(split, facts, lambda split: planned_attention(split, dtype, head_dim, group, format).shared)
    return planned_attention(split, dtype, head_dim, group, format)


def merge_ctas(head_dim: int, group: int) -> int:
    """CTAs that share what merge_attention merges of a row: of latents, so many that each does it at one go."""
    return instances.head_tiles(group) * head_dim // 8 if head_dim in instances.LATENT_DIMS else 4


def planned_step(
    split: Split,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    kernel: DigestKernel,
    max_pages: int,
    k: int,
    direct: bool,
    format: type[PageFormat] = Plain,
    kept: bool = False,
) -> Plan:
    """sparse_decode over a given split; `kept`: with scores by head in shared memory."""
    spec = instances.sparse_decode(dtype, head_dim, group, kernel, format)
    scorer = instances.scorer_words(kernel, head_dim, group)
    tiles = rooms.kept_tiles(max_pages, split.ctas, split.warps) if kept else 0
    scores = rooms.kept_bytes(group, tiles)
    shared = rooms.step_bytes(head_dim, group, split.ctas, split.warps, scorer, max_pages, k, direct, scores, format)
    return Plan(spec, split, shared, direct)


def step_plan(
    device: int,
    dtype: torch.dtype,
    rows: int,
    head_dim: int,
    group: int,
    kernel: DigestKernel,
    max_pages: int,
    k: int,
    format: type[PageFormat] = Plain,
    shares: bool = False,
    fits: bool = False,
) -> Plan | None:
    """sparse_decode for `rows` (sequence, kv head) pairs, or None where the four ops serve better.

    Args:
        shares: pages are chosen by their shares of a head's attention.
        fits: nothing is chosen.
    """
    width = -(-max_pages // WIDTHS) * WIDTHS
    return _step_plan(device, dtype, rows, head_dim, group, kernel, width, k, fits, format, shares)


@functools.lru_cache(1024)
def _step_plan(
    device: int,
    dtype: torch.dtype,
    rows: int,
    head_dim: int,
    group: int,
    kernel: DigestKernel,
    width: int,
    k: int,
    fits: bool,
    format: type[PageFormat],
    shares: bool,
) -> Plan | None:
    facts = gpu(device)
    if facts.max_cluster == 1 or not selectable(width, k):
        return None
    direct = width <= DIRECT_PAGES

    def plan(ctas: int, warps: int) -> Plan:
        """With scores that are kept where there is room."""
        made = functools.partial(
            planned_step, Split(ctas, True, warps), dtype, head_dim, group, kernel, width, k, direct, format
        )
        roomy = made(kept=shares)
        return roomy if roomy.shared <= facts.shared else replace(made(), spills=shares)

    def room(ctas: int, warps: int) -> int:
        made = plan(ctas, warps)
        return 0 if made.shared > facts.shared else capacity(made.spec, device, ctas, warps, made.shared)

    split = split_step(facts, rows, max_warps(head_dim, group), room, fits)
    made = plan(split.ctas, split.warps)
    return made if made.shared <= facts.shared else None


def selectable(max_pages: int, k: int) -> bool:
    """Whether a selection fits the kernels."""
    return max_pages <= instances.MAX_PAGES and k <= instances.MAX_SELECTED


@dataclass(frozen=True)
class ScorePlan:
    """How scoring is split: kv heads of a CTA, and CTAs that share the pages of a sequence."""

    spec: KernelSpec
    heads: int
    chunks: int
    warps: int
    shared: int  # bytes


@functools.lru_cache(1024)
def score_plan(
    device: int,
    dtype: torch.dtype,
    b: int,
    num_kv_heads: int,
    head_dim: int,
    group: int,
    kernel: DigestKernel,
    max_pages: int,
) -> ScorePlan:
    """score_pages for b sequences of up to `max_pages` pages."""
    staged, room = (UNIT * words for words in instances.scorer_words(kernel, head_dim, group))
    facts, warps = gpu(device), 4 if head_dim in instances.LATENT_DIMS else 8
    heads = math.gcd(num_kv_heads, warps)
    while heads > 1 and (heads * staged > 64_000 or heads * staged + warps * room > facts.shared):
        heads //= 2
    tiles = -(-max_pages * heads // (UNIT * warps))
    chunks = min(tiles, max(1, 2 * facts.sms * heads // (b * num_kv_heads)))
    spec = instances.score_pages(dtype, head_dim, group, kernel)
    return ScorePlan(spec, heads, chunks, warps, heads * staged + warps * room)
