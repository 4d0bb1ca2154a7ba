"""Which blocks of keys hold most of a prompt's attention: an estimate by a few queries of every block, and every key.

Each of these queries meets every key before it, and their shares of attention are summed by blocks. Means lose what
single tokens look for: of the queries of a block, the mean looks for the first tokens; of the keys, it hides the one.
On SmolLM2 (4,096 tokens, blocks of 128, a document each), nats per token above a dense prompt in plain text, and
where a passage of the beginning comes again, at the density that it takes:

    four queries of a block, every key      .037, -.161 at .42
    two queries of a block, every key       .037,  .566 at .41
    four, one list for the heads of a group .043,  .197 at .44
    antidiagonal sums, 16 apart             .038,  .040 at .45  (XAttention: Xu et al., 2025)
    means of blocks                         .040,  .098 at .41

What a few queries of a block look for, those that are asked may miss: of 8,192 tokens of the testbed, at .42, answers
of several values fall from 100 to 81 %. Asked by the four of each head that give the first tokens the least, 96, at
.33; but then SmolLM2 loses .05 instead of .004 where a passage comes again. By the four that do look furthest, which
takes all products to know, the testbed loses nothing.

For n tokens it is n / 32 queries by n keys: 1 / 64 of the products that attention takes, and n^2 / 64 logits of each
head. At 128k tokens of 32 layers and 32 heads these are .28 T: 1.1 TB in 16 bits, where no kernel keeps them to
itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.ops import for_backend
from sparsekv.policies.prompt import PromptChunk

NUM_ASKED = 4  # queries of a block, evenly apart


def blocks_of_mass(chunk: PromptChunk, mass: float) -> Tensor:
    """The fewest blocks that hold so much of the estimated attention of each block of queries, but for what the first
    tokens take of it; and those that are always seen: the first, the one before, and its own.

    Queries of the last block's worth of tokens see every block: what is asked tends to stand there, and a single
    token of it may be the one that finds the answer.

    Returns:
        `[b, hq, num_query_blocks, num_key_blocks]` bool. Blocks of later keys may be among them.
    """
    shares, always = block_shares(chunk), _always(chunk)
    others = shares.masked_fill(always, 0.0)
    ordered = others.sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    left = mass - (shares - others).sum(-1, keepdim=True)
    least = ordered.masked_fill(before >= left, float("inf")).amin(-1, keepdim=True)
    return (others >= least) | always


def block_shares(chunk: PromptChunk) -> Tensor:
    """The share of each block of keys in the attention of those queries of a block that are asked, on average. The
    first block is left out: it is seen anyway, and its first tokens can take nearly all.

    Returns:
        `[b, hq, num_query_blocks, num_key_blocks]` float32.
    """
    size, asked = chunk.block_size, _asked(chunk)
    block = torch.arange(chunk.first_block, chunk.num_key_blocks, device=chunk.query.device)
    if not asked:
        return chunk.query.new_zeros(*chunk.query.shape[:2], len(block), chunk.num_key_blocks, dtype=torch.float32)
    place = torch.arange(asked[0], asked[-1] + 1, _step(size), device=block.device)  # made there: nobody waits
    place = F.pad(place, (0, len(asked) - len(place)), value=asked[-1])
    query, ops = chunk.query[:, :, place - chunk.past], for_backend(chunk.config.backend)
    scores = ops.score_blocks(query, chunk.key, asked, size, chunk.scaling)
    scores[..., 0] = float("-inf")
    members = (place // size == block[:, None]).float()
    shares: Tensor = (members / members.sum(1, keepdim=True).clamp_min(1)) @ scores.softmax(-1)
    return shares


def _asked(chunk: PromptChunk) -> list[int]:
    """The tokens whose queries are asked: in every block the same ones, and the last of all. None in the first block,
    which sees nothing but itself."""
    step, n = _step(chunk.block_size), chunk.key.shape[2]
    first = max(chunk.past, chunk.block_size)
    return sorted({*range(first + (-first - 1) % step, n, step), n - 1}) if first < n else []


def _step(block_size: int) -> int:
    """From one query that is asked to the next."""
    return max(1, block_size // NUM_ASKED)


def _always(chunk: PromptChunk) -> Tensor:
    """The blocks that are always seen, `[num_query_blocks, num_key_blocks]` bool."""
    key = torch.arange(chunk.num_key_blocks, device=chunk.query.device)
    query = key[chunk.first_block :, None]
    return (key == 0) | ((query - key).abs() <= 1) | (query >= chunk.key.shape[2] // chunk.block_size - 1)
