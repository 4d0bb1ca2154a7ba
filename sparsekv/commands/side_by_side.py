"""A document that is read once, and questions about it that every way to decode answers in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers.cache_utils import Cache

import sparsekv
from sparsekv import DecodeStats, PagedCache
from sparsekv.command_line import new_console
from sparsekv.evaluation.accuracy.asking import PromptTurn, Row, decode, prefill
from sparsekv.evaluation.pages_plot import PageTrace
from sparsekv.evaluation.tasks import Metric
from sparsekv.testing.timing import synchronize


@dataclass(frozen=True)
class Ask:
    """A question in tokens.

    Attributes:
        turn: the question, and how long an answer may be.
        expected: what a right answer is, or holds.
        evidence: spans `[start, end)` of the document, in tokens, that the answer comes from.
    """

    turn: PromptTurn
    expected: str
    evidence: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Scene:
    """A document and the questions about it.

    Attributes:
        document: its tokens.
        budgets: in tokens; the methods are `top_k` with each, and `recent` with the last.
        stop_ids: tokens that end an answer.
        is_right: of what was said and what was expected.
    """

    document: list[int]
    asks: Sequence[Ask]
    budgets: Sequence[int]
    stop_ids: frozenset[int]
    is_right: Callable[[str, str], bool]


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it took.

    Attributes:
        text: the decoded answer, without the end token.
        is_right: whether it is what was expected.
        num_tokens: tokens decoded one by one, the question's included.
        ms_per_token: mean milliseconds of one of them.
    """

    text: str
    is_right: bool
    num_tokens: int
    ms_per_token: float


@dataclass
class Method:
    """A way to decode: its cache, and the answers it gave."""

    name: str
    cache: Cache
    stats: DecodeStats | None
    answers: list[Answer] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Part of the cache read per token; dense reads it all."""
        return self.stats.share if self.stats is not None else 1.0

    @property
    def sparse_share(self) -> float:
        """Part that is read of the layers that choose their pages."""
        return self.stats.sparse_share if self.stats is not None else 1.0

    def as_row(self) -> dict[str, Any]:
        """What the JSON file says of it."""
        return {
            "method": self.name,
            "right": self.num_right,
            "share": self.share,
            "sparse_share": self.sparse_share,
            "ms_per_token": self.ms_per_token,
            "stats": self.stats.as_dict() if self.stats is not None else None,
            "answers": [asdict(answer) for answer in self.answers],
        }

    @property
    def ms_per_token(self) -> float:
        tokens = sum(a.num_tokens for a in self.answers)
        return sum(a.ms_per_token * a.num_tokens for a in self.answers) / max(tokens, 1)

    @property
    def num_right(self) -> int:
        return sum(a.is_right for a in self.answers)


def compare(model: Any, tokenizer: Any, scene: Scene) -> tuple[list[Method], PageTrace]:
    """Reads the document once; every method then decodes from the same keys and values. Shows its progress.

    Returns:
        The methods, dense first; and the pages that the smallest budget read for a question that it answered.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=new_console()) as progress:
        return _compare(model, tokenizer, scene, progress)


def _compare(model: Any, tokenizer: Any, scene: Scene, progress: Progress) -> tuple[list[Method], PageTrace]:
    budgets = scene.budgets
    reading = progress.add_task(f"reading {len(scene.document):,} tokens (dense prefill)", total=1)
    with sparsekv.patch(model, budget=budgets[0]) as patch:
        cache = patch.new_cache()
        prefill(model, [scene.document], cache)
        progress.advance(reading)
        plain = Method("dense", cache.to_dynamic(), None)
        forks = {f"top_k {budget}": cache.fork(budget=budget) for budget in budgets}
        forks[f"recent {budgets[-1]}"] = cache.fork(budget=budgets[-1], policy="recent")
        sparse = [Method(name, fork, fork.stats) for name, fork in forks.items()]
        for method in sparse:
            _ask_all(model, tokenizer, method, scene, progress)
        right = [ask for ask, answer in zip(scene.asks, sparse[0].answers, strict=True) if answer.is_right]
        trace = _trace(model, tokenizer, cache.fork(budget=budgets[0]), scene, (right or list(scene.asks))[0])
    _ask_all(model, tokenizer, plain, scene, progress)  # the model as it is without sparsekv
    return [plain, *sparse], trace


def _ask_all(model: Any, tokenizer: Any, method: Method, scene: Scene, progress: Progress) -> None:
    task = progress.add_task(method.name, total=len(scene.asks))
    for question in scene.asks:
        method.answers.append(ask(model, tokenizer, method.cache, scene, question))
        progress.advance(task)


def ask(model: Any, tokenizer: Any, cache: Cache, scene: Scene, question: Ask) -> Answer:
    """Feeds a question token by token, decodes greedily to an end token, and puts the cache back as it was."""
    row, mask = Row([question.turn], Metric.RECALL, scene.stop_ids), _mask(model, cache)
    synchronize(model.device)
    start = time.perf_counter()
    decode(model, cache, [row], mask)
    seconds = time.perf_counter() - start
    cache.crop(-row.num_tokens)
    text = tokenizer.decode(row.said[0])
    is_right = scene.is_right(text, question.expected)
    return Answer(text, is_right, row.num_tokens, seconds / row.num_tokens * 1e3)


def _trace(model: Any, tokenizer: Any, fork: PagedCache, scene: Scene, question: Ask) -> PageTrace:
    """Asks one question again, and notes every page read."""
    trace = PageTrace(question.evidence, page_size=fork.config.page_size, budget=int(fork.config.plain_budget))
    fork.observers.append(trace.observe)
    row = Row([question.turn], Metric.RECALL, scene.stop_ids)
    decode(model, fork, [row], _mask(model, fork))
    trace.words = [tokenizer.decode([token]).strip() for token in (*question.turn.prompt, *row.said[0])]
    trace.num_asked = len(question.turn.prompt)
    return trace


def _mask(model: Any, cache: Cache) -> Tensor:
    return torch.ones(1, cache.get_seq_length(), dtype=torch.long, device=model.device)
