"""A forward pass of a decode step as CUDA graphs."""

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
        graphs: what is launched, one after the other.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.weights: list[int] = []
        self.output: Any = None
        self.reads: list[Read] = []
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, forward: Callable[..., Any], site: Site, cut: torch.nn.Module | None = None) -> None:
        """Captures `forward(**inputs)`, which computes nothing yet. Where it comes to the module `cut`, another graph
        begins: the GPU is at work on the first one while the host launches the second, which takes it longer.

        Raises:
            Exception: whatever keeps it from being captured.
        """
        current = torch.cuda.current_stream(site.stream.device)
        site.stream.wait_stream(current)
        with _nothing_collected(), torch.cuda.stream(site.stream), _before(cut, lambda: self._cut(site)):
            self._begin(site)
            try:
                output = forward(**self.inputs)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture is void, and says so
                    self.graphs[-1].capture_end()
                raise
            self.graphs[-1].capture_end()
        current.wait_stream(site.stream)
        self.output = type(output)(**{name: x for name, x in output.items() if name != CACHE})

    def replay(self, inputs: dict[str, Tensor], cache: PagedCache) -> Any:
        """Runs the step on other values of its inputs: the same names, shapes and dtypes."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.launch()
        return type(self.output)(**self.output, **{CACHE: cache})

    def launch(self) -> None:
        """Runs the step as its inputs are."""
        for graph in self.graphs:
            graph.replay()

    def _begin(self, site: Site) -> None:
        self.graphs.append(torch.cuda.CUDAGraph())
        self.graphs[-1].capture_begin(pool=site.pool, capture_error_mode="thread_local")

    def _cut(self, site: Site) -> None:
        if torch.cuda.is_current_stream_capturing():  # else another thread has come to the module
            self.graphs[-1].capture_end()
            self._begin(site)


def addresses(model: torch.nn.Module) -> list[int]:
    """Where a model's parameters and buffers lie; of tensors that only stand for others, which they are."""
    tensors = [*model.parameters(), *model.buffers()]
    return [x.data_ptr() if type(x) in (Tensor, torch.nn.Parameter) else id(x) for x in tensors]


def _before(module: torch.nn.Module | None, work: Callable[[], None]) -> contextlib.AbstractContextManager[Any]:
    """Within it, work is done before a module's forward."""
    return contextlib.nullcontext() if module is None else module.register_forward_pre_hook(lambda *_: work())


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
