"""A streamer for `generate` that shows text as it comes and notes when each token came."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor


class Stream(transformers.TextStreamer):
    """Text as it comes, without the prompt and without special tokens.

    Attributes:
        said: the text so far.
        num_tokens: tokens so far, the end token included.

    Args:
        show: called with every piece of text.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._times: list[float] = []
        self.said = ""

    @property
    def num_tokens(self) -> int:
        return len(self._times)

    @property
    def ms_per_token(self) -> float | None:
        """Mean milliseconds of a decoded token: of all but the first, which the dense pass gives. None: there is
        only one."""
        if self.num_tokens < 2:
            return None
        return (self._times[-1] - self._times[0]) / (self.num_tokens - 1) * 1e3

    def put(self, value: Tensor) -> None:
        """Takes the prompt, which is not shown, then tokens."""
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt:
            self._times.append(time.perf_counter())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the base class with text that no later token will change."""
        self.said += text
        self._show(text)


class StopWhen(transformers.StoppingCriteria):
    """Ends `generate` after the token at which `is_over()` holds."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """`[b]` bool, the same for every row."""
        return torch.full((len(input_ids),), self._is_over(), device=input_ids.device, dtype=torch.bool)
