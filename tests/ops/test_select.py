"""select_pages: an exact, deterministic top-k with forced pages, against a sort of Python tuples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsekv.ops import reference
from sparsekv.testing import naive

SELECT = torch.ops.sparsekv.select_pages
INF, NAN = float("inf"), float("nan")

# Few different values, so that ties are the rule; the odd ones are where a comparison of bits or floats goes wrong.
ODD = st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0000001])
SCORE = ODD | st.floats(width=32)


@st.composite
def selections(draw: st.DrawFn) -> dict[str, object]:
    """Arguments of the op: any scores, ragged lengths, forced pages, limits, more or fewer slots than pages."""
    b, hkv, num_slots = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 12))
    page_size = draw(st.sampled_from([1, 3, 16]))
    size = b * hkv * num_slots
    values = draw(st.lists(SCORE, min_size=size, max_size=size))
    lengths = draw(st.lists(st.integers(0, num_slots * page_size), min_size=b, max_size=b))
    limits = draw(st.none() | st.lists(st.integers(0, 15), min_size=b, max_size=b))
    return {
        "scores": torch.tensor(values, dtype=torch.float32).view(b, hkv, num_slots),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "page_size": page_size,
        "k": draw(st.integers(1, 15)),
        "sink_tokens": draw(st.integers(0, 2 * page_size)),
        "recent_tokens": draw(st.integers(0, 3 * page_size)),
        "limits": None if limits is None else torch.tensor(limits, dtype=torch.int32),
        "min_score": draw(st.none() | st.sampled_from([-1.0, 0.0, 1.0, -INF, INF])),
        "whole_tokens": draw(st.integers(0, num_slots * page_size)),
    }


@given(selections())
def test_equals_a_sort(arguments: dict[str, object]) -> None:
    slots = SELECT(**arguments)
    assert slots.dtype == torch.int32
    assert torch.equal(slots, naive.select_pages(**arguments))


@given(selections())
def test_shape_of_the_answer(arguments: dict[str, object]) -> None:
    """Ascending, without repeats, existing pages only, then -1; as many as k, the limit and the pages allow, or fewer
    where some score too little."""
    scores, lens, k, limits = (arguments[name] for name in ("scores", "seq_lens", "k", "limits"))
    assert isinstance(scores, Tensor)
    slots = SELECT(**arguments)
    assert slots.shape == (*scores.shape[:2], k)
    for row, heads in enumerate(slots.tolist()):
        pages = -(-int(lens[row]) // arguments["page_size"])
        most = min(k, pages, pages if limits is None else int(limits[row]))
        for listed in heads:
            if arguments["min_score"] is not None:
                most = min(most, sum(slot >= 0 for slot in listed))
            assert listed[most:] == [-1] * (k - most)
            assert listed[:most] == sorted(set(listed[:most]))
            assert all(0 <= slot < pages for slot in listed[:most])


def select(scores: list[float], length: int, k: int, sinks: int = 0, recent: int = 1) -> list[int]:
    """One sequence, one head, pages of four tokens."""
    lens = torch.tensor([length], dtype=torch.int32)
    return SELECT(torch.tensor(scores)[None, None], lens, 4, k, sinks, recent)[0, 0].tolist()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5.0, 5.0, 5.0, 5.0, 0.0], [0, 1, 4]),
        ([0.0, -0.0, 0.0, 1.0, 0.0], [0, 3, 4]),
        ([-0.0, 0.0, -1.0, -1.0, 0.0], [0, 1, 4]),
        ([NAN, -1e38, NAN, -INF, 0.0], [0, 1, 4]),
        ([INF, 3e38, INF, 1.0, 0.0], [0, 2, 4]),
        ([-0.0, 0.0, -0.0, 0.0, -1.0], [0, 1, 4]),
        ([-1e-45, 0.0, 1e-45, -1.0, 0.0], [1, 2, 4]),
    ],
)
def test_ties_and_odd_scores(scores: list[float], expected: list[int]) -> None:
    """Equal scores, zeros of either sign among them, go to the earlier page; NaN is as good as -inf."""
    assert select(scores, 20, 3) == expected


@pytest.mark.parametrize(
    ("length", "sinks", "recent", "forced"),
    [
        (17, 0, 0, [4]),  # the current page holds one token
        (20, 0, 0, [4]),  # ... or is full
        (20, 0, 4, [4]),
        (20, 0, 5, [3, 4]),
        (17, 0, 5, [3, 4]),
        (17, 0, 6, [2, 3, 4]),  # the window of six starts at position 11
        (20, 1, 0, [0, 4]),
        (20, 5, 0, [0, 1, 4]),
        (20, 4, 99, [0, 1, 2, 3, 4]),
        (3, 8, 0, [0]),
        (0, 4, 4, []),
    ],
)
def test_forced_pages_come_first(length: int, sinks: int, recent: int, forced: list[int]) -> None:
    worst_where_forced = [-INF if slot in forced else 100.0 for slot in range(5)]
    slots = select(worst_where_forced, length, max(len(forced), 1), sinks, recent)
    assert [slot for slot in slots if slot >= 0] == forced


def test_limits_cut_each_row_at_its_own_number() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0]).expand(3, 1, 4).contiguous()
    lens, limits = torch.tensor([16, 16, 16], dtype=torch.int32), torch.tensor([1, 2, 9], dtype=torch.int32)
    slots = SELECT(scores, lens, 4, 3, 0, 1, limits)
    assert slots[:, 0].tolist() == [[3, -1, -1], [0, 3, -1], [0, 2, 3]]


def test_strided_scores() -> None:
    """The op may not take the memory layout for granted."""
    scores = torch.randn(9, 2, 3).permute(2, 1, 0)
    lens = torch.tensor([36, 20, 1], dtype=torch.int32)
    assert torch.equal(SELECT(scores, lens, 4, 5, 4, 4), naive.select_pages(scores, lens, 4, 5, 4, 4))


def test_slots_as_a_mask() -> None:
    slots = torch.tensor([[[0, 2, -1]], [[-1, -1, -1]]], dtype=torch.int32)
    assert reference.listed(slots, 4).tolist() == [[[True, False, True, False]], [[False] * 4]]
