"""Keys that queries look for, in as many pages as a step is to read.

Of long random keys no page holds a share of the attention that matters, and a step that leaves out pages with less
would read hardly any, which is no speed to be told. In trained models attention has peaks; here keys are given some.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.ops.formats import KEYS

from .attention_points import LayerPoint

MASS = 0.98  # of a head's attention that the pages of its planted keys hold together: other pages are far below
MARGIN = 2  # each of them holds at least so many times the least share


def check_read(point: LayerPoint) -> None:
    """Raises ConfigError if a step cannot be made to read `point.read` tokens."""
    config, group = point.config, point.geometry.group
    a_head = int(MASS / (MARGIN * config.min_share))
    forced = point.num_pages - len(_free_slots(point))
    least, most = forced + group, min(config.budget_pages(point.context), forced + group * a_head)
    if point.read is not None and not least <= config.pages_for(point.read) <= most:
        raise ConfigError(
            f"--read={point.read} is not possible at a context of {point.context:,}: at least "
            f"{least * config.page_size} tokens (the pages that are always read, and one for each of {group} query "
            f"heads), at most {most * config.page_size} (the budget, or {a_head} pages a head, each of which holds "
            f"{MARGIN} times min_share={config.min_share})."
        )


def plant(point: LayerPoint, query: Tensor, kv_pool: Tensor, block_table: Tensor, generator: torch.Generator) -> None:
    """Overwrites the first key of pages chosen at random, so many that with those always read they hold `point.read`
    tokens: a key along one of the group's queries, of the length that gives all of a head's the same share.

    Args:
        query: `[b, hq, d]`; block_table: `[b, max_pages]`.
        kv_pool: `[num_pages, 2, hkv, p, d]`, whose keys are normal: they are changed in place.
    """
    heads, group, free = point.geometry.num_kv_heads, point.geometry.group, _free_slots(point)
    number = point.k - (point.num_pages - len(free))
    order = torch.rand(point.batch, heads, len(free), generator=generator, device=query.device)
    slots = free.start + order.topk(number, dim=-1).indices  # [b, hkv, number]
    pages = block_table[:, None].expand(-1, heads, -1).gather(2, slots)
    which = torch.arange(number, device=query.device) % group
    along = query.float().unflatten(1, (heads, group))[:, :, which]  # [b, hkv, number, d]
    squared = along.square().sum(-1, keepdim=True)
    # What a head's other tokens weigh, normal as they are, is close to its expectation.
    others = math.log(point.context) + point.scaling**2 * squared / 2
    logits = others + math.log(MASS / (1 - MASS) * group / number)
    keys = along * logits / (point.scaling * squared)
    kv_pool[pages, KEYS, torch.arange(heads, device=pages.device)[:, None], 0] = keys.to(kv_pool.dtype)


def _free_slots(point: LayerPoint) -> range:
    """The pages that are not read in any case."""
    config = point.config
    first_recent = max(point.context - max(config.recent_tokens, 1), 0) // config.page_size
    return range(config.pages_for(config.sinks), first_recent)
