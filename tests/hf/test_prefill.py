"""Long prompts: attended to without a mask of their size and in chunks, and the answer is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

import sparsekv
from sparsekv.cache import attention_blocks, prefill
from sparsekv.cache.masks import visible_columns
from sparsekv.hf import attention, chunks, generation
from sparsekv.hf.attention import sparsekv_mask
from sparsekv.ops import reference

NEW = 8  # tokens that `decode` generates
ROUNDING = 1e-4  # as in conftest.py
FULL: dict[str, Any] = {"budget": 4096, "page_size": 4, "dense_layers": 1}
SMALL: dict[str, Any] = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": (0,)}
EAGER_ONLY = ("gemma2", "gpt_oss")
SDPA = """
    llama qwen2 qwen3 qwen3_moe mixtral mistral gemma3_text gemma3n_text gemma4_text phi3 glm4 olmo2 smollm3
    starcoder2 gpt2 opt deepseek_v3 diffllama
""".split()
MODELS = [(family, "sdpa") for family in SDPA]
MODELS += [(family, "eager") for family in ("llama", "gemma3_text", "deepseek_v3", *EAGER_ONLY)]
RUN_DENSE = ("diffllama",)  # its keys are transformed on the way to the attention
EXPANDED = ("deepseek_v3",)  # all its keys are, and its pages hold what they are made of
SINGLE, PADDED, MOSTLY_PADDING = (40,), (40, 33, 19), (48, 20, 5)


@given(batch=st.integers(1, 300), num_new=st.integers(1, 300_000))
@example(batch=1, num_new=chunks.WHOLE)
@example(batch=1, num_new=chunks.WHOLE + 1)
@example(batch=1, num_new=4 * chunks.CHUNK + 1)
@example(batch=1, num_new=16_384 * 16_400 + 1)
@example(batch=40, num_new=1024)
@example(batch=40, num_new=1025)
@example(batch=100_000, num_new=1)
@example(batch=100_000, num_new=1025)
def test_chunks_are_of_a_bounded_size_and_never_end_with_one_token(batch: int, num_new: int) -> None:
    """A last chunk of one token would be taken for a decode step."""
    size = chunks.chunk_size(batch, num_new)
    if size is None:
        assert batch * num_new <= chunks.WHOLE or num_new <= max(1024, chunks.CHUNK // batch)
        return
    assert batch * num_new > chunks.WHOLE
    assert num_new % size != 1
    wanted = max(chunks.CHUNK // batch, 1024)
    assert wanted <= size <= wanted + 16 * 16
    assert size < num_new or num_new == wanted + 1  # in two, the second would be of one token
    of_latents = chunks.chunk_size(batch, num_new, expands=True)
    assert of_latents is None or max(chunks.WHOLE // batch, 1024) <= of_latents


# -- prompts whose mask would be large


@pytest.fixture
def no_masks(monkeypatch) -> None:
    """Every mask is large."""
    monkeypatch.setattr(attention, "LARGE_MASK", 0)


@pytest.fixture
def attended(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of all queries that are attended to without a mask."""
    shapes: list[tuple[int, ...]] = []
    original = prefill.attend

    def spy(layer: Any, query: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return original(layer, query, *args)

    monkeypatch.setattr(prefill, "attend", spy)
    return shapes


@pytest.fixture
def attended_to_all(monkeypatch) -> list[tuple[int, ...]]:
    """As `attended`, in layers that are not in pages or are more than plain."""
    shapes: list[tuple[int, ...]] = []
    original = prefill.attend_all

    def spy(query: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return original(query, *args)

    monkeypatch.setattr(prefill, "attend_all", spy)
    return shapes


@pytest.fixture
def masks_made(monkeypatch) -> list[tuple[int, int, int]]:
    """Batch, queries and keys of all masks that transformers' sdpa makes for more than one query."""
    made: list[tuple[int, int, int]] = []
    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def spy(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> Any:
        if q_length > 1:
            made.append((batch_size, q_length, kv_length))
        return original(batch_size, q_length, kv_length, *args, **kwargs)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    return made


@pytest.mark.parametrize(
    ("lengths", "chunk"),
    [(SINGLE, None), (PADDED, None), (SINGLE, 7), (PADDED, 7), (MOSTLY_PADDING, 12)],
    ids=["single", "padded", "chunks", "padded-chunks", "chunks-of-padding"],
)
@pytest.mark.parametrize(("family", "implementation"), MODELS)
def test_without_masks_generate_gives_what_it_gives_with_them(
    family, implementation, lengths, chunk, tiny, prompt, decode, assert_same, no_masks, attended, attended_to_all
) -> None:
    """All families, all ways to prefill; of plain attention a prompt alone needs no mask in any case."""
    model, inputs = tiny(family, attn_implementation=implementation), prompt(*lengths)
    if lengths is MOSTLY_PADDING:  # the longest row is left out: the first chunks hold no token
        inputs = {name: tensor[1:] for name, tensor in inputs.items()}
    theirs = decode(model, inputs, prefill_chunk_size=chunk)
    with sparsekv.patch(model, **FULL) as patch:
        ours = decode(model, inputs, prefill_chunk_size=chunk)
    assert_same(ours, theirs)
    assert patch.stats.dense_steps == (0 if family in RUN_DENSE else NEW - 1)
    is_paged = family not in (*RUN_DENSE, *EXPANDED)
    needs_mask = (lengths, chunk) != (SINGLE, None)
    assert bool(attended) == (is_paged and implementation == "sdpa" and needs_mask)
    is_windowed = implementation == "sdpa" and family.startswith("gemma")
    others = family in EAGER_ONLY or is_windowed or (implementation == "sdpa" and not is_paged and needs_mask)
    assert bool(attended_to_all) == others


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma3n_text"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_without_masks_the_same_pages_are_chosen(
    family, chunk, tiny, prompt, decode, assert_same, naive_sparse, no_masks, attended
) -> None:
    """What the pages hold after such a prompt is right: decoding at a small budget reads the pages it should."""
    model, naive = tiny(family), tiny(family)
    naive_sparse(naive, **SMALL)
    with sparsekv.patch(model, **SMALL, digest="minmax") as patch:
        ours = decode(model, prompt(*PADDED), prefill_chunk_size=chunk)
    assert_same(ours, decode(naive, prompt(*PADDED), prefill_chunk_size=chunk))
    assert patch.stats.sparse_steps == NEW - 1
    assert attended


def second_turn(model: PreTrainedModel, prompt: Any, decode: Any, padded: bool, **settings: Any) -> Any:
    """An answer, and the answer to what is said next; padding lies in the middle, then."""
    lengths, more = ((40, 31), (12, 15)) if padded else ((40,), (15,))
    first, added = decode(model, prompt(*lengths)), prompt(*more)
    inputs = {"input_ids": torch.cat([first.sequences, added["input_ids"]], dim=1)}
    if padded:
        answered = torch.ones(2, NEW, dtype=torch.long)
        mask = (prompt(*lengths)["attention_mask"], answered, added["attention_mask"])
        inputs["attention_mask"] = torch.cat(mask, dim=1)
    return decode(model, inputs, past_key_values=first.past_key_values, **settings)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "implementation"), MODELS)
def test_a_second_turn_without_masks(
    family, implementation, padded, tiny, prompt, decode, assert_same, no_masks
) -> None:
    """A prompt over what the pages hold already."""
    model = tiny(family, attn_implementation=implementation)
    theirs = second_turn(model, prompt, decode, padded)
    with sparsekv.patch(model, **FULL) as patch:
        assert_same(second_turn(model, prompt, decode, padded), theirs)
    assert patch.stats.dense_passes == (0 if family in RUN_DENSE else 2)


RIGHT = torch.arange(40) < torch.tensor([[40], [33], [2]])
HOLES = (torch.arange(40) % torch.tensor([[7], [5], [11]]) > 0) | (torch.arange(40) > 37)
NOTHING_AT_FIRST = torch.arange(40) >= torch.tensor([[0], [21], [39]])


@torch.no_grad()
def forwards(model: PreTrainedModel, ids: Tensor, mask: Tensor, sizes: tuple[int, ...], keep: int = 0) -> Tensor:
    """Logits of passes over so many tokens each, with a cache, at all places that are no padding.

    Args:
        keep: the last so many columns of each pass only; 0: all.
    """
    past, logits, end = None, [], 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for size in sizes:
        start, end = end, end + size
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end].long(),
            position_ids=positions[:, start:end],
            past_key_values=past,
            use_cache=True,
            logits_to_keep=keep,
        )
        past = out.past_key_values
        logits.append(out.logits[mask[:, end - (keep or size) : end]])
    return torch.cat(logits)


@pytest.mark.parametrize("sizes", [(40,), (9, 1, 22, 1, 7), (1, 39)], ids=str)
@pytest.mark.parametrize("mask", [RIGHT, HOLES, NOTHING_AT_FIRST], ids=["right", "holes", "left"])
@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "sdpa"), ("gemma3_text", "sdpa"), ("opt", "sdpa"), ("deepseek_v3", "sdpa"), ("llama", "eager")]
    + [(family, "eager") for family in EAGER_ONLY],
)
def test_padding_anywhere_without_masks(family, implementation, mask, sizes, tiny, prompt, no_masks) -> None:
    """Behind the prompt or in its middle: the columns that hold tokens are attended to, and no others."""
    model, ids = tiny(family, attn_implementation=implementation), prompt(40, 40, 40)["input_ids"]
    theirs = forwards(model, ids, mask, sizes)
    with sparsekv.patch(model, **FULL):
        ours = forwards(model, ids, mask, sizes)
    assert float((ours - theirs).abs().max()) < ROUNDING


@pytest.mark.parametrize("keep", [1, 5])
@pytest.mark.parametrize("sizes", [(40,), (29, 11)], ids=str)
@pytest.mark.parametrize("lengths", [SINGLE, (40, 33, 2)], ids=str)
def test_layers_that_attend_for_the_last_tokens_alone(lengths, sizes, keep, tiny, prompt, no_masks) -> None:
    """Where keys are shared, the layers that have none of their own skip what no logits are asked of."""
    model, inputs = tiny("gemma4_text"), prompt(*lengths)
    arguments = inputs["input_ids"], inputs["attention_mask"].bool(), sizes, keep
    theirs = forwards(model, *arguments)
    with sparsekv.patch(model, **FULL):
        ours = forwards(model, *arguments)
    assert float((ours - theirs).abs().max()) < ROUNDING


@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        (SINGLE, {}),
        (PADDED, {}),
        (SINGLE, {"prefill_chunk_size": 7}),
        (PADDED, {"prefill_chunk_size": 7}),
        (PADDED, {"num_beams": 2}),
        (SINGLE, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}),
    ],
    ids=str,
)
def test_no_mask_of_the_prompts_size_is_made(
    lengths, settings, tiny, prompt, decode, no_masks, attended, masks_made
) -> None:
    with sparsekv.patch(model := tiny("llama"), **FULL):
        decode(model, prompt(*lengths), **settings)
    assert masks_made == []
    assert bool(attended) == ((lengths, settings) != (SINGLE, {}))


def test_small_masks_are_made(tiny, prompt, decode, attended, masks_made) -> None:
    """Up to some size the model's own implementation does all of it."""
    with sparsekv.patch(model := tiny("llama"), **FULL):
        decode(model, prompt(*PADDED), prefill_chunk_size=25)
        assert masks_made == [(3, 25, 25), (3, 15, 40)]
        assert attended == []


def test_large_is_a_matter_of_elements(tiny, prompt, decode, monkeypatch, attended, masks_made) -> None:
    """Rows, queries and keys count."""
    monkeypatch.setattr(attention, "LARGE_MASK", 3 * 15 * 40)
    with sparsekv.patch(model := tiny("llama"), **FULL):
        decode(model, prompt(*PADDED), prefill_chunk_size=25)
    assert masks_made == [(3, 15, 40)]
    assert attended == [(3, 4, 25, 16)] * 4


def test_few_queries_over_long_rows_have_no_mask(tiny, prompt, decode, monkeypatch, attended, masks_made) -> None:
    """It would take a copy of every row's keys at once."""
    monkeypatch.setattr(attention, "LARGE_MASK", 3 * 25 * 25)
    monkeypatch.setattr(attention, "LONG_KEYS", 40)
    with sparsekv.patch(model := tiny("llama"), **FULL):
        decode(model, prompt(*PADDED), prefill_chunk_size=25)
    assert masks_made == [(3, 25, 25)]
    assert attended == [(3, 4, 15, 16)] * 4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
def test_the_users_static_cache(family, large, padded, chunk, tiny, prompt, decode, assert_same, monkeypatch) -> None:
    """Its keys have room behind the tokens: what is last is not newest, and its masks are never left out."""
    if large:
        monkeypatch.setattr(attention, "LARGE_MASK", 0)
    model, inputs = tiny(family), prompt(*(PADDED if padded else SINGLE))

    def answer() -> Any:
        cache = StaticCache(config=model.config, max_cache_len=64)
        return decode(model, inputs, past_key_values=cache, prefill_chunk_size=chunk)

    theirs = answer()
    with sparsekv.patch(model, **FULL):
        assert_same(answer(), theirs)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
def test_the_users_dynamic_cache(
    family, padded, chunk, tiny, prompt, decode, assert_same, no_masks, masks_made
) -> None:
    """Masks are left out there, too."""
    model, inputs = tiny(family), prompt(*(PADDED if padded else SINGLE))

    def answer() -> Any:
        return decode(model, inputs, past_key_values=DynamicCache(config=model.config), prefill_chunk_size=chunk)

    theirs = answer()
    masks_made.clear()
    with sparsekv.patch(model, **FULL):
        assert_same(answer(), theirs)
    assert masks_made == []


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "gemma2"])
def test_forwards_without_a_cache(family, tiny, prompt, no_masks) -> None:
    model, inputs = tiny(family), prompt(*PADDED)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        theirs = model(**inputs, use_cache=False).logits[real]
        with sparsekv.patch(model, **FULL):
            ours = model(**inputs, use_cache=False).logits[real]
    assert float((ours - theirs).abs().max()) < ROUNDING


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "gemma2"])
def test_training_under_a_left_out_mask(family, tiny, prompt, no_masks) -> None:
    """The same loss and the same gradients: the mask is made where it is needed after all."""
    model, inputs = tiny(family, num_hidden_layers=2).train(), prompt(*PADDED)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for is_patched in (False, True):
        if is_patched:
            sparsekv.patch(model, **FULL)
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("asked_by", ["argument", "config"])
def test_attention_weights_under_a_left_out_mask(asked_by, tiny, prompt, no_masks) -> None:
    """Of attention that we compute ourselves else; those of padding mean nothing."""
    model, inputs = tiny("gpt_oss"), prompt(40, 33)
    theirs = model(**inputs, output_attentions=True).attentions
    with sparsekv.patch(model, **FULL), torch.no_grad():
        if asked_by == "config":
            model.config.output_attentions = True
            ours = model(**inputs).attentions
        else:
            ours = model(**inputs, output_attentions=True).attentions
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[0], b[0])
        torch.testing.assert_close(a[1, :, 7:], b[1, :, 7:])


@pytest.mark.parametrize("family", EAGER_ONLY)
def test_bfloat16_under_a_left_out_mask(family, tiny, prompt, no_masks) -> None:
    """No further from the float32 result than twice what eager attention in bfloat16 is."""
    exact, model = (tiny(family, attn_implementation="eager").to(x) for x in (torch.float32, torch.bfloat16))
    ids = prompt(40)["input_ids"]
    every, sizes = torch.ones(1, 40, dtype=torch.bool), (25, 15)
    truth, theirs = (forwards(reference, ids, every, sizes) for reference in (exact, model))
    with sparsekv.patch(model, **FULL):
        ours = forwards(model, ids, every, sizes)
    assert ours.dtype == torch.bfloat16
    assert float((ours - truth).norm()) <= 2 * float((theirs - truth).norm())


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given, found = (
            {x.untyped_storage().data_ptr(): x for x in tree_leaves(tree) if isinstance(x, Tensor)}
            for tree in ((args, kwargs), out)
        )
        made = [x.untyped_storage().nbytes() for address, x in found.items() if address not in given]
        self.nbytes = max(self.nbytes, *made, 0)
        return out


@pytest.mark.parametrize("lengths", [(1500,), (1500, 1400)], ids=str)
@pytest.mark.parametrize(
    ("family", "implementation"), [("gemma3_text", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_nothing_of_a_prompts_size_squared_is_made(
    family, implementation, lengths, tiny, prompt, no_masks, monkeypatch
) -> None:
    """Not in full layers and not in those of a window: not even a mask of a byte for every pair."""
    monkeypatch.setattr(attention_blocks, "BLOCK_ELEMENTS", 1 << 16)
    small = {"num_hidden_layers": 2, "intermediate_size": 16, "max_position_embeddings": 2048}
    model, inputs = tiny(family, attn_implementation=implementation, **small), prompt(*lengths)
    with sparsekv.patch(model, **FULL), torch.no_grad():
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        past = model(ids[:, :1000], attention_mask=mask[:, :1000], logits_to_keep=1).past_key_values
        for settings in ({"input_ids": ids}, {"input_ids": ids[:, 1000:], "past_key_values": past}):
            with Largest() as largest:
                model(attention_mask=mask, logits_to_keep=1, **settings)
            assert largest.nbytes < settings["input_ids"].numel() * 1500


@pytest.mark.parametrize("reading", ["dense", "sparse"])
@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2])
def test_of_earlier_pages_a_chunk_unpacks_some_rows_at_a_time(
    rows, kv, reading, tiny, prompt, no_masks, monkeypatch
) -> None:
    """Nothing that it makes is larger than the keys of these rows in one layer: they are decoded by blocks."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(prefill, "MAX_TOGETHER", 1500 * rows)
    wide = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    model, inputs = tiny("llama", **wide, max_position_embeddings=2048), prompt(*[1500] * 4)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    settings = {"kv": kv, "prefill": reading, "digest": "minmax", "backend": "reference"}
    with sparsekv.patch(model, **settings) as patch, torch.no_grad():
        past = patch.new_cache(4 * 1504)
        model(ids[:, :1360], attention_mask=mask[:, :1360], past_key_values=past, logits_to_keep=1)
        with Largest() as largest:
            model(ids[:, 1360:], attention_mask=mask, past_key_values=past, logits_to_keep=1)
        assert (patch.stats.prefill.causal > 0) == (reading == "sparse")
    assert largest.nbytes == rows * 1504 * 4 * 64 * 4  # in whole pages, in float32


CAUSAL: dict[str, Any] = {"q_offset": 4, "mask_function": causal_mask_function}


@pytest.mark.parametrize(
    ("lengths", "asked"),
    [
        ((6, 10), {"mask_function": sliding_window_causal_mask_function(3)}),
        ((6, 10), {"local_size": 3}),
        ((6, 10), {"allow_is_causal_skip": False}),
        ((6, 12), {}),
        ((6, 10), {"q_offset": torch.tensor(4)}),
        ((6, 10), {"kv_offset": 1}),
        ((6, 10), {"attention_mask": torch.ones(2, 8, dtype=torch.bool)}),
        ((1, 10), {"q_offset": 9, "attention_mask": torch.arange(10) >= torch.tensor([[0], [3]])}),
    ],
    ids=["sliding", "local", "asked-for", "room", "static", "window", "short", "step"],
)
def test_masks_that_say_more_are_made(lengths, asked, tiny, no_masks) -> None:
    """Only what is causal, of the newest tokens, and known to its end is left out."""
    arguments = CAUSAL | asked
    expected = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](2, *lengths, **arguments)
    with sparsekv.patch(model := tiny("llama"), **FULL):
        made = sparsekv_mask(2, *lengths, config=model.config, **arguments)
    assert made.dtype == torch.bool
    assert torch.equal(made, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_of_a_mask_left_out_the_columns_are_made(padded, tiny, no_masks, masks_made) -> None:
    """Which hold tokens; nothing where sdpa needs nothing."""
    columns = torch.arange(10) >= torch.tensor([[0], [3 if padded else 0]])
    with sparsekv.patch(model := tiny("llama"), **FULL):
        made = sparsekv_mask(2, 6, 10, config=model.config, attention_mask=columns, **CAUSAL)
        whole = sparsekv_mask(2, 10, 10, config=model.config, attention_mask=columns, **CAUSAL | {"q_offset": 0})
    assert masks_made == []
    assert tuple(made.shape) == (2, 1, 1, 10)
    assert torch.equal(visible_columns(made), columns)
    assert torch.equal(visible_columns(whole), columns) if padded else whole is None


@pytest.mark.parametrize("chunked", [False, True])
def test_a_mask_of_the_users_own(chunked, tiny, prompt, no_masks, attended) -> None:
    """In four dimensions, whatever it says: here a prefix that sees all of itself."""
    model, ids = tiny("llama"), prompt(30)["input_ids"]
    mask = torch.ones(30, 30, dtype=torch.bool).tril() | (torch.arange(30) < 9)
    settings: dict[str, Any] = {"attention_mask": mask[None, None], "use_cache": True}
    with torch.no_grad():
        theirs = model(ids, **settings).logits
        with sparsekv.patch(model, **FULL):
            if chunked:
                first = model(ids[:, :20], **settings | {"attention_mask": mask[None, None, :20, :20]})
                settings |= {"attention_mask": mask[None, None, 20:], "past_key_values": first.past_key_values}
                ours = torch.cat([first.logits, model(ids[:, 20:], **settings).logits], dim=1)
            else:
                ours = model(ids, **settings).logits
    assert float((ours - theirs).abs().max()) < ROUNDING
    assert attended == []


# -- prompts that go through in chunks


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """The least there are: 1024 tokens of each row."""
    monkeypatch.setattr(chunks, "CHUNK", 1024)
    monkeypatch.setattr(chunks, "WHOLE", 2048)


@pytest.fixture
def long(tiny) -> Callable[..., PreTrainedModel]:
    """`long("llama")`: a tiny model for prompts of some thousand tokens."""
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 8192}
    return lambda family="llama", **settings: tiny(family, **sizes | settings)


class Passes:
    """Columns of every forward of several tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.columns: list[int] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs.shape[1] > 1:
            self.columns.append(inputs.shape[1])

    def taken(self) -> list[int]:
        columns, self.columns = self.columns, []
        return columns


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [((1025,), [1025]), ((2048,), [2048]), ((2100,), [1024, 1024, 52]), ((1500, 1100), [1024, 476])],
    ids=str,
)
@pytest.mark.parametrize("masks", [False, True])
def test_long_prompts_are_chunked(
    lengths, passes, masks, long, prompt, decode, assert_same, small_chunks, monkeypatch
) -> None:
    """By generate itself, and the answer is what the unpatched model answers in one pass."""
    if not masks:
        monkeypatch.setattr(attention, "LARGE_MASK", 0)
    model, inputs = long(), prompt(*lengths)
    seen = Passes(model)
    theirs = decode(model, inputs)
    assert seen.taken() == [max(lengths)]
    with sparsekv.patch(model, **FULL) as patch:
        ours = decode(model, inputs)
    assert seen.taken() == passes
    assert patch.stats.dense_passes == len(passes)
    assert_same(ours, theirs)


def test_a_last_chunk_is_not_one_token(long, prompt, decode, assert_same, small_chunks) -> None:
    model, inputs = long(), prompt(2049)
    seen, theirs = Passes(model), decode(model, inputs)
    seen.taken()
    with sparsekv.patch(model, **FULL) as patch:
        assert_same(decode(model, inputs), theirs)
    assert seen.taken() == [1040, 1009]
    assert patch.stats.dense_steps == NEW - 1


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "opt", "deepseek_v3"])
def test_chunks_in_other_families(family, long, prompt, decode, assert_same, small_chunks) -> None:
    """With sliding windows, sinks, learned positions, and layers that run dense."""
    model, inputs = long(family), prompt(1500, 1100)
    seen, theirs = Passes(model), decode(model, inputs)
    seen.taken()
    with sparsekv.patch(model, **FULL):
        assert_same(decode(model, inputs), theirs)
    assert seen.taken() == [1024, 476]


def test_the_users_chunk_size_is_the_users(long, prompt, decode, assert_same, small_chunks) -> None:
    model, inputs = long(), prompt(2100)
    seen, theirs = Passes(model), decode(model, inputs)
    seen.taken()
    with sparsekv.patch(model, **FULL):
        for size in (1500, 4000):
            assert_same(decode(model, inputs, prefill_chunk_size=size), theirs)
    assert seen.taken() == [1500, 600, 2100]


def test_the_users_generation_config_is_untouched(long, prompt, small_chunks) -> None:
    """The one given with a call, and the model's own."""
    model, inputs = long(), prompt(2100)
    seen = Passes(model)
    given_config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    before = given_config.to_dict(), model.generation_config.to_dict()
    with sparsekv.patch(model, **FULL):
        model.generate(**inputs, generation_config=given_config)
        model.generate(**inputs, max_new_tokens=2)
    assert seen.taken() == [1024, 1024, 52] * 2
    assert (given_config.to_dict(), model.generation_config.to_dict()) == before
    assert given_config.prefill_chunk_size is model.generation_config.prefill_chunk_size is None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunks_later_turns", [False, True])
def test_a_long_second_turn(
    padded, chunks_later_turns, long, prompt, decode, assert_same, small_chunks, monkeypatch
) -> None:
    """What counts is what is new; not with a transformers that would feed the chunks what it has fed before."""
    chunked = chunks_later_turns and generation._CHUNKS_LATER_TURNS
    monkeypatch.setattr(generation, "_CHUNKS_LATER_TURNS", chunked)
    lengths, more = ((30, 21), (1900, 1090)) if padded else ((30,), (2200,))
    model, added = long(), prompt(*more)

    def turns() -> Any:
        first = decode(model, prompt(*lengths))
        inputs = {"input_ids": torch.cat([first.sequences, added["input_ids"]], dim=1)}
        answered = torch.ones(len(lengths), NEW, dtype=torch.long)
        mask = (prompt(*lengths)["attention_mask"], answered, added["attention_mask"])
        inputs["attention_mask"] = torch.cat(mask, dim=1)
        return decode(model, inputs, past_key_values=first.past_key_values)

    seen, theirs = Passes(model), turns()
    seen.taken()
    with sparsekv.patch(model, **FULL):
        assert_same(turns(), theirs)
    size = max(more) + 1  # and the last token of the answer, which nobody has seen yet
    chunks = [1024] * (size // 1024) + [size % 1024]
    assert seen.taken() == [max(lengths), *(chunks if chunked else [size])]


def test_a_second_turn_that_is_short_enough(long, prompt, decode, small_chunks) -> None:
    """However long the first was."""
    model = long()
    with sparsekv.patch(model, **FULL):
        first, seen = decode(model, prompt(1500)), Passes(model)
        ids = torch.cat([first.sequences, prompt(1100)["input_ids"]], dim=1)
        decode(model, {"input_ids": ids}, past_key_values=first.past_key_values)
    assert seen.taken() == [1101]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_all_rows_count(settings, long, prompt, decode, assert_same, small_chunks) -> None:
    """A prompt that is short enough alone is not when there are two of it."""
    model, inputs = long(), prompt(1500)
    seen, theirs = Passes(model), decode(model, inputs, **settings)
    assert seen.taken() == [1500]
    with sparsekv.patch(model, **FULL):
        decode(model, inputs)
        assert seen.taken() == [1500]
        assert_same(decode(model, inputs, **settings), theirs)
    assert seen.taken() == [1024, 476]


@pytest.mark.parametrize("settings", [{"output_hidden_states": True}, {"output_attentions": True}], ids=str)
def test_what_is_asked_of_all_tokens_comes_in_one_piece(
    settings, long, prompt, decode, assert_same, small_chunks, monkeypatch
) -> None:
    """As unpatched: the states of the whole prompt, not those of its last chunk."""
    monkeypatch.setattr(chunks, "WHOLE", 1024)
    model, inputs = long(attn_implementation="eager"), prompt(1100)
    seen, (name,) = Passes(model), [key.removeprefix("output_") for key in settings]
    theirs = decode(model, inputs, **settings, max_new_tokens=2)
    seen.taken()
    with sparsekv.patch(model, **FULL):
        ours = decode(model, inputs, **settings, max_new_tokens=2)
    assert seen.taken() == [1100]
    assert_same(ours, theirs)
    torch.testing.assert_close(getattr(ours, name)[0], getattr(theirs, name)[0])


@pytest.mark.parametrize(
    "settings", [{"use_cache": False}, {"past_key_values": DynamicCache}], ids=["none", "dynamic"]
)
def test_prompts_for_other_caches_are_left_alone(settings, long, prompt, decode, assert_same, small_chunks) -> None:
    """They are not ours to chunk."""
    model, inputs = long(), prompt(2100)
    seen = Passes(model)

    def answer() -> Any:
        made = {name: x(config=model.config) if callable(x) else x for name, x in settings.items()}
        return decode(model, inputs, max_new_tokens=2, **made)

    theirs, passes = answer(), seen.taken()
    with sparsekv.patch(model, **FULL):
        assert_same(answer(), theirs)
    assert seen.taken() == passes


def test_embeddings_are_left_alone(long, prompt, decode, assert_same, small_chunks) -> None:
    """Only ids can be split: what else a prompt consists of goes through whole."""
    model, inputs = long(), prompt(2100)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    seen, theirs = Passes(model), decode(model, {"inputs_embeds": embeds, **inputs})
    seen.taken()
    with sparsekv.patch(model, **FULL):
        assert_same(decode(model, {"inputs_embeds": embeds, **inputs}), theirs)
    assert seen.taken() == [2100]


def test_an_assistant_is_no_obstacle(long, prompt, decode, assert_same, small_chunks) -> None:
    model, inputs = long(), prompt(2100)
    assistant = copy.deepcopy(model)
    theirs = decode(model, inputs, assistant_model=assistant)
    with sparsekv.patch(model, **FULL), sparsekv.patch(assistant, **FULL):
        assert_same(decode(model, inputs, assistant_model=assistant), theirs)
