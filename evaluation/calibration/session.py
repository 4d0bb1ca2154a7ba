"""A calibration from its options to its files: loads the model, searches, says what was found."""

from __future__ import annotations

import argparse
import hashlib
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import sparsekv
from sparsekv import Patch, SparseConfig
from sparsekv.command_line import circumstances, read_text
from sparsekv.errors import ConfigError
from sparsekv.evaluation.accuracy.plots import shown
from sparsekv.evaluation.tasks import Writer
from sparsekv.hf import models
from sparsekv.hf.fingerprint import model_hash
from sparsekv.hf.support import context_of

from .documents import length_for, pieces
from .ledger import VARYING, Ledger
from .measure import Measurer
from .report import figure, named, table
from .search import Search, Tolerance, budgets, looks
from .verdicts import Outcome

_FIRST = 8  # documents of the first look, at least, if the text has as many
_RECALL = 3  # tolerances of natural text are one of recall: few tokens of a use are said again
_SCORED = {"cpu": 24, "cuda": 256}  # tokens of a turn
_AT_ONCE = {"cpu": 1 << 15, "cuda": 1 << 17}  # tokens of documents


class Session:
    """One calibration.

    Args:
        args: the options of the command; command: as it was typed.

    Raises:
        ConfigError: the text is too short, an option is not allowed, or a file is of something else.
    """

    def __init__(self, args: argparse.Namespace, command: str, console: Console) -> None:
        self.args, self.console, self.out = args, console, Path(args.out)
        self._record = self.out.with_suffix(".calibration.jsonl")
        if self.out.exists() and not self._record.exists():
            raise ConfigError(
                f"--out {self.out} is there, without {self._record.name} beside it: choose another name."
            )
        self._base = SparseConfig(dense_layers=0, digest=args.digests[0], kv=args.kv or "plain")
        text = read_text("--text", args.text)
        self.model, tokenizer = models.load(args.model, args.device, args.dtype)
        writer, device = Writer(tokenizer), self.model.device.type
        ids = writer.check(text)
        self.length = length_for(len(ids), context_of(self.model.config), args.length)
        scored = args.scored or _SCORED.get(device, _SCORED["cpu"])
        if scored > self.length // 4:
            raise ConfigError(
                f"--scored {scored} is not allowed: at most {self.length // 4}, a quarter of a document."
            )
        self.pieces = pieces(ids, writer, self.length, scored)
        self._at_once = max((args.batch_tokens or _AT_ONCE.get(device, _AT_ONCE["cpu"])) // self.length, 1)
        self._identity = {
            "model": model_hash(self.model),
            "text": hashlib.sha256(text.encode()).hexdigest(),
            "length": self.length,
            "scored": scored,
            **{name: x for name, x in asdict(self._base).items() if name not in VARYING},
        }
        self._circumstances = circumstances(command)
        self._of_prompts: Search | None = None
        self._answer = ""  # told last

    def run(self) -> bool:
        """Searches, prints and writes; returns whether a setting is known to meet the tolerance. Where it is
        interrupted it shows what is known, and the same command goes on."""
        args, base = self.args, self._base
        lines = [
            [base.with_(digest=digest, group_pooling=pooling, budget=budget) for budget in budgets(base, self.length)]
            for digest in args.digests
            for pooling in args.poolings
        ]
        first = self._at_once * math.ceil(_FIRST / self._at_once)
        tolerance = Tolerance(args.tolerance, args.recall_tolerance or _RECALL * args.tolerance)
        with sparsekv.patch(self.model, base) as patch:
            measurer = Measurer(patch, self.pieces, self._at_once)
            ledger = Ledger(self._record, self._identity, self._circumstances, measurer, base.with_(policy="all"))
            search = Search(ledger, lines, looks(first, len(self.pieces)), tolerance, ledger.bytes_per_token)
            try:
                self._search(search, ledger, patch)
            except KeyboardInterrupt:
                if search.outcomes:
                    self._show(search, ledger)
                raise
            self._show(search, ledger)
        return self._conclude(search)

    def _search(self, search: Search, ledger: Ledger, patch: Patch) -> None:
        """Look after look, then layer after layer. A setting that meets the tolerance is on the disk at once."""
        layers = [status.layer_idx for status in patch.layers if status.is_sparse and status.shares is None]
        if not layers:
            raise ConfigError(f"--model {self.args.model}: no layer chooses pages, so there is nothing to calibrate.")
        per_look = sum(math.log2(len(line) + 1) for line in search.lines) + 1  # settings, and dense
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
            bar = _Bar(progress)
            ledger.tell = bar.tell
            bar.expect(per_look * search.looks[0] / self._at_once)
            for count in search.by_digest(lambda count: self._tell_best(search, count)):
                bar.expect(per_look / 2 * count / self._at_once)  # fewer and fewer are open
            bar.expect(2 * math.log2(len(layers) + 1) * search.looks[0] / self._at_once)
            search.by_layer(layers)
            self._of_prompts = search.of_prompts(ledger.density) if self.args.prefill == "sparse" else None
            if self._of_prompts is not None:
                bar.expect(2 * math.ceil(search.looks[0] / self._at_once))
                list(self._of_prompts.by_digest())

    def _tell_best(self, search: Search, count: int) -> None:
        """The best so far, where it has become another; also written, if it is known to meet the tolerance."""
        if search.best is not None:
            search.best.config.save(self.out)
        answer = f"{count} documents: {_told(search.best or search.closest)}"
        if answer != self._answer:
            self.console.print(answer)
        self._answer = answer

    def _show(self, search: Search, ledger: Ledger) -> None:
        """The table, and the picture beside the settings."""
        natural, recall = (float(x) for x in np.mean(ledger.nats(ledger.dense, search.looks[0]), axis=0))
        title = (
            f"{shown(self.args.model, 60)}, documents of {self.length:,} tokens; "
            f"dense: {natural:.3f} nats per token, recall {recall:.3f}"
        )
        content = (title, search.outcomes.values(), ledger.bytes_per_token(ledger.dense), search.best)
        self.console.print(table(*content))
        figure(*content).savefig(self.out.with_suffix(".png"))

    def _conclude(self, search: Search) -> bool:
        """What was written and how it is used, or why nothing was; and what more text would tell."""
        best, say = self._with_sparse_prompts() or search.best, self.console.print
        if best is None:
            closest = search.closest
            say(f"No setting is known to meet the tolerance. The closest loses {closest.excess:.2g} times as much:")
            say(_told(closest))
        if best is not None or self.args.force:
            (best or search.closest).config.save(self.out)
            say(f"Written: {self.out}. --settings {self.out}, or sparsekv.SparseConfig.load({str(self.out)!r})")
        undecided = [outcome for outcome in search.open if math.isfinite(outcome.documents_needed)]
        if undecided:
            nearest = min(undecided, key=lambda outcome: outcome.documents_needed)
            needed, has = (count * self.length for count in (nearest.documents_needed, len(self.pieces)))
            say(f"About {needed:,.0f} tokens of text would tell more; --text has {has:,} in whole documents.")
            say(_told(nearest))
        return best is not None

    def _with_sparse_prompts(self) -> Outcome | None:
        """The best setting behind sparse prompts, if these were searched for and found; tells what was measured."""
        if self._of_prompts is None:
            return None
        for outcome in self._of_prompts.outcomes.values():
            self.console.print(f"{_told(outcome)}, {outcome.cost:.0%} of a prompt's blocks")
        best = self._of_prompts.best
        if best is None or best.cost == 1:
            self.console.print("Prompts stay dense: no sparse ones are known to meet the tolerance and read less.")
            return None
        return best


class _Bar:
    """How far a calibration is. What there is to measure shows as it goes on."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("", total=None)

    def expect(self, more: float) -> None:
        """About so many measurements are to come."""
        done = self._progress.tasks[0].completed
        self._progress.update(self._task, total=done + max(math.ceil(more), 1))

    def tell(self, config: SparseConfig | None) -> None:
        """A setting is about to be measured, or has been."""
        if config is None:
            self._progress.advance(self._task)
        else:
            self._progress.update(self._task, description=named(config))


def _told(outcome: Outcome) -> str:
    losses = f"natural {outcome.natural}, recall {outcome.recall}"
    return f"{named(outcome.config)}: {outcome.verdict.value} ({losses} nats above dense)"
