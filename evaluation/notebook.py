"""What the notebooks share: their sizes, a model, and questions asked token by token.

size = notebook.profile(full={"tokens": 16384}, ci={"tokens": 4096})
model, tokenizer = notebook.load(None)
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from transformers.cache_utils import Cache

from sparsekv import PagedCache
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.hf.wording import stop_ids

from . import testbed
from .accuracy import asking, session
from .accuracy.options import RunOptions
from .accuracy.summary import Run
from .pages_plot import PageTrace
from .report import BLUE, RED, new_figure, short
from .tasks import Document, Metric, Question, Writer, score

PROFILE = "SPARSEKV_NOTEBOOK_PROFILE"


def profile(*, full: Mapping[str, Any], ci: Mapping[str, Any]) -> SimpleNamespace:
    """A notebook's sizes, as attributes: `full`, or where SPARSEKV_NOTEBOOK_PROFILE=ci, the small ones.

    Raises:
        ConfigError: the two do not name the same sizes.
        UnknownNameError: there is no such profile.
    """
    if full.keys() != ci.keys():
        raise ConfigError(f"full and ci must name the same sizes; only one has {sorted(full.keys() ^ ci.keys())}.")
    name, known = os.environ.get(PROFILE, "full"), {"full": full, "ci": ci}
    if name not in known:
        raise UnknownNameError(PROFILE, name, known)
    return SimpleNamespace(**known[name])


def load(model: str | None = None, device: str = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer, on the GPU if there is one.

    Args:
        model: id on the hub or a folder; None: the small model that ships with sparsekv.

    Raises:
        ConfigError: there is no such model or device.
    """
    return session.load(RunOptions(model=model or testbed.NAME, device=device))


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    Attributes:
        text, expected: of all turns.
        pieces: the tokens that were decoded one by one, as text: the question's, then the answer's.
        num_asked: how many of them are the question's.
    """

    text: str
    expected: str
    is_right: bool
    pieces: list[str]
    num_asked: int


def read(model: Any, tokenizer: Any, text: str, cache: Cache) -> None:
    """Fills an empty cache with a text, in a dense pass.

    Raises:
        ConfigError: the tokenizer does not know all words.
    """
    asking.prefill(model, [Writer(tokenizer).document_ids(text)], cache)


def ask(model: Any, tokenizer: Any, cache: Cache, question: Question, metric: Metric = Metric.RECALL) -> Reply:
    """Asks about the text in the cache, question and answer token by token, greedily.

    The cache then holds both: give it `cache.fork()`, to ask another question about the same text.
    """
    turns = asking.turns_of(question, Writer(tokenizer).encode)
    row = asking.Row(turns, metric, stop_ids(model, tokenizer))
    mask = torch.ones(1, cache.get_seq_length(), dtype=torch.long, device=model.device)
    asking.decode(model, cache, [row], mask)
    said = [tokenizer.decode(ids) for ids in row.said]
    expected = [turn.answers for turn in question.turns]
    fed = [token for turn, answer in zip(turns, row.said, strict=True) for token in (*turn.prompt, *answer)]
    return Reply(
        text=" / ".join(said).strip(),
        expected=" / ".join(" ".join(answers) for answers in expected),
        is_right=score(metric, said, expected) == 1.0,
        pieces=[tokenizer.decode([token]).strip() for token in fed],
        num_asked=len(turns[0].prompt),
    )


def trace(model: Any, tokenizer: Any, cache: PagedCache, document: Document, question: Question) -> PageTrace:
    """Asks, and notes the pages that every layer reads; `pages_figure` draws them.

    Args:
        cache: holds the document; give it a fork, as to `ask`.
    """
    to_ids, text = Writer(tokenizer).document_ids, document.text
    evidence = [(len(to_ids(text[:start])), len(to_ids(text[:end]))) for start, end in question.evidence]
    found = PageTrace(evidence, page_size=cache.config.page_size, budget=int(cache.config.plain_budget))
    cache.observers.append(found.observe)
    reply = ask(model, tokenizer, cache, question)
    found.words, found.num_asked = reply.pieces, reply.num_asked
    return found


def measure(options: RunOptions, folder: Path | None = None) -> Run:
    """What `sparsekv eval run` measures, without its progress bar.

    Args:
        folder: of the run. What it holds is not measured again, also if a digest of that name has changed since: so
            by default it is a new temporary one.

    Raises:
        SparseKVError: bad input.
    """
    folder = Path(tempfile.mkdtemp()) if folder is None else folder
    session.run([options], folder, "evaluation.notebook.measure", Console(file=io.StringIO(), force_jupyter=False))
    return Run.read(folder)


def answers_figure(right: Mapping[str, Sequence[Sequence[bool]]], budgets: Sequence[int]) -> Any:
    """A panel per policy: which questions were answered at which budget.

    Args:
        right: by policy, a row per question, a value per budget.
        budgets: in tokens.
    """
    num_questions = max(len(rows) for rows in right.values())
    size = {"figsize": (3.6 * len(right), 1.7 + 0.3 * num_questions), "dpi": 110}
    figure, axes = new_figure(ncols=len(right), sharey=True, squeeze=False, **size)
    for panel, (policy, rows) in zip(axes.flat, right.items(), strict=True):
        _draw_answers(panel, rows)
        panel.set_title(f"policy {policy}", fontsize=10)
        panel.set_xticks(range(len(budgets)), [short(budget) for budget in budgets])
        panel.set_xlabel("budget [tokens per kv head]")
    axes[0, 0].set_ylabel("question number")
    axes[0, 0].set_yticks(range(num_questions), range(1, num_questions + 1))
    figure.suptitle("Which questions are answered")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _draw_answers(panel: Any, rows: Sequence[Sequence[bool]]) -> None:
    for wanted, marker, color, label in ((True, "o", BLUE, "right"), (False, "x", RED, "wrong")):
        places = [(x, y) for y, row in enumerate(rows) for x, is_right in enumerate(row) if is_right == wanted]
        panel.scatter(*(zip(*places, strict=True) if places else ([], [])), s=55, marker=marker, c=color, label=label)
    panel.set_xlim(-0.5, len(rows[0]) - 0.5)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.grid(alpha=0.3)
    panel.set_axisbelow(True)
