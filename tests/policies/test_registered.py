"""What every registered policy must do: a new one is tested here by being registered."""

import ast
import dataclasses
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv import policies
from sparsekv.config import GROUP_POOLINGS, SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.policies import POLICIES, DecodeStep, Policy, Reads
from sparsekv.testing.pages import Pages, edge_lengths, random_pages
from sparsekv.testing.steps import blank_memory, decode_step

P = 8
each_policy = pytest.mark.parametrize("name", list(POLICIES))


def small(policy: str, budget: int | float = 6 * P, **settings: object) -> SparseConfig:
    return SparseConfig(**{"page_size": P, "sinks": 2, "recent": 9, "policy": policy, "budget": budget, **settings})


def step_of(pages: Pages, config: SparseConfig, hq: int = 4) -> DecodeStep:
    return decode_step(torch.randn(len(pages.lengths), hq, pages.kv_pool.shape[4]), pages, config)


@each_policy
@pytest.mark.parametrize("digest", list(DIGESTS))
@pytest.mark.parametrize("pooling", GROUP_POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_are_well_formed(name: str, digest: str, pooling: str, dtype: torch.dtype) -> None:
    """None if it reads all, or `[b, hkv, k]` int32: existing pages, ascending, -1 behind, forced ones among them."""
    pages = random_pages([0, *edge_lengths(P), 100], page_size=P, dtype=dtype)
    step = step_of(pages, small(name, digest=digest, group_pooling=pooling))
    slots = POLICIES.get(name)().select(step)
    assert (slots is None) == POLICIES.get(name).reads_all
    if slots is None:
        return
    assert (slots.dtype, tuple(slots.shape)) == (torch.int32, (len(pages.lengths), 2, step.k))
    for n, heads in zip(pages.lengths, slots.tolist(), strict=True):
        forced = {i // P for i in range(n) if i < 2 or i >= n - 9}
        for listed in heads:
            chosen = [slot for slot in listed if slot >= 0]
            assert listed == sorted(set(chosen)) + [-1] * (step.k - len(chosen))
            assert forced <= set(chosen) <= set(range(-(-n // P)))


@each_policy
def test_what_it_declares_to_read_is_what_it_reads(name: str) -> None:
    """A policy that reads neither digests nor keys must decide without them: they are NaN here."""
    policy = POLICIES.get(name)()
    pages = random_pages([100, 64], page_size=P)
    step = step_of(pages, small(name, digest="minmax"))
    expected = policy.select(step)
    spoiled = {
        "summary": [torch.full_like(x, float("nan")) for x in step.summary] if policy.reads is Reads.KEYS else []
    }
    if policy.reads is not Reads.KEYS:
        spoiled["kv_pool"] = torch.full_like(step.kv_pool, float("nan"))
    if policy.reads is Reads.DIGESTS:
        del spoiled["summary"]
    got = policy.select(dataclasses.replace(step, **spoiled))
    assert (got is None and expected is None) or torch.equal(got, expected)


@each_policy
@pytest.mark.parametrize("digest", list(DIGESTS))
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_a_budget_of_the_whole_context_is_dense(name: str, digest: str, lengths: list[int], seed: int) -> None:
    """Attention over the selection equals attention over everything."""
    pages = random_pages(lengths, 1, 8, P, spare=1, seed=seed)
    step = step_of(pages, small(name, budget=96, digest=digest), hq=2)
    slots = POLICIES.get(name)().select(step)
    arguments = (step.query, pages.kv_pool, pages.block_table, pages.seq_lens)
    chosen, dense = (torch.ops.sparsekv.attend_pages(*arguments, s, 0.25) for s in (slots, None))
    torch.testing.assert_close(chosen, dense, rtol=1e-5, atol=1e-5)


@each_policy
@pytest.mark.parametrize("budget", [6 * P, 0.5])
def test_what_a_row_reads_depends_on_that_row_alone(name: str, budget: int | float) -> None:
    """Not on the rows beside it, nor on how wide the table is, and with it the selection."""
    policy, pages = POLICIES.get(name)(), random_pages([100, 64, 30, 9], page_size=P)
    step = step_of(pages, small(name, budget=budget))
    together = pages_read(policy, step)
    for row, n in enumerate(pages.lengths):
        table = step.block_table[row : row + 1]
        for width in (-(-n // P), table.shape[1], 40):
            alone = dataclasses.replace(
                step,
                query=step.query[row : row + 1],
                seq_lens=step.seq_lens[row : row + 1],
                block_table=torch.nn.functional.pad(table, (0, width - table.shape[1])),
                k=min(step.config.budget_pages(width * P), width),
            )
            alone = dataclasses.replace(alone, memory=blank_memory(alone))
            assert pages_read(policy, alone) == together[row : row + 1]


def pages_read(policy: Policy, step: DecodeStep) -> list[list[list[int]]]:
    """By row and kv head."""
    slots = policy.select(step)
    if slots is None:
        return [[list(range(-(-n // P)))] * 2 for n in step.seq_lens.tolist()]
    return [[[slot for slot in head if slot >= 0] for head in row] for row in slots.tolist()]


@each_policy
def test_holds_nothing_itself(name: str) -> None:
    policy, pages = POLICIES.get(name)(), random_pages([100, 64], page_size=P)
    one, other = step_of(pages, small(name)), step_of(pages, small(name))
    first, _, again = policy.select(one), policy.select(other), policy.select(one)
    assert (first is None and again is None) or torch.equal(first, again)


def test_every_module_is_registered() -> None:
    """A file in sparsekv/policies that is not imported, or whose policy has no name, is a mistake."""
    others = {f"sparsekv.policies.{name}" for name in ("base", "declared", "prompt", "prompt_mass")}
    modules = {f"sparsekv.policies.{m.name}" for m in pkgutil.iter_modules(policies.__path__)} - others
    assert modules <= {POLICIES.get(name).__module__ for name in POLICIES}
    imported = {
        alias.name
        for node in ast.walk(ast.parse(Path(policies.__path__[0], "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {module.rsplit(".", 1)[1] for module in modules} <= imported
    assert all(POLICIES.get(name).__doc__ for name in POLICIES)


def test_the_step_explains_every_attribute() -> None:
    """DecodeStep is what others write policies against: each of its fields is in the documentation."""
    documented = inspect.getdoc(DecodeStep) or ""
    assert all(f"{field.name}" in documented for field in dataclasses.fields(DecodeStep))
    with pytest.raises(dataclasses.FrozenInstanceError):
        step_of(random_pages([9], page_size=P), small("all")).k = 3
