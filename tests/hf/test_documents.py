"""Caches in files: what goes on after a load is what would have gone on without, and what does not fit is refused."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import sparsekv
from sparsekv.cache import PagedCache
from sparsekv.errors import CacheFileError, CacheStateError, ConfigError
from sparsekv.hf.ranks import Ranks
from sparsekv.hf.support import CACHE
from sparsekv.pages import pieces
from sparsekv.pages.residency import RESIDENCIES
from sparsekv.testing.consistency import assert_consistent
from sparsekv.testing.damage import DAMAGES, fuzz, small_model
from tools.tiny_models import smallest

SMALL: dict[str, Any] = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": 0}
EXTENDING = Path(__file__).parents[1] / "extending"
STATES = ("qwen3_next", "falcon_h1", "lfm2_moe")


@pytest.fixture
def model(tiny) -> Any:
    return tiny("llama")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.safetensors"


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 32, shape, generator=torch.Generator().manual_seed(seed))


def read(patch: sparsekv.Patch, ids: Tensor, **inputs: Any) -> PagedCache:
    cache = patch.new_cache()
    with torch.no_grad():
        patch.model(ids, **{CACHE: cache}, **inputs, use_cache=True)
    return cache


def go_on(patch: sparsekv.Patch, ids: Tensor, cache: PagedCache, **settings: Any) -> Any:
    """Ten greedy tokens, and their logits."""
    told = {"do_sample": False, "max_new_tokens": 10, "output_logits": True, "return_dict_in_generate": True}
    return patch.model.generate(ids, **{CACHE: cache}, **told | settings)


def assert_equal(one: Any, other: Any) -> None:
    assert torch.equal(one.sequences, other.sequences)
    for mine, theirs in zip(one.logits, other.logits, strict=True):
        assert torch.equal(mine, theirs)


CASES = [
    ("llama", {}),
    ("llama", {"policy": "oracle", "digest": "mean_std"}),
    ("llama", {"kv": "int8"}),
    ("llama", {"kv": ("int8", "int4"), "page_size": 16, "budget": 64}),
    ("llama", {"prefill": "sparse"}),
    ("gemma3_text", {}),
    ("gemma3_text", {"kv": "int8"}),
    ("llama4_text", {}),
    ("gpt_oss", {}),
    ("gemma3n_text", {}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"kv": "int8"}),
    *((family, {}) for family in STATES),
]


@pytest.mark.parametrize(("family", "settings"), CASES, ids=str)
def test_what_goes_on_after_a_load_is_what_would_have_gone_on(family, settings, tiny, path) -> None:
    """Two rows, one of them padded, of a chunked prompt and a few decoded tokens; all bits of all logits."""
    model = smallest(family) if family in STATES else tiny(family)
    ids, mask = tokens(2, 41), torch.ones(2, 41, dtype=torch.int64)
    mask[1, :7] = 0
    with sparsekv.patch(model, **SMALL | settings) as patch:
        first = go_on(patch, ids, patch.new_cache(), attention_mask=mask, prefill_chunk_size=15, max_new_tokens=4)
        cache = first[CACHE]
        cache.save(path, first.sequences)
        with torch.inference_mode():  # what is loaded may be written to outside of it
            loaded = patch.load(path)
        assert torch.equal(loaded.ids, first.sequences[:, :-1])
        assert_consistent(loaded._store)
        mask = torch.cat([mask, mask.new_ones(2, 4)], 1)
        assert_equal(*(go_on(patch, first.sequences, x, attention_mask=mask) for x in (loaded, cache)))


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["plain", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_on_a_gpu_in_many_pieces(family, kv, tiny, path, monkeypatch) -> None:
    """Captured steps, and host memory that is used again and again."""
    monkeypatch.setattr(pieces, "PIECE", 1 << 12)
    model = (smallest(family) if family in STATES else tiny(family)).to("cuda", torch.bfloat16)
    ids = tokens(1, 200).cuda()
    with sparsekv.patch(model, **SMALL | {"budget": 64, "page_size": 16}, kv=kv) as patch:
        cache = read(patch, ids)
        cache.save(path, ids)
        loaded = patch.load(path)
        assert_consistent(loaded._store)
        for i, pages in loaded._store.layers.items():
            held = [store.table.pages_of(0)[:-1] for store in (loaded._store, cache._store)]
            for one, other in zip(pages.read(held[0])[0], cache._store.layers[i].read(held[1])[0], strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        prompt = torch.cat([ids, ids[:, :5]], 1)
        assert torch.equal(go_on(patch, prompt, loaded).sequences, go_on(patch, prompt, cache).sequences)


def test_it_is_a_file_of_safetensors(model, path) -> None:
    with sparsekv.patch(model, **SMALL) as patch:
        cache = read(patch, tokens(1, 21))
        cache.save(path, title="mine")
    with safe_open(path, "pt") as file:
        assert '"title": "mine"' in file.metadata()["facts"]
        assert torch.equal(file.get_tensor("pages.0.kv")[:5], cache._store.layers[0].kv[:5])
        assert not file.get_tensor("pages.0.kv")[5, :, :, 1:].any()  # behind the last token


def test_single_rows_and_forks_share_what_they_shared(model, path) -> None:
    """A page is saved once, however many rows hold it, and pages of others are not."""
    with sparsekv.patch(model, **SMALL) as patch:
        ids = tokens(1, 40)
        cache = read(patch, ids)
        fork = cache.fork()
        fork.batch_repeat_interleave(3)
        ids = torch.cat([ids.expand(3, -1), tokens(3, 3, seed=2)], 1)
        out = go_on(patch, ids, fork, max_new_tokens=2)
        fork.save(path, out.sequences)
        loaded = patch.load(path)
        pool = loaded._store.table.pool
        assert pool.num_pages - pool.num_free == 10 + 3  # shared ones, and one of each row
        assert_consistent(loaded._store)
        assert_equal(go_on(patch, out.sequences, loaded), go_on(patch, out.sequences, fork))
        row = cache.fork()
        row.save(path, ids[:1])
        assert patch.load(path).nbytes <= cache.nbytes


def test_what_a_policy_remembers_goes_on(model, path) -> None:
    """Unless it is another policy that goes on."""
    spec: Any = importlib.util.spec_from_file_location("alternating", EXTENDING / "alternating.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with sparsekv.patch(model, **SMALL, policy="alternating") as patch:
        first = go_on(patch, tokens(2, 60), patch.new_cache(), max_new_tokens=4)
        cache = first[CACHE]
        assert cache._store.memory.phase
        cache.save(path, first.sequences)
        loaded = patch.load(path)
        assert loaded._store.memory.phase == cache._store.memory.phase
        assert_equal(go_on(patch, first.sequences, loaded), go_on(patch, first.sequences, cache))
    with sparsekv.patch(model, **SMALL) as patch:
        assert patch.load(path)._store.memory.phase == 0
    sparsekv.POLICIES.remove("alternating")


def test_pages_that_lie_elsewhere(model, path) -> None:
    """Where they lie is not a matter of the file."""
    spec: Any = importlib.util.spec_from_file_location("host_pages", EXTENDING / "host_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    RESIDENCIES.register("in_dict_of_documents")(module.InDict)
    try:
        ids = tokens(1, 33)
        with sparsekv.patch(model, **SMALL) as patch:
            expected = go_on(patch, ids, cache := read(patch, ids[:, :-1]))
            cache.crop(-int(cache.get_seq_length() - 32))
            cache.save(path, ids)
        with sparsekv.patch(model, **SMALL, residency="in_dict_of_documents") as patch:
            loaded = patch.load(path)
            loaded.save(path)
            assert torch.equal(go_on(patch, ids, loaded).sequences, expected.sequences)
            assert torch.equal(go_on(patch, ids, patch.load(path)).sequences, expected.sequences)
    finally:
        RESIDENCIES.remove("in_dict_of_documents")


# -- prompts that begin like a document


@pytest.mark.parametrize("kv", ["plain", "int8"])
def test_a_prompt_reuses_what_it_begins_with(kv, model, path) -> None:
    ids = tokens(1, 40)
    with sparsekv.patch(model, **SMALL, kv=kv) as patch:
        read(patch, ids).save(path, ids)
        for kept, prompt in (
            (40, torch.cat([ids, tokens(1, 5, seed=2)], 1)),
            (22, torch.cat([ids[:, :22], 99 - tokens(1, 9)], 1)),
            (39, ids),
            (9, ids[:, :10]),
        ):
            loaded = patch.load(path, prompt)
            assert loaded.get_seq_length() == kept
            assert torch.equal(loaded.ids, prompt[:, :kept])
            assert_consistent(loaded._store)
            expected = read(patch, ids)
            expected.crop(kept - 40)
            assert_equal(go_on(patch, prompt, loaded), go_on(patch, prompt, expected))
        several = torch.cat([ids.expand(3, -1), tokens(3, 4, seed=3)], 1)
        loaded = patch.load(path, several)
        assert loaded._store.table.pool.num_pages == 10
        assert go_on(patch, several, loaded).sequences.shape == (3, 54)
        with pytest.raises(CacheFileError, match="no tokens that the prompt begins with"):
            patch.load(path, 99 - ids)
        with pytest.raises(CacheFileError, match="has 1 sequences, and the prompt"):
            patch.load(path, ids[0])


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_where_a_layer_cannot_go_back_the_whole_document_counts(family, tiny, path) -> None:
    model = smallest(family) if family in STATES else tiny(family)
    ids = tokens(1, 120)
    with sparsekv.patch(model, **SMALL) as patch:
        read(patch, ids).save(path, ids)
        prompt = torch.cat([ids, tokens(1, 5, seed=2)], 1)
        assert_equal(go_on(patch, prompt, patch.load(path, prompt)), go_on(patch, prompt, read(patch, ids)))
        with pytest.raises(CacheStateError, match=r"window|state"):
            patch.load(path, prompt[:, :20])


def test_tokens_are_known_as_far_as_they_were_told(model, path) -> None:
    ids = tokens(2, 20)
    with sparsekv.patch(model, **SMALL) as patch:
        cache = read(patch, ids)
        for wrong in (ids[:1], ids[:, :19], ids[0], ids.float()):
            with pytest.raises(CacheStateError, match="the cache holds 2 sequences of 20 tokens"):
                cache.save(path, wrong)
        cache.save(path)
        assert patch.load(path).ids is None
        with pytest.raises(CacheFileError, match="saved without its tokens"):
            patch.load(path, ids)
        cache.save(path, ids)
        loaded = patch.load(path)
        loaded.reorder_cache(torch.tensor([1, 1]))
        loaded.crop(-3)
        loaded.save(path)
        assert torch.equal(patch.load(path).ids, ids[[1, 1], :17])
        go_on(patch, torch.cat([loaded.ids, tokens(2, 2)], 1), loaded)
        loaded.save(path)  # more than is known
        assert patch.load(path).ids is None
        loaded.reset()
        assert loaded.ids is None


# -- what is refused


def refused(patch: sparsekv.Patch, path: Path, reason: str) -> None:
    with pytest.raises(CacheFileError, match=reason):
        patch.load(path)


def test_another_model_is_refused_with_the_reason(model, tiny, path) -> None:
    with sparsekv.patch(model, **SMALL) as patch:
        read(patch, tokens(1, 20)).save(path)
    for other, reason in (
        (tiny("llama", seed=1), "of another model: its weights are others"),
        (tiny("mistral"), "of another model: a LlamaForCausalLM, and this is a MistralForCausalLM"),
        (tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 9.0}), "rope_parameters was .* and is"),
        (tiny("llama").bfloat16(), "its weights are others"),
    ):
        with sparsekv.patch(other, **SMALL) as patch:
            refused(patch, path, reason)
    with sparsekv.patch(copy.deepcopy(model), **SMALL) as patch:
        assert patch.load(path).get_seq_length() == 20


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"page_size": 8, "budget": 32}, "other settings: page_size was 4 and is 8"),
        ({"digest": "minmax"}, "digest was 'sign_sketch' and is 'minmax'"),
        ({"kv": "int8"}, "kv was 'plain' and is 'int8'"),
        ({"prefill": "sparse"}, "prefill was 'dense' and is 'sparse'"),
        ({"budget": 32}, None),
        ({"policy": "oracle", "capture": False, "dense_layers": 1}, None),
        ({"max_tokens": 4}, "CacheFullError"),
    ],
    ids=str,
)
def test_other_settings_are_refused_where_pages_depend_on_them(settings, reason, model, path) -> None:
    with sparsekv.patch(model, **SMALL) as patch:
        read(patch, tokens(1, 20)).save(path)
    with sparsekv.patch(model, **SMALL | settings) as patch:
        if reason is None:
            assert patch.load(path).get_seq_length() == 20
        elif reason == "CacheFullError":
            with pytest.raises(sparsekv.CacheFullError, match="max_tokens leaves 1 of 1"):
                patch.load(path)
        else:
            refused(patch, path, reason)


def test_digests_that_were_not_kept(model, path) -> None:
    with sparsekv.patch(model, **SMALL | {"dense_layers": 1}) as patch:
        read(patch, tokens(1, 20)).save(path)
    with sparsekv.patch(model, **SMALL) as patch:
        refused(patch, path, "needs digests, and layer 0 kept none")


def test_what_cannot_be_saved_is_said(model, tiny, path, monkeypatch) -> None:
    with sparsekv.patch(model, **SMALL) as patch:
        with pytest.raises(CacheStateError, match="nothing to save"):
            patch.new_cache().save(path)
        cache = read(patch, tokens(1, 20))
        with pytest.raises(CacheStateError, match="not made by a patch"):
            PagedCache(model.config).save(path)
        with pytest.raises(CacheStateError, match="is not here any more"):
            pickle.loads(pickle.dumps(cache)).save(path)
        copy.deepcopy(cache).save(path)
        assert patch.load(path).get_seq_length() == 20
        monkeypatch.setattr(Ranks, "size", 2)
        for call in (lambda: cache.save(path), lambda: patch.load(path)):
            with pytest.raises(CacheStateError, match="2 ranks hold the model"):
                call()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="as densely as it does unpatched"):
        patch = sparsekv.patch(tiny("diffllama"), **SMALL)
    with pytest.raises(CacheStateError, match="transformers' own DynamicLayer, which is not saved"):
        read(patch, tokens(1, 20)).save(path)


def test_an_interrupted_pass_is_not_saved(model, path) -> None:
    with sparsekv.patch(model, **SMALL) as patch:
        cache = read(patch, tokens(1, 20))
        cache._store.accept(0, 20, *torch.zeros(2, 1, 2, 1, 16), None, True)
        with pytest.raises(CacheStateError, match="interrupted"):
            cache.save(path)


def test_damaged_files_are_refused_or_give_what_was_saved(tmp_path) -> None:
    """`python -m sparsekv.testing.damage` does more of them."""
    with sparsekv.patch(small_model(), page_size=4, budget=16, sinks=1, recent=4) as patch:
        tally = fuzz(patch, tmp_path, files=300, seed=0)
    assert len([name for name in tally if name.startswith("refused:")]) == len(DAMAGES)
    assert sum(tally.values()) == 300


# -- many questions about one document


def test_questions_share_the_document_they_are_about(model) -> None:
    """And each is answered as if it were alone."""
    ids, asked = tokens(1, 160), [[5, 6, 7], [8, 13], [9, 10, 11, 12]]
    with sparsekv.patch(model, **SMALL) as patch:
        read_ids: list[int] = []
        document = patch.prefix(ids[0].tolist(), reserve_tokens=64, progress=read_ids.append)
        assert read_ids == [160]
        before = document.cache.nbytes
        inputs = document.inputs(asked)
        answers = patch.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        pool = document.cache._store.table.pool
        assert pool.num_pages - pool.num_free == 160 // 4 + 2 + 2 + 3  # the document once
        assert document.cache.nbytes == before  # there was room
        for question, answer in zip(asked, answers, strict=True):
            alone = document.inputs([question])
            expected = patch.model.generate(**alone, max_new_tokens=6, do_sample=False)
            assert answer[-6:].tolist() == expected[0, -6:].tolist()
        assert document.cache.get_seq_length() == 160
        with pytest.raises(ConfigError, match="at least one question"):
            document.inputs([])
        with pytest.raises(ConfigError, match="at least one question"):
            document.inputs([[]])
        with pytest.raises(ConfigError, match="Text needs a tokenizer"):
            patch.prefix("text")
        with pytest.raises(ConfigError, match="at least one token"):
            patch.prefix([])


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "deepseek_v3"])
def test_every_kind_of_layer_forks_from_a_prefix(family, tiny, path) -> None:
    model = smallest(family) if family in STATES else tiny(family)
    with sparsekv.patch(model, **SMALL) as patch:
        document = patch.prefix(tokens(1, 33))
        document.cache.save(path)
        loaded = patch.load(path)
        loaded.batch_repeat_interleave(2)
        inputs = document.inputs([[5, 6], [7, 8]])
        expected = patch.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found = patch.model.generate(**inputs | {CACHE: loaded}, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, expected)
