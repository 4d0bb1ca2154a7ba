"""Tasks in which much is said, where errors add up: a chain is followed, a table copied, several questions answered.

The testbed answers a chain of up to four pointers and up to four codes at once. For its tokenizer, long tasks are
therefore a series of such turns over one cache; elsewhere they are one question with one long answer.
"""

from __future__ import annotations

from sparsekv.evaluation.testbed import tasks as grammar
from sparsekv.evaluation.testbed import vocabulary as vocab
from sparsekv.evaluation.testbed.tasks import Ask, FactPlan, Pools

from .base import Document, Metric, Question, Task, Turn, register
from .planned import WORDS, Planned, evidence, seeded, turn
from .ruler import MultiKey, MultiQuery, MultiValue, VariableTracking
from .writer import Text, Writer

POINTERS = 32
ROWS = 32
AT_ONCE = 4  # pointers or rows of one turn of the testbed
_ROW = r"\w[\w ]*\w"


def _series(writer: Writer, text: Text, asks: list[Ask], items: str, how: str = "") -> Question:
    """A question whose turns are asked one after the other."""
    turns = [turn(writer, ask, items, how, later=i > 0) for i, ask in enumerate(asks)]
    return Question(tuple(turns), evidence(text, *asks))


@register("chain")
class Chain(Task):
    """Follow 32 pointers from person to person: each next name is found through the last one said. Other, shorter
    chains lie around. In the testbed's words, 8 chains of 4 pointers are followed one after the other."""

    metric = Metric.PREFIX
    num_questions = 1
    stops = False

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        rng = seeded(self, seed)
        pools = writer.pools(rng, num_tokens)
        hops = AT_ONCE if writer.spaced else POINTERS
        chains = [[_chain(pools, hops) for _ in range(POINTERS // hops)] for _ in range(num_questions)]
        others = grammar.variable_tracking(pools, 0).threads
        threads = [list(ask.needs) for asks in chains for ask in asks]
        text = writer.tell([*threads, *others], num_tokens, rng)
        how = (
            "Begin with the one whose number it is, go on with the one who keeps the same number as that one, and so "
            "on to the end. Answer with the names only, separated by spaces."
        )
        questions = [_series(writer, text, asks, WORDS, how) for asks in chains]
        return Document(text.text, tuple(questions), text.num_tokens)


def _chain(pools: Pools, hops: int) -> Ask:
    return grammar.chain(pools, pools.take("numbers", 1)[0], hops)


@register("table")
class Table(Task):
    """Copy a table of 32 rows, a key and its code each, row by row; the keys look alike. The prompt ends with the
    first key. In the testbed's words, four rows are asked for at a time, by their keys."""

    metric = Metric.PREFIX
    num_questions = 1
    stops = False

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        rng = seeded(self, seed)
        pools = writer.pools(rng, num_tokens)
        tables = [_rows(pools) for _ in range(num_questions)]
        threads = [[fact for ask in asks for fact in ask.needs] for asks in tables]
        text = writer.tell(threads, num_tokens, rng, depths=[rng.random() for _ in tables])
        if writer.spaced:
            questions = [_series(writer, text, asks, _ROW) for asks in tables]
        else:
            questions = [Question((_copy(writer, asks),), evidence(text, *asks)) for asks in tables]
        return Document(text.text, tuple(questions), text.num_tokens)


def _rows(pools: Pools) -> list[Ask]:
    """Questions for a table's rows, four at a time."""
    keys = pools.look_alike_keys(ROWS)[:ROWS]
    parts = [keys[i : i + AT_ONCE] for i in range(0, ROWS, AT_ONCE)]
    return [grammar.ask_codes(pools, FactPlan(), part, vocab.CODE_FACTS[:1]) for part in parts]


def _copy(writer: Writer, asks: list[Ask]) -> Turn:
    """A question for the whole table."""
    answers = [f"{ask.prompt.partition('Answer : ')[2]} {ask.answer}" for ask in asks]  # KEY CODE , KEY CODE , ...
    rows = [writer.render(row) for answer in answers for row in answer.split(" , ")]
    first, last = (row.rpartition(" ")[0] for row in (rows[0], rows[-1]))
    asked = (
        f"\n\nQuestion: copy the list of secret codes that begins with that of the {first} and ends with that of the "
        f"{last}. Answer with all {len(rows)} of them, in the same order, one per line.\n"
    )
    opening = f"Answer:\n{first}"
    rows[0] = rows[0].removeprefix(f"{first} ")
    return Turn(asked + opening, tuple(rows), " " + "\n".join(rows), opening)


@register("multi_turn")
class MultiTurn(Task):
    """Four questions, one after the other: what was asked and said before stays in the cache. They ask for a code,
    for towns, for a chain, and for several codes."""

    num_questions = 2
    families: tuple[type[Planned], ...] = (MultiKey, MultiValue, VariableTracking, MultiQuery)

    def write(self, writer: Writer, num_tokens: int, num_questions: int, seed: int) -> Document:
        rng = seeded(self, seed)
        pools = writer.pools(rng, num_tokens)
        plans = [family.builder(pools, num_questions) for family in self.families]
        text = writer.tell([thread for plan in plans for thread in plan.threads], num_tokens, rng)
        questions = []
        for asks in zip(*(plan.asks for plan in plans), strict=True):
            told = [
                turn(writer, ask, family.items, family.how, later=i > 0)
                for i, (family, ask) in enumerate(zip(self.families, asks, strict=True))
            ]
            questions.append(Question(tuple(told), evidence(text, *asks)))
        return Document(text.text, tuple(questions), text.num_tokens)
