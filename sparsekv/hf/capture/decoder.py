"""The decode step of `generate` as CUDA graphs: two launches for a whole forward pass.

Everything a step needs from the host (room for its token, lengths, the page table) is done before the replay, in
place; see `PagedCache.step`. A captured step is used for other prompts and other caches as long as it would read the
same addresses, and re-captured when a pool grows or the batch changes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor

from sparsekv.cache import PagedCache
from sparsekv.cache.steps import Step
from sparsekv.config import SparseConfig
from sparsekv.hf.attention import without_masks
from sparsekv.hf.capture.fusion import fused
from sparsekv.hf.capture.graphs import CapturedStep, Site, addresses
from sparsekv.hf.ranks import Ranks
from sparsekv.hf.support import CACHE, LayerStatus
from sparsekv.ops.instances import ELEMENTS
from sparsekv.ops.launch import usable
from sparsekv.pages import RESIDENCIES
from sparsekv.policies import POLICIES

MAX_GRAPHS = 8  # batch sizes and widths of tables that are kept ready, in every phase of a policy
MIN_FUSED = 4096  # new tokens of a prompt, over the batch, that save more than the milliseconds which `fused` takes
# What is asked for by these would be overwritten by the next replay.
_RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")


class Todo(IntEnum):
    """What is to be done about a step's graph: by several ranks, what the one that is least far needs."""

    WARM_UP, CAPTURE, COMPARE, REPLAY = range(4)


class Run:
    """One decode loop. Every graph that it uses is compared with an eager step first, whatever was done to the model
    since it was captured.

    Attributes:
        captured, verified: the steps that were captured in this loop, and those that were compared.
        refusal: why the rest of this loop is not captured, or None.
        obstacle: why this rank did not capture the step before, and why no rank did.
        place: where the tensors of the step before lie.
    """

    def __init__(self) -> None:
        self.captured: WeakSet[CapturedStep] = WeakSet()  # weak: a graph that is thrown away frees its memory
        self.verified: WeakSet[CapturedStep] = WeakSet()
        self.refusal: str | None = None
        self.obstacle: tuple[Any, str | None] = (..., None)  # there was none
        self.place: tuple[Any, ...] = ()


class CapturedDecoder:
    """Runs a model's decode steps: captured where possible, else as the model does.

    Args:
        model: the patched model.
        config: its settings, of which `capture`, `fuse` and `backend` count here.
        layers: what each layer does when it decodes, as the patch keeps it up to date.

    Attributes:
        captures, replays: how often either was done.
        refusal: why nothing is captured any more, or None; forgotten by `clear`.
        last_obstacle: why the last step was not captured, or None; forgotten by `clear`, too.
    """

    def __init__(self, model: Any, config: SparseConfig, layers: Sequence[LayerStatus]) -> None:
        self.__setstate__({"model": model, "config": config, "layers": layers})

    def __getstate__(self) -> dict[str, Any]:  # graphs are this process's, and this model's
        return {"model": self.model, "config": self.config, "layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.config, self.layers = state["model"], state["config"], state["layers"]
        self.captures = self.replays = 0
        self.refusal: str | None = None
        self.last_obstacle: str | None = None
        self.ranks = Ranks.of(self.model)
        self._steps: OrderedDict[Any, CapturedStep] = OrderedDict()
        self._warm: set[Any] = set()
        self._sites: dict[torch.device, Site] = {}

    @property
    def fuse(self) -> bool:
        """Whether norms and rotary embeddings run as one kernel each, where that is the same."""
        return self.config.fuse and self.config.backend == "auto"

    @property
    def fuses_prompts(self) -> bool:
        """Whether they do in a long prompt, too, which takes a GPU with kernels for this model, and one rank."""
        device, is_served = self.model.device, self.model.dtype in ELEMENTS and self.ranks.size == 1
        return self.fuse and is_served and device.type == "cuda" and usable(device.index)

    def around_prompt(self, num_new: int) -> contextlib.AbstractContextManager[None]:
        """Within it so many new tokens of a prompt, over the batch, are read: fused as a step is, if they are many.

        Raises:
            KernelCompileError, KernelError: a kernel cannot be built or launched.
        """
        is_worth_it = num_new >= MIN_FUSED and self.fuses_prompts
        return fused(self.model) if is_worth_it else contextlib.nullcontext()

    def clear(self) -> None:
        """Forgets all captured steps, and that some could not be captured: the next decode loop tries again."""
        self._steps.clear()
        self._sites.clear()
        self.refusal = self.last_obstacle = None

    def __call__(self, run: Run, **inputs: Any) -> Any:
        """The model's forward.

        Args:
            run: the decode loop that it is a step of.
            inputs: the forward's arguments, by name.

        Raises:
            CacheFullError, OutOfMemoryError: there is no room for the token; the cache is what it was.
        """
        self.last_obstacle = self._common_obstacle(run, inputs)
        if self.last_obstacle is not None:
            return self.model(**inputs)
        cache = inputs[CACHE]
        with cache.step() as begun:
            return self._step(run, cache, begun, inputs)

    def why_eager(self, device: torch.device) -> str | None:
        """Why no decode step of a model on this device is captured, or None."""
        if not self.config.capture:
            return "capture=False"
        if device.type != "cuda":
            return f"CUDA graphs need a GPU, and the device is {device}"
        if not RESIDENCIES.get(self.config.residency).can_be_captured:
            return f"pages of residency {self.config.residency!r} are fetched between a step's launches"
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return "the model lies on several devices"
        moving = [str(status.layer_idx) for status in self.layers if not status.is_in_place]
        if moving:
            return f"not in pages: layers {', '.join(moving)}"
        return self.refusal

    def obstacle(self, inputs: dict[str, Any]) -> str | None:
        """Why a forward with these inputs is not captured, or None."""
        cache, tokens, mask = (inputs.get(name) for name in (CACHE, "input_ids", "attention_mask"))
        if not isinstance(cache, PagedCache) or not isinstance(tokens, Tensor) or tokens.shape[1] != 1:
            return "it is not a decode step of a PagedCache"
        reason = self.why_eager(tokens.device)
        if reason is not None:
            return reason
        if not cache.is_steady or cache.observers:
            return "not every layer is in pages, or a state" if not cache.is_steady else "the cache is observed"
        if not all(layer.policy.capturable for layer in cache.paged_layers):
            return "the policy's steps cannot be captured (Policy.capturable)"
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return "a mask of its own is given"
        if any(inputs.get(name) for name in _RECORDED):
            return "inner states are asked for"
        return None

    # -- how

    def _common_obstacle(self, run: Run, inputs: dict[str, Any]) -> str | None:
        """Why no rank captures a step. They ask each other at the first one, and when it has become another."""
        mine = run.refusal or self.obstacle(inputs)
        if run.obstacle[0] != mine:
            run.obstacle = mine, self.ranks.first(mine, "what keeps a step from being captured")
        return run.obstacle[1]

    def _todo(self, run: Run, step: CapturedStep | None, is_warm: bool, place: tuple[Any, ...]) -> Todo:
        """What all ranks do. A replay where nothing has moved needs no word: then nothing has moved in any."""
        if step is None:
            mine = Todo.CAPTURE if is_warm else Todo.WARM_UP
        else:
            mine = Todo.REPLAY if step in run.verified else Todo.COMPARE
        if mine is Todo.REPLAY and place == run.place:
            return mine
        run.place = place
        return min(self.ranks.gather(mine, "a step to be captured"))

    def _step(self, run: Run, cache: PagedCache, begun: Step, inputs: dict[str, Any]) -> Any:
        tensors, rest = _split(inputs, cache)
        shapes = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in tensors.items())
        warm = begun.config, begun.shape, shapes
        of_cache = begun.key
        key = of_cache, shapes, repr(sorted(rest.items(), key=str)), torch.is_autocast_enabled("cuda")
        step = self._steps.get(key)
        todo = self._todo(run, step, warm in self._warm, of_cache[-1])
        if todo is not Todo.REPLAY:
            begun.save()
        if todo is Todo.WARM_UP:  # kernels are built and libraries started by an eager step
            self._warm.add(warm)
            with self._as_captured():
                return self.model(**inputs)
        if todo is Todo.CAPTURE:
            step = self._capture(run, cache, begun, tensors, rest)
            if step is None:
                return self.model(**inputs)
            run.captured.add(step)
            self._keep(key, step)
        step = cast(CapturedStep, step)
        if todo is Todo.COMPARE:
            return self._verify(run, step, cache, begun, tensors, inputs)
        output = step.replay(tensors, cache)
        begun.follow(step.reads)
        self.replays += 1
        return output

    def _capture(
        self, run: Run, cache: PagedCache, begun: Step, tensors: dict[str, Tensor], rest: dict[str, Any]
    ) -> CapturedStep | None:
        forward = partial(self.model, **rest, **{CACHE: cache})
        step, failure = None, None
        try:
            step = CapturedStep(tensors)
            step.weights = addresses(self.model)
            with begun.capturing() as step.reads, self._as_captured():
                step.record(forward, self._site(tensors["input_ids"].device), self._cut())
        except Exception as error:
            failure = _told(error)
        failure = self.ranks.first(failure, "whether a step was captured")
        if failure is not None:
            self._give_up(run, *failure)
            return None
        self.captures += 1
        return step

    def _cut(self) -> torch.nn.Module | None:
        """Where a step is cut into two graphs: the third layer, if there is one."""
        lists = (x for x in self.model.modules() if isinstance(x, torch.nn.ModuleList))
        stacks = [x for x in lists if len(x) == len(self.layers) > 2]
        return stacks[-1][2] if stacks else None

    def _site(self, device: torch.device) -> Site:
        if device not in self._sites:
            self._sites[device] = Site(device)
        return self._sites[device]

    @contextlib.contextmanager
    def _as_captured(self) -> Iterator[None]:
        """How the model's forward runs when it is captured, and in the steps that prepare and check that."""
        with without_masks(), fused(self.model) if self.fuse else contextlib.nullcontext():
            yield

    def _keep(self, key: Any, step: CapturedStep) -> None:
        self._steps[key] = step
        if len(self._steps) > MAX_GRAPHS * POLICIES.get(self.config.policy).period:
            self._steps.popitem(last=False)

    def _verify(
        self,
        run: Run,
        step: CapturedStep,
        cache: PagedCache,
        begun: Step,
        tensors: dict[str, Tensor],
        inputs: dict[str, Any],
    ) -> Any:
        """A step by replay, and the same step eagerly: the graph may have baked in what has changed since. The eager
        one comes last, as what either writes into the pages is overwritten by the next; states are put back."""
        in_place = step.weights == addresses(self.model)  # else it would read memory that may be gone
        in_place = self.ranks.all(in_place, "where the weights of a step lie")
        replayed = step.replay(tensors, cache) if in_place else None
        begun.restore()
        with self._as_captured():
            eager = self.model(**inputs)
        is_same = replayed is not None and _same(eager.logits, replayed.logits)
        if self.ranks.all(is_same, "whether a captured step is right"):
            run.verified.add(step)
            return eager
        self.clear()
        if step in run.captured:  # nothing but the token and its position should have changed since
            other = "gives other logits than an eager one" if in_place else "has its weights elsewhere than the next"
            self.refuse(f"a captured step {other}")
        return eager

    def _give_up(self, run: Run, reason: str, is_memory: bool) -> None:
        """After a capture that failed: for good, or for this loop alone if memory ran out, which another may have."""
        if not is_memory:
            self.refuse(f"its forward cannot be captured ({reason})")
            return
        self.clear()
        run.refusal = "memory ran out while a step was captured; the next call tries again"
        self._warn(run.refusal)

    def refuse(self, reason: str) -> None:
        """Decodes eagerly from now on, until `clear`."""
        self.clear()
        self.refusal = reason
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        warnings.warn(f"sparsekv decodes {type(self.model).__name__} eagerly: {reason}.", stacklevel=2)


def _split(inputs: dict[str, Any], cache: PagedCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that change with every step, and everything else but the cache. Padding is not in the pages, so a
    decode step needs no mask; positions are given, not derived from a length that would be captured with the rest."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and name != "attention_mask"}
    rest = {name: x for name, x in inputs.items() if name not in tensors and name not in ("attention_mask", CACHE)}
    if "position_ids" not in tensors:
        tensors["position_ids"] = torch.full_like(inputs["input_ids"], cache.get_seq_length())
        rest.pop("position_ids", None)
    return tensors, rest


def _told(error: Exception) -> tuple[str, bool]:
    """Why a capture failed, and whether it was for want of memory."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return reason, isinstance(error, torch.OutOfMemoryError) or "out of memory" in reason


def _same(exact: Tensor, replayed: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return bool(((exact == replayed) | (exact.isnan() & replayed.isnan())).all())
