"""prefill="sparse": which blocks of keys a prompt's queries see, against a loop over single queries."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekv import SparseConfig
from sparsekv.ops import prompt
from sparsekv.policies import POLICIES, PromptChunk, prompt_mass

SIZE, STEP = 32, 32 // prompt_mass.NUM_ASKED
# query heads, kv heads, tokens before the chunk, tokens with it
CHUNKS = {"whole": (4, 2, 0, 170), "a chunk": (2, 2, 64, 192), "cut within blocks": (4, 1, 75, 130)}


def chunk_of(hq: int, hkv: int, past: int, n: int, **settings: Any) -> PromptChunk:
    query, key = torch.randn(2, hq, n - past, 16), torch.randn(2, hkv, n, 16)
    return PromptChunk(0, query, key, SIZE, 0.5, SparseConfig(prefill="sparse", **settings))


def by_single_queries(chunk: PromptChunk) -> Tensor:
    key = chunk.key.repeat_interleave(chunk.query.shape[1] // chunk.key.shape[1], dim=1)
    shares, n = torch.zeros(*chunk.query.shape[:2], chunk.num_query_blocks, chunk.num_key_blocks), key.shape[2]
    for i in range(chunk.num_query_blocks):
        block = range(max((chunk.first_block + i) * SIZE, chunk.past), min((chunk.first_block + i + 1) * SIZE, n))
        asked = [p for p in block if p >= SIZE and ((p + 1) % STEP == 0 or p == n - 1)]
        for p in asked:
            logits = chunk.query[:, :, p - chunk.past, None] @ key[:, :, SIZE : p + 1].mT * chunk.scaling
            for j, share in enumerate(logits[:, :, 0].softmax(-1).split(SIZE, dim=-1), 1):
                shares[:, :, i, j] += share.sum(-1) / len(asked)
    return shares


@pytest.mark.parametrize("shape", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("elements", [1, 2000, prompt.SCORED_ELEMENTS])
def test_shares(shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are estimated at once."""
    monkeypatch.setattr(prompt, "SCORED_ELEMENTS", elements)
    chunk = chunk_of(*shape)
    torch.testing.assert_close(prompt_mass.block_shares(chunk), by_single_queries(chunk), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("mass", [0.3, 0.7, 0.95])
def test_the_fewest_blocks_that_hold_the_mass(shape: tuple[int, ...], mass: float) -> None:
    chunk = chunk_of(*shape, prefill_mass=mass)
    blocks = POLICIES.get("top_k")().prompt_blocks(chunk)
    assert blocks is not None
    shares, first, n = prompt_mass.block_shares(chunk), chunk.first_block, chunk.key.shape[2]
    for row, head, i in torch.cartesian_prod(*map(torch.arange, shares.shape[:3])).tolist():
        own, share = first + i, shares[row, head, i, : first + i + 1]
        seen = blocks[row, head, i, : own + 1]
        always = {0, own, max(own - 1, 0)}
        assert all(seen[j] for j in always)
        if (own + 1) * SIZE > n - SIZE:
            assert bool(seen.all())  # the last block's worth of tokens
            continue
        chosen = [j for j in range(own + 1) if seen[j] and j not in always]
        held = float(share[seen].sum())
        assert own == 0 or held >= mass - 1e-5
        assert not chosen or held - float(share[chosen].min()) < mass


def test_where_nothing_is_chosen() -> None:
    policy = POLICIES.get("top_k")()
    few = chunk_of(2, 2, 101, 100 + SIZE)
    assert policy.prompt_blocks(few) is None  # less than a block, as a question or a verification is
    dense = chunk_of(*CHUNKS["whole"]).config.with_(prefill="dense")
    assert not policy.chooses_blocks(dense)
    assert policy.prompt_blocks(PromptChunk(0, few.query, few.key, 8, 0.5, dense)) is None


def test_half_precision_holds_what_sinks_leave() -> None:
    """Where the first tokens take nearly all, float16 would hold nothing of the rest."""
    chunk = chunk_of(2, 2, 0, 128)
    query, key = torch.ones_like(chunk.query), 0.01 * chunk.key
    key[:, :, 0], key[:, :, 40] = 2.0, 1.0
    half = PromptChunk(0, query.half(), key.half(), SIZE, 1.0, chunk.config)
    shares = prompt_mass.block_shares(half)
    assert bool((shares[:, :, 2, 1] > 0.99).all())
    torch.testing.assert_close(shares[:, :, 1:].sum(-1), torch.ones(2, 2, 3), rtol=0, atol=1e-3)
