"""PagedCache holds what transformers' DynamicCache holds, after every operation of the cache protocol."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from sparsekv.cache import PagedCache
from sparsekv.errors import CacheStateError, ConfigError
from sparsekv.testing.cache_pair import CachePair, tiny_config

SMALL = {"page_size": 4, "sinks": 1, "recent": 4, "budget": 16, "dense_layers": 0}


def left_padded(*lengths: int) -> Tensor:
    """`[b, n]` bool."""
    return torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]


def prefilled(t: int = 11, batch: int = 3, valid: Tensor | None = None, **options: object) -> CachePair:
    pair = CachePair(**{**SMALL, **options})
    pair.forward(t if valid is None else valid.shape[1], batch if valid is None else len(valid), valid)
    return pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
def test_prefill_chunks_and_decode(dtype: torch.dtype, digest: str) -> None:
    pair = prefilled(dtype=dtype, digest=digest, num_layers=3)
    pair.check()
    for t in (1, 1, 5, 1, 4, 2, 1):
        pair.forward(t)
        pair.check()


@pytest.mark.parametrize("chunks", [[1], [1, 1, 1, 1, 1], [3, 1, 8], [16, 16], [5, 4, 1, 2, 1]])
def test_ragged_left_padded_batches(chunks: list[int]) -> None:
    """Padding of more than a page, of part of one, none, and a row that begins in the second pass."""
    pair = prefilled(valid=left_padded(12, 11, 3, 7))
    pair.check()
    for t in chunks:
        pair.forward(t)
        pair.check()


def test_a_chunk_may_be_padded_too() -> None:
    """Multi-turn batches: padding in front, in the middle, and rows without a valid token."""
    pair = prefilled(valid=left_padded(6, 2, 5))
    turn = torch.tensor([[False, False, True, True], [True] * 4, [False] * 4])
    for valid in (turn, None, turn.flip(0)):
        pair.forward(4, valid=valid)
        pair.check()
        pair.forward(1)
        pair.check()


def test_a_row_of_nothing_but_padding() -> None:
    """It begins with a chunk, a whole pass or a single token later, or never."""
    valid = torch.tensor([[False] * 5, [True] * 5])
    for first in (1, 3, 9):
        pair = prefilled(valid=valid)
        pair.check()
        pair.forward(3, valid=valid[:, :3])
        pair.check()
        pair.forward(first)
        pair.check()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 8, 10, 11, 50])
@pytest.mark.parametrize("padded", [False, True])
def test_crop(count: int, padded: bool) -> None:
    pair = prefilled(valid=left_padded(11, 6, 2) if padded else None)
    pair.crop(count)
    if count < 11:
        pair.check()
        pair.forward(3)
    else:
        assert pair.paged.get_seq_length() == 0
        assert pair.paged._store.table.pool.num_free == pair.paged._store.table.pool.num_pages


def test_crop_takes_a_tensor_and_no_positive_number() -> None:
    pair = prefilled()
    pair.paged.crop(torch.tensor(-2))
    assert pair.paged.get_seq_length() == 9
    with pytest.raises(ConfigError, match=r"crop\(3\): give the number of tokens to remove as a negative number"):
        pair.paged.crop(3)
    assert pair.paged.get_seq_length() == 9


def test_an_emptied_cache_starts_anew() -> None:
    pair = prefilled()
    pair.crop(11)
    fresh = CachePair(**SMALL)
    fresh.paged = pair.paged
    fresh.forward(7, batch=3)
    fresh.check()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0, 0, 2]])
def test_reorder(rows: list[int], padded: bool) -> None:
    pair = prefilled(valid=left_padded(11, 6, 2) if padded else None)
    for _ in range(3):
        pair.reorder(torch.tensor(rows))
        pair.check()
        pair.forward(1)
        pair.check()


@pytest.mark.parametrize(
    "rows", [[0], [2, 1], [-1], [-3, 2], [1, 1, 0, 2], torch.tensor([0, 2]), torch.tensor([True, False, True])]
)
@pytest.mark.parametrize("padded", [False, True])
def test_select(rows: list[int] | Tensor, padded: bool) -> None:
    pair = prefilled(valid=left_padded(11, 6, 2) if padded else None)
    pair.select(rows)
    pair.check()
    pair.forward(6)
    pair.check()


@pytest.mark.parametrize("rows", [[3], [-4], torch.tensor([0, 5]), torch.tensor([True, False])])
def test_rows_that_do_not_exist_are_refused(rows: list[int] | Tensor) -> None:
    """As by indexing a tensor; nothing wraps around."""
    pair = prefilled()
    with pytest.raises(IndexError):
        pair.paged.batch_select_indices(rows)
    pair.check()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_repeat(times: int) -> None:
    pair = prefilled(valid=left_padded(11, 6, 2))
    used = pair.paged._store.table.pool.num_pages
    pair.repeat(times)
    assert pair.paged._store.table.pool.num_pages == used  # shared, not copied
    pair.check()
    pair.forward(1)
    pair.check()
    pair.crop(2)
    pair.check()


def test_operations_on_an_empty_cache() -> None:
    pair = CachePair(**SMALL)
    pair.paged.crop(-3)
    pair.paged.reorder_cache(torch.tensor([0, 0]))
    pair.paged.batch_repeat_interleave(2)
    pair.paged.batch_select_indices(torch.tensor([0]))
    pair.forward(5, batch=2)
    pair.check()


def test_reset() -> None:
    pair = prefilled(reserve_tokens=200)
    capacity = pair.paged._store.layers[0].capacity
    pair.paged.reset()
    assert pair.paged.get_seq_length() == 0
    assert pair.paged.nbytes == 0
    fresh = CachePair(**SMALL)
    fresh.paged = pair.paged
    fresh.forward(7, batch=2, valid=left_padded(7, 3))
    fresh.forward(1)
    fresh.check()
    assert pair.paged._store.layers[0].capacity == capacity  # reserved again


def test_deepcopy() -> None:
    pair = prefilled(valid=left_padded(11, 6, 2))
    twin = copy.deepcopy(pair)
    twin.forward(5)
    pair.forward(1)
    pair.crop(3)
    for each in (pair, twin):
        each.check()
    assert twin.paged.stats is pair.paged.stats


def test_deepcopy_of_one_of_two_forks() -> None:
    pair = prefilled()
    fork = pair.fork()
    twin = copy.deepcopy(pair)
    twin.check()
    for each in (pair, fork, twin):
        each.forward(3)
    twin.check()
    pair.check(fork)


@pytest.mark.parametrize("padded", [False, True])
def test_to_dynamic(padded: bool) -> None:
    """A plain cache with the same content, which goes on by itself."""
    pair = prefilled(valid=left_padded(11, 6, 2) if padded else None)
    plain = pair.paged.to_dynamic()
    assert type(plain) is type(pair.plain)
    for i, layer in enumerate(plain.layers):
        for copied, expected in zip((layer.keys, layer.values), pair.held(i), strict=True):
            assert torch.equal(copied, expected)
    plain.update(*torch.randn(2, 3, 2, 1, 8), 0)
    pair.check()
    assert CachePair(**SMALL).paged.to_dynamic().get_seq_length() == 0


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_in_it_can_be_read(padded: bool) -> None:
    """By iteration too, as code that shares a prefix does; tokens that no attention has asked for yet included."""
    pair = prefilled(valid=left_padded(11, 6, 2) if padded else None)
    first, second = pair.paged.layers[0].keys, pair.paged.layers[0].keys
    assert first.data_ptr() != second.data_ptr()  # copies
    key, value = torch.randn(2, 3, 2, 1, 8)
    pair.paged.update(key, value, 0)
    plain = DynamicCache([(keys, values) for keys, values, *_ in pair.paged])
    for i, layer in enumerate(plain.layers):
        for copied, expected, new in zip((layer.keys, layer.values), pair.held(i), (key, value), strict=True):
            assert torch.equal(copied, torch.cat([expected, new], dim=2) if i == 0 else expected)


def test_an_empty_cache_holds_nothing() -> None:
    pair = CachePair(**SMALL)
    assert [(keys, values) for keys, values, *_ in pair.paged] == [(None, None)] * 2
    pair.forward(5)
    pair.paged.crop(-5)
    assert pair.paged.layers[1].keys.shape == (1, 2, 0, 8)
    pair.paged.reset()
    assert pair.paged.layers[1].keys is None


EDITS = {
    "keys": lambda layer: setattr(layer, "keys", torch.zeros(3, 2, 5, 8)),
    "values": lambda layer: setattr(layer, "values", None),
    "offload": lambda layer: layer.offload(),
    "crop": lambda layer: layer.crop(-1),
    "reorder_cache": lambda layer: layer.reorder_cache(torch.tensor([0, 0, 0])),
    "batch_select_indices": lambda layer: layer.batch_select_indices([0]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_layer_in_pages_is_not_edited_by_itself(edit: str) -> None:
    pair = prefilled()
    with pytest.raises(CacheStateError, match=r"Layer 1 of this cache keeps its tokens in pages: .*to_dynamic\(\)"):
        EDITS[edit](pair.paged.layers[1])
    pair.check()


def test_nothing_is_lost_by_an_edit_before_the_first_token() -> None:
    """It is an error there, too: the layer would not look at it. transformers' early initialization is none."""
    cache = PagedCache(tiny_config(), **SMALL)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(CacheStateError, match="Layer 0 of this cache keeps its tokens in pages"):
        cache.layers[0].keys = torch.zeros(1, 2, 5, 8)


def test_layers_report_their_lengths() -> None:
    pair = prefilled(num_layers=3)
    assert [pair.paged.get_seq_length(i) for i in range(3)] == [11] * 3
    assert pair.paged.layers[1].get_mask_sizes(2) == (13, 0)
    assert pair.paged.layers[1].get_max_length() == -1
    pair.paged.layers[0].update(*torch.randn(2, 3, 2, 1, 8))
    assert pair.paged.get_seq_length() == 12  # what is pending counts


def test_repr_says_what_it_holds() -> None:
    text = repr(prefilled(num_layers=3).paged)
    assert "3 sequences, 11 tokens, 3 of 3 layers in pages" in text
    assert "0 sequences, 0 tokens, 0 of 2 layers" in repr(PagedCache(tiny_config()))


OPERATIONS = st.one_of(
    st.tuples(st.just("forward"), st.integers(1, 7)),
    st.tuples(st.just("crop"), st.integers(1, 6)),
    st.tuples(st.just("reorder"), st.permutations([0, 1, 2]).map(torch.tensor)),
    st.tuples(st.just("select"), st.lists(st.integers(-3, 2), min_size=3, max_size=3)),
    st.tuples(st.just("fork"), st.none()),
)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3), operations=st.lists(OPERATIONS, max_size=8))
def test_any_operations(lengths: list[int], operations: list[tuple[str, object]]) -> None:
    """Any mix of passes, crops, selections and forks, with the forks alive and checked to the end."""
    width = max(max(lengths), 1)
    pair = prefilled(valid=torch.arange(width) >= width - torch.tensor(lengths)[:, None])
    forks = []
    for name, argument in operations:
        if name == "fork":
            forks.append(pair.fork())
        elif pair.mask.shape[1] > (argument if name == "crop" else 0):
            getattr(pair, name)(argument)
    pair.check(*forks)
