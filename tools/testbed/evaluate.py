"""Dense accuracy of the testbed model: `python -m tools.testbed.evaluate` prints a table and, with --out, saves it.

Every question is asked alone, right after the story. An answer counts if all its words and the end of the
sequence are right. The answer's tokens are fed in and the model's best next tokens compared with them, which
is greedy decoding's result exactly: as long as all tokens are right, both have read the same text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

from sparsekv.evaluation import testbed
from sparsekv.evaluation.testbed import TASKS, Story, make_story
from sparsekv.hf import models
from sparsekv.hf.support import CACHE

from .batches import PAD_ID, WORD_IDS, question_ids

CARD_LENGTHS = (4096, 8192, 16384, 32768)
EVALUATION_SEED = 1_000_000  # training draws 32-bit seeds at random; these stories are others
QUESTIONS_PER_STORY = 8


@torch.inference_mode()
def answered_right(model: LlamaForCausalLM, story: Story) -> list[bool]:
    """For each question of a story, asked alone, whether greedy decoding answers it right."""
    device = model.device
    ids = torch.tensor([[WORD_IDS[word] for word in story.words]], device=device)
    cache = DynamicCache(config=model.config)
    model.model(input_ids=ids, **{CACHE: cache}, use_cache=True)
    cache.batch_repeat_interleave(len(story.questions))
    pairs = [question_ids(question) for question in story.questions]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    rows = [prompt + answer + [PAD_ID] * (longest - len(prompt) - len(answer)) for prompt, answer in pairs]
    best = model(input_ids=torch.tensor(rows, device=device), **{CACHE: cache}, use_cache=True).logits.argmax(-1)
    return [
        said[len(prompt) - 1 : len(prompt) + len(answer) - 1] == answer
        for said, (prompt, answer) in zip(best.tolist(), pairs, strict=True)
    ]


def accuracy(model: LlamaForCausalLM, task: str, num_tokens: int, num_questions: int) -> float:
    """Share of questions answered right, over stories of one length; `num_questions` is rounded up to stories."""
    right: list[bool] = []
    while len(right) < num_questions:
        story = make_story(num_tokens, (task,), QUESTIONS_PER_STORY, EVALUATION_SEED + len(right))
        right += answered_right(model, story)
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=testbed.NAME, help="model folder; the committed one if left out")
    parser.add_argument("--out", type=Path, default=None, help="where to write the table, as JSON")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(CARD_LENGTHS))
    parser.add_argument("--questions", type=int, default=200, help="per task and length")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    model, _ = models.load(args.model, models.AUTO, args.dtype)
    table: dict[str, dict[str, float]] = {task: {} for task in TASKS}
    for num_tokens in args.lengths:
        for task in TASKS:
            table[task][str(num_tokens)] = round(accuracy(model, task, num_tokens, args.questions), 4)
            print(f"{num_tokens} {task} {table[task][str(num_tokens)]:.3f}", flush=True)
    if args.out is not None:
        report = {"questions": args.questions, "dtype": str(model.dtype), "accuracy": table}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
