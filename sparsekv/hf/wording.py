"""How a document and questions become the text that a model reads, by its chat template or as plain text, and where
an answer ends.

Every turn's text begins where the cache ends, so what was read before is never rendered again: whatever a template
would make of earlier turns, the tokens that a later turn builds on are those in the cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sparsekv.errors import ConfigError

CHATS = ("auto", "yes", "no")
# Before a template: those that tell the date get the same one every day, so that a run goes on in the same words.
_ONE_DAY = "{% macro strftime_now(form) %}1 January 2025{% endmacro %}"
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

    def as_json(self) -> dict[str, Any]:
        """For the records: what stands around the document and the questions."""
        return {"start": self.start, "first": list(self.first), "later": list(self.later)}


def plain(has_document: bool) -> Wording:
    """For models without a chat template."""
    later = ("\n\nQuestion: ", "\nAnswer:")
    first = later if has_document else ("Question: ", "\nAnswer:")
    return Wording("", first, later, end="\n\n", adds_start_token=True)


def of_testbed() -> Wording:
    """What the small model that ships has learned."""
    around = (" Question : ", " Answer :")
    return Wording("", around, around, is_spaced=True)


def of_run(tokenizer: Any, chat: str) -> Wording | None:
    """What a measurement puts documents and questions into; None: nothing, tasks are asked in their own words.

    It says the same every day, and models that can are told not to think aloud: an answer has few tokens.

    Args:
        chat: `yes`, `no` or `auto`: yes where the tokenizer has a chat template.

    Raises:
        ConfigError: there is no template, or it cannot be used.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat == "yes" and not template:
        raise ConfigError("--chat yes: this model's tokenizer has no chat template. Use --chat auto or --chat no.")
    if chat == "no" or not template:
        return None
    changes = {"chat_template": _ONE_DAY + tokenizer.get_chat_template(), "enable_thinking": False}
    return of_template(tokenizer, has_document=True, way_out="--chat no", **changes)


def of_template(tokenizer: Any, has_document: bool, way_out: str = "--plain", **changes: Any) -> Wording:
    """From the tokenizer's chat template; the document is the beginning of the first user message.

    Args:
        way_out: the option that leaves the template out.
        changes: passed to `apply_chat_template`.

    Raises:
        ConfigError: the template does not render two questions one after the other.
    """

    def rendered(*messages: dict[str, str]) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, **changes}
        try:
            text: str = tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise ConfigError(f"The model's chat template fails ({error}). {way_out} leaves it out.") from error
        return text

    def split(text: str, mark: str) -> tuple[str, str]:
        before, found, after = text.partition(mark)
        if not found:
            raise ConfigError(
                f"The model's chat template leaves out parts of a conversation. {way_out} leaves it out."
            )
        return before, after

    first = {"role": "user", "content": f"{_DOCUMENT}\n\n{_FIRST}" if has_document else _FIRST}
    start, rest = split(rendered(first), _DOCUMENT) if has_document else ("", rendered(first))
    answer, second = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _LATER}
    _, later = split(rendered(first, answer, second), _ANSWER)
    return Wording(start, split(rest, _FIRST), split(later, _LATER))


def stop_ids(model: Any, tokenizer: Any, wording: Wording | None = None) -> frozenset[int]:
    """Tokens that end an answer: the model's and the tokenizer's, and the one that a chat template puts behind it.

    Args:
        wording: of the chat; the text between an answer and the next question is `later[0]`. None: there is no chat.
    """
    found = model.generation_config.eos_token_id
    ids = [found] if isinstance(found, int) else list(found or [])
    known = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*ids, *known, *([] if wording is None else _first_special(tokenizer, wording.later[0]))])


def _first_special(tokenizer: Any, text: str) -> list[int]:
    """The first special token of a text, if it has one."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [i for i in ids if i in known and known[i].special and i != tokenizer.unk_token_id][:1]
