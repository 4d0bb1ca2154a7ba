"""What stands around a document and questions: a template cut where the turns end, and what a run asks with it."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.hf import wording
from sparsekv.hf.wording import Wording

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Templated:
    """What is needed of a tokenizer with a chat template."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        import jinja2

        return jinja2.Template(self.chat_template).render(messages=messages, **options)


def test_a_template_is_cut_where_the_turns_end() -> None:
    made = wording.of_template(Templated("<s>" + CHATML), has_document=True)
    assert made == Wording("<s><|user|>", ("\n\n", "<end><|assistant|>"), ("<end><|user|>", "<end><|assistant|>"))
    without = wording.of_template(Templated("<s>" + CHATML), has_document=False)
    assert without.start == ""
    assert without.first == ("<s><|user|>", "<end><|assistant|>")
    assert without.later == made.later


def test_put_together_again_it_is_what_the_template_renders() -> None:
    tokenizer = Templated("<s>" + CHATML)
    made = wording.of_template(tokenizer, has_document=True)
    text = f"{made.start}D{made.question('Q', True)}A{made.question('R', False)}"
    messages = [("user", "D\n\nQ"), ("assistant", "A"), ("user", "R")]
    assert text == tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], add_generation_prompt=True
    )


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ messages[9].content.x }}", "no question"])
def test_a_template_that_leaves_something_out_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="--plain leaves it out"):
        wording.of_template(Templated(template), has_document=True)


def test_plain_text_and_the_testbeds_words() -> None:
    assert wording.plain(True).question("Who?", True) == "\n\nQuestion: Who?\nAnswer:"
    assert wording.plain(False).question("Who?", True) == "Question: Who?\nAnswer:"
    assert wording.of_testbed().question("who is it?", False) == " Question : who is it ? Answer :"


# -- of a run


def tokenizer(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast.from_pretrained(testbed.MODEL_DIR, local_files_only=True)
    made.chat_template = template
    return made


def test_a_run_uses_a_template_where_there_is_one() -> None:
    made = wording.of_run(tokenizer(CHATML), "auto")
    assert made == wording.of_run(tokenizer(CHATML), "yes") == wording.of_run(tokenizer({"default": CHATML}), "auto")
    assert made == wording.of_template(tokenizer(CHATML), has_document=True)
    assert wording.of_run(tokenizer(CHATML), "no") is None
    assert wording.of_run(tokenizer(None), "auto") is wording.of_run(tokenizer(None), "no") is None
    with pytest.raises(ConfigError, match="--chat yes: this model's tokenizer has no chat template"):
        wording.of_run(tokenizer(None), "yes")
    with pytest.raises(ConfigError, match="--chat no leaves it out"):
        wording.of_run(tokenizer("no question"), "auto")


def test_a_run_asks_in_the_same_words_every_day_and_without_thinking_aloud() -> None:
    template = "{{ strftime_now('%d %b %Y') }}{{ '' if enable_thinking is false else '<think>' }}" + CHATML
    made = wording.of_run(tokenizer(template), "auto")
    assert made is not None
    assert made.start == "1 January 2025<|user|>"
