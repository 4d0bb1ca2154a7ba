"""Dense accuracy of the testbed model: `python -m evaluation.testbed.evaluate` prints and saves a table.

Every question is asked alone, right after the story. An answer counts if all its words and the end of the
sequence are right. The answer's tokens are fed in and the model's best next tokens compared with them, which
is greedy decoding's result exactly: as long as all tokens are right, both have read the same text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

from sparsekv.hf.support import CACHE

from .batches import PAD_ID, WORD_IDS, question_ids
from .stories import ALL_TASKS, Question, Story, make_story

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
    tokens, is_answer = _question_batch(story.questions)
    logits = model(input_ids=tokens.to(device), **{CACHE: cache}, use_cache=True).logits
    right = logits[:, :-1].argmax(-1).cpu() == tokens[:, 1:]
    return (right | ~is_answer[:, 1:]).all(-1).tolist()


def _question_batch(questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with answers, padded on the right: ids and a mask of the answers, both `[questions, longest]`."""
    pairs = [question_ids(question) for question in questions]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), longest), PAD_ID)
    is_answer = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        is_answer[row, len(prompt) : end] = True
    return ids, is_answer


def accuracy(
    model: LlamaForCausalLM, tasks: Sequence[str], num_tokens: int, num_questions: int, seed: int = EVALUATION_SEED
) -> float:
    """Share of questions answered right, over stories of one length; `num_questions` is rounded up to stories."""
    right: list[bool] = []
    while len(right) < num_questions:
        story = make_story(num_tokens, tasks, QUESTIONS_PER_STORY, seed + len(right))
        right += answered_right(model, story)
    return sum(right) / len(right)


def accuracy_table(
    model: LlamaForCausalLM, lengths: Sequence[int], num_questions: int, path: Path | None = None
) -> dict[str, dict[str, float]]:
    """Accuracy by task and length, each task in stories of its own; saved after every length if `path` is given."""
    table: dict[str, dict[str, float]] = {task: {} for task in ALL_TASKS}
    for num_tokens in lengths:
        start = time.monotonic()
        for task in ALL_TASKS:
            table[task][str(num_tokens)] = round(accuracy(model, (task,), num_tokens, num_questions), 4)
        row = "  ".join(f"{task} {table[task][str(num_tokens)]:.3f}" for task in ALL_TASKS)
        print(f"{num_tokens}: {row}  ({time.monotonic() - start:.0f} s)", flush=True)
        if path is not None:
            report = {"questions": num_questions, "dtype": str(model.dtype), "accuracy": table}
            path.write_text(json.dumps(report, indent=2) + "\n")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="model folder; the committed one if left out")
    parser.add_argument("--out", type=Path, default=None, help="where to write the table, as JSON")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(CARD_LENGTHS))
    parser.add_argument("--questions", type=int, default=200, help="per task and length")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    from . import MODEL_DIR

    model = LlamaForCausalLM.from_pretrained(args.model or MODEL_DIR, dtype=getattr(torch, args.dtype))
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    accuracy_table(model, args.lengths, args.questions, args.out)


if __name__ == "__main__":
    main()
