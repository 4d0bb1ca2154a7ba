"""Calls of a patched model that are denser than wanted: each reason is a warning once, and stands in the report."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from sparsekv.hf import attention
from sparsekv.hf.support import CACHE


class Reason(NamedTuple):
    """Why a call decodes densely, as half a sentence, and what to do instead, as a whole one."""

    text: str
    way_out: str


class Notices:
    """What a patch has to say of the calls of its model.

    Attributes:
        reasons: why calls decoded densely, in the order in which it was noticed.
        others: what else was asked for and could not be done.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.others: list[str] = []

    def say(self, text: str) -> None:
        """Warns of what a cache could not do, unless the same has been said before."""
        if text not in self.others:
            self.others.append(text)
            warnings.warn(f"sparsekv: {text}.", stacklevel=4)

    def add(self, reason: Reason) -> None:
        """Warns of a call that decodes densely, unless the same has been said before."""
        if reason.text not in self.reasons:
            self.reasons.append(reason.text)
            warnings.warn(f"sparsekv: {reason.text}: this call decodes densely. {reason.way_out}", stacklevel=4)


def reason_in_model(model: PreTrainedModel, without_cache: bool) -> Reason | None:
    """Why a call of a patched model, or of its decoder, gets no PagedCache, whatever else it asks for.

    Args:
        without_cache: whether it wants no cache at all.
    """
    changed = attention_set_since(model)
    if changed is not None:
        return Reason(changed, "Undo the patch and patch the model again.")
    if model.training:
        return Reason("the model is in training mode", "Call model.eval() to decode sparsely.")
    if without_cache:
        return Reason("use_cache=False leaves no keys to choose from", "Leave it out to decode sparsely.")
    return None


def reason_in_cache(cache: Any) -> Reason:
    """Why a call with this cache decodes densely: it is not paged."""
    return Reason(
        f"a {type(cache).__name__} of your own, which has no pages, is given",
        f"Leave {CACHE} out, or pass patch.new_cache(): the patched model fills it, with a prefix, too.",
    )


def attention_set_since(model: PreTrainedModel) -> str | None:
    """That the attention of a patched model was exchanged (`set_attn_implementation`), or None."""
    config = model.config.get_text_config(decoder=True)
    if attention.is_patched(config):
        return None
    return f"the attention was set to {attention.original_implementation(config)!r} after the patch"
