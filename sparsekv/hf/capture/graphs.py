"""A forward pass of a decode step as a CUDA graph."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache import PagedCache
from sparsekv.hf.support import CACHE
from sparsekv.pages.step_state import Read


class Site:
    """Where the steps of a device are captured: a stream for it, and one pool for the memory of all their graphs."""

    def __init__(self, device: torch.device) -> None:
        self.stream = _stream(device)
        self.pool = torch.cuda.graph_pool_handle()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class CapturedStep:
    """A captured forward pass of one token per sequence.

    Attributes:
        inputs: where a replay expects the model's tensors.
        weights: where it expects the model's weights, as `addresses` gives them.
        output: what the model returned, without the cache; every replay writes to the same tensors.
        reads: what each layer reads, for the counters; every replay writes to the same slots.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.weights: list[int] = []
        self.output: Any = None
        self.reads: list[Read] = []

    def record(self, forward: Callable[..., Any], site: Site) -> None:
        """Captures `forward(**inputs)`, which computes nothing yet.

        Raises:
            Exception: whatever keeps it from being captured.
        """
        self.graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(site.stream.device)
        site.stream.wait_stream(current)
        with _nothing_collected(), torch.cuda.stream(site.stream):
            self.graph.capture_begin(pool=site.pool, capture_error_mode="thread_local")
            try:
                output = forward(**self.inputs)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture is void, and says so
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        current.wait_stream(site.stream)
        self.output = type(output)(**{name: x for name, x in output.items() if name != CACHE})

    def replay(self, inputs: dict[str, Tensor], cache: PagedCache) -> Any:
        """Runs the step on other values of its inputs: the same names, shapes and dtypes."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return type(self.output)(**self.output, **{CACHE: cache})


def addresses(model: torch.nn.Module) -> list[int]:
    """Where a model's parameters and buffers lie; of tensors that only stand for others, which they are."""
    tensors = [*model.parameters(), *model.buffers()]
    return [x.data_ptr() if type(x) in (Tensor, torch.nn.Parameter) else id(x) for x in tensors]


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Without garbage collection: what it frees might not be freed while a graph is captured."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
