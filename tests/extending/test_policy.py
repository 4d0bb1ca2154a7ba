"""A policy of a user's that remembers (`alternating.py`): what it reads, eagerly and captured, whatever happens to a
cache meanwhile."""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

import sparsekv
from sparsekv import PagedCache, Patch
from sparsekv.hf.capture import Run
from sparsekv.hf.support import CACHE
from sparsekv.policies import POLICIES, DecodeStep
from sparsekv.testing import naive
from sparsekv.testing.cache_pair import CachePair, tiny_config
from sparsekv.testing.playing import decoded, played

FILE = Path(__file__).with_name("alternating.py")
SMALL: dict[str, Any] = {"policy": "alternating", "page_size": 4, "sinks": 2, "recent": 4, "budget": 24}
ONE_DENSE = SMALL | {"dense_layers": 1}
# 15 steps after 65 tokens begin no page: without a GPU every page is another table, and captured anew.
STEADY: dict[str, Any] = {"policy": "alternating", "page_size": 16, "sinks": 2, "recent": 4, "budget": 48}
STEADY |= {"dense_layers": 1, "fuse": False}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    """As when a user imports the file. Other tests run every policy that is registered."""
    spec: Any = importlib.util.spec_from_file_location("alternating", FILE)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    POLICIES.remove("alternating")


class Rule:
    """An observer that knows what every step must read: it keeps scores, and counts steps, by itself.

    Attributes:
        phases: of the steps of layer 1.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.phases: list[int] = []
        self._steps: Counter[int] = Counter()
        self._scores: list[list[Tensor]] = [[], [], [], []]  # of each layer and row, `[hkv, full pages]`

    def __call__(self, step: DecodeStep, slots: Tensor | None) -> None:
        i, p = step.layer_idx, step.config.page_size
        if i == 0:  # which is dense
            assert slots is None
            return
        if self._steps[i] % 4 == 0:
            scored = zip(step.digest_scores(), step.seq_lens.tolist(), strict=True)
            self._scores[i] = [scores[:, : n // p].clone() for scores, n in scored] if i != 2 else self._scores[1]
        self.phases += [self._steps[i] % 4] if i == 1 else []
        self._steps[i] += 1
        scores = torch.full((len(step.query), 2, step.block_table.shape[1]), float("inf"))
        for row, known in enumerate(self._scores[i]):
            scores[row, :, : known.shape[1]] = known
        assert slots is not None
        assert torch.equal(slots, naive.select_pages(scores, step.seq_lens, p, step.k, step.config.sinks, 4))


def tiny(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A model of 4 layers, the weights so wide that another page shows."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | settings)).eval()


def prompt(*lengths: int) -> dict[str, Tensor]:
    """A row of random tokens per length, padded on the left."""
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 100, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def generated(model: LlamaForCausalLM, inputs: dict[str, Tensor], new: int, **settings: Any) -> Tensor:
    tokens: Tensor = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **settings)
    return tokens


def stepped(rule: Rule, batch: int = 2, steps: int = 6) -> CachePair:
    """A pair of caches after a prompt of 41 tokens and some steps, watched."""
    pair = CachePair(num_layers=4, **ONE_DENSE)
    pair.paged.observers.append(rule)
    pair.forward(41, batch)
    for _ in range(steps):
        pair.forward(1)
    return pair


def test_it_is_one_short_file() -> None:
    assert len(FILE.read_text().splitlines()) <= 60


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_reads_what_the_rule_says(beams: int) -> None:
    """Across pages that begin and rows that are padded; of beams, that rows take along what was scored in them."""
    model, rule = tiny(), Rule()
    with sparsekv.patch(model, **ONE_DENSE) as patch:
        assert "  layers 1-3: sparse (alternating over sign_sketch digests, anew every 4 steps)" in str(patch)
        cache = patch.new_cache()
        reorder = cache.reorder_cache

        def follow(rows: Tensor) -> None:
            rule._scores = [[scores[row] for row in rows] if scores else [] for scores in rule._scores]
            reorder(rows)

        cache.reorder_cache = follow
        cache.observers.append(rule)
        generated(model, prompt(50, 37), 15, past_key_values=cache, num_beams=beams)
        assert patch.stats.sparse_steps == 14
    assert rule.phases == [0, 1, 2, 3] * 3 + [0, 1]


def reset(pair: CachePair) -> None:
    pair.paged.reset()
    pair.plain = DynamicCache(config=pair.paged.model_config)  # whose own reset keeps the tokens' places in 5.17
    pair.mask = pair.mask[:0]


@pytest.mark.parametrize(
    ("change", "phases"),
    [
        (lambda pair: pair, [2, 3]),
        (lambda pair: pair.reorder(torch.tensor([0, 1])), [2, 3]),
        (lambda pair: pair.crop(1), [0, 1]),
        (lambda pair: pair.forward(2), [0, 1]),
        (lambda pair: pair.forward(1, valid=torch.tensor([[True], [False]])), [0, 1]),
        (reset, [0, 1]),
    ],
    ids=["nothing", "rows", "crop", "several tokens", "padding", "reset"],
)
def test_what_is_remembered_is_forgotten_by_all_but_steps(change: Callable[..., Any], phases: list[int]) -> None:
    rule = Rule()
    pair = stepped(rule)
    if phases[0] == 0:
        rule.forget()
    change(pair)
    rule.forget() if phases[0] == 0 else rule.phases.clear()  # once more: the change may have been a step
    if not len(pair.mask):
        pair.forward(41, 2)
    for _ in range(2):
        pair.forward(1)
    assert rule.phases == phases
    pair.check()


@pytest.mark.parametrize("how", ["fork", "deepcopy"])
def test_a_fork_goes_on_by_itself(how: str) -> None:
    rule = Rule()
    pair = stepped(rule)
    twin = pair.fork() if how == "fork" else copy.deepcopy(pair)
    other = copy.deepcopy(rule)
    twin.paged.observers = [other]
    for _ in range(5):
        pair.forward(1)
        twin.forward(1)
    assert rule.phases == other.phases == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    anew = Rule()
    changed = pair.fork(budget=28)  # what was remembered belongs to another budget
    changed.paged.observers = [anew]
    changed.forward(1)
    assert anew.phases == [0]


def test_layers_that_are_not_in_pages_have_no_number() -> None:
    """The policy pairs the layers that it decides for, whatever lies between them."""
    cache, seen = PagedCache(tiny_config(4), **SMALL, dense_layers=(1,), on_fallback=print), []
    cache.observers.append(lambda step, slots: seen.append((step.layer_idx, step.ordinal, len(step.memory))))
    cache.layers[2].refuse("a test")
    for t in (9, 1):
        for i in (0, 1, 3):
            cache.update(*torch.randn(2, 1, 2, t, 8), i)
            cache.layers[i].commit(None) if t > 1 else cache.layers[i].decode(torch.randn(1, 4, 1, 8), 1.0, 0.0, None)
    assert seen == [(0, 0, 1), (1, 1, 0), (3, 1, 1)]


@pytest.mark.parametrize("budget", [24, 0.4])
@torch.no_grad()
def test_what_a_row_reads_depends_on_that_row_alone(budget: int | float) -> None:
    """Also where it is read whole at first while another row is not, and where the other makes the table wider."""
    model, tokens = tiny(), torch.randint(3, 100, (2, 24))

    def pages_read(inputs: dict[str, Tensor], rows: list[int]) -> list[list[Any]]:
        found: list[list[Any]] = [[] for _ in rows]

        def watch(step: DecodeStep, slots: Tensor | None) -> None:
            for row, n in enumerate(step.seq_lens.tolist()):
                listed = [list(range(-(-n // 4)))] * 2 if slots is None else slots[row].tolist()
                found[row].append([[slot for slot in head if slot >= 0] for head in listed])

        cache = patch.new_cache()
        cache.observers.append(watch)
        mask = inputs["attention_mask"]
        model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0), **{CACHE: cache})
        for i in range(24):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            at = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            model(tokens[rows, i : i + 1], **at, **{CACHE: cache})
        return found

    with sparsekv.patch(model, **ONE_DENSE | {"budget": budget}) as patch:
        both = prompt(50, 13)
        together = pages_read(both, [0, 1])
        for row, length in enumerate((50, 13)):
            alone = {name: x[row : row + 1, -length:] for name, x in both.items()}
            assert pages_read(alone, [row]) == together[row : row + 1]


# -- captured


def loop(patch: Patch, cache: PagedCache, tokens: range) -> list[Tensor]:
    return decoded(partial(patch.decoder, Run()), cache, tokens)


@torch.no_grad()
def test_captured_equals_eager() -> None:
    """A graph for each phase; through crop, forks in turn, and a graph that has become stale and leaves nothing."""
    model = tiny()
    with played(), sparsekv.patch(model, **STEADY) as patch:

        def prefilled() -> PagedCache:
            cache = patch.new_cache(reserve_tokens=256)
            model(**prompt(65), **{CACHE: cache})
            return cache

        def both(tokens: range) -> None:
            for mine, yours in zip(ours, theirs, strict=True):
                found, expected = loop(patch, mine, tokens), decoded(model, yours, tokens)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

        ours, theirs = [prefilled()], [prefilled()]
        both(range(5, 18))
        assert (patch.decoder.captures, patch.decoder.replays) == (4, 5)  # of 13 steps 4 warm up, 4 are compared
        for cache in ours + theirs:
            cache.crop(-11)
        both(range(30, 33))
        ours, theirs = [[cache, cache.fork()] for (cache,) in (ours, theirs)]
        for token in range(40, 46):
            both(range(token, token + 1))
        down = model.model.layers[0].mlp.down_proj
        down.weight = torch.nn.Parameter(down.weight * 2)
        both(range(50, 52))
        assert patch.decoder.refusal is None


def test_two_models_in_turn_find_their_graphs_again(monkeypatch) -> None:
    """The next cache of a model gets what the last one remembered in, and where it lay."""
    monkeypatch.setattr(Patch, "_captures", True)  # as on a GPU, where tensors are kept for the next cache
    one, other, whole = tiny(1), tiny(2), {"cache_implementation": "static"}
    with played(), sparsekv.patch(one, **STEADY) as first, sparsekv.patch(other, **STEADY) as second:
        for _ in range(2):
            for patch in (first, second):
                found = generated(patch.model, prompt(65), 15, **whole)
                replays = patch.decoder.replays
                assert torch.equal(found, generated(patch.model, prompt(65), 15, disable_compile=True, **whole))
                assert replays == patch.decoder.replays
                assert patch.decoder.captures == 4


WIDE = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 8192}
ON_GPU: dict[str, Any] = {"policy": "alternating", "budget": 64, "page_size": 16, "recent": 16, "dense_layers": 1}
ON_GPU |= {"fuse": False}  # random weights in bf16 choose between equal logits, so last bits would decide


def on_gpu(*lengths: int) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in prompt(*lengths).items()}


@pytest.mark.gpu
@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
def test_on_a_gpu_captured_equals_eager(digest: str) -> None:
    """Short prompts, which are read whole at first, and ragged batches, too; and what is counted."""
    model = tiny(**WIDE).to("cuda", torch.bfloat16)
    with sparsekv.patch(model, **ON_GPU, digest=digest) as patch:
        for lengths in ((300,), (300, 41), (40,), (300,)):
            patch.stats.reset()
            captured, counted = generated(model, on_gpu(*lengths), 60), patch.stats.as_dict()
            patch.stats.reset()
            assert torch.equal(captured, generated(model, on_gpu(*lengths), 60, disable_compile=True))
            assert patch.stats.as_dict() == counted
            assert patch.decoder.refusal is None
        assert patch.decoder.replays > 100


@pytest.mark.gpu
def test_on_a_gpu_through_beams_crops_and_forks() -> None:
    model = tiny(**WIDE).to("cuda", torch.bfloat16)
    text = prompt(700)["input_ids"].cuda()

    def turns(**settings: Any) -> list[Tensor]:
        cache, found = patch.new_cache(reserve_tokens=1024), []
        for length in (300, 400, 500):
            found.append(generated(model, {"input_ids": text[:, :length]}, 20, past_key_values=cache, **settings))
            cache.crop(-(cache.get_seq_length() - length + 1))
        branches = [cache, cache.fork(), cache.fork(budget=96)]
        for length in (600, 650):  # in turn, each from where it is
            for branch in branches:
                found.append(
                    generated(model, {"input_ids": text[:, :length]}, 11, past_key_values=branch, **settings)
                )
                branch.crop(-(branch.get_seq_length() - length + 1))
        return [*found, generated(model, on_gpu(300), 30, num_beams=3, **settings)]

    with sparsekv.patch(model, **ON_GPU) as patch:
        captured = turns()
        assert patch.decoder.replays > 0
        assert all(torch.equal(a, b) for a, b in zip(captured, turns(disable_compile=True), strict=True))


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_forks_step_by_step() -> None:
    """In the midst of a period, in turn: each has its own memory."""
    model = tiny(**WIDE).to("cuda", torch.bfloat16)
    with sparsekv.patch(model, **ON_GPU) as patch:
        run = Run()

        def logits(forward: Callable[..., Any]) -> list[Tensor]:
            cache = patch.new_cache(reserve_tokens=2048)
            model(**on_gpu(300), **{CACHE: cache})
            found = decoded(forward, cache, range(5, 23))
            branches = [cache, cache.fork()]
            for token in range(30, 60):
                for i, branch in enumerate(branches):
                    found += decoded(forward, branch, range(token + i, token + i + 1))
            return found

        captured = logits(partial(patch.decoder, run))
        assert patch.decoder.replays > 40
        assert all(torch.equal(a, b) for a, b in zip(captured, logits(model), strict=True))


@pytest.mark.gpu
def test_on_a_gpu_two_models_in_turn() -> None:
    models = [tiny(seed, **WIDE).to("cuda", torch.bfloat16) for seed in (1, 2)]
    with sparsekv.patch(models[0], **ON_GPU) as first, sparsekv.patch(models[1], **ON_GPU) as second:
        for _ in range(2):
            for patch in (first, second):
                captured = generated(patch.model, on_gpu(300), 40)
                assert torch.equal(captured, generated(patch.model, on_gpu(300), 40, disable_compile=True))
        assert (first.decoder.captures, second.decoder.captures) == (4, 4)
