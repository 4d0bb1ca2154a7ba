"""What the user has made torch's default dtype or device is not ours: every tensor that we make names its own."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sparsekv
from sparsekv.digests import DIGESTS
from sparsekv.policies import POLICIES
from sparsekv.testing.cache_pair import CachePair

PACKAGE = Path(sparsekv.__file__).parent
FACTORIES = {"arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace"}
FACTORIES |= {"normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}


def unnamed(source: str) -> Iterator[str]:
    """Calls that make a tensor by a default: `line: what is missing`."""
    for call in ast.walk(ast.parse(source)):
        module, _, name = ast.unparse(call.func).rpartition(".") if isinstance(call, ast.Call) else ("", "", "")
        if module == "torch" and name in FACTORIES:
            missing = _needed(name, call) - {keyword.arg for keyword in call.keywords}
            if missing:
                yield f"line {call.lineno}: torch.{name} without {' and '.join(sorted(missing))}"


def _needed(name: str, call: ast.Call) -> set[str]:
    """A range of whole numbers is int64 whatever the default."""
    constants = [x.value for arg in call.args for x in ast.walk(arg) if isinstance(x, ast.Constant)]
    is_whole = name == "arange" and float not in map(type, constants)
    return {"device"} if is_whole else {"device", "dtype"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_tensors_are_made_with_dtype_and_device(path: Path) -> None:
    assert list(unnamed(path.read_text(encoding="utf-8"))) == []


def test_the_rule_sees_what_it_must() -> None:
    for wrong in ("torch.zeros(3)", "torch.eye(3, device=x)", "torch.arange(4)", "torch.arange(0, 1.5, device=x)"):
        assert list(unnamed(wrong))
    for right in ("torch.eye(3, dtype=y, device=x)", "torch.arange(n, device=x)", "x.new_zeros(3)", "np.zeros(3)"):
        assert not list(unnamed(right))


@pytest.fixture
def other_defaults() -> Iterator[None]:
    """Such that a tensor made by default is of no use."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("digest", list(DIGESTS))
@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_cache_under_other_defaults(digest: str, policy: str, other_defaults: None) -> None:
    """What it holds, and what it attends to at full budget, is what a plain cache gives."""
    settings = {"page_size": 4, "sinks": 1, "recent": 4, "dense_layers": 1}
    pair = CachePair(digest=digest, policy=policy, budget=16, **settings)
    columns = torch.arange(40, device="cpu")
    pair.forward(40, 3, columns >= torch.tensor([[0], [17], [37]], dtype=torch.int64, device="cpu"))
    pair.repeat(2)
    pair.select([4, 0, 5])
    pair.reorder(torch.tensor([2, 0, 1], dtype=torch.int64, device="cpu"))
    pair.crop(3)
    fork, twin = pair.fork(budget=1.0), copy.deepcopy(pair)
    for each in (pair, fork, twin):
        each.forward(5)
        attended = each.forward(1)
        torch.testing.assert_close(attended[0], each.attention(0).float())  # a layer that reads everything
        assert each.paged.to_dynamic().get_seq_length() == 43
    pair.check(fork)
    twin.check()
