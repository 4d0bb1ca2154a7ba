"""The captured decode step of `generate`, on a GPU: token for token what an eager step gives, whatever the call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsekv
from sparsekv.digests import DIGESTS
from sparsekv.hf import attention, chunks, generation
from sparsekv.policies import POLICIES
from sparsekv.testing.consistency import assert_consistent
from sparsekv.testing.steps import Unsteady

pytestmark = pytest.mark.gpu
# Not fused: random weights in bf16 choose between equal logits, so last bits would decide.
SETTINGS: dict[str, Any] = {"budget": 64, "page_size": 16, "recent": 16, "dense_layers": 1, "fuse": False}
WIDE = {"hidden_size": 128, "head_dim": 64, "num_hidden_layers": 3, "max_position_embeddings": 8192}

Inputs = dict[str, Tensor]


@pytest.fixture
def model(tiny) -> Callable[..., PreTrainedModel]:
    """`model()`: a small model on the GPU, in bfloat16, with heads that the kernels serve."""

    def build(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **settings: Any) -> PreTrainedModel:
        made: PreTrainedModel = tiny(family, **WIDE | settings).to("cuda", dtype)
        return made

    return build


@pytest.fixture
def ids(prompt) -> Callable[..., Inputs]:
    """`ids(300, 20)`: a left-padded batch of prompts on the GPU."""
    return lambda *lengths: {name: tensor.cuda() for name, tensor in prompt(*lengths).items()}


def tokens(model: PreTrainedModel, inputs: Inputs, new: int = 40, **settings: Any) -> Tensor:
    torch.manual_seed(5)
    wanted: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    out: Tensor = model.generate(**inputs, **wanted | settings)
    return out


def eager(model: PreTrainedModel, inputs: Inputs, new: int = 40, **settings: Any) -> Tensor:
    return tokens(model, inputs, new, disable_compile=True, **settings)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "qwen2", "mistral", "phi3", "olmo2", "glm4", "smollm3", "opt", "mixtral"]
)
def test_captured_equals_eager(family, model, ids) -> None:
    made, inputs = model(family), ids(300)
    with sparsekv.patch(made, **SETTINGS) as patch:
        captured = tokens(made, inputs)
        counted, replays = patch.stats.as_dict(), patch.decoder.replays
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs))
        assert patch.decoder.refusal is None
        assert (patch.decoder.captures, replays) == (1, 37)  # of 39 steps one warms up, one is compared
        assert patch.stats.as_dict() == counted
        assert counted["sparse_steps"] == 39


def test_a_step_of_many_layers_is_cut(model, ids) -> None:
    made, inputs = model(num_hidden_layers=4), ids(300)
    with sparsekv.patch(made, **SETTINGS) as patch:
        captured = tokens(made, inputs)
        (step,) = patch.decoder._steps.values()
        assert len(step.graphs) == 2
        assert torch.equal(captured, eager(made, inputs))


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("digest", list(DIGESTS))
@pytest.mark.parametrize("budget", [64, 0.3])
def test_every_policy_and_digest(policy, digest, budget, model, ids) -> None:
    made, inputs = model(), ids(300, 41)
    settings = SETTINGS | {"policy": policy, "digest": digest, "budget": budget}
    with sparsekv.patch(made, **settings) as patch:
        captured, counted = tokens(made, inputs), patch.stats.as_dict()
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs))
        assert patch.decoder.replays > 0
        assert patch.stats.as_dict() == counted


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("policy", ["top_k", "oracle", "all"])
@pytest.mark.parametrize("kv", ["int8", "int4", "int4-int8"])
def test_pages_in_fewer_bits(kv, policy, backend, model, ids) -> None:
    made, inputs = model(), ids(300, 41)
    with sparsekv.patch(made, **SETTINGS | {"kv": kv, "policy": policy, "backend": backend}) as patch:
        captured, counted = tokens(made, inputs), patch.stats.as_dict()
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs))
        assert patch.decoder.replays > 0
        assert patch.stats.as_dict() == counted


@pytest.mark.parametrize("policy", ["top_k", "oracle", "unsteady"])
def test_steps_that_read_fewer_pages_than_the_budget(policy, model, ids, monkeypatch) -> None:
    """How many, the slots alone tell: they are counted after every replay, and of a step that is compared once."""
    monkeypatch.setitem(POLICIES._classes, "unsteady", Unsteady)
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 64)
    made, inputs = model(), ids(300, 41)
    settings = SETTINGS | {"policy": policy, "budget": 256, "group_pooling": "share", "min_share": 0.05}
    with sparsekv.patch(made, **settings) as patch:
        captured, counted = tokens(made, inputs), patch.stats.as_dict()
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs))
        assert patch.decoder.replays > 0
        assert patch.stats.as_dict() == counted
        assert counted["pages_read"] < counted["pages_total"]


def test_budgets_by_layer(model, ids) -> None:
    """One after the other is outgrown, and every layer reads and counts as in an eager step."""
    made, inputs = model(num_hidden_layers=4), ids(90, 41)
    settings = SETTINGS | {"budget": {1: 96, 2: 0.5, "rest": 160}, "dense_layers": 0}
    with sparsekv.patch(made, **settings) as patch:
        captured = tokens(made, inputs, 120)
        counted, shares = patch.stats.as_dict(), patch.stats.shares
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs, 120))
        assert patch.decoder.refusal is None
        assert patch.decoder.replays > 100
        assert counted["sparse_steps"] == 119
        assert shares[2] < shares[1] < shares[0] == shares[3] < 1
        assert patch.decoder.captures <= 3


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float32_and_the_reference(backend, model, ids) -> None:
    """No kernels: plain torch is captured all the same."""
    made, inputs = model(dtype=torch.float32), ids(300, 41)
    with sparsekv.patch(made, backend=backend, **SETTINGS) as patch:
        assert torch.equal(tokens(made, inputs), eager(made, inputs))
        assert patch.decoder.replays > 0


def test_other_prompts_need_no_other_capture(model, ids) -> None:
    made = model()
    with sparsekv.patch(made, **SETTINGS) as patch:
        for length in (450, 300, 200, 65):  # a longer one may need more memory elsewhere
            inputs = ids(length)
            captured = tokens(made, inputs)
            assert patch.decoder.captures == 1
            assert torch.equal(captured, eager(made, inputs))


def test_a_new_batch_size_is_captured_once(model, ids) -> None:
    made = model()
    with sparsekv.patch(made, **SETTINGS) as patch:
        for lengths, captures in [((300, 20, 131), 1), ((300,), 2), ((30, 250, 16), 2), ((290,), 2)]:
            captured = tokens(made, ids(*lengths))
            assert torch.equal(captured, eager(made, ids(*lengths)))
            assert patch.decoder.captures == captures


def test_a_pool_that_grows_is_captured_again(model, ids, monkeypatch) -> None:
    monkeypatch.setattr(generation, "AHEAD", 16)
    made, inputs = model(), ids(300, 100)
    with sparsekv.patch(made, **SETTINGS) as patch:
        captured = tokens(made, inputs, new=2500)
        assert torch.equal(captured, eager(made, inputs, new=2500))
        assert 2 <= patch.decoder.captures <= 20
        assert patch.decoder.replays > 2400


def test_crossing_the_budget(model, ids) -> None:
    """Up to the budget nothing is chosen, by another launch."""
    made, inputs = model(), ids(40)
    with sparsekv.patch(made, **SETTINGS) as patch:
        assert torch.equal(tokens(made, inputs, new=80), eager(made, inputs, new=80))
        assert patch.stats.dense_steps > 0
        assert patch.stats.sparse_steps > 0
        assert patch.decoder.captures == 2


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_k": 20},
        {"repetition_penalty": 1.3},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 37},
        {"cache_implementation": "static"},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=str,
)
def test_ways_to_generate(how, model, ids) -> None:
    made, inputs = model(), ids(300)
    with sparsekv.patch(made, **SETTINGS):
        captured = tokens(made, inputs, **how)
        assert torch.equal(captured, eager(made, inputs, **how))


def test_assisted_decoding(model, ids) -> None:
    made, assistant, inputs = model(), model(num_hidden_layers=1), ids(300)
    with sparsekv.patch(made, **SETTINGS), sparsekv.patch(assistant, **SETTINGS):
        captured = tokens(made, inputs, assistant_model=assistant)
        assert torch.equal(captured, eager(made, inputs, assistant_model=assistant))


def test_streaming_and_stopping(model, ids) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            pass

    made, inputs, streamer = model(), ids(300), Streamer()
    with sparsekv.patch(made, **SETTINGS):
        free = tokens(made, inputs)
        stop = int(free[0, 320])
        stopped = tokens(made, inputs, min_new_tokens=0, eos_token_id=stop, streamer=streamer)
    assert torch.equal(stopped, free[:, : stopped.shape[1]])
    assert int(stopped[0, -1]) == stop
    assert streamer.seen == stopped[0].tolist()


def test_inner_states_are_recorded_eagerly(model, ids) -> None:
    made, inputs = model(), ids(300)
    with sparsekv.patch(made, **SETTINGS) as patch:
        wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
        out: Any = made.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **wanted)
        assert patch.decoder.replays == 0
        assert not torch.equal(out.hidden_states[2][-1], out.hidden_states[3][-1])


def test_raw_logits_are_kept(model, ids) -> None:
    made, inputs = model(), ids(300)
    with sparsekv.patch(made, **SETTINGS):
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        captured: Any = tokens(made, inputs, **wanted)
        plain: Any = eager(made, inputs, **wanted)
    for ours, theirs in zip(captured.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_turns_crops_and_forks_of_ones_own_cache(model, ids) -> None:
    made = model()
    text = tokens(made, ids(700), new=1)  # random tokens to go on with

    def turns(**settings: Any) -> list[Tensor]:
        cache, outs = patch.new_cache(), []
        for length in (300, 400, 500):
            outs.append(tokens(made, {"input_ids": text[:, :length]}, 20, past_key_values=cache, **settings))
            cache.crop(-(cache.get_seq_length() - length + 1))
            assert_consistent(cache._store)
        branch = cache.fork(budget=96)
        outs.append(tokens(made, {"input_ids": text[:, :600]}, 20, past_key_values=branch, **settings))
        assert_consistent(cache._store, branch._store)
        return outs

    with sparsekv.patch(made, **SETTINGS) as patch:
        captured = turns()
        assert patch.decoder.replays > 0
        for ours, theirs in zip(captured, turns(disable_compile=True), strict=True):
            assert torch.equal(ours, theirs)


def test_four_thousand_tokens(model, ids) -> None:
    """In one go, and every digest is then what a fresh build would give."""
    made, inputs = model(), ids(100, 37)
    with sparsekv.patch(made, **SETTINGS) as patch:
        cache = patch.new_cache()
        captured = tokens(made, inputs, 4000, past_key_values=cache)
        assert cache.get_seq_length() == 100 + 3999
        assert_consistent(cache._store)
        assert patch.decoder.replays > 3900
        del cache
        assert torch.equal(captured[:, :1100], eager(made, inputs, 1000))


def test_two_models_with_different_settings(model, ids) -> None:
    one, other, inputs = model(), model("qwen3"), ids(300)
    expected = []
    for made, budget in ((one, 64), (other, 96)):
        with sparsekv.patch(made, **SETTINGS | {"budget": budget}):
            expected.append(eager(made, inputs))
    with sparsekv.patch(one, **SETTINGS), sparsekv.patch(other, **SETTINGS | {"budget": 96}):
        for _ in range(2):
            assert torch.equal(tokens(one, inputs), expected[0])
            assert torch.equal(tokens(other, inputs), expected[1])


@pytest.fixture
def little_memory() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 30)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_after_running_out_of_memory(model, ids, little_memory) -> None:
    made, inputs = model(), ids(300)
    with sparsekv.patch(made, **SETTINGS):
        expected = eager(made, inputs)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                tokens(made, {"input_ids": ids(6000)["input_ids"].repeat(400, 1)})
            assert torch.equal(tokens(made, inputs), expected)


def test_memory_is_kept_for_the_next_call_and_given_back(model, ids) -> None:
    made = model()
    with sparsekv.patch(made, **SETTINGS):  # what libraries keep for themselves, they take now
        tokens(made, ids(300))
    gc.collect()
    before = torch.cuda.memory_allocated()
    with sparsekv.patch(made, **SETTINGS) as patch:
        tokens(made, ids(3000))
        kept = torch.cuda.memory_allocated()
        tokens(made, ids(3000))
        assert torch.cuda.memory_allocated() == kept > before
        patch.free_memory()
        gc.collect()
        assert torch.cuda.memory_allocated() - before < 1 << 20
        assert torch.equal(tokens(made, ids(300)), eager(made, ids(300)))


def test_a_changed_model_is_noticed(model, ids) -> None:
    """A weight put in the place of another, a forward exchanged: what was captured is thrown away, and nothing of it
    is left in the pages."""
    made, inputs = model(), ids(300)
    mlp = made.model.layers[1].mlp

    def with_pages(**settings: Any) -> tuple[Tensor, list[Tensor]]:
        cache = patch.new_cache(reserve_tokens=512)
        out = tokens(made, inputs, past_key_values=cache, **settings)
        assert_consistent(cache._store)
        return out, [tensor for layer in cache.to_dynamic().layers for tensor in (layer.keys, layer.values)]

    def check() -> Tensor:
        captured, ours = with_pages()
        expected, theirs = with_pages(disable_compile=True)
        assert torch.equal(captured, expected)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        return captured

    with sparsekv.patch(made, **SETTINGS) as patch:
        first = check()
        assert torch.equal(first, check())
        assert patch.decoder.captures == 1  # so the graph is there when the model changes
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach() * -2)
        second = check()
        forward = mlp.forward
        mlp.forward = lambda x: forward(x) * 3
        third = check()
        assert patch.decoder.captures == 3
        assert patch.decoder.refusal is None
    assert len({tuple(out[0].tolist()) for out in (first, second, third)}) == 3


def test_a_model_that_was_away_meanwhile(model, ids) -> None:
    """Where its weights were there is no memory any more."""
    made, inputs = model(), ids(300)
    with sparsekv.patch(made, **SETTINGS) as patch:
        expected = tokens(made, inputs)
        made.cpu()
        torch.cuda.empty_cache()
        between = torch.empty(1 << 24, device="cuda")  # where the weights might be put back to
        made.cuda()
        assert torch.equal(tokens(made, inputs), expected)
        assert patch.decoder.refusal is None
        del between


def test_a_forward_that_cannot_be_captured_runs_eagerly(model, ids) -> None:
    made, inputs = model(), ids(300)
    made.model.layers[1].register_forward_hook(lambda module, args, output: float(args[0].sum()) and None)
    with sparsekv.patch(made, **SETTINGS) as patch:
        with pytest.warns(UserWarning, match="decodes LlamaForCausalLM eagerly: its forward cannot be captured"):
            captured = tokens(made, inputs)
        assert torch.equal(captured, eager(made, inputs))
        assert "decode loop of generate: eager (its forward cannot be captured" in str(patch)
        assert patch.stats.sparse_steps == 2 * 39
    torch.cuda.synchronize()


def test_out_of_memory_while_capturing_ends_with_the_call(model, ids) -> None:
    """The next one captures."""
    made, inputs = model(), ids(300)

    def hook(module: Any, args: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("a test")

    handle = made.model.layers[1].register_forward_pre_hook(hook)
    with sparsekv.patch(made, **SETTINGS) as patch:
        with pytest.warns(UserWarning, match="memory ran out while a step was captured"):
            first = tokens(made, inputs)
        assert patch.decoder.replays == 0
        handle.remove()
        second = tokens(made, inputs)
        assert patch.decoder.replays >= 37
        assert torch.equal(first, second)
        assert torch.equal(first, eager(made, inputs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: run it on a machine that has them")
def test_a_model_that_moves_to_another_gpu_is_captured_there(model, ids) -> None:
    made, inputs = model(), ids(300)
    with sparsekv.patch(made, **SETTINGS) as patch:
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            made.to(device)
            there = {name: tensor.to(device) for name, tensor in inputs.items()}
            replays = patch.decoder.replays
            assert torch.equal(tokens(made, there), eager(made, there))
            assert patch.decoder.refusal is None
            assert patch.decoder.replays - replays >= 37


def test_a_forward_that_counts_steps_itself_runs_eagerly(model, ids) -> None:
    """Its graph would repeat the number it was captured with: noticed at the next step, before it is used."""
    made, inputs, count = model(), ids(300), [0]

    def hook(module: Any, args: Any, output: Any) -> Any:
        count[0] += 1
        return output * (1 + count[0] % 7)

    made.model.layers[1].mlp.register_forward_hook(hook)
    with sparsekv.patch(made, **SETTINGS) as patch:
        with pytest.warns(UserWarning, match="a captured step gives other logits than an eager one"):
            tokens(made, inputs)
        assert patch.decoder.replays <= 1


def test_capture_is_a_setting(model, ids) -> None:
    made, inputs = model(), ids(300)
    with sparsekv.patch(made, capture=False, **SETTINGS) as patch:
        tokens(made, inputs)
        assert patch.decoder.replays == 0
        assert "decode loop of generate: eager (capture=False)" in str(patch)


def test_layers_that_are_not_in_pages_run_eagerly(model, ids) -> None:
    made, inputs = model("diffllama"), ids(300)
    with sparsekv.patch(made, **SETTINGS) as patch:
        assert torch.equal(tokens(made, inputs), eager(made, inputs))
        assert patch.decoder.replays == 0
        assert "decode loop of generate: eager (not in pages: layers 0" in str(patch)


HYBRIDS = (
    "qwen3_next olmo_hybrid bamba granitemoehybrid nemotron_h jamba lfm2_moe falcon_h1 zamba zamba2 zaya".split()
)


@pytest.mark.parametrize("lengths", [(90,), (90, 41)], ids=str)
@pytest.mark.parametrize("family", HYBRIDS)
def test_states_are_captured(family, lengths, hybrid, ids) -> None:
    """Another call of the same batch finds them where they were."""
    made, inputs = hybrid(family).to("cuda", torch.bfloat16), ids(*lengths)
    with sparsekv.patch(made, **SETTINGS) as patch:
        captured, counted = tokens(made, inputs), patch.stats.as_dict()
        assert (patch.decoder.refusal, patch.decoder.captures, patch.decoder.replays) == (None, 1, 37)
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs))
        assert patch.stats.as_dict() == counted
        assert torch.equal(captured, tokens(made, inputs))
        assert patch.decoder.captures == 1


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prefill_chunk_size": 37}, {"do_sample": True}], ids=str)
def test_ways_to_generate_with_states(how, hybrid, ids) -> None:
    made, inputs = hybrid("qwen3_next").to("cuda", torch.bfloat16), ids(90, 41)
    with sparsekv.patch(made, **SETTINGS):
        captured = tokens(made, inputs, **how)
        assert torch.equal(captured, eager(made, inputs, **how))


def test_keys_and_values_that_layers_share_are_captured(model, ids) -> None:
    """(Gemma 3n's own forward copies a number from the host, and cannot be captured.)"""
    made, inputs = model("gemma4_text", num_hidden_layers=6, global_head_dim=64, sliding_window=64), ids(300, 41)
    with sparsekv.patch(made, **SETTINGS) as patch:
        captured, counted = tokens(made, inputs), patch.stats.as_dict()
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs))
        assert (patch.decoder.refusal, patch.decoder.replays > 30) == (None, True)
        assert patch.stats.as_dict() == counted


@pytest.mark.parametrize("lengths", [(300,), (20,), (300, 41)], ids=str)
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "mistral", "llama4_text"])
def test_sliding_windows_are_captured(family, lengths, model, ids) -> None:
    """Full ones and such as fill, and chunks; a window's pages change hands behind one graph. Llama 4's attention
    counts tokens, too: every 16th changes what it computes."""
    size = "attention_chunk_size" if family == "llama4_text" else "sliding_window"
    made, inputs = model(family, **{size: 64}, num_hidden_layers=4), ids(*lengths)
    with sparsekv.patch(made, **SETTINGS) as patch:
        captured, counted = tokens(made, inputs, 120), patch.stats.as_dict()
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs, 120))
        assert patch.decoder.refusal is None
        assert patch.decoder.replays > 100
        assert patch.stats.as_dict() == counted


@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
@pytest.mark.parametrize("lengths", [(300,), (20,), (300, 41)], ids=str)
def test_latents_are_captured(lengths, digest, model, ids) -> None:
    """Of real widths: in kernels; min/max, as no kernel makes or scores them there, partly in plain torch."""
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    made, inputs = model("deepseek_v3", **sizes, head_dim=64), ids(*lengths)
    with sparsekv.patch(made, **SETTINGS, digest=digest) as patch:
        captured, counted = tokens(made, inputs), patch.stats.as_dict()
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs))
        assert patch.decoder.refusal is None
        assert patch.decoder.replays > 30
        assert patch.stats.as_dict() == counted
    assert all(status.is_in_place for status in patch.layers)


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text", "deepseek_v3"])
def test_windows_and_latents_in_fewer_bits_are_captured(family, kv, model, ids) -> None:
    """By kernels and in plain torch."""
    sizes = {
        "gemma3_text": {"sliding_window": 64},
        "llama4_text": {"attention_chunk_size": 64},
        "deepseek_v3": {"kv_lora_rank": 64, "head_dim": 8},
    }
    made, inputs = model(family, **sizes[family], num_hidden_layers=4), ids(300, 41)
    with sparsekv.patch(made, **SETTINGS, kv=kv) as patch:
        captured, counted = tokens(made, inputs), patch.stats.as_dict()
        patch.stats.reset()
        assert torch.equal(captured, eager(made, inputs))
        assert (patch.decoder.refusal, patch.decoder.replays > 30) == (None, True)
        assert patch.stats.as_dict() == counted


def test_latents_that_are_all_read_are_the_unpatched_model(model, ids, decode, distance) -> None:
    """To rounding; captured from the third step on."""
    made, inputs = model("deepseek_v3", torch.float32, head_dim=8), ids(300, 41)
    unpatched = decode(made, inputs)
    with sparsekv.patch(made, **SETTINGS | {"budget": 4096}) as patch:
        patched = decode(made, inputs)
    assert patch.decoder.replays > 0
    assert torch.equal(patched.sequences, unpatched.sequences)
    assert distance(patched, unpatched) < 1e-2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_in_and_out_of_inference_mode(context, model, ids) -> None:
    made, inputs = model(), ids(300)
    with sparsekv.patch(made, **SETTINGS):
        expected = eager(made, inputs)
        with context():
            assert torch.equal(tokens(made, inputs), expected)
        assert torch.equal(tokens(made, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [(900,), (900, 130, 517)], ids=str)
def test_long_prompts_in_chunks(dtype, lengths, model, ids, monkeypatch) -> None:
    """Without masks, by PyTorch's kernels over two parts of the keys: what the whole prompt at once gives."""
    made, inputs = model(dtype=dtype), ids(*lengths)
    with sparsekv.patch(made, **SETTINGS | {"budget": 1024}):
        whole: Any = tokens(made, inputs, 4, output_logits=True, return_dict_in_generate=True)
        monkeypatch.setattr(attention, "LARGE_MASK", 0)
        monkeypatch.setattr(chunks, "CHUNK", 256)
        monkeypatch.setattr(chunks, "WHOLE", 512)
        chunked: Any = tokens(made, inputs, 4, output_logits=True, return_dict_in_generate=True)
    exact, ours = whole.logits[0].float(), chunked.logits[0].float()
    assert float((ours - exact).norm() / exact.norm()) < (0.03 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma"])
def test_by_default_the_same_tokens(family, model, ids) -> None:
    made, inputs = model(family, dtype=torch.float32), ids(300, 41)
    with sparsekv.patch(made, **SETTINGS | {"fuse": True}) as patch:
        captured = tokens(made, inputs, 40)
        assert patch.decoder.replays == 37
        assert torch.equal(captured, eager(made, inputs, 40))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_fused(family, fuse, model, ids) -> None:
    """Norms and rotary embeddings in one kernel each give the same but for rounding; nothing else is touched."""
    made, inputs = model(family), ids(300, 41)
    logits = {"return_dict_in_generate": True, "output_logits": True}
    with sparsekv.patch(made, **SETTINGS | {"budget": 1024, "fuse": fuse}) as patch:
        ours: Any = tokens(made, inputs, 6, **logits)
        theirs: Any = eager(made, inputs, 6, **logits)
        assert patch.decoder.refusal is None
        assert patch.decoder.replays == 3
    assert "forward" not in vars(made.model.norm)
    same = (ours.sequences == theirs.sequences)[:, 300:].all(0).cumprod(0).sum()  # until rounding chose another token
    assert same == 6 if not fuse else same >= 2
    for a, b in list(zip(ours.logits, theirs.logits, strict=True))[: int(same)]:
        assert float((a.float() - b.float()).norm() / b.float().norm()) <= (0.03 if fuse else 0)
