"""How long a token of `model.generate` takes, sparse beside the unpatched model, on the same prompts in one run.

Every mode generates greedily from the same random tokens. The device is waited for at three tokens only (the first,
one past capture and warm-up, the last), so a token takes what it takes without a clock. A short call in every mode
comes first and counts for nothing; the unpatched model is then measured before the patched one and after it, and its
faster time counts. On a GPU the patched one reads the prompt once before, for nothing, too (of long ones the
beginning): PyTorch's attention plans for a length when it first sees it. The counters must say that the sparse path
ran, and on a GPU that captured steps were replayed; else no speed is printed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor
from transformers import LogitsProcessorList

import sparsekv
from sparsekv import POLICIES, Patch
from sparsekv.cache import plain_layers
from sparsekv.command_line import choose_device, new_console

from .generate_clock import Clock, Counts, check_counts, split_ms
from .generate_file import ResultFile
from .generate_model import Subject
from .generate_points import CAPTURED, DTYPES, MIN_NEW_TOKENS, MODES, Options, Point, options_of
from .generate_rows import Row, around, compare, failure, is_out_of_memory
from .graph_timer import Timer, free, read_tb_per_s
from .known_models import MODELS
from .plots import tokens_figure
from .tables import print_tokens, token_line

Result = TypeVar("Result")

_WARMUP_BEYOND = 64  # tokens by which the warm-up's prompt exceeds the budget
_MAX_READ_TWICE = 131_072  # tokens of a sequence: of longer ones, planning takes a small share
_READS = 20  # of the memory, of which the median is its speed
_TIMES = ("ms_per_token", "first_token_s", "first_steps_s", "tokens_per_s")


class GenerateBench:
    """Times a model's `generate`, mode by mode.

    Args:
        tb_per_s: at which the device's memory was seen to be read; None: no row says how long its weights take.

    Attributes:
        is_warm: whether nothing has been forgotten since `warm_up`.
    """

    def __init__(
        self, subject: Subject, options: Options, device: torch.device, tb_per_s: float | None = None
    ) -> None:
        self.subject, self.options, self.device, self.tb_per_s = subject, options, device, tb_per_s
        self.is_warm = False

    def warm_up(self) -> None:
        """A short call in every mode: kernels are compiled and libraries started. What the static mode compiles is
        compiled anew at every length, and seen in its first steps."""
        longest = max(where.context for where in self.options.points)
        budget = max(each.budget_pages(0) * each.page_size for each in self.options.config.each)
        where = Point(1, min(budget + _WARMUP_BEYOND, longest))
        clock = Clock(self.device, (), dict)
        for name in self.options.modes:
            if name != "static":
                self._in_mode(name, lambda patch: self._generate(where, MIN_NEW_TOKENS, clock))
        self.is_warm = True

    def row(self, where: Point, name: str) -> Row:
        """One mode at one point. One that needs more memory than there is says so, and so does an unpatched mode that
        fails in another way: it stops nobody else.

        Raises:
            SparseKVError: a patched mode did not do what it promises.
        """
        row: Row = {"model": self.subject.name, "batch": where.batch, "context": where.context, "mode": name}
        config = self.options.config
        row |= {"ranks": self.subject.ranks.size}
        row |= {"digest": config.digest, "budget": config.as_dict()["budget"], **dict.fromkeys(_TIMES)}
        why_not = self.options.why_not(name, where) or (self.subject.why_not_static if name == "static" else None)
        if why_not is not None:
            return {**row, "note": why_not}
        self.subject.ranks.gather(name, f"{name} at {where}")  # an error where they cannot go on together
        try:
            return row | self._in_mode(name, lambda patch: self._measure(where, name, patch))
        except Exception as error:
            if MODES[name].is_patched and not is_out_of_memory(error):
                raise
            return row | failure(error)
        finally:
            free(self.device)

    def _in_mode(self, name: str, work: Callable[[Patch | None], Result]) -> Result:
        """Does the work on the model as the mode wants it: unpatched, or with a patch of its own."""
        with self.subject.ranks.together(f"mode {name}"):
            return self._patched(name, work)

    def _patched(self, name: str, work: Callable[[Patch | None], Result]) -> Result:
        model, settings = self.subject.model, MODES[name].settings
        if settings is not None:
            with sparsekv.patch(model, self.options.config, **settings) as patch:
                return work(patch)
        try:
            return work(None)
        finally:
            if name == "static":
                _forget_compiled(model)
                self.is_warm = False

    def _measure(self, where: Point, name: str, patch: Patch | None) -> Row:
        options, in_use = self.options, _in_use(self.device)  # before a patch keeps pages for the next call
        if patch is not None and self.device.type == "cuda":
            beginning = replace(where, context=min(where.context, _MAX_READ_TWICE))
            self._generate(beginning, 1, Clock(self.device, (), dict))
        at = (1, options.first_tokens, options.new_tokens)
        clock = Clock(self.device, at, lambda: _count(patch))
        peak = self._generate(where, options.new_tokens, clock, **MODES[name].options)
        peak = None if peak is None else peak - in_use
        start, first, steady, last = clock.times
        ms = (last - steady) * 1e3 / options.timed_tokens
        row: Row = {
            "ms_per_token": ms,
            "first_token_s": first - start,
            "first_steps_s": steady - first,
            "tokens_per_s": where.batch * 1e3 / ms,
            "peak_bytes": peak,
        }
        row |= self._reads(where, patch, ms)
        return row if patch is None else row | self._proof(where, name, patch, clock, ms)

    def _generate(self, where: Point, new_tokens: int, clock: Clock, **options: Any) -> int | None:
        """Calls `generate`; returns the most bytes that were in use meanwhile, on a GPU."""
        ids = prompt(where, self.subject.text.vocab_size).to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens}
        free(self.device)
        gc.freeze()  # what modes before this one have made is not gone over, again and again, while this one is timed
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clock.start()
        try:
            self.subject.model.generate(
                **inputs, do_sample=False, logits_processor=LogitsProcessorList([clock]), **options
            )
        finally:
            gc.unfreeze()
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def _reads(self, where: Point, patch: Patch | None, ms: float) -> Row:
        """The bytes of the cache, and those that a token reads: weights, and of the cache what the counters say."""
        num_tokens = where.batch * (where.context + self.options.new_tokens)
        size = self.subject.cache_bytes(num_tokens, None if patch is None else patch.config)
        weights, read = self.subject.step_bytes(where.batch), size
        if patch is not None:
            read = patch.stats.bytes_read // max(patch.stats.sparse_steps + patch.stats.dense_steps, 1)
        total = None if weights is None or read is None else weights + read
        speed = total / ms / 1e9 if total is not None and self.device.type == "cuda" else None
        weights_ms = weights / self.tb_per_s / 1e9 if weights and self.tb_per_s else None
        return {
            "cache_bytes": size,
            "bytes_per_token": total,
            "tb_per_s": speed,
            "memory_tb_per_s": self.tb_per_s,
            "weights_ms": weights_ms,
            "over_weights": weights_ms and ms / weights_ms,
        }

    def _proof(self, where: Point, name: str, patch: Patch, clock: Clock, ms: float) -> Row:
        """The counters, checked, and where a captured step's time goes.

        Raises:
            SparseKVError: the mode did not do what it promises.
        """
        decoder, config = patch.decoder, patch.config
        asked = not (POLICIES.get(config.policy).reads_all or self.options.fits(where))
        why_dense = self._why_dense(patch) if asked else None
        chooses = asked and why_dense is None
        promised = ["sparse_steps"] if chooses else []
        promised += ["replays"] if config.capture and self.device.type == "cuda" else []
        counted = {key: clock.counted[key] for key in promised}
        why_eager = check_counts(counted, self.options.timed_tokens, _why_eager(patch))
        row: Row = {"note": "; ".join(filter(None, (why_dense, why_eager, self._why_little(chooses)))) or None}
        row |= {"captures": decoder.captures, "replays": decoder.replays, "refusal": decoder.refusal}
        row |= {"stats": patch.stats.as_dict()}
        if self.options.split and name in CAPTURED:
            row["split_ms"] = split_ms(decoder, ms, self.device)
        return row

    def _why_dense(self, patch: Patch) -> str | None:
        """Why no step is sparse, if that was known before the first one."""
        plain = plain_layers(self.subject.config)
        if len(patch.config.dense_among(plain)) < len(plain):
            return None
        return f"decodes densely: {', '.join(sorted({status.reason for status in patch.layers}))}"

    def _why_little(self, chooses: bool) -> str | None:
        """What a reader should know of how much was read where pages may be left out: attention is nowhere peaked."""
        if not chooses or not self.options.config.min_share or self.subject.source is not None:
            return None
        return (
            "random weights attend to all pages alike: where there are many, none holds min_share, and only those "
            "always read are read (--min-share 1e-30: the budget is)"
        )


def _count(patch: Patch | None) -> Counts:
    return {} if patch is None else {"sparse_steps": patch.stats.sparse_steps, "replays": patch.decoder.replays}


def _why_eager(patch: Patch) -> str | None:
    """What keeps a model's steps from being captured, as far as its patch knows."""
    moving = [str(status.layer_idx) for status in patch.layers if not status.is_in_place]
    layers = f"layers {', '.join(moving)} are not in pages" if moving else None
    return patch.decoder.refusal or layers


def _forget_compiled(model: Any) -> None:
    """transformers makes a static cache as long as the longest before it, and PyTorch compiles for any size what has
    changed its size: every point is to be what it is in a process of its own. Frees what was compiled, too."""
    for name in ("_previous_max_cache_length", "_compiled_call", "_last_compile_config", "_cache"):
        model.__dict__.pop(name, None)
    torch.compiler.reset()


def prompt(where: Point, vocab_size: int) -> Tensor:
    """Random tokens, the same ones for every mode."""
    generator = torch.Generator().manual_seed(where.context)
    return torch.randint(vocab_size, (where.batch, where.context), generator=generator)


def _in_use(device: torch.device) -> int:
    """Bytes of a GPU's memory that are in use, from where a peak is counted."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def sweep(bench: GenerateBench, save: Callable[[Sequence[Row]], object], console: Console) -> list[Row]:
    """A row per point and mode. What is known is saved after each: a run that is cut short has told it."""
    rows: list[Row] = []
    for where in bench.options.points:
        found: dict[str, Row] = {}
        here: list[Row] = []
        if not bench.is_warm:
            bench.warm_up()
        for name in bench.options.order:
            row = bench.row(where, name)
            console.print(token_line(row), markup=False)
            found[name] = around(found.get(name), row)
            here = [found[mode] for mode in bench.options.modes if mode in found]
            compare(here)
            save([*rows, *here])
        rows += here
    return rows


def run(args: argparse.Namespace, command: str) -> Row:
    """Measures, prints the tables and writes the files asked for; returns what the JSON file holds."""
    device = choose_device(args.device)
    options = options_of(args, device)
    on_gpu = device.type == "cuda"
    dtype = DTYPES[args.dtype or ("bfloat16" if on_gpu else "float32")]
    subject = Subject(args.model, args.geometry or list(MODELS)[0 if on_gpu else -1], dtype)
    if subject.ranks.rank:  # the first one writes
        options = replace(options, out=None, add=False)
    subject.check(max(where.context for where in options.points), options.new_tokens)
    if device.index is not None and on_gpu:
        torch.cuda.set_device(device)
    file, console = ResultFile(subject, options, device, command), new_console()
    tb_per_s = read_tb_per_s(device, Timer(device, _READS))
    free(device)
    subject.load(device)
    rows = sweep(GenerateBench(subject, options, device, tb_per_s), file.save, console)
    print_tokens(console, rows)
    path = file.save(rows)
    if path is not None:
        tokens_figure([*file.kept, *rows]).savefig(path.with_suffix(".png"))
        console.print(f"Written: {path} and .png")
    return file.content(rows)
