"""The decode step of `generate` as a CUDA graph: one launch for a whole forward pass.

Everything a step needs from the host (room for its token, lengths, the page table) is done before the replay, in
place; see `PagedCache.step`. A captured step is used for other prompts and other caches as long as it would read the
same addresses, and re-captured when a pool grows or the batch changes.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from sparsekv.cache import PagedCache
from sparsekv.hf.fusion import fused

MOST_GRAPHS = 8  # batch sizes and widths of tables that are kept ready
# What is asked for by these would be overwritten by the next replay.
_RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")


class Run:
    """One decode loop. Every graph that it uses is compared with an eager step first, whatever was done to the model
    since it was captured.

    Attributes:
        captured, verified: the steps that were captured in this loop, and those that were compared.
    """

    def __init__(self) -> None:
        self.captured: set[CapturedStep] = set()
        self.verified: set[CapturedStep] = set()


class CapturedStep:
    """A captured forward pass of one token per sequence.

    Attributes:
        inputs: where a replay expects the model's tensors.
        output: what the model returned, without the cache; every replay writes to the same tensors.
        reads: what each layer reads, for the counters.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.inputs = inputs
        self.output: Any = None
        self.reads: list[tuple[int, bool]] = []

    def replay(self, inputs: dict[str, Tensor], cache: PagedCache) -> Any:
        """Runs the step on other values of its inputs."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return type(self.output)(**self.output, past_key_values=cache)


class CapturedDecoder:
    """Runs a model's decode steps: captured where possible, else as the model does.

    Args:
        fuse: whether norms and rotary embeddings run as one kernel each, where that is the same.

    Attributes:
        captures, replays: how often either was done.
        refusal: why nothing is captured any more, or None.
    """

    def __init__(self, model: Any, fuse: bool = True) -> None:
        self.__setstate__({"model": model, "fuse": fuse})

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "fuse": self.fuse}  # graphs are this process's, and this model's

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.fuse = state["model"], state["fuse"]
        self.captures = self.replays = 0
        self.refusal: str | None = None
        self._steps: OrderedDict[Any, CapturedStep] = OrderedDict()
        self._warm: set[Any] = set()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def clear(self) -> None:
        """Forgets all captured steps."""
        self._steps.clear()
        self._pool = None

    def __call__(self, run: Run, **inputs: Any) -> Any:
        """The model's forward."""
        if self.obstacle(inputs) is not None:
            return self.model(**inputs)
        cache = inputs["past_key_values"]
        with cache.step():
            return self._step(run, cache, inputs)

    def obstacle(self, inputs: dict[str, Any]) -> str | None:
        """Why a forward with these inputs is not captured, or None."""
        cache, tokens, mask = (inputs.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
        if self.refusal is not None:
            return self.refusal
        if not isinstance(cache, PagedCache) or not isinstance(tokens, Tensor) or tokens.shape[1] != 1:
            return "it is not a decode step of a PagedCache"
        if tokens.device.type != "cuda":
            return f"CUDA graphs need a GPU, and the model is on {tokens.device}"
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return "the model lies on several devices"
        if not cache.is_steady or cache.observers:
            return "not every layer lives in pages" if not cache.is_steady else "the cache is observed"
        if not all(layer.policy.fills_budget for layer in cache.paged_layers):
            return "what the policy reads is counted at every step (Policy.fills_budget)"
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return "a mask of its own is given"
        if any(inputs.get(name) for name in _RECORDED):
            return "inner states are asked for"
        return None

    # -- how

    def _step(self, run: Run, cache: PagedCache, inputs: dict[str, Any]) -> Any:
        tensors, rest = _split(inputs, cache)
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())
        warm = cache.config, cache.step_shape, shapes
        key = cache.step_key, shapes, repr(sorted(rest.items(), key=str)), torch.is_autocast_enabled("cuda")
        step = self._steps.get(key)
        if step is None and warm not in self._warm:  # kernels are built and libraries started by an eager step
            self._warm.add(warm)
            with self._as_captured():
                return self.model(**inputs)
        if step is None:
            step = self._capture(cache, tensors, rest)
            if step is None:
                return self.model(**inputs)
            run.captured.add(step)
            self._keep(key, step)
        elif step not in run.verified:
            return self._verify(run, step, cache, tensors, inputs)
        output = step.replay(tensors, cache)
        cache.follow(step.reads)
        self.replays += 1
        return output

    def _capture(self, cache: PagedCache, tensors: dict[str, Tensor], rest: dict[str, Any]) -> CapturedStep | None:
        with torch.inference_mode(False), torch.no_grad():
            step = CapturedStep({name: tensor.clone() for name, tensor in tensors.items()})
        device = tensors["input_ids"].device
        self._stream = self._stream or torch.cuda.Stream(device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        collects = gc.isenabled()
        gc.disable()  # what it frees might not be freed while a graph is captured
        try:
            with cache.capturing() as step.reads, self._as_captured(), torch.cuda.stream(self._stream):
                step.graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = self.model(**step.inputs, **rest, past_key_values=cache)
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # the capture is void, and says so
                        step.graph.capture_end()
                    raise
                step.graph.capture_end()
        except Exception as error:
            self.refuse(f"its forward cannot be captured ({(str(error) or type(error).__name__).splitlines()[0]})")
            return None
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream(device).wait_stream(self._stream)
        step.output = type(output)(**{name: x for name, x in output.items() if name != "past_key_values"})
        self.captures += 1
        return step

    def _as_captured(self) -> contextlib.AbstractContextManager[None]:
        """How the model's forward runs when it is captured, and in the steps that prepare and check that."""
        return fused(self.model) if self.fuse else contextlib.nullcontext()

    def _keep(self, key: Any, step: CapturedStep) -> None:
        self._steps[key] = step
        if len(self._steps) > MOST_GRAPHS:
            self._steps.popitem(last=False)

    def _verify(
        self, run: Run, step: CapturedStep, cache: PagedCache, tensors: dict[str, Tensor], inputs: dict[str, Any]
    ) -> Any:
        """An eager step, and the same step by replay: the graph may have baked in what has changed since."""
        with self._as_captured():
            eager = self.model(**inputs)
        replayed = step.replay(tensors, cache)
        if _same(eager.logits, replayed.logits):
            run.verified.add(step)
            return eager
        self.clear()
        if step in run.captured:  # nothing but the token and its position has changed since
            self.refuse("a captured step gives other logits than an eager one")
        return eager

    def refuse(self, reason: str) -> None:
        """Decodes eagerly from now on."""
        self.refusal = reason
        self.clear()
        warnings.warn(f"sparsekv decodes {type(self.model).__name__} eagerly: {reason}.", stacklevel=2)


def _split(inputs: dict[str, Any], cache: PagedCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that change with every step, and everything else but the cache. Padding is not in the pages, so a
    decode step needs no mask; positions are given, not derived from a length that would be captured with the rest."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and name != "attention_mask"}
    rest = {
        name: x
        for name, x in inputs.items()
        if name not in tensors and name not in ("attention_mask", "past_key_values")
    }
    if "position_ids" not in tensors:
        tensors["position_ids"] = torch.full_like(inputs["input_ids"], cache.get_seq_length())
        rest.pop("position_ids", None)
    return tensors, rest


def _same(exact: Tensor, replayed: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return bool(((exact == replayed) | (exact.isnan() & replayed.isnan())).all())
