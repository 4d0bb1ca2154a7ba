"""One layer's pages of a random batch, laid out as badly as the interface allows.

Page ids are shuffled, memory that no token was written to is NaN, and table entries past a sequence's end name pages
of other sequences: an op that looks where it should not gives an answer that is visibly wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekv.digests import DIGESTS, Digest
from sparsekv.ops.formats import PageFormat, halves, page_format

NAN = float("nan")


def edge_lengths(page_size: int) -> tuple[int, ...]:
    """The lengths of sequences where off-by-one errors live: empty, one token, around one page, several pages."""
    return (0, 1, max(page_size - 1, 0), page_size, page_size + 1, 3 * page_size + page_size // 2)


@dataclass(frozen=True)
class Pages:
    """What the ops are handed for one layer.

    Attributes:
        kv_pool: `[num_pages, 2, hkv, p, d]`, or `[num_pages, 1, ...]` of keys that are the values, too.
        block_table: `[b, max_pages]` int32; seq_lens: `[b]` int32.
    """

    kv_pool: Tensor
    block_table: Tensor
    seq_lens: Tensor

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.kv_pool.shape[3]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [int(n) for n in self.seq_lens]

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, in order, each `[n, hkv, d]`."""
        p, n = self.page_size, self.lengths[row]
        ids = [int(page) for page in self.block_table[row, : -(-n // p)]]
        kv = self.kv_pool[ids].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :n]  # [halves, n, hkv, d]
        return kv[0], kv[-1]

    def used(self) -> Iterator[tuple[int, int, int]]:
        """Every used page as (row, slot, tokens in it)."""
        for row, n in enumerate(self.lengths):
            for slot in range(-(-n // self.page_size)):
                yield row, slot, min(self.page_size, n - slot * self.page_size)

    def to(self, device: torch.device | str) -> Pages:
        """The same pages on another device."""
        return Pages(self.kv_pool.to(device), self.block_table.to(device), self.seq_lens.to(device))

    def emptied(self) -> Pages:
        """The same tables over a pool in which nothing was written yet."""
        return replace(self, kv_pool=torch.full_like(self.kv_pool, NAN))


def random_pages(
    lengths: Sequence[int],
    num_kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    spare: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    num_halves: int = 2,
) -> Pages:
    """Pages of sequences with these lengths.

    Args:
        spare: pages of the pool, and columns of the table, that no sequence uses.
        num_halves: 1 of keys that are the values, too.
    """
    generator = torch.Generator(device).manual_seed(seed)
    counts = [-(-n // page_size) for n in lengths]
    ids = torch.randperm(sum(counts) + spare, dtype=torch.int64, device=device, generator=generator)
    used = ids[: sum(counts)] if sum(counts) else ids[:1]
    places = (len(lengths), max(counts, default=0) + spare)
    block_table = used[torch.randint(len(used), places, dtype=torch.int64, device=device, generator=generator)]
    kv_pool = torch.full((len(ids), num_halves, num_kv_heads, page_size, head_dim), NAN, dtype=dtype, device=device)
    shape = (sum(lengths), num_halves, num_kv_heads, head_dim)
    tokens = torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)
    for row, new in enumerate(tokens.split(list(lengths))):
        own, position = ids[sum(counts[:row]) :][: counts[row]], torch.arange(len(new), device=device)
        block_table[row, : len(own)] = own
        kv_pool[own[position // page_size], :, :, position % page_size] = new
    return Pages(kv_pool, block_table.int(), torch.tensor(lengths, dtype=torch.int32, device=device))


def empty_summary(digest: Digest, pages: Pages) -> list[Tensor]:
    """The digest's tensors for a pool, filled with what nobody may read: NaN, or all ones in whole numbers."""
    num_pages, _, num_kv_heads, page_size, head_dim = pages.kv_pool.shape
    tensors = []
    for field in digest.fields(page_size, head_dim):
        dtype = field.dtype or pages.kv_pool.dtype
        trap = NAN if dtype.is_floating_point else torch.iinfo(dtype).max
        tensors.append(pages.kv_pool.new_full((num_pages, num_kv_heads, *field.shape), trap, dtype=dtype))
    return tensors


def fitted_state(digest: Digest, pages: Pages) -> list[Tensor]:
    """The digest's fixed tensors, fitted to the tokens of the longest sequence."""
    longest = max(range(len(pages.lengths)), key=lambda row: pages.lengths[row])
    keys, _ = pages.tokens(longest)
    return digest.fit(keys.transpose(0, 1)[None], None)


def fresh_summary(name: str, pages: Pages, state: Sequence[Tensor]) -> list[Tensor]:
    """The digests of all used pages, computed from their tokens; NaN in every other place."""
    digest, p = DIGESTS.get(name)(), pages.page_size
    summary, device = empty_summary(digest, pages), pages.kv_pool.device
    slot = torch.arange(pages.block_table.shape[1], device=device)
    row, column = (slot * p < pages.seq_lens[:, None]).nonzero(as_tuple=True)
    ids = pages.block_table[row, column].long()
    valid = column[:, None] * p + torch.arange(p, device=device) < pages.seq_lens[row, None]
    keys = pages.kv_pool[ids, 0].masked_fill(~valid[:, None, :, None], NAN)
    for stored, computed in zip(summary, digest.summarize(keys, valid, state), strict=True):
        stored[ids] = computed.to(stored.dtype)
    return summary


def stored_as(kind: PageFormat, pages: Pages) -> Tensor:
    """The pool of plain pages in another format; what no token was written to is all ones."""
    num_pages, num_halves, num_kv_heads, p, d = pages.kv_pool.shape
    size, dtype = kind.mean_record(p, d, pages.kv_pool.dtype, num_halves)
    ones = torch.full((), 0xFF, dtype=torch.uint8, device=pages.kv_pool.device).expand(dtype.itemsize).clone()
    pool = ones.view(dtype).expand(num_pages, num_halves, num_kv_heads, p, size).clone()
    slot = torch.arange(pages.block_table.shape[1], device=pool.device)
    row, column = (slot * p < pages.seq_lens[:, None]).nonzero(as_tuple=True)
    ids = pages.block_table[row, column].long()
    valid = column[:, None] * p + torch.arange(p, device=pool.device) < pages.seq_lens[row, None]
    for which in halves(pages.kv_pool):
        records = kind.encode(pages.kv_pool[ids, which], valid, which)
        page, offset = (
            valid.nonzero(as_tuple=True) if kind.by_token else torch.ones_like(valid).nonzero(as_tuple=True)
        )
        kind.write(records[page, :, offset], pool, ids[page], offset, d, which)
    return pool


def in_format(name: str, pages: Pages) -> tuple[Tensor, Pages]:
    """The pool of plain pages in another format, and plain pages of what is left there of the tokens."""
    kind, (d, dtype) = page_format(name), (pages.kv_pool.shape[4], pages.kv_pool.dtype)
    pool = stored_as(kind, pages)
    held = torch.stack([kind.read(kind.stored(pool, d, which), d, dtype, which) for which in halves(pool)], 1)
    return pool, replace(pages, kv_pool=held)
