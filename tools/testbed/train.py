"""Trains the testbed model: `python -m tools.testbed.train --out DIR`, nine minutes on one H200.

The recipe is a pure function of `--seed`: batches, their order and the learning rate depend on step numbers
alone, never on the clock. What differs between runs is the rounding of the GPU's atomic additions.

A look-up circuit hardly grows in long stories: pointing at one of hundreds of facts is almost never right by
chance, so there is little to learn from. The first stage therefore tells stories of 128 words, and some of them
twice, which teaches to find and copy any word; then the stories grow. The README says what was tried.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekv.evaluation.testbed import vocabulary as vocab

from .batches import LABELS, PAD_ID, WORD_IDS, Batch, Bucket, StoryBatches
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
# Stages of the training: the number of steps, and the weights by which each step draws its bucket.
STAGES: tuple[tuple[int, dict[str, float]], ...] = (
    (3000, {"echo": 1, "tiny": 2}),
    (4000, {"tiny": 1, "short": 3}),
    (5000, {"short": 4, "medium": 3, "long": 2, "longer": 1}),
    (5000, {"short": 2, "medium": 2, "long": 3, "longer": 4, "longest": 1}),
)
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 200
DECAY_SHARE = 0.25  # of all steps, at the end
LOG_EVERY = 50  # steps
CHECKPOINT_EVERY = 500  # steps


def model_config() -> LlamaConfig:
    """Six small Llama layers with two kv heads: big enough to look facts up in 32k tokens."""
    return LlamaConfig(
        vocab_size=len(WORD_IDS),
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
        eos_token_id=WORD_IDS[vocab.END],
        pad_token_id=PAD_ID,
        initializer_range=0.06,  # with 0.02 the look-ups did not come in this many steps
    )


def schedule(seed: int) -> list[Bucket]:
    """The bucket of every step."""
    rng = random.Random(seed)
    names = [name for steps, weights in STAGES for name in rng.choices([*weights], [*weights.values()], k=steps)]
    return [BUCKETS[name] for name in names]


def learning_rate(step: int, num_steps: int) -> float:
    """Warm-up, a plateau, and a linear decay to nearly zero over the last quarter."""
    rise = (step + 1) / WARM_UP_STEPS
    fall = (num_steps - step) / max(1, int(DECAY_SHARE * num_steps))
    return PEAK_LEARNING_RATE * min(1.0, rise, fall)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy, and `[2, labels]` counts of scored tokens by label: those right, and all."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]
    logits = model.lm_head(hidden[rows, batch.positions]).float()  # [batch, s, vocab]
    targets = batch.ids[rows, batch.positions + 1]
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    one_hot = functional.one_hot(batch.labels, len(LABELS)).float()  # [batch, s, labels]
    right = (logits.argmax(-1) == targets)[..., None] * one_hot
    counts = torch.stack([right.sum((0, 1)), one_hot.sum((0, 1))])
    return (losses * batch.weights).sum() / batch.weights.sum(), counts


class Log:
    """A CSV file with a line per length of story every `LOG_EVERY` steps: loss, and accuracy per label.

    Sums stay on the device between two lines, so that no step waits for them.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._start = path, time.monotonic()
        self._sums: dict[int, tuple[int, Tensor, Tensor]] = {}  # by length: steps, loss, counts
        if not path.exists():
            self._write([["step", "seconds", "story_tokens", "loss", *LABELS]])

    def add(self, story_tokens: int, loss: Tensor, counts: Tensor) -> None:
        """Takes what `batch_loss` gives."""
        steps, all_loss, all_counts = self._sums.get(story_tokens, (0, 0.0, 0.0))
        self._sums[story_tokens] = (steps + 1, all_loss + loss, all_counts + counts)

    def flush(self, step: int) -> None:
        """Writes and prints the lines of all lengths met since the last flush."""
        seconds, lines = f"{time.monotonic() - self._start:.1f}", []
        for story_tokens, (steps, loss, counts) in sorted(self._sums.items()):
            shares = [f"{right / scored:.4f}" if scored else "-" for right, scored in counts.T.tolist()]
            lines.append([str(step), seconds, str(story_tokens), f"{loss.item() / steps:.4f}", *shares])
            print(*lines[-1], flush=True)
        self._write(lines)
        self._sums.clear()

    def _write(self, lines: list[list[str]]) -> None:
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows(lines)


def train_steps(model: LlamaForCausalLM, batches: StoryBatches, stop: int, out: Path, workers: int = 0) -> None:
    """Trains `model` in place from the first step of `batches` to before `stop`; leaves a checkpoint in `out`.

    Args:
        workers: processes that write stories ahead.
    """
    device, num_steps = model.device, len(batches.schedule)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    checkpoint, log = out / "checkpoint.pt", Log(out / "training_log.csv")
    if batches.first_step:
        optimizer.load_state_dict(torch.load(checkpoint, map_location=device)["optimizer"])
    ahead = 8 if workers else None
    loader = DataLoader(
        batches, batch_size=None, num_workers=workers, prefetch_factor=ahead, pin_memory=device.type == "cuda"
    )
    for step, batch in zip(range(batches.first_step, stop), loader, strict=False):
        on_device = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
        loss, counts = train_step(model, optimizer, on_device, learning_rate(step, num_steps))
        log.add(batches.schedule[step].story_tokens, loss, counts)
        done, is_last = step + 1, step + 1 == stop
        if done % LOG_EVERY == 0 or is_last:
            log.flush(done)
        if done % CHECKPOINT_EVERY == 0 or is_last:
            state = {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint)


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, rate: float
) -> tuple[Tensor, Tensor]:
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
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14, help="processes that write stories")
    parser.add_argument("--stop", type=int, default=None, help="stop before this step; go on with --resume")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model, first = LlamaForCausalLM(model_config()), 0
    if args.resume:
        state = torch.load(args.out / "checkpoint.pt", map_location="cpu")
        model.load_state_dict(state["model"])
        first = state["step"]
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    if model.device.type == "cuda":
        for layer in model.model.layers:  # all six share one compiled graph, for all lengths
            layer.compile(dynamic=True)
    batches = StoryBatches(schedule(args.seed), args.seed, first)
    stop = len(batches.schedule) if args.stop is None else args.stop
    train_steps(model, batches, stop, args.out, args.workers)
    save(model, args.out / "model")


if __name__ == "__main__":
    main()
