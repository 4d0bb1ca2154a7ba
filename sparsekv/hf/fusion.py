"""Small operators of a decode step in one kernel each: at batch 1 a token's time is matrices and launches.

RMS norms and rotary embeddings are half a dozen kernels each as transformers writes them, with hardly a byte to
move. They are replaced only while a step is captured or compared with a captured one, and only where the replacement
is seen to give the same: every model family writes its own, and some mean something else by the same name.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

Replacement = tuple[Any, str, Callable[..., Any]]  # of which attribute of a class or a Python module, by what

_ROTARY = "apply_rotary_pos_emb"  # as nearly all of transformers' models call it
_TOLERANCE = 0.01  # of a result's norm: last bits in bf16; another meaning gives more


@contextlib.contextmanager
def fused(model: torch.nn.Module) -> Iterator[None]:
    """Within it, the model's norms and rotary embeddings run as one kernel each where that gives the same."""
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in list(replacements(model)):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


@torch.no_grad()
def replacements(model: torch.nn.Module) -> Iterator[Replacement]:
    """What can be replaced, found by trying it on a few numbers (no random ones: generate's are not to change)."""
    for kind, module in {type(module): module for module in model.modules()}.items():
        if kind.__name__.endswith("RMSNorm") and kind is not torch.nn.RMSNorm:
            ours, weight = _norm(kind.forward), getattr(module, "weight", None)
            if weight is None or weight.ndim != 1:
                continue
            if _agree(partial(ours, module), module, _numbers(weight, 1, 1, len(weight))):
                yield kind, "forward", ours
    attentions = {
        type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Attention")
    }
    inputs = _turns(next(model.parameters()))
    for file in (sys.modules[name] for name in sorted(attentions)):
        original = getattr(file, _ROTARY, None)
        if original is not None and _agree(_rotary(original), original, *inputs):
            yield file, _ROTARY, _rotary(original)


def _norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """An RMS norm's forward by the op `rms_norm`."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        epsilon = getattr(self, "variance_epsilon", getattr(self, "eps", None))
        if args or kwargs or epsilon is None or hidden_states.dtype != self.weight.dtype:
            return original(self, hidden_states, *args, **kwargs)
        return torch.ops.sparsekv.rms_norm(hidden_states, self.weight, epsilon)

    return forward


def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_rotary_pos_emb` by the op `rotate`."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = q.ndim == 4 and cos.ndim == 3 and cos.shape[1:] == (q.shape[2], q.shape[3])
        if args or kwargs or not whole or cos.dtype != q.dtype:
            return original(q, k, cos, sin, *args, **kwargs)
        return torch.ops.sparsekv.rotate(q, k, cos, sin)

    return apply


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


def _turns(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query, a key, and the cosines and sines of a position, for heads of 8 channels."""
    angles = _numbers(like, 1, 1, 4).repeat(1, 1, 2)
    return _numbers(like, 1, 2, 1, 8), _numbers(like, 1, 1, 1, 8), angles.cos(), angles.sin()


def _numbers(like: Tensor, *shape: int) -> Tensor:
    """From -1 to 1, in the dtype of a parameter."""
    return torch.arange(torch.Size(shape).numel(), device=like.device).mul(0.7).sin().view(shape).to(like.dtype)
