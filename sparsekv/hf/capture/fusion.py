"""Small operators in one kernel each: a token's time is matrices and launches at batch 1, a long prompt's also bytes.

RMS norms and rotary embeddings are half a dozen kernels each as transformers writes them, of which each reads and
writes everything anew. They are replaced only while a step is captured or compared with a captured one, or a long
prompt is read, for the thread that does that, and only where the replacement is seen to give the same: every model
family writes its own, and some mean something else by the same name.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from sparsekv.ops import for_backend

Replacement = tuple[Any, str, Callable[..., Any]]  # of which attribute of a norm or a Python module, by what

_ROTARY = "apply_rotary_pos_emb"  # as nearly all of transformers' models call it
_OFFSETS = 0.0, 1.0  # that families of models add to the weights of their norms
_RATIOS = 1, 2  # of a head's channels to those of its cosines: these are for all channels, or for each half of them
_TOLERANCE = 0.01  # of a result's norm: last bits in bf16; another meaning gives more
_PLAIN = (int, float, str, type(None))
_OPS = for_backend("auto")
_LOCK = threading.Lock()  # over who stands in for what


class StandIn:
    """What stands in a function's place: the replacement for threads that asked for it, for all others the function.

    Attributes:
        is_new: whether the owner had no such attribute of its own.
        threads: how often each thread has asked.
    """

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any], is_new: bool) -> None:
        self.original, self.replacement, self.is_new = original, replacement, is_new
        self.threads: Counter[int] = Counter()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self.replacement if threading.get_ident() in self.threads else self.original
        return chosen(*args, **kwargs)


@contextlib.contextmanager
def fused(model: torch.nn.Module) -> Iterator[None]:
    """Within it and in this thread, a model's norms and rotary embeddings run as one kernel each where that gives the
    same but for rounding, and no gradient is wanted. Norms are this model's own; the rotary function is shared by the
    models of its family, of which other threads go on with the original. It may be entered anew before it is left,
    also for other models and by other threads, and is left in any order.

    Raises:
        KernelCompileError, KernelError: a kernel cannot be built or launched.
    """
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in list(replacements(model)):
            undo.enter_context(_replaced(owner, name, replacement))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    thread = threading.get_ident()
    with _LOCK:
        stand_in = vars(owner).get(name)
        if not isinstance(stand_in, StandIn):
            stand_in = StandIn(getattr(owner, name), replacement, name not in vars(owner))
            setattr(owner, name, stand_in)
        stand_in.threads[thread] += 1
    try:
        yield
    finally:
        with _LOCK:
            stand_in.threads[thread] -= 1
            stand_in.threads += Counter()  # drops those at zero
            if not stand_in.threads and vars(owner).get(name) is stand_in:  # else somebody has exchanged it since
                if stand_in.is_new:
                    delattr(owner, name)
                else:
                    setattr(owner, name, stand_in.original)


@torch.no_grad()
def replacements(model: torch.nn.Module) -> Iterator[Replacement]:
    """What can be replaced, found by trying it on a few numbers (no random ones: generate's are not to change).

    Raises:
        KernelCompileError, KernelError: a kernel cannot be built or launched.
    """
    yield from _norms(model)
    yield from _rotaries(model)


def _norms(model: torch.nn.Module) -> Iterator[Replacement]:
    """Each norm by itself, tried once for those that are made alike. Whoever has given a norm a forward of its own
    (accelerate to move weights, a kernel of the hub) knows why."""
    tried: dict[Any, float | None] = {}  # the offset with which ours agrees, or None
    for module in model.modules():
        kind, weight = type(module), getattr(module, "weight", None)
        if not kind.__name__.endswith("RMSNorm") or kind is torch.nn.RMSNorm:
            continue
        own = vars(module).get("forward")
        if weight is None or weight.ndim != 1 or not (own is None or isinstance(own, StandIn)):
            continue
        if type(weight) not in (Tensor, torch.nn.Parameter):  # divided among ranks, say
            continue
        original, alike = MethodType(kind.forward, module), _alike(module, weight)
        if alike not in tried:
            tried[alike] = _offset(module, weight)
        offset = tried[alike]
        if offset is not None:
            yield module, "forward", _norm(module, original, offset)


def _offset(module: torch.nn.Module, weight: Tensor) -> float | None:
    """What a norm adds to its weights, if ours does the same; tried on one with weights that hide nothing, as ones or
    zeros would."""
    numbers, twin = _numbers(weight, 2, 1, len(weight)), copy.copy(module)
    twin._parameters = {**module._parameters, "weight": torch.nn.Parameter(numbers[1, 0], requires_grad=False)}
    original = MethodType(type(module).forward, twin)
    agreeing = (offset for offset in _OFFSETS if _agree(_norm(twin, original, offset), original, numbers[:1]))
    return next(agreeing, None)


def _alike(module: torch.nn.Module, weight: Tensor) -> Any:
    """The same for norms that compute the same, but for the values of their weights."""
    public = {name: x for name, x in vars(module).items() if not name.startswith("_") and name != "forward"}
    settings = tuple((name, x if isinstance(x, _PLAIN) else id(x)) for name, x in public.items())
    return type(module), weight.shape, weight.dtype, weight.device, settings


def _rotaries(model: torch.nn.Module) -> Iterator[Replacement]:
    attentions = {
        type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Attention")
    }
    like = next(model.parameters())
    for file in (sys.modules[name] for name in sorted(attentions)):
        original = getattr(file, _ROTARY, None)
        if isinstance(original, StandIn):
            original = original.original
        if original is None:
            continue
        agreeing = [x for x in _RATIOS if _agree(_rotary(original, [x]), original, *_turns(like, x))]
        if agreeing:
            yield file, _ROTARY, _rotary(original, agreeing)


def _norm(module: Any, original: Callable[..., Any], offset: float) -> Callable[..., Any]:
    """An RMS norm's forward by the op `rms_norm`."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        epsilon, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), module.weight
        unlike = epsilon is None or hidden_states.dtype != weight.dtype
        if args or kwargs or unlike or _wants_gradient(hidden_states, weight):
            return original(hidden_states, *args, **kwargs)
        return _OPS.rms_norm(hidden_states, weight, epsilon, offset)

    return forward


def _rotary(original: Callable[..., Any], ratios: Sequence[int]) -> Callable[..., Any]:
    """`apply_rotary_pos_emb` by the op `rotate`, for the ratios with which it means the same: cosines of half the
    channels may also mean that the other half is not turned."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = q.ndim == 4 and cos.ndim == 3 and cos.shape[1] == q.shape[2]
        served = whole and q.shape[3] / cos.shape[2] in ratios
        if args or kwargs or not served or cos.dtype != q.dtype or _wants_gradient(q, k):
            return original(q, k, cos, sin, *args, **kwargs)
        return _OPS.rotate(q, k, cos, sin)

    return apply


def _wants_gradient(*tensors: Tensor) -> bool:
    """Whether a result will be differentiated, which the ops cannot be."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _agree(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether both compute the same, but for rounding."""
    try:
        expected = _tensors(theirs(*inputs))
    except Exception:  # what cannot be called like this is something else; ours, where it fails, is to be heard
        return False
    found = _tensors(ours(*inputs))
    return len(found) == len(expected) and all(
        a.shape == b.shape and float((a - b).norm()) <= _TOLERANCE * float(b.norm())
        for a, b in zip(found, expected, strict=True)
    )


def _tensors(result: Any) -> list[Tensor]:
    return [x.float() for x in (result if isinstance(result, tuple) else (result,))]


def _turns(like: Tensor, ratio: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query, a key, and the cosines and sines of three positions, for heads of 8 channels."""
    angles = _numbers(like, 1, 3, 4).repeat(1, 1, 2 // ratio)
    return _numbers(like, 1, 2, 3, 8), _numbers(like, 1, 1, 3, 8), angles.cos(), angles.sin()


def _numbers(like: Tensor, *shape: int) -> Tensor:
    """From -1 to 1, in the dtype of a parameter."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device=like.device)
    return numbers.mul(0.7).sin().view(shape).to(like.dtype)
