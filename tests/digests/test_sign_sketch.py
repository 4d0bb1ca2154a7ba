"""The 1-bit sketch: per-token summaries and a fixed state, which the interface must carry through the cache."""

import pytest
import torch
from torch import Tensor

from sparsekv.digests import sign_sketch
from sparsekv.digests.sign_sketch import QUERY_LIMIT, SignSketch
from sparsekv.errors import ConfigError
from sparsekv.testing import naive
from sparsekv.testing.pages import Pages, fitted_state, fresh_summary, random_pages

D, P = 32, 8


def rotation(seed: int, d: int = D) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def estimates(query: Tensor, keys: Tensor, state: list[Tensor]) -> Tensor:
    """Each key in a page of its own: query `[d]`, keys `[n, d]` -> `[n]`."""
    one = torch.ones(len(keys), 1, dtype=torch.bool)
    summary = [x[None] for x in SignSketch().summarize(keys[:, None, None], one, state)]
    return SignSketch().score(query[None, None, None], summary, state)[0, 0, 0]


def naive_estimate(query: Tensor, key: Tensor, mean: Tensor, turn: Tensor) -> float:
    """f <Rq, s> with s = sign(R(k - mean)) and f = |k - mean|^2 / <s, R(k - mean)>, in float64; Rq in whole units."""
    centred = turn.double() @ (key - mean).double()
    signs = [1.0 if x > 0 else -1.0 for x in centred.tolist()]
    unit = float((turn.double() @ query.double()).abs().max()) / QUERY_LIMIT
    rotated = [unit * round(x / unit) for x in (turn.double() @ query.double()).tolist()]
    factor = float(centred @ centred) / sum(s * float(x) for s, x in zip(signs, centred, strict=True))
    return factor * sum(s * x for s, x in zip(signs, rotated, strict=True))


def test_fields_are_a_bit_per_channel_and_a_half_per_token() -> None:
    signs, factor = SignSketch().fields(page_size=16, head_dim=128)
    assert (signs.shape, signs.dtype) == ((2, 4, 8, 4), torch.uint8)
    assert (factor.shape, factor.dtype) == ((16,), torch.float16)
    with pytest.raises(ConfigError, match="head_dim=20 must divide by 8"):
        SignSketch().fields(page_size=16, head_dim=20)


def test_the_formula() -> None:
    keys, query, mean = torch.randn(20, D), torch.randn(D), torch.randn(D)
    turn = rotation(1)
    expected = torch.tensor([naive_estimate(query, key, mean, turn) for key in keys])
    torch.testing.assert_close(estimates(query, keys, [mean[None], turn[None]]), expected, rtol=1e-4, atol=1e-4)


def test_a_page_scores_its_best_token() -> None:
    pages = random_pages([37], 1, D, P)
    state = fitted_state(SignSketch(), pages)
    query = torch.randn(1, 1, 1, D)
    summary = [x[pages.block_table[:, :5]] for x in fresh_summary("sign_sketch", pages, state)]
    scores = SignSketch().score(query, summary, state)[0, 0, 0]
    keys, _ = pages.tokens(0)
    single = [naive_estimate(query[0, 0, 0], key[0], state[0][0], state[1][0]) for key in keys]
    expected = torch.tensor([max(single[i : i + P]) for i in range(0, 37, P)])
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-2)  # the factor is kept in half precision


def test_along_the_key_itself_the_estimate_is_exact_but_for_rounding() -> None:
    """All d channels add up, each rounded to a fortieth of the largest."""
    keys, mean = torch.randn(10, D), torch.randn(D)
    for key in keys:
        estimate = estimates(key - mean, key[None], [mean[None], rotation(2)[None]])
        torch.testing.assert_close(estimate[0], (key - mean).square().sum(), rtol=0.02, atol=0.0)


def test_rounding_the_query_adds_little_to_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, query = torch.randn(4000, 128), torch.randn(128)
    state = SignSketch().fit(keys[None, None], None)
    exact = (keys - state[0]) @ query
    rounded = (estimates(query, keys, state) - exact).square().mean()
    monkeypatch.setattr(sign_sketch, "QUERY_LIMIT", 1 << 20)
    assert rounded < 1.01 * (estimates(query, keys, state) - exact).square().mean()


def test_the_estimate_is_unbiased_over_rotations() -> None:
    """The mean over 400 rotations lies within four standard errors of q . (k - mean)."""
    keys, query, mean = torch.randn(6, D), torch.randn(D), torch.randn(D)
    drawn = torch.stack([estimates(query, keys, [mean[None], rotation(seed)[None]]) for seed in range(400)])
    error = drawn.mean(0) - (keys - mean) @ query
    assert bool((error.abs() <= 4 * drawn.std(0) / 400**0.5).all())


def test_the_state_is_the_mean_key_and_an_orthogonal_matrix() -> None:
    keys = torch.randn(2, 3, 10, D)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[0, :4] = False
    mean, turn, _ = SignSketch().fit(keys, valid)
    kept = torch.cat([keys[0, :, 4:], keys[1]], dim=1)
    torch.testing.assert_close(mean, kept.mean(1))
    torch.testing.assert_close(turn @ turn.transpose(-1, -2), torch.eye(D).expand(3, D, D), rtol=1e-5, atol=1e-5)


def test_a_key_on_the_mean_scores_zero() -> None:
    mean = torch.randn(D)
    assert estimates(torch.randn(D), mean[None], [mean[None], rotation(0)[None]]).tolist() == [0.0]


def test_correlates_with_the_dot_product_as_one_bit_can() -> None:
    """RaBitQ: at one bit a channel the correlation tends to sqrt(2 / pi) = 0.798 for random keys."""
    keys, query = torch.randn(4000, 64), torch.randn(64)
    state = SignSketch().fit(keys[None, None], None)
    both = torch.stack([estimates(query, keys, state), keys @ query])
    assert float(both.corrcoef()[0, 1]) == pytest.approx((2 / torch.pi) ** 0.5, abs=0.02)


def test_finds_the_page_of_a_similar_key_where_the_bound_does_not() -> None:
    """A key plus as much noise, among 1,024 random keys: is its page among the four best of 64?"""
    pages = random_pages([64 * 16], 1, 64, 16, seed=1)
    keys, _ = pages.tokens(0)
    query = keys[torch.randint(1024, (200,))] + torch.randn(200, 1, 64)
    table, lens = pages.block_table[:, :64].expand(200, -1), pages.seq_lens.expand(200)
    best = naive.best_products(query, Pages(pages.kv_pool, table, lens))[:, 0].argmax(-1)
    found = {}
    for name, state in (("sign_sketch", fitted_state(SignSketch(), pages)), ("minmax", [])):
        summary = fresh_summary(name, pages, state)
        scores = torch.ops.sparsekv.score_pages(query, summary, state, table, lens, 16, name, "max", 1.0)
        found[name] = (scores[:, 0].topk(4).indices == best[:, None]).any(-1).float().mean().item()
    assert found["sign_sketch"] > 0.9
    assert found["minmax"] < 0.5
