"""Every way to decode, from pages: like the unpatched model while the context fits the budget, like masking beyond.

A mode is a function of a model that returns tensors; it runs on the model unpatched and patched. Its marker says how
many single-token steps and how many passes of several tokens must have come from pages in the patched run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import sparsekv

NEW = 8
SOME = -1  # a number that depends on which guesses a verification accepts
MODES: dict[str, tuple[Callable[..., list[Tensor]], int, int]] = {}


def mode(steps: int, passes: int = 1) -> Callable[[Any], Any]:
    """Adds a mode, with the paged steps and passes it consists of."""

    def add(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        MODES[function.__name__] = (function, steps, passes)
        return function

    return add


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **settings: Any) -> list[Tensor]:
    """Sequences and the raw logits of every step."""
    out = run(model, inputs, **settings)
    return [out.sequences, *out.logits]


def run(model: PreTrainedModel, inputs: dict[str, Tensor], **settings: Any) -> Any:
    torch.manual_seed(5)
    wanted = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **wanted | settings)


@mode(steps=NEW - 1)
def greedy(model, prompt):
    return generate(model, prompt(40, 33))


@mode(steps=NEW - 1)
def sampling(model, prompt):
    return generate(model, prompt(40, 33), do_sample=True, temperature=0.8, top_k=20)


@mode(steps=NEW - 1)
def several_return_sequences(model, prompt):
    return generate(model, prompt(40, 33), do_sample=True, num_return_sequences=3)


@mode(steps=NEW - 1)
def beam_search(model, prompt):
    return generate(model, prompt(40, 33), num_beams=3, num_return_sequences=2)


@mode(steps=NEW - 1)
def beam_sampling(model, prompt):
    return generate(model, prompt(40, 33), num_beams=3, do_sample=True)


@mode(steps=SOME, passes=SOME)
def prompt_lookup(model, prompt):
    return generate(model, prompt(120), prompt_lookup_num_tokens=3, max_matching_ngram_size=1)


@mode(steps=NEW - 1, passes=4)
def chunked_prefill(model, prompt):
    return generate(model, prompt(40, 33), prefill_chunk_size=12)


@mode(steps=NEW - 1 + 1, passes=4)
def chunked_prefill_with_a_last_chunk_of_one(model, prompt):
    return generate(model, prompt(41), prefill_chunk_size=10)


@mode(steps=NEW - 1 + 1, passes=4)
def padded_chunked_prefill_with_a_last_chunk_of_one(model, prompt):
    return generate(model, prompt(41, 26), prefill_chunk_size=10)


@mode(steps=NEW - 1, passes=4)
def chunks_of_nothing_but_padding(model, prompt):
    """Prompts padded to a round length: the first chunks hold no token of any row."""
    padded = {name: tensor[1:] for name, tensor in prompt(48, 20, 5).items()}
    return generate(model, padded, prefill_chunk_size=12)


@mode(steps=NEW - 1 + 12, passes=0)
def chunks_of_one(model, prompt):
    return generate(model, prompt(12), prefill_chunk_size=1)


@mode(steps=NEW - 1 + 12, passes=0)
def padded_chunks_of_one(model, prompt):
    return generate(model, prompt(12, 7), prefill_chunk_size=1)


@mode(steps=20, passes=0)
def one_token_prompt(model, prompt):
    return generate(model, prompt(1), max_new_tokens=20)


@mode(steps=19)
def one_token_prompts_padded(model, prompt):
    return generate(model, prompt(6, 1), max_new_tokens=20)


@mode(steps=2 * (NEW - 1), passes=2)
def second_turn(model, prompt):
    first = run(model, prompt(40))
    ids = torch.cat([first.sequences, prompt(6)["input_ids"]], dim=1)
    second = run(model, {"input_ids": ids}, past_key_values=first.past_key_values)
    return [first.sequences, second.sequences, *second.logits]


@mode(steps=2 * (NEW - 1), passes=2)
def padded_second_turn(model, prompt):
    """The rows of the second turn have other lengths than those of the first, so padding lies in the middle too."""
    first = run(model, prompt(40, 31))
    more = prompt(3, 6)
    answered = torch.ones(2, NEW, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([first.sequences, more["input_ids"]], dim=1),
        "attention_mask": torch.cat([prompt(40, 31)["attention_mask"], answered, more["attention_mask"]], dim=1),
    }
    second = run(model, inputs, past_key_values=first.past_key_values)
    return [first.sequences, second.sequences, *second.logits]


@mode(steps=2 * (NEW - 1), passes=2)
def second_turn_after_a_row_ended_early(model, prompt):
    """What generate wrote behind a row's end is padding to the next turn."""
    first = run(model, prompt(40, 33))
    answered = torch.arange(NEW) < torch.tensor([[NEW], [3]])
    more = prompt(6, 6)
    inputs = {
        "input_ids": torch.cat([first.sequences, more["input_ids"]], dim=1),
        "attention_mask": torch.cat([prompt(40, 33)["attention_mask"], answered, more["attention_mask"]], dim=1),
    }
    second = run(model, inputs, past_key_values=first.past_key_values)
    return [second.sequences, *second.logits]


@mode(steps=3 * (NEW - 1) + 2, passes=1)
def turns_of_one_token(model, prompt):
    """The last token of an answer and nothing else: the next turn begins with a single-token step."""
    out = run(model, prompt(40))
    logits = [*out.logits]
    for _ in range(2):
        out = run(model, {"input_ids": out.sequences}, past_key_values=out.past_key_values)
        logits += out.logits
    return [out.sequences, *logits]


@mode(steps=0)
def plain_forward(model, prompt):
    out = model(**prompt(40, 33), use_cache=True)
    return [out.logits]


@mode(steps=NEW)
def manual_loop(model, prompt):
    inputs = prompt(40, 33)
    mask, logits = inputs["attention_mask"], []
    out = model(**inputs, use_cache=True)
    for _ in range(NEW):
        logits.append(out.logits[:, -1])
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        position_ids = (mask.cumsum(1) - 1)[:, -1:]
        ids = logits[-1].argmax(-1, keepdim=True)
        past = out.past_key_values
        out = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=past)
    return logits


@mode(steps=NEW)
def manual_loop_padded_on_the_right(model, prompt):
    """Padding behind the prompt stays behind it; every row goes on at its own position."""
    mask = prompt(40, 33)["attention_mask"].flip(1)
    positions, logits = mask.sum(1, keepdim=True), []
    out = model(prompt(40, 40)["input_ids"] * mask, attention_mask=mask, use_cache=True)
    ids = out.logits.gather(1, (positions - 1)[..., None].expand(-1, -1, 100)).argmax(-1)
    for step in range(NEW):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        past = out.past_key_values
        out = model(ids, attention_mask=mask, position_ids=positions + step, past_key_values=past)
        logits.append(out.logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
    return logits


@mode(steps=NEW, passes=2)
def teacher_forced_without_a_mask(model, prompt):
    ids = prompt(60)["input_ids"]
    out = model(ids[:, :40], use_cache=True)
    logits = [out.logits]
    for start, stop in [(i, i + 1) for i in range(40, 40 + NEW)] + [(40 + NEW, 60)]:
        out = model(ids[:, start:stop], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return logits


@mode(steps=NEW - 1)
def inputs_embeds(model, prompt):
    inputs = prompt(40, 33)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    return generate(model, {"inputs_embeds": embeds.detach(), **inputs})


@mode(steps=NEW - 1)
def static_cache(model, prompt):
    return generate(model, prompt(40, 33), cache_implementation="static")


@mode(steps=NEW - 1)
def dynamic_cache_by_name(model, prompt):
    return generate(model, prompt(40, 33), cache_implementation="dynamic")


@mode(steps=NEW - 1)
def streaming(model, prompt):
    streamer = Collector()
    out = run(model, prompt(40), streamer=streamer)
    assert streamer.ended
    return [out.sequences, torch.cat([tokens.flatten() for tokens in streamer.received])]


@mode(steps=2 * (NEW - 1), passes=2)
def inference_mode_then_without(model, prompt):
    """Pages made in inference mode can be written outside of it."""
    with torch.inference_mode():
        first = run(model, prompt(40))
    ids = torch.cat([first.sequences, prompt(6)["input_ids"]], dim=1).clone()
    second = run(model, {"input_ids": ids}, past_key_values=first.past_key_values)
    return [second.sequences, *second.logits]


@mode(steps=NEW - 1)
def gradients_enabled(model, prompt):
    """Outside `no_grad`, as a beginner's loop is."""
    out = model(**prompt(40), use_cache=True)
    logits = [out.logits[:, -1:]]
    for _ in range(NEW - 1):
        out = model(logits[-1].argmax(-1), past_key_values=out.past_key_values)
        logits.append(out.logits)
    return logits


@mode(steps=NEW)
def past_given_by_position(model, prompt):
    """The decoder's own forward, with the cache as its fourth argument."""
    inputs, decoder = prompt(40, 33), model.get_decoder()
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = decoder(inputs["input_ids"], mask, positions, None)
    states, past = [out.last_hidden_state], out.past_key_values
    for token in range(NEW):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        ids = torch.full((2, 1), token + 3)
        states.append(decoder(ids, mask, (mask.cumsum(1) - 1)[:, -1:], past).last_hidden_state)
    return states


@mode(steps=0, passes=0)
def no_cache(model, prompt):
    return generate(model, prompt(40, 33), use_cache=False)


@mode(steps=0, passes=0)
def no_cache_plain_forward(model, prompt):
    return [model(**prompt(40, 33), use_cache=False).logits]


@mode(steps=0, passes=0)
def the_users_dynamic_cache(model, prompt):
    return generate(model, prompt(40, 33), past_key_values=DynamicCache(config=model.config))


class Collector(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.received: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.received.append(value.clone())

    def end(self) -> None:
        self.ended = True


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max()) < tolerance


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", MODES)
def test_at_full_budget_a_mode_gives_what_the_unpatched_model_gives(name, family, tiny, prompt) -> None:
    """One model in which every layer is paged, and one that mixes paged with sliding layers."""
    run_mode, steps, passes = MODES[name]
    model = tiny(family)
    theirs = run_mode(model, prompt)
    with sparsekv.patch(model, budget=4096, page_size=4, dense_layers=1) as patch:
        ours = run_mode(model, prompt)
    assert_close(ours, theirs)
    assert patch.stats.sparse_steps == 0
    if steps == SOME:
        assert patch.stats.dense_passes > 1, "a verification is a pass of several tokens over what the pages hold"
    else:
        assert (patch.stats.dense_steps, patch.stats.dense_passes) == (steps, passes)


SMALL = {"budget": 16, "page_size": 4, "sinks": 2, "recent": 4, "dense_layers": (0,)}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", MODES)
def test_at_a_small_budget_a_mode_gives_what_masking_the_other_pages_gives(
    name, family, tiny, prompt, naive_sparse
) -> None:
    """The whole path (digests, selection, beams that share pages, rolling back) against a mask over all keys."""
    run_mode, steps, _ = MODES[name]
    model, naive = tiny(family), tiny(family)
    if name != "the_users_dynamic_cache":  # that runs dense
        naive_sparse(naive, **SMALL)
    theirs = run_mode(naive, prompt)
    with sparsekv.patch(model, **SMALL, digest="minmax") as patch:
        ours = run_mode(model, prompt)
    assert_close(ours, theirs)
    if steps != SOME:
        assert patch.stats.sparse_steps + patch.stats.dense_steps == steps
        assert (patch.stats.sparse_steps > 0) == (steps > 0)


def test_layers_with_budgets_of_their_own(tiny, prompt, naive_sparse) -> None:
    """A function of the layer, asked once for those that can be sparse: of these six every second one slides."""
    model, naive = tiny("gemma3_text", num_hidden_layers=6), tiny("gemma3_text", num_hidden_layers=6)
    settings, asked = SMALL | {"dense_layers": ()}, []

    def budget(layer_idx: int) -> int:
        asked.append(layer_idx)
        return 12 + 4 * layer_idx

    naive_sparse(naive, **settings | {"budget": [12 + 4 * i for i in range(6)]})
    with sparsekv.patch(model, **settings | {"budget": budget, "digest": "minmax"}) as patch:
        assert patch.config.budget == ((1, 16), (3, 24), (5, 32))
        for mode in ("greedy", "beam_search"):
            assert_close(MODES[mode][0](model, prompt), MODES[mode][0](naive, prompt))
    assert asked == [1, 3, 5]
