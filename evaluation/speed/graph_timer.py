"""Microseconds of a piece of GPU work as it runs inside a CUDA graph, and the same interface on a CPU."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A graph is made this long by repeating its calls, so that starting it costs nothing to speak of, up to a number of
# calls that is captured quickly.
MIN_GRAPH_US, MAX_CALLS = 500.0, 256
WARMUP_REPLAYS = 3
CPU_FREE_BYTES = 1 << 28  # supposed, not asked: enough for layers to take turns in memory

Step = Callable[[int], object]


@dataclass(frozen=True)
class Spread:
    """Microseconds of one call: the median of all replays and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """The spread of some times."""
        low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        return cls(median, low, high)


class Timer:
    """Times `step(0) ... step(count - 1)`: on a GPU one after the other in one CUDA graph, on a CPU call by call.

    Args:
        replays: of the graph; on a CPU, calls that are timed.
    """

    def __init__(self, device: torch.device, replays: int) -> None:
        self.device, self.replays = device, replays

    def __call__(self, step: Step, count: int, floor_us: float = 0.0) -> Spread:
        """Microseconds of one call.

        Args:
            count: calls with inputs of their own.
            floor_us: the least one call can take, as far as known.
        """
        if self.device.type != "cuda":
            return Spread.of(self._plain_us(step, count))
        wanted = math.ceil(MIN_GRAPH_US / max(count * floor_us, 1.0))
        rounds = max(1, min(wanted, MAX_CALLS // count))

        def work() -> None:
            for _ in range(rounds):
                for i in range(count):
                    step(i)

        return Spread.of([us / (rounds * count) for us in self._graph_us(work)])

    def _graph_us(self, work: Callable[[], None]) -> list[float]:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # what is compiled or allocated at a first call cannot be captured
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            work()
        for _ in range(WARMUP_REPLAYS):
            graph.replay()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.replays)]
        for start, end in events:  # queued without waiting: the GPU never idles between replays
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(self.device)
        graph.reset()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def _plain_us(self, step: Step, count: int) -> list[float]:
        times = []
        for i in range(-WARMUP_REPLAYS, self.replays):
            start = time.perf_counter()
            step(i % count)
            times.append((time.perf_counter() - start) * 1e6)
        return times[WARMUP_REPLAYS:]


def free(device: torch.device) -> None:
    """Gives back the memory of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Of the device's memory that may be filled."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_FREE_BYTES


def read_tb_per_s(device: torch.device, timer: Timer, num_bytes: int | None = None) -> float:
    """Terabytes per second that a maximum over a large tensor reads: what the memory gives, not what it promises."""
    num_bytes = num_bytes or min(4 << 30, free_bytes(device) // 4)
    numbers = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    at_least_us = num_bytes / 10e6  # 10 TB/s: so that few calls make a graph
    return num_bytes / timer(lambda i: numbers.max(), 1, at_least_us).median / 1e6
