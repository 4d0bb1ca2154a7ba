"""Trains the testbed model: `python -m evaluation.testbed.train --out DIR`, nine minutes on one H200.

The recipe is a pure function of `--seed`: batches, their order and the learning rate depend on step numbers
alone, never on the clock. What differs between runs is the rounding of the GPU's atomic additions.

A look-up circuit hardly grows in long stories: pointing at one of hundreds of facts is almost never right by
chance, so there is little to learn from. The first stage therefore tells stories of 128 words, and some of them
twice, which teaches to find and copy any word; then the stories grow. The model card says what was tried.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from . import vocabulary as vocab
from .batches import LABELS, Batch, Bucket, StoryBatches
from .package import save

BUCKETS = {
    "echo": Bucket(story_tokens=128, question_tokens=128, batch=128, questions=0),
    "tiny": Bucket(story_tokens=128, question_tokens=96, batch=128, questions=6),
    "short": Bucket(story_tokens=512, question_tokens=384, batch=64, questions=16),
    "medium": Bucket(story_tokens=2048, question_tokens=768, batch=24, questions=32),
    "long": Bucket(story_tokens=8192, question_tokens=768, batch=8, questions=32),
    "longer": Bucket(story_tokens=16384, question_tokens=768, batch=4, questions=32),
    "longest": Bucket(story_tokens=32768, question_tokens=768, batch=2, questions=32),
}


@dataclass(frozen=True)
class Plan:
    """All that decides what a step trains on."""

    buckets: list[Bucket]  # of every step
    seed: int
    workers: int


@dataclass(frozen=True)
class Stage:
    """Some steps in which every step draws its bucket with the given weights."""

    steps: int
    weights: dict[str, float]


RECIPES: dict[str, tuple[Stage, ...]] = {
    "full": (
        Stage(3000, {"echo": 1, "tiny": 2}),
        Stage(4000, {"tiny": 1, "short": 3}),
        Stage(5000, {"short": 4, "medium": 3, "long": 2, "longer": 1}),
        Stage(5000, {"short": 2, "medium": 2, "long": 3, "longer": 4, "longest": 1}),
    ),
    "smoke": (Stage(2, {"echo": 1, "tiny": 1}),),
}
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 200
DECAY_SHARE = 0.25  # of all steps, at the end
LOG_EVERY = 50  # steps
CHECKPOINT_EVERY = 500  # steps


def model_config() -> LlamaConfig:
    """Six small Llama layers with two kv heads: big enough to look facts up in 32k tokens."""
    words = vocab.all_words()
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.index(vocab.END),
        pad_token_id=words.index(vocab.PAD),
        initializer_range=0.06,  # with 0.02 the look-ups did not come in this many steps
    )


def schedule(stages: Sequence[Stage], seed: int) -> list[Bucket]:
    """The bucket of every step."""
    rng = random.Random(seed)
    names: list[str] = []
    for stage in stages:
        names += rng.choices(list(stage.weights), list(stage.weights.values()), k=stage.steps)
    return [BUCKETS[name] for name in names]


def learning_rate(step: int, num_steps: int) -> float:
    """Warm-up, a plateau, and a linear decay to nearly zero over the last quarter."""
    decay_steps = max(1, int(DECAY_SHARE * num_steps))
    rise = (step + 1) / WARM_UP_STEPS
    fall = (num_steps - step) / decay_steps
    return PEAK_LEARNING_RATE * min(1.0, rise, fall)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean cross-entropy, and `[labels, 2]` counts of (right, all) scored tokens by label."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]
    logits = model.lm_head(hidden[rows, batch.positions]).float()  # [batch, s, vocab]
    targets = batch.ids[rows, batch.positions + 1]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    right = (logits.argmax(-1) == targets).flatten().float()
    counts = torch.zeros(len(LABELS), 2, device=logits.device)
    counts.index_add_(0, batch.labels.flatten(), torch.stack([right, torch.ones_like(right)], dim=1))
    return (losses * weights).sum() / weights.sum(), counts


@dataclass
class Meter:
    """Sums of one bucket between two lines of the log, kept on the device so that no step waits for them."""

    steps: int
    loss: torch.Tensor
    counts: torch.Tensor  # [labels, 2]


class Log:
    """A CSV file with a line per bucket every `LOG_EVERY` steps: loss and accuracy of answer tokens per task."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.monotonic()
        self.meters: dict[int, Meter] = {}
        if not path.exists():
            self._write([["step", "seconds", "story_tokens", "loss", *LABELS]])

    def add(self, story_tokens: int, loss: torch.Tensor, counts: torch.Tensor) -> None:
        meter = self.meters.get(story_tokens)
        if meter is None:
            self.meters[story_tokens] = Meter(1, loss, counts)
        else:
            meter.steps, meter.loss, meter.counts = meter.steps + 1, meter.loss + loss, meter.counts + counts

    def flush(self, step: int) -> None:
        """Writes and prints the lines of all buckets met since the last flush."""
        seconds = f"{time.monotonic() - self.start:.1f}"
        lines = []
        for story_tokens, meter in sorted(self.meters.items()):
            right, scored = meter.counts.T.tolist()
            shares = [f"{r / s:.4f}" if s else "-" for r, s in zip(right, scored, strict=True)]
            lines.append([str(step), seconds, str(story_tokens), f"{meter.loss.item() / meter.steps:.4f}", *shares])
            print(*lines[-1], flush=True)
        self._write(lines)
        self.meters.clear()

    def _write(self, lines: list[list[str]]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(lines)


def batches(buckets: list[Bucket], seed: int, first_step: int, workers: int) -> Iterator[Batch]:
    """Batches in step order, written ahead by worker processes."""
    ahead = 8 if workers else None
    return iter(
        DataLoader(
            StoryBatches(buckets, seed, first_step),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=ahead,
            pin_memory=torch.cuda.is_available(),
        )
    )


def train_steps(model: LlamaForCausalLM, plan: Plan, first: int, stop: int, out: Path) -> None:
    """Trains `model` in place on steps [first, stop) of the schedule, and leaves a checkpoint in `out`."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    checkpoint = out / "checkpoint.pt"
    if first:
        optimizer.load_state_dict(torch.load(checkpoint, map_location=device)["optimizer"])
    log = Log(out / "training_log.csv")
    for step, batch in enumerate(batches(plan.buckets[:stop], plan.seed, first, plan.workers), start=first):
        rate = learning_rate(step, len(plan.buckets))
        log.add(batch.story_tokens, *train_step(model, optimizer, batch.to(device), rate))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == stop:
            log.flush(step + 1)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == stop:
            state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint)


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update in bf16 autocast over float32 weights; returns loss and counts, without waiting for them."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        loss, counts = batch_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log, model and accuracy")
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14, help="processes that write stories")
    parser.add_argument("--stop", type=int, default=None, help="stop before this step; go on with --resume")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM(model_config())
    first = _restore(model, args.out / "checkpoint.pt") if args.resume else 0
    model.to(device).train()
    if device.type == "cuda":
        for layer in model.model.layers:  # all six share one compiled graph, for all lengths
            layer.compile(dynamic=True)
    plan = Plan(schedule(RECIPES[args.recipe], args.seed), args.seed, args.workers)
    stop = len(plan.buckets) if args.stop is None else args.stop
    train_steps(model, plan, first, stop, args.out)
    save(model, args.out / "model")


def _restore(model: LlamaForCausalLM, checkpoint: Path) -> int:
    """Loads the weights of a checkpoint and returns the step it stopped before."""
    state = torch.load(checkpoint, map_location="cpu")
    model.load_state_dict(state["model"])
    return int(state["step"])


if __name__ == "__main__":
    main()
