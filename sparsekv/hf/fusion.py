"""Small operators of a decode step, fused by torch.compile: at batch 1 a token's time is matrices and launches.

RMS norms and rotary embeddings are half a dozen kernels each as transformers writes them, with hardly a byte to
move. Compiled, each is one. They are replaced only while a step is warmed up and captured; everything else of the
model, and every other call of it, stays as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

_ROTARY = "apply_rotary_pos_emb"  # as nearly all of transformers' models call it
_compiled: dict[Any, Any] = {}


@contextlib.contextmanager
def fused(model: torch.nn.Module) -> Iterator[None]:
    """Within it, the model's norms and rotary embeddings run compiled. Where they cannot be (no Triton, no C
    compiler), torch says so and they run as they are."""
    with contextlib.ExitStack() as undo, torch._dynamo.config.patch(suppress_errors=True):
        for owner, name in small_parts(model):
            original = getattr(owner, name)
            setattr(owner, name, _compile(original))
            undo.callback(setattr, owner, name, original)
        yield


def small_parts(model: torch.nn.Module) -> list[tuple[Any, str]]:
    """Functions to fuse, as attributes of a class or a Python module."""
    kinds = {type(module): None for module in model.modules()}  # a dict keeps the order
    norms = [
        (kind, "forward") for kind in kinds if kind.__name__.endswith("RMSNorm") and kind is not torch.nn.RMSNorm
    ]
    files = {sys.modules[kind.__module__]: None for kind in kinds if kind.__name__.endswith("Attention")}
    return norms + [(file, _ROTARY) for file in files if hasattr(file, _ROTARY)]


def _compile(function: Any) -> Any:
    """Compiled once a process, rounding where the original rounds."""
    if function not in _compiled:
        _compiled[function] = torch.compile(function, options={"emulate_precision_casts": True})
    return _compiled[function]
