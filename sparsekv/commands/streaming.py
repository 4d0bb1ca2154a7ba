"""A streamer for `generate` that shows text as it comes and notes when each token came."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor


class Stream(transformers.TextStreamer):
    """Text as it comes, without the prompt and without special tokens.

    Attributes:
        said: the text so far.

    Args:
        show: called with every piece of text.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self.said = show, ""
        self._times: list[float] = []

    @property
    def num_tokens(self) -> int:
        """Tokens so far, the end token included."""
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
        if not self.next_tokens_are_prompt:
            self._times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the base class with text that no later token will change."""
        self.said += text
        self._show(text)
