"""Training batches: stories followed by their questions and answers, or by themselves, as token ids.

One item of `StoryBatches` is the whole batch of one training step, a pure function of (schedule, seed, step),
so worker processes can write batches in any order and the training still sees the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsekv.errors import ConfigError
from sparsekv.evaluation.testbed import TASKS, Question, Story, make_story
from sparsekv.evaluation.testbed import vocabulary as vocab

WORD_IDS = {word: index for index, word in enumerate(vocab.all_words())}
PAD_ID = WORD_IDS[vocab.PAD]
LABELS = (*TASKS, "echo", "prose")  # what a position belongs to
ECHO, PROSE = LABELS.index("echo"), LABELS.index("prose")
ANSWER_WEIGHT, PROSE_WEIGHT = 1.0, 0.05
# How often a story is about a task: more often, the fewer tokens its answers have and the harder they are.
TASK_WEIGHTS = {
    "needle": 1,
    "many_keys": 2,
    "multi_value": 4,
    "multi_query": 1,
    "variable_tracking": 4,
    "frequent_word": 1,
}


@dataclass(frozen=True)
class Bucket:
    """One shape of batch: `batch` rows of a story and a block of up to `questions` questions.

    Without questions the block repeats the story, which teaches to look up and copy any word.
    """

    story_tokens: int
    question_tokens: int  # room for prompts and answers, padded
    batch: int
    questions: int


class Batch(NamedTuple):
    """What one step needs; `s` = scored positions of a row, those of answers and a sample of the prose."""

    ids: Tensor  # [batch, story_tokens + question_tokens] int64
    positions: Tensor  # [batch, s] int64: the token at position + 1 is predicted
    labels: Tensor  # [batch, s] int64: index in LABELS of the predicted token
    weights: Tensor  # [batch, s] float32


class StoryBatches(Dataset[Batch]):
    """The batch of every step of a schedule, from `first_step` on."""

    def __init__(self, schedule: Sequence[Bucket], seed: int, first_step: int = 0) -> None:
        self.schedule = schedule
        self.seed = seed
        self.first_step = first_step

    def __len__(self) -> int:
        return len(self.schedule) - self.first_step

    def __getitem__(self, index: int) -> Batch:
        step = self.first_step + index
        bucket = self.schedule[step]
        write = _questions if bucket.questions else _echo
        rows = []
        for row in range(bucket.batch):
            rng = random.Random(f"{self.seed}/{step}/{row}")
            rows.append(_scored(*write(bucket, rng), bucket.question_tokens, rng))
        return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def _echo(bucket: Bucket, rng: random.Random) -> tuple[list[int], list[int]]:
    """Ids and labels of a story told twice; all of the second telling is scored."""
    ids = [WORD_IDS[word] for word in _some_story(replace(bucket, questions=1), rng).words]
    return ids + ids, [PROSE] * len(ids) + [ECHO] * len(ids)


def _questions(bucket: Bucket, rng: random.Random) -> tuple[list[int], list[int]]:
    """Ids and labels of a story with its questions and answers."""
    story = _some_story(bucket, rng)
    ids = [WORD_IDS[word] for word in story.words]
    labels = [PROSE] * len(ids)
    num_tokens = bucket.story_tokens + bucket.question_tokens
    for question in rng.sample(story.questions, len(story.questions)):
        prompt, answer = question_ids(question)
        if len(ids) + len(prompt) + len(answer) > num_tokens:
            break
        ids += prompt + answer
        labels += [PROSE] * len(prompt) + [LABELS.index(question.task)] * len(answer)
    return ids + [PAD_ID] * (num_tokens - len(ids)), labels


def _some_story(bucket: Bucket, rng: random.Random) -> Story:
    """A story about one task, or two, or all of them; fewer questions where the facts do not fit."""
    tasks = _some_tasks(rng, count=rng.choice((1, 1, 2, len(TASKS))))
    questions = bucket.questions
    while True:
        try:
            return make_story(bucket.story_tokens, tasks, questions, rng.getrandbits(32))
        except ConfigError:
            if questions == 1:  # no question of these tasks fits
                tasks = _some_tasks(rng, count=1)
            questions = max(1, questions * 3 // 4)


def _some_tasks(rng: random.Random, count: int) -> list[str]:
    """Different tasks, drawn by weight."""
    urgency = {task: rng.random() ** (1 / weight) for task, weight in TASK_WEIGHTS.items()}
    return sorted(urgency, key=urgency.__getitem__, reverse=True)[:count]


def question_ids(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with the end of sequence after it."""
    prompt, answer = ([WORD_IDS[word] for word in text.split()] for text in (question.prompt, question.answer))
    return prompt, [*answer, WORD_IDS[vocab.END]]


def _scored(
    ids: list[int], labels: list[int], num_scored: int, rng: random.Random
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A row of a batch: the positions whose next token is scored are all of the answers, and a sample of the prose.

    A row scores a fixed number of positions, so that a long story does not drown its few questions in prose.
    """
    targets = np.array(labels[1:])
    answers, prose = np.flatnonzero(targets != PROSE), np.flatnonzero(targets == PROSE)
    draw = np.random.default_rng(rng.getrandbits(32)).integers(0, len(prose), num_scored - len(answers))
    positions = np.concatenate([answers, prose[draw]])
    weights = np.where(np.arange(num_scored) < len(answers), ANSWER_WEIGHT, PROSE_WEIGHT).astype(np.float32)
    return np.array(ids), positions, targets[positions], weights
