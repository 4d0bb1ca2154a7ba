"""What the clock of a `generate` call says: when tokens were there, what was counted meanwhile, and where a captured
decode step's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities
from transformers import LogitsProcessor

from sparsekv.errors import SparseKVError
from sparsekv.hf.capture.decoder import CapturedDecoder
from sparsekv.testing.timing import synchronize

Counts = dict[str, int]

REPLAYS = 5

# Parts of kernel names, in small letters; a kernel belongs to the first part that names it.
PARTS = {
    "attention": ("sparse_decode", "attend_pages", "score_pages", "select_pages", "append_kv", "merge_attention"),
    "gemm": ("nvjet", "gemm", "gemv", "cutlass", "splitk"),
    "all_reduce": ("nccl",),
}


class Clock(LogitsProcessor):
    """Notes when some of the tokens are there, for any batch size: `generate` hands it every token's logits.

    Args:
        at: the tokens, counted from 1, at which the device is waited for.
        count: called there too.

    Attributes:
        times: seconds, of the start and of these tokens.
        counts: what `count` gave at these tokens.
    """

    def __init__(self, device: torch.device, at: Sequence[int], count: Callable[[], Counts]) -> None:
        self.device, self.at, self.count = device, set(at), count
        self.num_tokens = 0
        self.times: list[float] = []
        self.counts: list[Counts] = []

    def start(self) -> None:
        """Just before `generate` is called."""
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits, unchanged."""
        self.num_tokens += 1
        if self.num_tokens in self.at:
            synchronize(self.device)
            self.times.append(time.perf_counter())
            self.counts.append(self.count())
        return scores

    @property
    def counted(self) -> Counts:
        """What was counted between the last two times."""
        before, after = self.counts[-2:]
        return {name: after[name] - before[name] for name in after}


def check_counts(counted: Mapping[str, int], num_steps: int, why_eager: str | None) -> str | None:
    """Whether the timed steps did what the mode promises; returns what a reader of the figures should know.

    Args:
        counted: `sparse_steps`, `replays` of the timed steps; what the mode does not promise is left out.
        why_eager: why nothing could be captured, or None.

    Raises:
        SparseKVError: they did something else.
    """
    if counted.get("sparse_steps", num_steps) < num_steps:
        raise SparseKVError(
            f"Only {counted['sparse_steps']} of {num_steps} timed steps were sparse, although the context exceeds "
            "the budget: no speed. `print(sparsekv.patch(model))` says which layers decode densely, and why."
        )
    replays = counted.get("replays", num_steps)
    if why_eager is not None and replays < num_steps:
        return f"decodes eagerly: {why_eager}"
    if not replays:
        raise SparseKVError(f"None of {num_steps} timed steps was the replay of a captured one: no speed.")
    return None if replays >= num_steps else f"only {replays} of {num_steps} timed steps were replays"


def split_ms(decoder: CapturedDecoder, ms_per_token: float, device: torch.device) -> dict[str, float] | None:
    """Milliseconds of one step by part, as replays of the step captured last show it; None where they cannot be seen.

    Args:
        ms_per_token: what a token took; what it takes beyond a replay is the host's.
    """
    step = next(reversed(decoder._steps.values()), None)
    if step is None or ProfilerActivity.CUDA not in supported_activities():
        return None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step.launch()
    start.record()
    for _ in range(REPLAYS):
        step.launch()
    end.record()
    torch.cuda.synchronize(device)
    ms_per_step = start.elapsed_time(end) / REPLAYS
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(REPLAYS):
            step.launch()
        torch.cuda.synchronize(device)
    kernels = [
        (event.name, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return parts(kernels, REPLAYS, ms_per_step, ms_per_token) if kernels else None


def parts(
    kernels: Iterable[tuple[str, float]], num_steps: int, ms_per_step: float, ms_per_token: float
) -> dict[str, float]:
    """Milliseconds of a token by part, from the names and microseconds of the kernels of so many steps. `gaps` lie
    between a step's kernels, less than none where these overlap; for the rest of a token the GPU waits for the host.
    """
    found = dict.fromkeys([*PARTS, "rest"], 0.0)
    for name, us in kernels:
        small = name.lower()
        part = next((part for part, names in PARTS.items() if any(n in small for n in names)), "rest")
        found[part] += us / 1e3 / num_steps
    if not found["all_reduce"]:  # of one GPU
        del found["all_reduce"]
    return found | {"gaps": ms_per_step - sum(found.values()), "host": ms_per_token - ms_per_step}
