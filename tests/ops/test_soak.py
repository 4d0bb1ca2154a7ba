"""The soak can fail: on the CPU it compares the reference with itself, and with versions that are wrong."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsekv import ops
from sparsekv.errors import SparseKVError
from sparsekv.ops.formats import formats_with_kernels
from sparsekv.testing import soak
from sparsekv.testing.cases import Case
from sparsekv.testing.soak import Tally, check

CPU = torch.device("cpu")
PLAIN = ops.for_backend("reference")
CASE = replace(
    Case.draw(random.Random(0)),
    head_dim=64, group=4, num_kv_heads=2, page_size=16, lengths=[1, 100, 257], k=4, pooling="max", digest="minmax",
    with_limits=False,
)  # fmt: skip


class Ops:
    """The reference, but for one op."""

    def __init__(self, name: str, wrong: Any) -> None:
        setattr(self, name, wrong)

    def __getattr__(self, name: str) -> Any:
        return getattr(PLAIN, name)


@pytest.mark.parametrize("kv", formats_with_kernels())
def test_the_reference_passes(kv: str) -> None:
    tally = Tally()
    check(replace(CASE, format=kv), CPU, tally)
    assert (tally.shapes, tally.formats) == (1, {kv: 1})
    assert set(tally.worst.values()) == {0.0}


def test_cases_are_the_same_for_a_seed() -> None:
    assert [Case.draw(random.Random(7)) for _ in range(3)] == [Case.draw(random.Random(7)) for _ in range(3)]


def scaled(name: str, factor: float) -> Any:
    def wrong(*args: Any) -> Any:
        result = getattr(PLAIN, name)(*args)
        return result * factor if isinstance(result, torch.Tensor) else (result[0] * factor, *result[1:])

    return wrong


def shifted_slots(*args: Any) -> torch.Tensor:
    return (PLAIN.select_pages(*args) - 1).clamp_min(-1)


def forgetful_append(*args: Any) -> None:
    PLAIN.append_kv(*args)
    args[5][0] = 0.0  # a page of the pool


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("append_kv", forgetful_append),
        ("score_pages", scaled("score_pages", 1.001)),
        ("select_pages", shifted_slots),
        ("attend_pages", scaled("attend_pages", 1.1)),
        ("sparse_decode", scaled("sparse_decode", 1.1)),
    ],
)
def test_a_wrong_op_is_found(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "OPS", Ops(name, wrong))
    with pytest.raises(SparseKVError, match=name):
        check(CASE, CPU, Tally())
