"""The four ops once more, as anyone would write them down: Python loops, one token and one number at a time, float64.

Too slow for anything but small tests, and simple enough to be read as the definition. Page pooling and selection read
numbers; the tensors may lie on any device, the results are on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekv.testing.pages import Pages


def append_kv(key: Tensor, value: Tensor, valid: Tensor | None, pages: Pages) -> None:
    """Writes the tokens that are no padding one after another; `pages` are the sequences after the append."""
    for row, end in enumerate(pages.lengths):
        columns = [c for c in range(key.shape[2]) if valid is None or bool(valid[row, c])]
        for position, column in enumerate(columns, start=end - len(columns)):
            page, offset = int(pages.block_table[row, position // pages.page_size]), position % pages.page_size
            pages.kv_pool[page, 0, :, offset] = key[row, :, column]
            pages.kv_pool[page, 1, :, offset] = value[row, :, column]


def page_bounds(query: Tensor, pages: Pages) -> Tensor:
    """The min/max bound of every query head and page, `[b, hq, max_pages]` float64; -inf past a sequence's end."""
    b, hq, d = query.shape
    group = hq // pages.kv_pool.shape[2]
    bounds = torch.full((b, hq, pages.block_table.shape[1]), -math.inf, dtype=torch.float64, device="cpu")
    for row, slot, count in pages.used():
        keys = pages.kv_pool[int(pages.block_table[row, slot]), 0, :, :count].double().cpu()  # [hkv, count, d]
        for head in range(hq):
            low, high = keys[head // group].amin(0), keys[head // group].amax(0)
            q = query[row, head].double().cpu()
            bounds[row, head, slot] = sum(max(float(q[c] * low[c]), float(q[c] * high[c])) for c in range(d))
    return bounds


def best_products(query: Tensor, pages: Pages) -> Tensor:
    """The largest dot product of every query head in every page, `[b, hq, max_pages]` float64."""
    b, hq, _ = query.shape
    group = hq // pages.kv_pool.shape[2]
    best = torch.full((b, hq, pages.block_table.shape[1]), -math.inf, dtype=torch.float64, device="cpu")
    for row, slot, count in pages.used():
        keys = pages.kv_pool[int(pages.block_table[row, slot]), 0].double().cpu()  # [hkv, p, d]
        for head in range(hq):
            q = query[row, head].double().cpu()
            best[row, head, slot] = max(float(q @ keys[head // group, i]) for i in range(count))
    return best


def pool_group(scores: Tensor, num_kv_heads: int, group_pooling: str) -> Tensor:
    """Scores per query head `[b, hq, pages]` -> per kv head `[b, hkv, pages]`; -inf where the page does not exist."""
    b, hq, num_slots = scores.shape
    group = hq // num_kv_heads
    pooled = torch.full((b, num_kv_heads, num_slots), -math.inf, dtype=torch.float64, device="cpu")
    for row in range(b):
        for head in range(num_kv_heads):
            heads = scores[row, head * group : (head + 1) * group].double()
            if group_pooling == "share":
                pooled[row, head] = _shares(heads)
                continue
            for slot in range(num_slots):
                if heads[0, slot] > -math.inf:
                    pooled[row, head, slot] = _pooled(heads, slot, group_pooling)
    return pooled


def _pooled(heads: Tensor, slot: int, group_pooling: str) -> float:
    column = [float(x) for x in heads[:, slot]]
    if group_pooling == "max":
        return max(column)
    if group_pooling == "sum":
        return sum(column)
    shares = [math.exp(x - float(heads[i].logsumexp(0))) for i, x in enumerate(column)]
    return sum(shares) / len(shares)


def _shares(heads: Tensor) -> Tensor:
    """Logarithms of pages' largest shares of a head's attention, of scores `[heads, pages]`: `[pages]`. The last page
    has what the others do not share."""
    exist = [slot for slot in range(heads.shape[1]) if heads[0, slot] > -math.inf]
    largest = torch.full(heads.shape[1:], -math.inf, dtype=torch.float64, device="cpu")
    for slot in exist[:-1]:
        largest[slot] = max(float(head[slot] - head[exist[:-1]].logsumexp(0)) for head in heads)
    largest[exist[-1:]] = 0.0
    return largest


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
    """The forced pages and then the best, by sorting tuples: `[b, hkv, k]` int32, ascending, padded with -1."""
    b, num_kv_heads, num_slots = scores.shape
    slots = torch.full((b, num_kv_heads, k), -1, dtype=torch.int32, device="cpu")
    for row in range(b):
        length = int(seq_lens[row])
        exists = range(min(num_slots, -(-length // page_size)))
        needed = {position // page_size for position in range(length) if position < sink_tokens}
        needed |= {position // page_size for position in range(max(length - max(recent_tokens, 1), 0), length)}
        for head in range(num_kv_heads):
            value = [-math.inf if math.isnan(x) else x for x in scores[row, head].tolist()]
            rank = {i: (0, 0.0, i) if i in needed else (1, -value[i], i) for i in exists}
            most = k if limits is None else min(k, int(limits[row]))
            least = -math.inf if min_score is None or length <= whole_tokens else min_score
            best_first = sorted((i for i in exists if i in needed or value[i] >= least), key=rank.__getitem__)
            chosen = sorted(best_first[:most])
            slots[row, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32, device="cpu")
    return slots


def attend_pages(
    query: Tensor,
    pages: Pages,
    slots: Tensor | None,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention token by token: output `[b, hq, d]` and log-sum-exp `[b, hq]`, both float64."""
    b, hq, d = query.shape
    group = hq // pages.kv_pool.shape[2]
    out = torch.zeros(b, hq, d, dtype=torch.float64, device="cpu")
    lse = torch.full((b, hq), -math.inf, dtype=torch.float64, device="cpu")
    for row in range(b):
        keys, values = (x.double().cpu() for x in pages.tokens(row))
        for head in range(hq):
            positions = listed_positions(pages, None if slots is None else slots[row, head // group], row)
            positions = [i for i in positions if first is None or i >= int(first[row])]
            q = query[row, head].double().cpu()
            logits = [capped(float(q @ keys[i, head // group]) * scaling, softcap) for i in positions]
            sink = [] if sinks is None else [float(sinks[head])]
            if logits or sink:
                lse[row, head] = torch.tensor(logits + sink, dtype=torch.float64, device="cpu").logsumexp(0)
            for i, logit in zip(positions, logits, strict=True):
                out[row, head] += math.exp(logit - float(lse[row, head])) * values[i, head // group]
    return out, lse


def capped(logit: float, softcap: float) -> float:
    """A logit under a softcap; 0 means none."""
    return softcap * math.tanh(logit / softcap) if softcap else logit


def listed_positions(pages: Pages, slots: Tensor | None, row: int) -> list[int]:
    """Positions of the tokens in the listed pages of one sequence and kv head; None lists all pages."""
    p, length = pages.page_size, pages.lengths[row]
    listed = range(-(-length // p)) if slots is None else [int(slot) for slot in slots if slot >= 0]
    return [i for slot in listed for i in range(slot * p, min((slot + 1) * p, length))]
