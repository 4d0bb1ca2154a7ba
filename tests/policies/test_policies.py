"""What each policy selects: exactly the pages that its definition names."""

import dataclasses
import math

import pytest
import torch

from sparsekv.config import SparseConfig
from sparsekv.errors import ConfigError
from sparsekv.policies import POLICIES, DecodeStep
from sparsekv.policies.oracle import exact_scores
from sparsekv.testing import naive
from sparsekv.testing.pages import Pages, edge_lengths, fresh_summary, random_pages
from sparsekv.testing.steps import decode_step

P = 8


def select(policy: str, pages: Pages, hq: int = 4, **settings: object) -> tuple[torch.Tensor, DecodeStep]:
    config = SparseConfig(**{"page_size": P, "sinks": 2, "recent": 1, "budget": 5 * P, "policy": policy, **settings})
    step = decode_step(torch.randn(len(pages.lengths), hq, pages.kv_pool.shape[4]), pages, config)
    slots = POLICIES.get(policy)().select(step)
    assert slots is not None
    return slots, step


def chosen(slots: torch.Tensor, row: int, head: int = 0) -> list[int]:
    return [slot for slot in slots[row, head].tolist() if slot >= 0]


@pytest.mark.parametrize(
    ("length", "sinks", "recent", "budget", "expected"),
    [
        (100, 2, 1, 40, [0, 9, 10, 11, 12]),  # 13 pages: the sink's, and the last four
        (100, 9, 1, 40, [0, 1, 10, 11, 12]),
        (100, 0, 1, 40, [8, 9, 10, 11, 12]),
        (97, 2, 1, 40, [0, 9, 10, 11, 12]),  # the last page holds one token
        (96, 2, 1, 40, [0, 8, 9, 10, 11]),
        (100, 2, 17, 40, [0, 9, 10, 11, 12]),
        (30, 2, 1, 40, [0, 1, 2, 3]),
        (1, 2, 1, 40, [0]),
        (0, 2, 1, 40, []),
    ],
)
def test_recent_is_the_sinks_and_the_window(
    length: int, sinks: int, recent: int, budget: int, expected: list[int]
) -> None:
    pages = random_pages([length, 200], page_size=P, spare=0)
    slots, _ = select("recent", pages, sinks=sinks, recent=recent, budget=budget)
    for head in range(2):
        assert chosen(slots, 0, head) == expected


def test_recent_does_not_ask_the_query() -> None:
    pages = random_pages([100, 64], page_size=P)
    assert torch.equal(select("recent", pages)[0], select("recent", pages)[0])


def test_all_reads_everything() -> None:
    pages = random_pages([100], page_size=P)
    config = SparseConfig(page_size=P, sinks=2, recent=1, budget=40, policy="all")
    assert POLICIES.get("all")().select(decode_step(torch.randn(1, 4, 16), pages, config)) is None


@pytest.mark.parametrize("pooling", ["max", "sum", "mean_softmax", "share"])
def test_top_k_takes_the_pages_with_the_best_bounds(pooling: str) -> None:
    pages = random_pages([*edge_lengths(P), 100], page_size=P)
    slots, step = select("top_k", pages, group_pooling=pooling, digest="minmax")
    scores = naive.pool_group(naive.page_bounds(step.query.double() * step.scaling, pages), 2, pooling)
    assert torch.equal(slots, naive.select_pages(scores, pages.seq_lens, P, step.k, 2, 1))


@pytest.mark.parametrize("pooling", ["max", "sum", "mean_softmax", "share"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_takes_the_pages_with_the_best_keys(pooling: str, dtype: torch.dtype) -> None:
    pages = random_pages([*edge_lengths(P), 100], page_size=P, dtype=dtype)
    slots, step = select("oracle", pages, group_pooling=pooling)
    exact = naive.pool_group(naive.best_products(step.query.double() * step.scaling, pages), 2, pooling)
    torch.testing.assert_close(exact_scores(step).double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(slots, naive.select_pages(exact, pages.seq_lens, P, step.k, 2, 1))


@pytest.mark.parametrize("policy", ["top_k", "oracle"])
@pytest.mark.parametrize("budget", [5 * P, 20 * P, 1.0])
def test_pages_of_too_small_shares_are_left_out(
    policy: str, budget: int | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sequences that are long enough, also where the budget has room for all."""
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 100)
    pages, least = random_pages([*edge_lengths(P), 100, 101, 160], page_size=P), 0.06
    slots, step = select(policy, pages, budget=budget, group_pooling="share", min_share=least)
    shares = exact_scores(step) if policy == "oracle" else step.digest_scores()
    expected = naive.select_pages(shares, pages.seq_lens, P, step.k, 2, 1, None, math.log(least), 100)
    assert torch.equal(slots, expected)
    assert len(chosen(slots, -3)) == min(step.k, 13)  # of 13 pages
    assert budget == 5 * P or max(len(chosen(slots, row)) for row in (-2, -1)) < 13


@pytest.mark.parametrize("policy", ["recent", "random"])
def test_scores_that_are_no_shares_have_no_least(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 0)
    slots, _ = select(policy, random_pages([100], page_size=P), group_pooling="share", min_share=0.9)
    assert len(chosen(slots, 0)) == 5


@pytest.mark.parametrize("group", [1, 3])
def test_oracle_reads_the_page_of_the_best_key(group: int) -> None:
    """With `max` pooling, the page with the largest dot product of any query head of the group is always read."""
    pages = random_pages([300, 150, 57], page_size=P)
    slots, step = select("oracle", pages, hq=2 * group)
    best = naive.best_products(step.query, pages).view(3, 2, group, -1).amax(2).argmax(-1)
    for row in range(3):
        for head in range(2):
            assert int(best[row, head]) in chosen(slots, row, head)


@pytest.mark.parametrize("policy", ["top_k", "recent", "oracle"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 1.0])
def test_a_fraction_is_of_each_sequence_s_own_length(policy: str, budget: float) -> None:
    """Rounded up to pages, and never below the forced ones; the width of the selection is the longest row's."""
    pages = random_pages([200, 100, 64, 8, 1, 0], page_size=P)
    slots, step = select(policy, pages, budget=budget)
    for row, n in enumerate(pages.lengths):
        assert len(chosen(slots, row)) == min(step.config.budget_pages(n), -(-n // P))
    assert slots.shape[2] == step.config.budget_pages(200)


def test_a_fraction_takes_the_best_pages_within_each_row_s_limit() -> None:
    pages = random_pages([200, 100, 64], page_size=P)
    slots, step = select("top_k", pages, budget=0.25, digest="minmax")
    scores = naive.pool_group(naive.page_bounds(step.query, pages), 2, "max")
    limits = torch.tensor([step.config.budget_pages(n) for n in pages.lengths])
    assert torch.equal(slots, naive.select_pages(scores, pages.seq_lens, P, step.k, 2, 1, limits))


@pytest.mark.parametrize("ask", [DecodeStep.digest_scores, DecodeStep.attend_best])
def test_scores_of_digests_that_are_not_kept(ask: object) -> None:
    """A policy that forgets to say that it reads them is told what to set."""
    pages = random_pages([100, 20], page_size=P)
    config = SparseConfig(page_size=P, sinks=2, recent=1, budget=40, policy="recent")
    step = dataclasses.replace(decode_step(torch.randn(2, 4, 16), pages, config, layer_idx=3), summary=[])
    with pytest.raises(
        ConfigError, match=r"policy='recent' asks .* layer 3 keeps no digests.*`reads = Reads.DIGESTS`"
    ):
        ask(step)


def test_digest_scores_are_the_op_s() -> None:
    pages = random_pages([100, 20], page_size=P)
    settings = {"digest": "minmax", "group_pooling": "sum", "backend": "reference"}
    config = SparseConfig(page_size=P, sinks=2, recent=1, budget=40, **settings)
    step = decode_step(torch.randn(2, 4, 16), pages, config)
    summary = fresh_summary("minmax", pages, [])
    expected = torch.ops.sparsekv.score_pages(
        step.query, summary, [], pages.block_table, pages.seq_lens, P, "minmax", "sum", 0.25
    )
    assert torch.equal(step.digest_scores(), expected)
