"""Attention mass and the oracle's overlap, against plain softmax over all keys."""

from typing import Any

import pytest
import torch

import sparsekv
from sparsekv import PagedCache
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.probes import Probe


@pytest.fixture(scope="module")
def model() -> Any:
    return testbed.load()[0]


def looked(model: Any, steps: list[Any] | None = None, **settings: Any) -> Probe:
    ids = torch.randint(3, 2000, (2, 300), generator=torch.Generator().manual_seed(0))
    with (
        sparsekv.patch(model, **{"budget": 128, "recent": 16, "dense_layers": 2} | settings) as patch,
        torch.inference_mode(),
    ):
        cache = patch.new_cache()
        model(input_ids=ids, past_key_values=cache)
        probe = Probe(cache, 1)
        probe.before_step(1)
        if steps is not None:
            cache.observers.append(lambda step, slots: steps.append((step, slots)))
        model(input_ids=ids[:, :1], past_key_values=cache)
    return probe


def test_mass_is_the_softmax_over_the_pages_read(model: Any) -> None:
    steps: list[Any] = []
    probe = looked(model, steps)
    lines = {line["layer"]: line for line in probe.lines()}
    assert sorted(lines) == [2, 3, 4, 5]  # those that choose
    for step, slots in steps:
        if slots is None:
            continue
        expected = torch.zeros(2)
        for row in range(2):
            keys = step.kv_pool[step.block_table[row].long(), 0].float().transpose(0, 1).flatten(1, 2)  # [hkv, n, d]
            keys = keys[:, : int(step.seq_lens[row])]
            query = step.query[row].unflatten(0, (2, 4))
            weights = (torch.einsum("hgd,hnd->hgn", query, keys) * step.scaling).softmax(-1)
            for head in range(2):
                read = [token for slot in slots[row, head].tolist() if slot >= 0
                        for token in range(slot * 16, min(slot * 16 + 16, keys.shape[1]))]  # fmt: skip
                expected[head] += weights[head, :, read].sum(-1).mean() / 2
        torch.testing.assert_close(torch.tensor(lines[step.layer_idx]["mass"]), expected, rtol=1e-4, atol=1e-5)


def test_the_oracle_overlaps_with_itself(model: Any) -> None:
    for line in looked(model, policy="oracle").lines():
        assert line["overlap"] == [1.0, 1.0]
    ours, by_lot = (
        [x for line in looked(model, policy=p).lines() for x in line["overlap"]] for p in ("top_k", "random")
    )
    assert sum(by_lot) < sum(ours)


def test_nothing_is_looked_at_between(model: Any) -> None:
    cache, looks = PagedCache(model.config), []
    probe = Probe(cache, 100)
    for step in range(101):
        probe.before_step(step)
        looks += cache.observers
    assert looks == [probe] * 4
    assert looked(model, policy="all").lines() == []
