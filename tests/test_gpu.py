"""On a GPU: the same answers as on the CPU. Run by `make test-gpu`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekv
from sparsekv.commands.demo import scene_of
from sparsekv.commands.side_by_side import ask
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.asking import prefill

pytestmark = pytest.mark.gpu


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 97}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, **sizes)
    return LlamaForCausalLM(config).to(dtype).eval()


def batch(device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (3, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    mask[1, :131] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 64},
}


@pytest.mark.parametrize("mode", MODES)
def test_full_budget_gives_the_unpatched_tokens(mode: str) -> None:
    model = tiny_llama().cuda()
    inputs = batch("cuda")
    if mode == "prompt lookup":  # one sequence only
        inputs = {name: tensor[2:] for name, tensor in inputs.items()}
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **MODES[mode]}
    expected = model.generate(**inputs, **options)
    with sparsekv.patch(model, budget=4096) as patch:
        assert torch.equal(model.generate(**inputs, **options), expected)
    assert patch.stats.dense_steps + patch.stats.dense_passes > 1
    assert patch.stats.pages_read > 0 or mode == "prompt lookup"


@pytest.mark.parametrize("digest", list(sparsekv.DIGESTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_budgets_read_the_same_pages_as_on_the_cpu(digest: str, dtype: torch.dtype) -> None:
    """Teacher-forced, so that one rounded logit does not change all that follows."""
    logits = {}
    for device in ("cpu", "cuda"):
        model = tiny_llama(dtype).to(device)
        inputs = batch(device)
        following = torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(2)).to(device)
        mask = inputs["attention_mask"]
        with torch.inference_mode(), sparsekv.patch(model, budget=96, digest=digest) as patch:
            cache = model(**inputs).past_key_values
            for i in range(following.shape[1]):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                out = model(input_ids=following[:, i : i + 1], attention_mask=mask, past_key_values=cache)
            logits[device] = out.logits[:, -1].float().cpu()
        assert patch.stats.sparse_steps == 10
        assert patch.stats.share < 1
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(logits["cuda"], logits["cpu"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv", ["plain", "int8", "int4"])
def test_the_testbed_answers_on_the_gpu(kv: str) -> None:
    model, tokenizer = testbed.load("cuda", torch.bfloat16)
    story = testbed.make_story(16384, ("needle",), num_questions=16, seed=5)
    scene = scene_of(story, tokenizer)
    with sparsekv.patch(model, budget=2048, kv=kv) as patch:
        cache = patch.new_cache()
        prefill(model, [scene.document], cache)
        answers = [ask(model, tokenizer, cache, scene, question) for question in scene.asks]
    assert sum(answer.is_right for answer in answers) >= 14
    assert patch.stats.sparse_steps == sum(answer.num_tokens for answer in answers)
