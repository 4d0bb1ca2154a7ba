"""How likely the end of a text is, token by token through the sparse path (as PG19 is used; Rae et al. 2019)."""

from __future__ import annotations

import re

from sparsekv.evaluation.testbed import tasks as grammar

from .base import Document, Metric, Question, Task, Turn, register
from .planned import evidence, seeded
from .writer import Writer

SCORED_TOKENS = 256
_ASKED = 16  # questions that a quiz has at most: about so many tokens
MAX_LETTERS = 16  # of a word: text may have no spaces
WORD = re.compile(rf"\s*\S{{1,{MAX_LETTERS}}}")


@register("perplexity")
class Perplexity(Task):
    """A story that ends in a quiz about itself, answered. So its end is likely to one who looks back.

    Plain sentences that tell the facts again would do for large models; the testbed looks facts up in answers only.
    A text of one's own: `perplexity:FILE`.
    """

    metric = Metric.PERPLEXITY
    num_questions = 1
    stops = False

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        rng = seeded(self, seed)
        pools = writer.pools(rng, num_tokens)
        plan = grammar.many_keys(pools, max(_ASKED, pools.num_tokens // 64))
        text = writer.tell(plan.threads, num_tokens, rng)
        questions = []
        for _ in range(num_questions):
            asks, quiz = rng.sample(plan.asks, _ASKED), ""
            for ask in asks:
                if len(writer.encode(quiz)) < SCORED_TOKENS:
                    quiz += f"{writer.prompt(ask.prompt, later=bool(quiz))} {writer.render(ask.answer)}"
            questions.append(Question((begun(writer, quiz),), evidence(text, *asks)))
        return Document(text.text, tuple(questions), text.num_tokens)


def begun(writer: Writer, text: str) -> Turn:
    """A text to be scored, all but its beginning: a word, or part of a long one.

    Raises:
        ConfigError: the tokenizer does not know all words.
    """
    writer.check(text)
    first = WORD.match(text)
    start = first.end() if first else 1
    return Turn(text[:start], (), text[start:])
