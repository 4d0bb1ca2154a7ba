"""Captured steps, which all believe or none; on a CPU they are played."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch as replaced

import torch
import torch.distributed as dist
from models import SMALL, case, is_second, shared, tokens

import sparsekv
from sparsekv.hf.capture import decoder as decoders
from sparsekv.testing.playing import Played, played


def as_graphs() -> contextlib.ExitStack:
    """Within it, steps are captured on any device, and memory goes from cache to cache."""
    stack = contextlib.ExitStack()
    if dist.get_backend() != "nccl":
        stack.enter_context(played())
        # A copy's hooks would lead back to the model anyway.
        stack.enter_context(replaced.object(Played, "frozen", staticmethod(lambda model: model)))
        stack.enter_context(replaced.object(sparsekv.Patch, "_captures", True))
    return stack


def captured(prepare: Callable[[sparsekv.Patch], Any] = lambda patch: None) -> list[Any]:
    """Two calls of generate, the second after `prepare`: whether each gave what eager steps give, how often a step
    was captured in it, how many steps were replayed, and why no more."""
    model, found = shared("llama"), []
    with as_graphs(), sparsekv.patch(model, **SMALL | {"budget": 32, "page_size": 8, "fuse": True}) as patch:
        expected = tokens(model, disable_compile=True, new=8)
        for before in (lambda patch: None, prepare):
            patch.decoder.captures = patch.decoder.replays = 0
            undo = before(patch)
            same = tokens(model, new=8) == expected
            found.append([same, patch.decoder.captures, patch.decoder.replays, patch.decoder.last_obstacle])
            if undo is not None:
                undo()
    return found


@case
def captured_twice() -> Any:
    return captured()


@case
def one_has_lost_its_graphs() -> Any:
    return captured(lambda patch: patch.decoder.clear() if is_second() else None)


@case
def another_weight_in_one() -> Any:
    def move(patch: sparsekv.Patch) -> None:
        if is_second():
            norm = patch.model.model.layers[0].input_layernorm
            norm.weight = torch.nn.Parameter(norm.weight.detach().clone())

    return captured(move)


@case
def one_finds_its_graph_wrong() -> Any:
    def doubt(patch: sparsekv.Patch) -> Any:
        same = replaced.object(decoders, "_same", lambda a, b: not is_second())
        same.start()
        return same.stop

    return captured(doubt)


def failing(error: Exception) -> Callable[[sparsekv.Patch], Any]:
    """Lets the second rank fail to capture anything anew."""

    def prepare(patch: sparsekv.Patch) -> Any:
        patch.decoder.clear()
        record = decoders.CapturedStep.record

        def fail(step: Any, *args: Any) -> None:
            record(step, *args)
            if is_second():
                raise error

        failed = replaced.object(decoders.CapturedStep, "record", fail)
        failed.start()
        return failed.stop

    return prepare


@case
def one_has_no_memory_for_a_graph() -> Any:
    return captured(failing(torch.OutOfMemoryError("CUDA out of memory.")))


@case
def one_cannot_capture() -> Any:
    return captured(failing(RuntimeError("operation not permitted")))


@case
def one_must_not_capture() -> Any:
    def observe(patch: sparsekv.Patch) -> Any:
        made = replaced.object(patch.decoder, "obstacle", lambda inputs: "a test" if is_second() else None)
        made.start()
        return made.stop

    return captured(observe)
