"""The sketches: per-token summaries and a fixed state, which the interface must carry through the cache.

Queries are handed over as the attention scales them, so that a product with a key is a logit.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.digests import sign_sketch
from sparsekv.digests.sign_sketch import QUERY_LIMIT, SignSketch, Sketched
from sparsekv.digests.sketch2 import Sketch2
from sparsekv.testing import naive
from sparsekv.testing.pages import NAN, Pages, fitted_state, fresh_summary, random_pages

D, P = 32, 8

each_sketch = pytest.mark.parametrize("sketch", [SignSketch(), Sketch2()], ids=["sign_sketch", "sketch2"])


def rotation(seed: int, d: int = D) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def shipped_rotation(d: int) -> Tensor:
    return SignSketch().fit(torch.empty(1, 1, 1, d), None)[0][0]


def estimates(query: Tensor, keys: Tensor, turn: Tensor, sketch: SignSketch) -> Tensor:
    """Of every token of full pages, the others left out: query `[d]`, keys `[pages, p, d]` -> `[pages, p]`."""
    valid, state = torch.ones(keys.shape[:2], dtype=torch.bool), [turn[None]]
    (records,) = sketch.summarize(keys[:, None], valid, state)
    kept, found = Sketched.of(records[None], keys.shape[-1], sketch.bits), []
    for token in range(keys.shape[1]):
        alone = kept._replace(factor=kept.factor.masked_fill(torch.arange(keys.shape[1]) != token, NAN))
        alone = alone.record(keys.shape[-1], sketch.bits)
        found.append(sketch.score(query[None, None, None], [alone], state)[0, 0, 0])
    return torch.stack(found, dim=-1)


def in_whole_units(x: Tensor, bits: int) -> Tensor:
    """Every other channel in units as many times as large as a code has values."""
    unit = float(x.abs().max()) / QUERY_LIMIT
    units = [unit, unit * 2**bits] * (len(x) // 2)
    return torch.tensor([u * round(y / u) for y, u in zip(x.tolist(), units, strict=True)], dtype=torch.float64)


def code(x: list[float], bits: int) -> list[float]:
    """Signs, and of two bits three times those of channels above the root mean square."""
    rms = (sum(y * y for y in x) / len(x)) ** 0.5
    return [(1.0 if y > 0 else -1.0) * (3.0 if bits == 2 and abs(y) > rms else 1.0) for y in x]


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def kept_mean(keys: Tensor, turn: Tensor) -> list[float]:
    """What is kept of a page's mean, rotated: its code in two bits, times a factor like a key's."""
    mean = (turn.double() @ keys.double().mean(0)).tolist()
    c = code(mean, 2)
    return [dot(mean, mean) / dot(c, mean) * x for x in c]


def naive_estimates(query: Tensor, keys: Tensor, turn: Tensor, bits: int) -> Tensor:
    """<Rq, m> + f <Rq, c> with m the mean that is kept, c the code of x = Rk - m and f = |x|^2 / <c, x>, in float64;
    Rq in whole units, f in half precision."""
    query, turn, mean = query.double(), turn.double(), kept_mean(keys, turn)
    rotated = in_whole_units(turn @ query, bits).tolist()
    found = []
    for key in keys.double():
        centred = (turn @ key - torch.tensor(mean, dtype=torch.float64)).tolist()
        c = code(centred, bits)
        factor = float(torch.tensor(dot(centred, centred) / dot(c, centred)).half())
        found.append(dot(rotated, mean) + factor * dot(c, rotated))
    return torch.tensor(found)


def page_scores(query: Tensor, keys: Tensor, sketch: SignSketch, valid: Tensor | None = None) -> Tensor:
    """Query `[d]`, keys `[pages, p, d]`, valid `[pages, p]` -> `[pages]`."""
    state = sketch.fit(keys[:, None], None)
    valid = torch.ones(keys.shape[:2], dtype=torch.bool) if valid is None else valid
    summary = sketch.summarize(keys[:, None], valid, state)
    return sketch.score(query[None, None, None], [x[None] for x in summary], state)[0, 0, 0]


@each_sketch
@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 8), (2, 8), (16, 128), (16, 80), (24, 96), (64, 256)])
def test_a_record_has_bits_per_channel_a_half_per_token_and_a_mean_in_two_bits(
    page_size: int, head_dim: int, sketch: SignSketch
) -> None:
    (field,) = sketch.fields(page_size, head_dim)
    assert field.dtype == torch.uint8
    kept = Sketched.of(torch.zeros(3, 2, *field.shape, dtype=torch.uint8), head_dim, sketch.bits)
    assert kept.codes.numel() >= 6 * page_size * head_dim * sketch.bits // 8
    assert kept.factor.shape == (3, 2, page_size)
    assert kept.mean.numel() >= 6 * head_dim // 4
    assert kept.record(head_dim, sketch.bits).shape == (3, 2, *field.shape)


@pytest.mark.parametrize(("sketch", "size"), [(SignSketch(), 8 + 16), (Sketch2(), 8 + 32)], ids=["one", "two"])
def test_a_record_is_one_of_whole_lines(sketch: SignSketch, size: int) -> None:
    assert sketch.fields(16, 128)[0].shape == (16, size)
    assert sketch.fields(64, 128)[0].shape == (64, size)


@each_sketch
def test_the_formula(sketch: SignSketch) -> None:
    keys, query, turn = torch.randn(20, D) + 3 * torch.randn(D), torch.randn(D), rotation(1)
    expected = naive_estimates(query, keys, turn, sketch.bits)
    torch.testing.assert_close(estimates(query, keys[None], turn, sketch)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_page_scores_the_log_sum_exp_of_its_tokens() -> None:
    pages = random_pages([37], 1, D, P)
    state = fitted_state(SignSketch(), pages)
    query = torch.randn(1, 1, 1, D)
    summary = [x[pages.block_table[:, :5]] for x in fresh_summary("sign_sketch", pages, state)]
    scores = SignSketch().score(query, summary, state)[0, 0, 0]
    keys, _ = pages.tokens(0)
    logits = [naive_estimates(query[0, 0, 0], page, state[0][0], 1) for page in keys[:, 0].split(P)]
    expected = torch.stack([x.exp().sum().log() for x in logits])
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-2)  # factors are kept in half precision


@each_sketch
def test_a_score_depends_neither_on_the_order_of_tokens_nor_on_those_far_off(sketch: SignSketch) -> None:
    keys, query = torch.randn(6, P, D), torch.randn(D)
    expected = page_scores(query, keys, sketch)
    torch.testing.assert_close(page_scores(query, keys[:, torch.randperm(P)], sketch), expected)
    state, valid = sketch.fit(keys[:, None], None), torch.ones(6, P, dtype=torch.bool)
    kept = Sketched.of(sketch.summarize(keys[:, None], valid, state)[0][None], D, sketch.bits)
    last = torch.arange(P) == P - 1
    without, either, other = (
        sketch.score(
            query[None, None, None],
            [kept._replace(factor=kept.factor.masked_fill(last, x)).record(D, sketch.bits)],
            state,
        )
        for x in (NAN, 6e4, -6e4)  # one of the two is far below all others, the other one far above
    )
    assert torch.equal(torch.minimum(either, other), without)
    assert bool((torch.maximum(either, other) > 1e3).all())


@each_sketch
def test_as_many_times_the_same_token_are_worth_their_logarithm_more(sketch: SignSketch) -> None:
    keys, count = torch.randn(4, 1, D).expand(4, P, D), torch.tensor([1, 2, 5, P])
    scores = page_scores(query := torch.randn(D), keys, sketch, torch.arange(P) < count[:, None])
    once = page_scores(query, keys[:, :1], sketch)
    torch.testing.assert_close(scores, once + count.log(), rtol=1e-4, atol=1e-4)


@each_sketch
def test_along_what_is_left_of_a_key_the_estimate_is_exact_but_for_rounding(sketch: SignSketch) -> None:
    """All d channels add up, each rounded to a 32nd of the largest or less."""
    keys, turn = torch.randn(10, D), rotation(2)
    for i, key in enumerate(keys):
        query = key - turn.T @ torch.tensor(kept_mean(keys, turn))
        torch.testing.assert_close(
            estimates(query, keys[None], turn, sketch)[0, i], query @ key, rtol=0.02, atol=0.02
        )


def test_rounding_the_query_adds_little_to_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, query, turn = torch.randn(250, 16, 128), torch.randn(128), shipped_rotation(128)
    rounded = (estimates(query, keys, turn, SignSketch()) - keys @ query).square().mean()
    monkeypatch.setattr(sign_sketch, "QUERY_LIMIT", 1 << 20)
    assert rounded < 1.01 * (estimates(query, keys, turn, SignSketch()) - keys @ query).square().mean()


@each_sketch
def test_the_estimate_is_unbiased_over_rotations(sketch: SignSketch) -> None:
    """The mean over 400 rotations lies within four standard errors of q . k."""
    keys, query = torch.randn(6, D) + torch.randn(D), torch.randn(D)
    drawn = torch.stack([estimates(query, keys[None], rotation(seed), sketch)[0] for seed in range(400)])
    assert bool(((drawn.mean(0) - keys @ query).abs() <= 4 * drawn.std(0) / 400**0.5).all())


def test_the_state_is_an_orthogonal_matrix_whatever_the_keys() -> None:
    turn, flips = SignSketch().fit(torch.randn(2, 3, 10, D), None)
    torch.testing.assert_close(turn @ turn.transpose(-1, -2), torch.eye(D).expand(3, D, D), rtol=1e-5, atol=1e-5)
    other = SignSketch().fit(torch.full((1, 3, 1, D), NAN), torch.zeros(1, 1, dtype=torch.bool))
    assert torch.equal(turn, other[0])
    assert torch.equal(flips, other[1])


def test_what_the_keys_of_a_page_have_in_common_counts_in_full() -> None:
    """So the heads of a group may be pooled: no part of a head's products is left out."""
    keys, query = 100 * torch.randn(400, 1, D) + torch.randn(400, 4, D), torch.randn(D)
    estimated, exact = estimates(query, keys, rotation(0), SignSketch()), keys @ query
    assert float((estimated * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("sketch", "best"), [(SignSketch(), 0.798), (Sketch2(), 0.939)], ids=["one", "two"])
def test_correlates_with_the_dot_product_as_so_many_bits_can(sketch: SignSketch, best: float) -> None:
    """RaBitQ: at one bit a channel the correlation tends to sqrt(2 / pi) for random keys; at two that of four equal
    steps to sqrt(1 - .1188), after Max."""
    keys, query = torch.randn(250, 16, 64), torch.randn(64)
    beyond = keys - keys.mean(1, keepdim=True)  # the rest is known
    estimated = estimates(query, keys, shipped_rotation(64), sketch) - keys.mean(1, keepdim=True) @ query
    both = torch.stack([estimated.flatten(), (beyond @ query).flatten()])
    assert float(both.corrcoef()[0, 1]) == pytest.approx(best, abs=0.02)


@each_sketch
@pytest.mark.parametrize("d", [1, 12, 20])
def test_a_key_whose_channels_are_no_eights_has_zeros_behind_it(d: int, sketch: SignSketch) -> None:
    query, keys, more = torch.randn(d), torch.randn(9, 16, d), (0, -d % 8)
    assert sketch.fields(16, d) == sketch.fields(16, d + more[1])
    scores, expected = page_scores(query, keys, sketch), page_scores(F.pad(query, more), F.pad(keys, more), sketch)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@each_sketch
@pytest.mark.parametrize("page_size", [1, 3])
def test_one_page_of_few_tokens_scores_as_among_others(page_size: int, sketch: SignSketch) -> None:
    """Its record is of no whole words."""
    query, keys = torch.randn(16), torch.randn(2, page_size, 16)
    assert page_scores(query, keys[:1], sketch)[0] == pytest.approx(page_scores(query, keys, sketch)[0].item())


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


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bits_are_found_again_where_they_were_put(bits: int, head_dim: int, device: str) -> None:
    numbers = torch.randint(1 << bits, (3, 2, 16, head_dim), dtype=torch.uint8)
    packed, query = sign_sketch._packed(numbers, bits), torch.randint(-124, 125, (3, 2, 5, head_dim)).float()
    codes = 2.0 * numbers + 1 - 2**bits
    found = sign_sketch._products(query.to(device), packed[:, None].to(device), bits, 16)[
        :, :, :, 0
    ].cpu()  # [g, p, b, h]
    expected = torch.einsum("bhgd,bhpd->gpbh", query, codes)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    if packed[0].numel() * 8 == numbers[0].numel() * bits:  # else bits are left over
        assert torch.equal(sign_sketch._unpacked(packed, bits, 16), numbers)
