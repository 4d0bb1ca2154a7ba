"""Training batches: stories followed by their questions and answers, or by themselves, as token ids.

One item of `StoryBatches` is the whole batch of one training step, a pure function of (schedule, seed, step),
so worker processes can write batches in any order and the training still sees the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from sparsekv.errors import ConfigError

from . import vocabulary as vocab
from .stories import ALL_TASKS, Question, Story, make_story

WORD_IDS = {word: index for index, word in enumerate(vocab.all_words())}
PAD_ID = WORD_IDS[vocab.PAD]
LABELS = (*ALL_TASKS, "echo", "prose")  # what a position belongs to
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

    @property
    def num_tokens(self) -> int:
        return self.story_tokens + self.question_tokens


@dataclass(frozen=True)
class Batch:
    """What one step needs; `s` = scored positions of a row, those of answers and a sample of the prose."""

    story_tokens: int
    ids: torch.Tensor  # [batch, num_tokens] int64
    positions: torch.Tensor  # [batch, s] int64: the token at position + 1 is predicted
    labels: torch.Tensor  # [batch, s] int64: index in LABELS of the predicted token
    weights: torch.Tensor  # [batch, s] float32

    def to(self, device: torch.device) -> Batch:
        move = [t.to(device, non_blocking=True) for t in (self.ids, self.positions, self.labels, self.weights)]
        return Batch(self.story_tokens, *move)

    def pin_memory(self) -> Batch:
        """Called by the data loader, so that copies to the GPU overlap with its work."""
        pinned = [t.pin_memory() for t in (self.ids, self.positions, self.labels, self.weights)]
        return Batch(self.story_tokens, *pinned)


class StoryBatches(Dataset[Batch]):
    """The batch of every step of a schedule."""

    def __init__(self, schedule: Sequence[Bucket], seed: int, first_step: int = 0) -> None:
        self.schedule = schedule
        self.seed = seed
        self.first_step = first_step

    def __len__(self) -> int:
        return len(self.schedule) - self.first_step

    def __getitem__(self, index: int) -> Batch:
        step = self.first_step + index
        bucket = self.schedule[step]
        write = _row if bucket.questions else _echo
        rows = [write(bucket, random.Random(f"{self.seed}/{step}/{row}")) for row in range(bucket.batch)]
        ids, positions, labels, weights = (np.stack(column) for column in zip(*rows, strict=True))
        return Batch(
            bucket.story_tokens,
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            torch.from_numpy(labels),
            torch.from_numpy(weights),
        )


Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # ids, scored positions, labels, weights


def _echo(bucket: Bucket, rng: random.Random) -> Row:
    """A story told twice; all of the second telling is scored."""
    story = _some_story(replace(bucket, questions=1), rng)
    ids = [WORD_IDS[word] for word in story.words]
    return _score(np.array(ids + ids), np.array([PROSE] * len(ids) + [ECHO] * len(ids)), bucket, rng)


def _row(bucket: Bucket, rng: random.Random) -> Row:
    """A story with its questions and answers."""
    story = _some_story(bucket, rng)
    ids = [WORD_IDS[word] for word in story.words]
    labels = [PROSE] * len(ids)
    for question in rng.sample(story.questions, len(story.questions)):
        prompt, answer = question_ids(question)
        if len(ids) + len(prompt) + len(answer) > bucket.num_tokens:
            break
        ids += prompt + answer
        labels += [PROSE] * len(prompt) + [ALL_TASKS.index(question.task)] * len(answer)
    padding = [PAD_ID] * (bucket.num_tokens - len(ids))
    return _score(np.array(ids + padding), np.array(labels), bucket, rng)


def _some_story(bucket: Bucket, rng: random.Random) -> Story:
    """A story about one task, or two, or all of them; fewer questions where the facts do not fit."""
    tasks = _some_tasks(rng, count=rng.choice((1, 1, 2, len(ALL_TASKS))))
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
    prompt = [WORD_IDS[word] for word in question.prompt.split()]
    answer = [WORD_IDS[word] for word in question.answer.split()]
    return prompt, [*answer, WORD_IDS[vocab.END]]


def _score(ids: np.ndarray, labels: np.ndarray, bucket: Bucket, rng: random.Random) -> Row:
    """Picks the positions whose next token is scored: all of the answers, and a sample of the prose.

    A row scores a fixed number of positions, so that a long story does not drown its few questions in prose.
    """
    targets = labels[1:]
    answers = np.flatnonzero(targets != PROSE)
    prose = np.flatnonzero(targets == PROSE)
    room = bucket.question_tokens - len(answers)
    draw = np.random.default_rng(rng.getrandbits(32)).integers(0, len(prose), room)
    positions = np.concatenate([answers, prose[draw]])
    weights = np.full(len(positions), PROSE_WEIGHT, np.float32)
    weights[: len(answers)] = ANSWER_WEIGHT
    return ids, positions, targets[positions], weights
