"""The testbed's model answers on a GPU as on the CPU: captured and eager, by kernels and in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsekv
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.asking import prefill
from sparsekv.evaluation.testbed import Story, make_story

pytestmark = pytest.mark.gpu
TOKENS, BUDGET = 16_384, 1024
TASKS = ("needle", "many_keys", "multi_query")
Answers = list[list[int]]


def stories(count: int, questions: int) -> list[Story]:
    return [make_story(TOKENS, TASKS, questions, seed) for seed in range(count)]


def answers(model: Any, tokenizer: Any, told: list[Story], capture: bool = True, **settings: Any) -> Answers:
    """What the model says: a story at once, then its questions and their answers token by token, on forks."""
    said = []
    with sparsekv.patch(model, budget=BUDGET, **settings) as patch, torch.inference_mode():
        for story in told:
            cache = patch.new_cache()
            prefill(model, [tokenizer(story.text).input_ids], cache)
            for question in story.questions:
                forward = model.get_compiled_call(None) if capture else model  # what generate's loop calls
                ids = tokenizer(question.prompt).input_ids
                wanted = len(tokenizer(question.answer, add_special_tokens=False).input_ids) + 1
                said.append(answer(forward, cache.fork(), ids, wanted, model.device))
        if capture and model.device.type == "cuda":
            assert patch.decoder.refusal is None
            assert patch.decoder.replays > 10 * len(said)
            assert patch.decoder.captures <= 2 * len(told)  # forks use the same graph
    return said


def answer(forward: Any, branch: sparsekv.PagedCache, ids: list[int], wanted: int, device: torch.device) -> list[int]:
    said = []
    for step in range(len(ids) + wanted - 1):
        token = ids[step] if step < len(ids) else said[-1]
        out = forward(input_ids=torch.tensor([[token]], device=device), past_key_values=branch, use_cache=True)
        if step >= len(ids) - 1:
            said.append(int(out.logits[0, -1].argmax()))
    assert branch.stats.sparse_steps == step + 1
    return said


def test_the_same_tokens_as_on_the_cpu() -> None:
    """In float32 and plain torch, so that nothing but the device differs."""
    model, tokenizer = testbed.load(dtype=torch.float32, device=torch.device("cpu"))
    told = stories(2, 4)
    expected = answers(model, tokenizer, told)
    model = model.to("cuda")
    assert answers(model, tokenizer, told, capture=False, backend="reference") == expected
    assert answers(model, tokenizer, told, backend="reference") == expected


def test_kernels_answer_as_well_as_plain_torch() -> None:
    """In bfloat16; half a point is one question in two hundred."""
    model, tokenizer = testbed.load(dtype=torch.bfloat16, device=torch.device("cuda"))
    told = stories(17, 12)
    right = [tokenizer(q.answer, add_special_tokens=False).input_ids for story in told for q in story.questions]

    def share(**settings: Any) -> float:
        said = answers(model, tokenizer, told, **settings)
        return sum(one[: len(wanted)] == wanted for one, wanted in zip(said, right, strict=True)) / len(right)

    by_kernels, in_torch = share(), share(backend="reference")
    print(f"\nright: {by_kernels:.4f} by kernels, {in_torch:.4f} in plain torch, of {len(right)} questions")
    assert len(right) >= 200
    assert in_torch > 0.9
    assert abs(by_kernels - in_torch) <= 0.005
    some = told[:3]
    assert answers(model, tokenizer, some) == answers(model, tokenizer, some, capture=False)
