"""How a document and questions become the text that a model reads: by its chat template, or as plain text.

Every turn's text begins where the cache ends, so what was read before is never rendered again: whatever a template
would make of earlier turns, the tokens that a later turn builds on are those in the cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsekv.errors import ConfigError

_DOCUMENT, _FIRST, _ANSWER, _LATER = (f"SPARSEKV-{name}" for name in ("DOCUMENT", "FIRST", "ANSWER", "LATER"))


@dataclass(frozen=True)
class Wording:
    """What stands around the document and the questions.

    Attributes:
        start: before the document.
        first: before and after the first question; the document is before that.
        later: before and after every other one; what ends the answer before it is part of it.
        end: text that ends an answer, where the model has learned no token for it.
        adds_start_token: whether the tokenizer's own start token comes first.
        is_spaced: whether the tokenizer wants spaces around punctuation.
    """

    start: str
    first: tuple[str, str]
    later: tuple[str, str]
    end: str | None = None
    adds_start_token: bool = False
    is_spaced: bool = False

    def question(self, text: str, is_first: bool) -> str:
        """The text of a turn."""
        before, after = self.first if is_first else self.later
        if self.is_spaced:
            text = " ".join(re.findall(r"\w+|[^\w\s]", text))
        return before + text + after


def plain(has_document: bool) -> Wording:
    """For models without a chat template."""
    later = ("\n\nQuestion: ", "\nAnswer:")
    first = later if has_document else ("Question: ", "\nAnswer:")
    return Wording("", first, later, end="\n\n", adds_start_token=True)


def of_testbed() -> Wording:
    """What the small model that ships has learned."""
    around = (" Question : ", " Answer :")
    return Wording("", around, around, is_spaced=True)


def of_template(tokenizer: Any, has_document: bool) -> Wording:
    """From the tokenizer's chat template; the document is the beginning of the first user message.

    Raises:
        ConfigError: the template does not render two questions one after the other.
    """
    first = {"role": "user", "content": f"{_DOCUMENT}\n\n{_FIRST}" if has_document else _FIRST}
    answered = [first, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _LATER}]
    start, rest = "", _rendered(tokenizer, [first])
    if has_document:
        start, rest = _split(rest, _DOCUMENT)
    _, later = _split(_rendered(tokenizer, answered), _ANSWER)
    return Wording(start, _split(rest, _FIRST), _split(later, _LATER))


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise ConfigError(f"The model's chat template fails ({error}). --plain leaves it out.") from error
    return text


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ConfigError("The model's chat template leaves out parts of a conversation. --plain leaves it out.")
    return before, after
