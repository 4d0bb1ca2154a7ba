"""Captured decode steps on any machine.

A graph is played by a copy of the model as it was when the step was captured: it computes what a graph would, and
writes where a graph would.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparsekv.cache import PagedCache
from sparsekv.hf.capture import decoder
from sparsekv.hf.capture.decoder import CapturedDecoder
from sparsekv.hf.capture.graphs import CapturedStep
from sparsekv.hf.support import CACHE


class Played(CapturedStep):
    """A captured step without a GPU. `failure`: what recording raises. `frozen`: what makes the copy of the model."""

    failure: Exception | None = None
    frozen = staticmethod(copy.deepcopy)

    def record(self, forward: Any, site: Any, cut: Any = None) -> None:
        """As CapturedStep's, but that it computes, and puts back what that changes."""
        step = forward.keywords[CACHE].step()
        step.save()
        output = forward(**self.inputs)
        step.restore()
        if self.failure is not None:  # some layers have run by then
            raise self.failure
        model, self.rest = forward.func, {name: x for name, x in forward.keywords.items() if name != CACHE}
        self.model = self.frozen(model)
        self.output = type(output)(logits=output.logits.clone())

    def replay(self, inputs: dict[str, Tensor], cache: PagedCache) -> Any:
        """As CapturedStep's."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        with cache.step().capturing() as reads:
            played = self.model(**self.inputs, **self.rest, **{CACHE: cache})
        for (_, slots), (_, listed) in zip(self.reads, reads, strict=True):
            if slots is not None and listed is not None:
                slots.copy_(listed)
        self.output.logits.copy_(played.logits)
        return type(self.output)(**self.output, **{CACHE: cache})


@contextlib.contextmanager
def played() -> Iterator[None]:
    """Within it, decode steps are captured and played, whatever the device."""
    with (
        patch.object(decoder, "CapturedStep", Played),
        patch.object(decoder, "Site", lambda device: SimpleNamespace(device=device)),
        patch.object(CapturedDecoder, "why_eager", lambda self, device: self.refusal),
        patch.object(Played, "failure", None),
    ):
        yield


@torch.no_grad()
def decoded(forward: Callable[..., Any], cache: PagedCache, tokens: range) -> list[Tensor]:
    """Logits of some tokens, one after the other in every row."""
    found = []
    device = next(iter(set.union(*(part.devices for part in cache._store.parts))))
    for token in tokens:
        ids = torch.full((cache._store.newest.batch_size, 1), token, dtype=torch.int64, device=device)
        inputs = {"input_ids": ids, "position_ids": torch.full_like(ids, cache.get_seq_length())}
        found.append(forward(**inputs, **{CACHE: cache}, use_cache=True).logits.clone())
    return found
