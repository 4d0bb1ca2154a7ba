"""Which blocks of keys hold most of a prompt's attention: an estimate by a few queries of every block, and every key.

Each of these queries meets every key before it, and their shares of attention are averaged by blocks. Means lose what
single tokens look for: of the queries of a block, the mean looks for the first tokens; of the keys, it hides the one.
On SmolLM2 (4,096 tokens, blocks of 128, a document each), nats per token above a dense prompt in plain text, and
where a passage of the beginning comes again, at the density that it takes, with queries that are evenly apart:

    four queries of a block, every key      .037, -.161 at .42
    two queries of a block, every key       .037,  .566 at .41
    four, one list for the heads of a group .043,  .197 at .44
    antidiagonal sums, 16 apart             .038,  .040 at .45  (XAttention: Xu et al., 2025)
    means of blocks                         .040,  .098 at .41

Most queries of a head look for nothing: they leave their attention to the first tokens (Xiao et al., "Efficient
Streaming Language Models with Attention Sinks", 2024, section 3), and of four that are evenly apart all may be such.
So each head is asked by those that give the first tokens the least. On the testbed (8,192 tokens, mass .95) what a
story says in several places is then found in 96 % of cases instead of 81, at a density of .33 instead of .42; eight
queries, or all blocks that any of the four wants, find no more. (All queries lose nothing, and take .85 of 4,096.)

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

NUM_ASKED = 4  # queries of a block
SINK_TOKENS = 4  # the first, which take what a head has no use for


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
    place, size, n = _asked(chunk), chunk.block_size, chunk.key.shape[2]
    asked = place.flatten(2)
    query = chunk.query.gather(2, asked[..., None].expand(-1, -1, -1, chunk.query.shape[3]))
    ends = [min((chunk.first_block + i + 1) * size, n) - 1 for i in range(chunk.num_query_blocks)]
    ops = for_backend(chunk.config.backend)
    scores = ops.score_blocks(query, chunk.key, [end for end in ends for _ in range(NUM_ASKED)], size, chunk.scaling)
    scores = scores.unflatten(2, (-1, NUM_ASKED))
    own = torch.arange(chunk.first_block, chunk.num_key_blocks, device=scores.device)
    scores.scatter_(-1, own[:, None, None].expand_as(scores[..., :1]), _own_scores(chunk, query, place))
    scores[..., 0] = float("-inf")
    return scores.softmax(-1).nan_to_num(0.0).mean(-2)


def _asked(chunk: PromptChunk) -> Tensor:
    """The queries of each block that are asked, each head its own: those that give the first tokens the least.

    Returns:
        `[b, hq, num_query_blocks, NUM_ASKED]` int64, places among the chunk's queries; where a block has fewer of
        these, some are named again.
    """
    (hq, t), size, first = chunk.query.shape[1:3], chunk.block_size, chunk.past % chunk.block_size
    sinks = chunk.key[:, :, :SINK_TOKENS].repeat_interleave(hq // chunk.key.shape[1], 1)
    given = ((chunk.query @ sinks.mT).float() * chunk.scaling).logsumexp(-1)
    given = F.pad(given, (first, chunk.num_query_blocks * size - first - t), value=float("inf"))
    place = given.unflatten(-1, (-1, size)).topk(NUM_ASKED, largest=False, sorted=False).indices
    place += size * torch.arange(chunk.num_query_blocks, device=place.device)[:, None] - first
    return place.clamp_(0, t - 1)


def _own_scores(chunk: PromptChunk, query: Tensor, place: Tensor) -> Tensor:
    """As `score_blocks`, of the queries' own blocks, `[b, hq, num_query_blocks, NUM_ASKED, 1]`."""
    size, n, hkv = chunk.block_size, chunk.key.shape[2], chunk.key.shape[1]
    start = chunk.first_block * size
    keys = F.pad(chunk.key[:, :, start:], (0, 0, 0, chunk.num_key_blocks * size - n)).unflatten(2, (-1, size))
    keys = keys.repeat_interleave(query.shape[1] // hkv, 1)
    logits = (query.unflatten(2, (-1, NUM_ASKED)) @ keys.mT).float() * chunk.scaling
    token = start + torch.arange(keys.shape[2] * size, device=keys.device).view(-1, 1, size)
    logits.masked_fill_(token > (place + chunk.past)[..., None], float("-inf"))
    return logits.logsumexp(-1, keepdim=True)


def _always(chunk: PromptChunk) -> Tensor:
    """The blocks that are always seen, `[num_query_blocks, num_key_blocks]` bool."""
    key = torch.arange(chunk.num_key_blocks, device=chunk.query.device)
    query = key[chunk.first_block :, None]
    return (key == 0) | ((query - key).abs() <= 1) | (query >= chunk.key.shape[2] // chunk.block_size - 1)
