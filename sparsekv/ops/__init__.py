"""The four operations of sparse decoding: append, score, select, attend; and `sparse_decode`, all of them at once.

`rotate` and `rms_norm` stand beside them: with them a captured decode step does the model's small work in one launch
each. `read_pages` gives pages back as keys and values, for what reads all of them densely.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sparsekv.ops import schema
from sparsekv.ops.cuda import why_reference
from sparsekv.ops.formulas import FORMULAS, DigestKernel, Formula
from sparsekv.ops.step import StepArguments

__all__ = ["FORMULAS", "DigestKernel", "Formula", "StepArguments", "for_backend", "why_reference"]

_PLAIN = SimpleNamespace(**schema.PLAIN)


def for_backend(backend: str) -> Any:
    """The namespace of the ops: `append_kv, read_pages, score_pages, select_pages, attend_pages, sparse_decode`,
    which a cache calls, `score_blocks` and `prompt_attention`, for sparse prompts, and `rotate` and `rms_norm`, which
    a captured step does.

    `auto` is `torch.ops.sparsekv` (the dispatcher picks by device); `reference` is plain torch on any device.
    """
    return _PLAIN if backend == "reference" else getattr(torch.ops, schema.NAMESPACE)
