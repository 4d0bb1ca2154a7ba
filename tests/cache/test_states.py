"""What a paged cache refuses, in words that help and without a trace, and when its layers fall back to dense."""

import warnings

import pytest
import torch
from torch import Tensor

from sparsekv.cache import PagedCache, tagged_layer
from sparsekv.cache.handshake import Mode
from sparsekv.errors import CacheFullError, CacheStateError, UnknownNameError
from sparsekv.testing.cache_pair import CachePair, tiny_config

SMALL = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0}


def kv(b: int = 1, t: int = 1, hkv: int = 2, d: int = 8) -> tuple[Tensor, Tensor]:
    key, value = torch.randn(2, b, hkv, t, d)
    return key, value


def prefilled(t: int = 11, batch: int = 3, valid: Tensor | None = None, **options: object) -> CachePair:
    pair = CachePair(**{**SMALL, **options})
    pair.forward(t, batch, valid)
    return pair


# -- refusals


@pytest.mark.parametrize("setting", [{"digest": "minmaxx"}, {"policy": "topk"}])
def test_unknown_names_are_refused_when_the_cache_is_made(setting: dict[str, str]) -> None:
    with pytest.raises(UnknownNameError, match=r"is not known\. Did you mean"):
        PagedCache(tiny_config(), **setting)


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_another_batch_size(t: int, batch: int, padded: bool) -> None:
    """Before anything is written, and before shapes clash somewhere inside."""
    valid = torch.arange(11) >= torch.tensor([[0], [2], [9]]) if padded else None
    pair = prefilled(valid=valid)
    with pytest.raises(
        CacheStateError, match=f"holds 3 sequences, the input has {batch}. Use a new cache, or batch_sel"
    ):
        pair.paged.layers[0].update(*kv(batch, t))
    pair.check()
    pair.forward(t)
    pair.check()


def test_a_cache_without_rows_takes_none() -> None:
    pair = prefilled()
    pair.paged.batch_select_indices(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(CacheStateError, match="holds 0 sequences, the input has 3"):
        pair.paged.layers[0].update(*kv(3))


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("edited", [(0, 0), (1, 5), (1, 1), (2, 9)])
def test_an_edited_mask(t: int, edited: tuple[int, int]) -> None:
    """Pages hold what was visible; a mask that changes its mind about it cannot be served, and leaves no trace."""
    valid = torch.arange(11) >= torch.tensor([[0], [2], [9]])
    pair = prefilled(valid=valid)
    mask = torch.cat([pair.mask, torch.ones(3, t, dtype=torch.bool)], dim=1)
    mask[edited] = ~mask[edited]
    layer = pair.paged.layers[0]
    layer.update(*kv(3, t))
    with pytest.raises(CacheStateError, match="attention mask of tokens that are in the cache already has changed"):
        layer.commit(mask)
    pair.check()
    pair.forward(t)  # goes on as if it had not been asked
    pair.check()


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("mask", [None, torch.ones(1, 11, dtype=torch.bool)])
def test_a_mask_that_is_left_out_later(t: int, mask: Tensor | None) -> None:
    """Nothing is hidden then, and pages do not hold what was. After the rows with padding are gone it may be."""
    pair = prefilled(valid=torch.arange(11) >= torch.tensor([[0], [2], [9]]))
    layer = pair.paged.layers[0]
    layer.update(*kv(3, t))
    for refuses in (layer.commit, lambda mask: pair.paged.check_room(3, t, mask)):
        with pytest.raises(CacheStateError, match="has changed"):
            refuses(mask)
    pair.check()
    pair.select([0])
    pair.forward(t)
    pair.check()


def test_padding_that_appears_in_an_unpadded_cache() -> None:
    pair = prefilled()
    layer = pair.paged.layers[0]
    layer.update(*kv(3))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 0] = False
    with pytest.raises(CacheStateError, match="has changed"):
        layer.commit(mask)
    pair.check()


@pytest.mark.parametrize("t", [1, 2, 5])
def test_a_full_cache(t: int) -> None:
    """The limit refuses the step, not the cache: what is there stays, and cropping makes room."""
    pair = prefilled(t=12, max_tokens=36)
    with pytest.raises(CacheFullError, match="needs 3 more pages"):
        pair.paged.check_room(3, 1)
    layer = pair.paged.layers[0]
    layer.update(*kv(3, t))
    with pytest.raises(CacheFullError):
        layer.commit(None)
    pair.check()
    pair.crop(6)
    pair.forward(t)
    pair.check()


def test_a_first_prompt_that_does_not_fit() -> None:
    pair = CachePair(max_tokens=36, **SMALL)
    with pytest.raises(CacheFullError, match="needs 15 more pages of 4 tokens, and max_tokens leaves 9 of 9"):
        pair.forward(20, batch=3)
    assert pair.paged.get_seq_length() == 0
    pair.paged.check_room(3, 12)
    pair.forward(12, batch=3)
    pair.check()


def test_a_crop_without_room_changes_no_layer() -> None:
    """It has to copy a page that a fork shares; layers that are not in pages wait for that to succeed."""
    pair = CachePair(max_tokens=8, on_fallback=lambda layer, why: None, **SMALL)
    pair.forward(6, up_to=1)
    pair.paged.update(*kv(1, 6), 1)
    pair.paged.layers[1].refuse("a test")
    fork = pair.paged.fork()
    with pytest.raises(CacheFullError):
        pair.paged.crop(-1)
    assert [pair.paged.get_seq_length(i) for i in range(2)] == [6, 6]
    del fork
    pair.paged.crop(-1)
    assert [pair.paged.get_seq_length(i) for i in range(2)] == [5, 5]


def interrupted(t: int = 4) -> CachePair:
    """Layer 0 has taken a pass that layer 1 has not."""
    pair = prefilled(t=10)
    pair.forward(t, up_to=1)
    return pair


@pytest.mark.parametrize("t", [1, 4])
def test_an_interrupted_pass_is_noticed(t: int) -> None:
    pair = interrupted()
    with pytest.raises(
        CacheStateError, match=r"Layer 1 holds 10 tokens where the cache holds \d+: an earlier forward"
    ):
        pair.forward(t)


def test_an_interrupted_pass_can_be_cropped_away() -> None:
    pair = interrupted(t=4)
    pair.paged.crop(-4)
    pair.plain.layers[0].crop(-4)
    pair.mask = pair.mask[:, :-4]
    pair.check()
    pair.forward(3)
    pair.check()


def test_a_crop_that_is_too_short_does_not_hide_the_interruption() -> None:
    pair = interrupted(t=4)
    pair.paged.crop(-3)
    with pytest.raises(CacheStateError, match="Layer 1 holds 10 tokens"):
        pair.forward(1)


# -- falling back


def test_layers_whose_attention_never_comes_run_dense() -> None:
    """Without the handshake at the first pass a layer is a plain dynamic one; a warning names it and the reason."""
    cache = PagedCache(tiny_config(), **SMALL)
    first, second = kv(2, 5), kv(2, 1)
    cache.update(*first, 0)
    with pytest.warns(UserWarning, match=r"Layer 0 of this PagedCache runs dense: .*sparsekv.patch\(model\) first"):
        keys, values = cache.update(*second, 0)
    assert torch.equal(keys, torch.cat([first[0], second[0]], dim=2))
    assert torch.equal(values, torch.cat([first[1], second[1]], dim=2))
    assert tagged_layer(keys, values) is None
    assert cache.layers[0].mode is Mode.DENSE
    assert cache.get_seq_length() == 6


def test_values_wider_than_keys_run_dense() -> None:
    told: list[tuple[int, str]] = []
    cache = PagedCache(tiny_config(), on_fallback=lambda layer, why: told.append((layer, why)), **SMALL)
    key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 12)
    keys, values = cache.update(key, value, 1)
    layer = tagged_layer(keys, values)
    assert layer is cache.layers[1]
    layer.commit(None)
    assert told == [(1, "keys (1, 2, 5, 8) and values (1, 2, 5, 12) differ in shape")]
    assert not layer.is_paged
    keys, values = cache.update(key[:, :, :1], value[:, :, :1], 1)
    assert (keys.shape[2], values.shape[2], cache.get_seq_length(1)) == (6, 6, 6)


def test_fallen_back_layers_follow_the_operations() -> None:
    """One layer paged, one dense: both are cropped, reordered, repeated and reset."""
    pair = CachePair(on_fallback=lambda layer, why: None, **SMALL)
    first = kv(3, 9)
    pair.forward(9, batch=3, up_to=1)
    pair.paged.update(*first, 1)
    pair.paged.layers[1].refuse("a test")
    pair.paged.crop(-2)
    pair.paged.batch_select_indices([2, 0])
    pair.paged.batch_repeat_interleave(2)
    pair.paged.reorder_cache(torch.tensor([3, 1, 0, 2]))
    rows = [0, 2, 2, 0]
    assert torch.equal(pair.paged.layers[1].keys, first[0][rows, :, :7])
    assert torch.equal(pair.paged._store.dense(0)[0], pair.plain.layers[0].keys[rows, :, :7])
    pair.paged.reset()
    assert [layer.mode for layer in pair.paged.paged_layers] == [Mode.NEW, Mode.NEW]


def test_a_paged_layer_cannot_be_refused() -> None:
    pair = prefilled()
    layer = pair.paged.layers[1]
    with pytest.raises(CacheStateError, match=r"Layer 1 cannot go on sparsely: a test\. Start from a new cache"):
        layer.refuse("a test")
    layer.update(torch.randn(3, 2, 1, 8), torch.randn(3, 2, 1, 4))
    with pytest.raises(CacheStateError, match="differ in shape"):
        layer.commit(None)
    pair.check()


def test_tokens_whose_attention_is_skipped_later_are_kept() -> None:
    """Once paged, a pass that nobody attended to is stored when the cache is next operated on as a whole."""
    pair = prefilled(t=10)
    pair.forward(1, up_to=1)
    token = kv(3)
    pair.paged.update(*token, 1)
    pair.plain.update(*token, 1)
    pair.crop(0)
    pair.check()


def test_attention_that_passes_the_pages_by_is_an_error() -> None:
    """As in a model that is not patched any more: it would see the new tokens alone."""
    pair = prefilled(t=10)
    pair.paged.update(*kv(3), 0)
    with pytest.raises(CacheStateError, match=r"Layer 0 of this cache lives in pages, .*to_dynamic"):
        pair.paged.update(*kv(3), 1)
    pair.paged.crop(-1)
    assert pair.paged.get_seq_length() == 10


@pytest.mark.parametrize("t", [1, 4])
def test_another_attention_is_noticed_before_it_runs(t: int) -> None:
    """Also in a model of one layer, where no second layer comes to notice that the first was passed by."""
    pair = prefilled(t=10, num_layers=1)
    pair.paged.model_config._attn_implementation = "eager"
    for _ in range(2):
        with pytest.raises(CacheStateError, match=r"Layer 0 of this cache lives in pages, .*to_dynamic"):
            pair.paged.update(*kv(3, t), 0)
    assert pair.paged.get_seq_length() == pair.paged.to_dynamic().get_seq_length() == 10


def test_a_model_may_be_patched_after_its_cache_was_made() -> None:
    pair = CachePair(**SMALL)
    pair.paged.model_config._attn_implementation = "eager"
    pair.forward(10, 3)
    pair.forward(1)
    pair.check()


def test_tags_need_both_tensors() -> None:
    cache = PagedCache(tiny_config(), **SMALL)
    keys, values = cache.update(*kv(), 0)
    assert tagged_layer(keys, values) is cache.layers[0]
    assert tagged_layer(keys * 2, values) is None
    assert tagged_layer(keys, values.clone()) is None
    other, _ = cache.update(*kv(), 1)
    assert tagged_layer(other, values) is None


# -- autograd


def test_a_cache_made_in_inference_mode_can_be_used_outside() -> None:
    with torch.inference_mode():
        pair = prefilled(batch=2, digest="sign_sketch", valid=torch.arange(11) >= torch.tensor([[0], [6]]))
    pair.forward(3)
    pair.forward(1)
    pair.crop(2)
    pair.check()
    fork = pair.fork()
    fork.forward(9)
    with torch.inference_mode():
        pair.forward(30)
        pair.forward(1)
    pair.forward(1)
    pair.check(fork)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensors_that_require_gradients_are_stored_without(backend: str) -> None:
    """A plain forward outside of no_grad: the cache carries no graph, and nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = PagedCache(tiny_config(num_layers=1), backend=backend, **SMALL)
        for t in (30, 4, 1):
            key, value = (x.requires_grad_() * 1 for x in kv(1, t))
            keys, values = cache.update(key, value, 0)
            layer = tagged_layer(keys, values)
            assert layer is not None
            layer.commit(None)
        layer.decode(torch.randn(1, 4, 1, 8, requires_grad=True) * 1, 0.3, 0.0, None)
    assert not cache._store.layers[0].kv.requires_grad
    assert cache._store.layers[0].kv.grad_fn is None
