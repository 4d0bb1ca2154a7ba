"""What tears the ranks: they cannot go on after it."""

from __future__ import annotations

from typing import Any

import torch
from models import SMALL, case, failure, is_second, shared

import sparsekv


@case
def one_has_no_memory_for_the_prompt() -> Any:
    """The other waits for it in the middle of a layer."""

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = shared("llama")
    with sparsekv.patch(model, **SMALL):
        if is_second():
            model.model.layers[1].mlp.register_forward_pre_hook(fail)
        return failure(model)
