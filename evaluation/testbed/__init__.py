"""A real small language model, trained on seeded stories, that answers questions about 32k tokens on a CPU.

>>> from sparsekv.evaluation import testbed
>>> model, tokenizer = testbed.load()
>>> story = testbed.make_story(2048, tasks=("many_keys",), seed=1)
>>> question = story.questions[0]
>>> inputs = tokenizer(f"{story.text} {question.prompt}", return_tensors="pt")
>>> output = model.generate(**inputs, max_new_tokens=8)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsekv.hf import models

from .stories import TASKS, Question, Story, make_story

__all__ = ["MODEL_DIR", "NAME", "TASKS", "UNLEARNED", "Question", "Story", "load", "make_story", "path_of"]

NAME, MODEL_DIR = "testbed", Path(__file__).parent / "model"
models.SHIPPED[NAME] = MODEL_DIR  # the name stands for this model wherever one can be named

# Tasks that the model answers worse than its bar at 16k (the model card has the figures).
UNLEARNED: frozenset[str] = frozenset()


def path_of(model: Any) -> Any:
    """What transformers loads: this model's folder instead of `NAME`, everything else as it is."""
    return str(MODEL_DIR) if model == NAME else model


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The trained model, ready for inference, and its tokenizer, from this folder alone.

    Args:
        dtype: of the weights; None: bfloat16 on a GPU, else float32.

    Raises:
        FileNotFoundError: the weights are missing.
    """
    if not (MODEL_DIR / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the testbed's weights are missing from {MODEL_DIR}: restore model.safetensors from the "
            "repository, or train it anew with `python -m tools.testbed.train`"
        )
    return models.load(NAME, str(device), dtype or models.AUTO)
