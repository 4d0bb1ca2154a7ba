"""What each op means, in plain torch. It is also the CPU implementation: no loop over pages, heads or sequences.

Names and shapes (the dictionary of the whole project): batch b, query heads hq, kv heads hkv, group g = hq / hkv,
head_dim d, page_size p; `kv_pool [num_pages, 2, hkv, p, record]` (keys at 0, values at 1, and `[num_pages, 1, ...]`
where keys are the values, too; in plain pages a token's record are its d channels: see `formats.py`), `block_table
[b, max_pages]` int32 (page ids of a sequence in order; entries past its end are ignored), `seq_lens [b]` int32,
selected `slots [b, hkv, k]` int32 (positions in the block table, ascending, -1 for none).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.ops.formats import KEYS, PageFormat, halves, page_format, take_rows
from sparsekv.ops.formulas import formula

NEG_INF = float("-inf")
MAX_SCORE = 1e30  # of what counts towards shares
NO_RANK = torch.iinfo(torch.int64).min
FORCED_ORDER = 1 << 31  # above that of every score
LOWEST, TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny

# Pages are attended to in chunks of about this many key elements, which stay in a CPU's cache: the whole context is
# never copied, and dense decoding runs at the speed of one read. A GPU, for which it is launches, takes more at once.
CHUNK_ELEMENTS = 1 << 20
BLOCK_ELEMENTS = 1 << 24  # that are read from pages at once


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
    """Writes new tokens into their pages and brings the digests of the pages they touch up to date. A digest sums up
    what its page holds, which in some formats are rounded keys.

    Args:
        key, value: `[b, hkv, t, d]`, in the model's dtype. With t = 0 only the digest of a partly filled last page is
            recomputed (what a crop needs).
        valid: `[b, t]` bool, False for padding, which is not stored; None: all valid.
        block_table, seq_lens: the sequences *after* the append.
        kv_pool, summary: written in place. An empty `summary` means that no digest is kept.
        state: the digest's fixed per-head tensors.
        digest: name of the digest's formula.
        format: name of the pages' format.
    """
    coded, page_size, head_dim = page_format(format), kv_pool.shape[3], key.shape[3]
    start = seq_lens - _num_new_tokens(key, valid)
    if coded.by_token:
        _write_tokens(key, value, valid, start, block_table, kv_pool, coded)
        if not summary:
            return
    row, slot = _touched_pages(start, seq_lens, page_size, key.shape[2], valid is None)
    pages = block_table[row, slot]
    position = slot[:, None] * page_size + torch.arange(page_size, device=key.device)  # [m, p]
    exists = position < seq_lens[row, None]
    if not coded.by_token and key.shape[2]:
        column = _columns(valid, position - start[row, None], row, key.shape[2])
        is_new = exists & (position >= start[row, None])
        for which, states in zip(halves(kv_pool), (key, value), strict=False):
            old = coded.read(coded.stored(kv_pool, head_dim, which)[pages], head_dim, key.dtype, which)
            new = states[row[:, None], :, column].transpose(1, 2)  # [m, hkv, p, d]
            merged = torch.where(is_new[:, None, :, None], new, old)
            records = coded.encode(merged, exists, which).transpose(1, 2)
            coded.write(records, kv_pool, pages[:, None], position % page_size, head_dim, which)
    if summary:
        keys = coded.read(coded.stored(kv_pool, head_dim, KEYS)[pages], head_dim, key.dtype, KEYS)
        for stored, computed in zip(summary, formula(digest).summarize(keys, exists, state), strict=True):
            stored[pages] = computed.to(stored.dtype)


def read_pages(pages: Tensor, batch: int, head_dim: int, dtype: torch.dtype, format: str = "plain") -> list[Tensor]:
    """Keys and values of whole pages, as many of every sequence, one sequence after the other.

    Args:
        pages: `[batch * n, 2, hkv, p, record]`, or `[batch * n, 1, ...]` of keys that are the values, too.
        dtype: the model's.
        format: name of the pages' format.

    Returns:
        Keys and values, or both in one, `[batch, hkv, n * p, d]` in that dtype; what no token was written to is
        arbitrary. Beside them it takes the memory of a block of pages.
    """
    coded = page_format(format)
    return [_read(coded.stored(pages, head_dim, x), batch, head_dim, dtype, coded, x) for x in halves(pages)]


def _read(stored: Tensor, batch: int, head_dim: int, dtype: torch.dtype, coded: PageFormat, which: int) -> Tensor:
    stored = stored.unflatten(0, (batch, -1)).transpose(1, 2)  # [batch, hkv, n, p, record]
    tokens = stored.new_empty(*stored.shape[:-1], head_dim, dtype=dtype)
    size = max(1, BLOCK_ELEMENTS * stored.shape[2] // max(tokens.numel(), 1))
    for block, part in zip(tokens.split(size, 2), stored.split(size, 2), strict=True):
        block.copy_(coded.read(part, head_dim, dtype, which))
    return tokens.flatten(2, 3)


def _num_new_tokens(key: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device)
    return valid.sum(1, dtype=torch.int32)


def _write_tokens(
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    start: Tensor,
    block_table: Tensor,
    kv_pool: Tensor,
    coded: PageFormat,
) -> None:
    """Padding is left out, so a sequence's tokens lie without gaps from position 0."""
    page_size, row = kv_pool.shape[3], torch.arange(len(start), device=start.device)[:, None]
    column = torch.arange(key.shape[2], device=start.device)[None]
    position = start[:, None] + column  # [b, t]
    if valid is not None:
        row, column = valid.nonzero(as_tuple=True)
        position = start[row] + valid.cumsum(1)[row, column] - 1  # [num_valid]
    pages, offset = block_table[row, position // page_size], position % page_size
    for which, states in zip(halves(kv_pool), (key, value), strict=False):
        records = coded.encode(states, valid, which).transpose(1, 2)  # [b, t, hkv, record]
        records = records if valid is None else records[row, column]
        coded.write(records, kv_pool, pages, offset, key.shape[3], which)


def _touched_pages(
    start: Tensor, seq_lens: Tensor, page_size: int, num_tokens: int, unpadded: bool
) -> tuple[Tensor, Tensor]:
    """Row and slot `[m]` of every page that new tokens come to, or that a row's last page is."""
    most_touched = (num_tokens + page_size - 2) // page_size + 1
    slot = start[:, None] // page_size + torch.arange(most_touched, device=start.device)  # [b, touched]
    if num_tokens == 1 and unpadded:  # the page of the one token; nothing here asks the device, so it can be captured
        return torch.arange(len(start), device=start.device), slot[:, 0]
    row, column = (slot * page_size < seq_lens[:, None]).nonzero(as_tuple=True)
    return row, slot[row, column]


def _columns(valid: Tensor | None, index: Tensor, row: Tensor, num_tokens: int) -> Tensor:
    """Which of the new columns is the i-th to be stored, for i in `index [m, p]` of rows `[m]`; any if none is."""
    index = index.clamp(0, num_tokens - 1)
    if valid is None:
        return index
    return valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[row[:, None], index]


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
    """How promising each page is for the query: `[b, hkv, max_pages]` float32, -inf past a sequence's end.

    Args:
        query: `[b, hq, d]`.
        summary: fields `[num_pages, hkv, ...]` of the digest; `state`: its fixed per-head tensors.
        group_pooling: `max`, `sum`, `mean_softmax` or `share` over the query heads that share a kv head.
        scaling: the attention's factor on dot products; scores are on the scale of logits.

    Raises:
        ConfigError: `summary` is empty. UnknownNameError: there is no such digest.
    """
    num_kv_heads = kv_heads_of(summary)
    grouped = rearrange(query.float() * scaling, "b (h g) d -> b h g d", h=num_kv_heads)
    scores = formula(digest).score(grouped, [take_rows(field, block_table) for field in summary], state)
    return pool_group(scores, seq_lens, page_size, group_pooling)


def kv_heads_of(summary: Sequence[Tensor]) -> int:
    """How many kv heads a digest is kept for. Raises ConfigError if it is not kept."""
    if not summary:
        raise ConfigError(
            "Pages without digests cannot be scored: `summary` is empty. Keep a digest, or read all pages."
        )
    return summary[0].shape[1]


def pool_group(scores: Tensor, seq_lens: Tensor, page_size: int, group_pooling: str) -> Tensor:
    """One score per kv head: `[b, hkv, g, pages]` -> `[b, hkv, pages]` float32, -inf past a sequence's end.

    By `share` it is the logarithm of the page's share of a head's attention, as far as scores tell, where that is
    largest. The page of the newest token is read in any case and may not be summed up yet: it does not count, the
    others share what is left, and its own is 0. A NaN is no share.
    """
    slot = torch.arange(scores.shape[-1], device=scores.device)
    past_end = slot * page_size >= seq_lens[:, None]  # [b, pages]
    scores = scores.masked_fill(past_end[:, None, None], NEG_INF)
    if group_pooling == "max":
        return scores.amax(2)
    if group_pooling == "sum":
        return scores.sum(2)
    if group_pooling == "share":
        newest = (slot == (seq_lens[:, None] - 1) // page_size)[:, None]  # [b, 1, pages]
        counted = scores.nan_to_num(nan=-MAX_SCORE).masked_fill(newest[:, None], -MAX_SCORE)
        pooled = counted.clamp(-MAX_SCORE, MAX_SCORE).log_softmax(-1).amax(2).masked_fill(newest, 0.0)
    else:
        pooled = scores.softmax(-1).mean(2)
    return pooled.masked_fill(past_end[:, None], NEG_INF)


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
    """The pages to read: the forced ones, then the best scores; of equal scores the earlier page.

    Args:
        scores: `[b, hkv, max_pages]` float32; NaN counts as -inf.
        k: pages per sequence and kv head.
        sink_tokens, recent_tokens: the pages of the first and of the last so many tokens are always taken, and so
            is the current page.
        limits: `[b]` int32, fewer than k pages for some sequences; None: k for all.
        min_score: pages that score less are left out, unless they are always taken; None: none are.
        whole_tokens: sequences of up to so many tokens have no least score.

    Returns:
        `[b, hkv, k]` int32 slots, ascending, padded at the end with -1 where there are fewer pages than k.
    """
    num_slots = scores.shape[-1]
    rank = _selection_rank(scores, seq_lens, page_size, sink_tokens, recent_tokens)
    if min_score is not None:
        too_low = scores.nan_to_num(nan=NEG_INF) < min_score
        is_free = rank <= (FORCED_ORDER - 1) << 31
        is_long = (seq_lens > whole_tokens)[:, None, None]
        rank = rank.masked_fill(too_low & is_free & is_long, NO_RANK)
    best = rank.topk(min(k, num_slots), dim=-1)
    keep = best.values > NO_RANK
    if limits is not None:
        keep &= torch.arange(best.values.shape[-1], device=scores.device) < limits[:, None, None]
    slots = best.indices.masked_fill(~keep, num_slots).sort(-1).values
    slots = slots.masked_fill(slots == num_slots, -1).to(torch.int32)
    return torch.nn.functional.pad(slots, (0, k - slots.shape[-1]), value=-1)


def _selection_rank(scores: Tensor, seq_lens: Tensor, page_size: int, sink_tokens: int, recent_tokens: int) -> Tensor:
    """Unique int64 ranks `[b, hkv, pages]`: the score in the high bits, the page's place in the low ones.

    A float's bits read as a sign-magnitude integer sort like the float; unique ranks make ties deterministic.
    """
    slot = torch.arange(scores.shape[-1], device=scores.device)
    finite = scores.nan_to_num(nan=NEG_INF, neginf=NEG_INF, posinf=float("inf")) + 0.0  # -0.0 ties with 0.0
    bits = finite.view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    first_recent = (seq_lens.long() - max(recent_tokens, 1)).clamp_min(0) // page_size  # [b]
    forced = (slot * page_size < sink_tokens) | (slot >= first_recent[:, None])  # [b, pages]
    past_end = slot * page_size >= seq_lens[:, None]
    order = order.masked_fill(forced[:, None], FORCED_ORDER)
    rank = (order << 31) - slot  # 31 bits hold any slot; the shifted order stays within int64
    return rank.masked_fill(past_end[:, None], NO_RANK)


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
    """Attention of one query per sequence over the listed pages.

    Args:
        query: `[b, hq, d]`.
        slots: `[b, hkv, k]` int32 pages to read (-1: none); None reads every page (dense decode).
        scaling: factor on the dot products; softcap: `softcap * tanh(x / softcap)` where not 0.
        sinks: `[hq]`, one extra logit per head that takes mass but has no value (gpt-oss).
        format: name of the pages' format.
        first: `[b]` int32, the first token of a sequence that is seen (of a sliding window); None: 0.

    Returns:
        output `[b, hq, d]` in the query's dtype and log-sum-exp `[b, hq]` float32 (natural log; the sink is in it).
        For float64 queries all is computed, and the log-sum-exp given, in float64.
    """
    (num_kv_heads, page_size), head_dim = kv_pool.shape[2:4], query.shape[2]
    coded, wide = page_format(format), torch.promote_types(query.dtype, torch.float32)
    if slots is None:
        every = torch.arange(block_table.shape[1], dtype=torch.int32, device=query.device)
        slots = every.expand(query.shape[0], num_kv_heads, -1)
    grouped = rearrange(query.to(wide), "b (h g) d -> b h g d", h=num_kv_heads)
    elements = CHUNK_ELEMENTS << 5 if query.is_cuda else CHUNK_ELEMENTS
    chunk = max(1, elements // (slots.shape[0] * num_kv_heads * page_size * head_dim))
    parts = []
    for some in slots.split(chunk, dim=-1):
        stored, valid = _gather_pages(coded, head_dim, kv_pool, block_table, seq_lens, some, first)
        found = [coded.read(x, head_dim, wide, which).flatten(2, 3) for which, x in enumerate(stored)]
        keys, values = found[KEYS], found[-1]
        if valid.is_cuda or not valid.all():
            # Memory no token was written to may hold NaN, and 0 * NaN is NaN: the weights alone do not keep it out.
            values.masked_fill_(~valid[..., None], 0.0)  # in place: it is the copy just taken
        parts.append(_attend_chunk(grouped, keys, values, valid, scaling, softcap))
    sink = None if sinks is None else rearrange(sinks.to(wide), "(h g) -> h g", h=num_kv_heads)
    out, lse = _merge(parts, sink)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1)


def _attend_chunk(
    grouped: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit and sum of weights `[b, hkv, g]`, weighted values `[b, hkv, g, d]`; weights relative to that
    logit."""
    logits = grouped @ keys.transpose(-1, -2) * scaling  # [b, hkv, g, tokens]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~valid[:, :, None], NEG_INF)
    peak = logits.amax(-1).clamp_min(LOWEST)  # finite also for a sequence without tokens here
    weights = (logits - peak[..., None]).exp()
    return peak, weights.sum(-1), weights @ values


def _merge(parts: Sequence[tuple[Tensor, Tensor, Tensor]], sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output `[b, hkv, g, d]` and log-sum-exp `[b, hkv, g]` of the chunks and the sink logits `[hkv, g]` together."""
    peaks, masses, weighted = (torch.stack(column) for column in zip(*parts, strict=True))
    peak = peaks.amax(0)
    if sink is not None:
        peak = torch.maximum(peak, sink)
    scale = (peaks - peak).exp()
    mass = (masses * scale).sum(0)
    if sink is not None:
        mass = mass + (sink - peak).exp()
    out = (weighted * scale[..., None]).sum(0) / mass.clamp_min(TINY)[..., None]
    return out, peak + mass.log()


def _gather_pages(
    coded: PageFormat,
    head_dim: int,
    kv_pool: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    first: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """What the listed pages hold of keys and of values, or of both in one, `[b, hkv, k, p, record]` each, and which
    tokens of them are seen, `[b, hkv, k * p]`."""
    num_kv_heads, page_size = kv_pool.shape[2], kv_pool.shape[3]
    heads = torch.arange(num_kv_heads, device=slots.device)[None, :, None]
    table = block_table[:, None].expand(-1, num_kv_heads, -1)
    pages = table.gather(2, slots.clamp_min(0).long())
    position = slots[..., None] * page_size + torch.arange(page_size, device=slots.device)
    valid = (slots[..., None] >= 0) & (position < seq_lens[:, None, None, None])
    if first is not None:
        valid &= position >= first[:, None, None, None]
    return coded.of_heads(kv_pool, pages, heads, head_dim), valid.flatten(2)


def listed(slots: Tensor, num_pages: int) -> Tensor:
    """Which pages are among `slots`, `[b, hkv, num_pages]` bool."""
    mask = torch.zeros(*slots.shape[:2], num_pages + 1, dtype=torch.bool, device=slots.device)
    mask.scatter_(2, slots.long() % (num_pages + 1), True)  # -1, for none, falls on the last place
    return mask[..., :-1]
