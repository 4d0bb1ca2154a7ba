"""The same answers as of a model held alone, by each rank from its own heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import CASES, FAMILIES, SMALL, case, device, generated, shared, tokens, whole

import sparsekv
from sparsekv.hf.support import CACHE


def compared(family: str) -> Callable[[], Any]:
    """How far the logits of a model that is held together lie from those of one that is not. Of latents, which are
    one head for all, each rank chooses for its own query heads: there it is a policy that does not ask them."""

    def run() -> list[float]:
        found = []
        for budget in (256, 16):
            runs, policy = [], "recent" if family == "deepseek_v2" else "top_k"
            for model in (whole(family), shared(family)):
                with sparsekv.patch(model, **SMALL | {"budget": budget, "policy": policy}):
                    runs.append(generated(model).logits)
            found.append(max(float((a - b).abs().max()) for a, b in zip(*runs, strict=True)))
        return found

    return run


CASES |= {family: compared(family) for family in FAMILIES}


@case
def beams() -> Any:
    found = []
    for model in (whole("llama"), shared("llama")):
        with sparsekv.patch(model, **SMALL):
            found.append(tokens(model, num_beams=3))
    return found


@case
def heads_of_a_rank() -> Any:
    with sparsekv.patch(shared("llama"), **SMALL) as patch:
        cache = patch.new_cache()
        shared("llama")(input_ids=torch.ones(1, 12, dtype=torch.int64, device=device()), **{CACHE: cache})
        return cache.layers[0].keys.shape[1]


@case
def what_a_patch_changes() -> Any:
    found = []
    for model in (shared("llama"), whole("llama")):
        before = set(vars(model))
        with sparsekv.patch(model, **SMALL):
            found.append(sorted(set(vars(model)) - before))
    return [found[0], sorted(set(vars(shared("llama"))) & set(found[0])), found[1]]
