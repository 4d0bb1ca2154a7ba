"""Kernels against the reference on the GPU, over random shapes, lengths, tables and memory that nobody may read.

Digests and formats of pages are drawn with the rest of a case; the report says how many cases each format had.

python -m sparsekv.testing.soak --shapes 10000 --seed 0 --out evaluation/results/soak_cuda.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import sparsekv
from sparsekv.digests import DIGESTS
from sparsekv.errors import SparseKVError
from sparsekv.ops import StepArguments, compiler, reference
from sparsekv.ops.formats import halves, page_format
from sparsekv.ops.formulas import formula, kernel_of
from sparsekv.testing.cases import Case
from sparsekv.testing.pages import Pages, fitted_state, fresh_summary, in_format, stored_as

OPS: Any = torch.ops.sparsekv

# Relative error (Frobenius norm) of an output. Weights are rounded to 16 bits, which is most of it.
ALLOWED = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Tally:
    """What has been checked: cases, how many of them in each format, and the largest relative error of each op."""

    shapes: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, actual: Tensor, expected: Tensor, allowed: float, case: Case) -> None:
        """Counts an error.

        Raises:
            SparseKVError: it is too large, or infinities differ.
        """
        finite = expected.isfinite()
        if not torch.equal(finite, actual.isfinite()):
            raise SparseKVError(f"{name}: not finite where the reference is, or the other way round: {case}")
        difference = (actual.float() - expected.float())[finite]
        error = float(difference.norm() / expected[finite].float().norm().clamp_min(1e-6))
        self.worst[name] = max(self.worst.get(name, 0.0), error)
        if not error <= allowed:
            raise SparseKVError(f"{name}: relative error {error:.2g}, allowed is {allowed:.2g}: {case}")


def check(case: Case, device: torch.device, tally: Tally) -> None:
    """Every op on one case, against the reference on the same device.

    Raises:
        SparseKVError: an op is wrong.
    """
    check_append(case, device)
    inputs = Inputs(case, device)
    scores, slots = check_parts(inputs, tally)
    check_step(inputs, scores, slots, tally)
    tally.shapes += 1
    tally.formats[case.format] = tally.formats.get(case.format, 0) + 1


def check_append(case: Case, device: torch.device) -> None:
    """Several tokens, padding among them, onto pages that hold the earlier ones."""
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    columns = case.num_new + (case.num_new // 2 if case.padded else 0)
    valid = None
    if case.padded:
        places = torch.rand(
            len(case.lengths), columns, dtype=torch.float32, device=device, generator=generator
        ).argsort(1)
        valid = places < case.num_new
    pages = case.pages([n + case.num_new for n in case.lengths], device)
    shape = (2, len(case.lengths), case.num_kv_heads, columns, case.head_dim)
    key, value = _normal(shape, generator).to(case.dtype)
    stored, pages = in_format(case.format, pages)
    _check_read(case, stored)
    state, written = _state(case, pages), []
    for op in (OPS.append_kv, reference.append_kv):
        pool, summary = stored.clone(), _summary_before(case.num_new, case, pages, state)
        op(key, value, valid, pages.block_table, pages.seq_lens, pool, summary, state, case.digest, case.format)
        written.append((pool, summary))
    (pool, summary), (expected_pool, expected_summary) = written
    _same("append_kv: pool", pool, expected_pool, case)
    same_summary(case.digest, summary, expected_summary, pages.kv_pool.shape, "append_kv: digests", case)


def _check_read(case: Case, pool: Tensor) -> None:
    """All pages, as a batch of one sequence: also what was never written, of which nothing is said."""
    arguments = (pool, 1, case.head_dim, case.dtype, case.format)
    names = ("keys", "values")[: case.num_halves]
    for name, actual, expected in zip(
        names, OPS.read_pages(*arguments), reference.read_pages(*arguments), strict=True
    ):
        _same(f"read_pages: {name}", actual, expected, case)


def _state(case: Case, pages: Pages) -> list[Tensor]:
    return fitted_state(DIGESTS.get(case.digest)(), pages)


def _summary_before(num_new: int, case: Case, pages: Pages, state: Sequence[Tensor]) -> list[Tensor]:
    """The digests as they were before the last tokens of every sequence came."""
    return fresh_summary(case.digest, replace(pages, seq_lens=pages.seq_lens - num_new), state)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=generator.device, generator=generator)


class Inputs:
    """What the ops of a decode step are handed."""

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(case.seed + 2)
        self.case, self.given = case, case.pages(case.lengths, device)
        self.pool, self.pages = in_format(case.format, self.given)
        self.state = _state(case, self.pages)
        self.summary = fresh_summary(case.digest, self.pages, self.state)
        shape = (len(case.lengths), case.num_kv_heads * case.group, case.head_dim)
        self.query = _normal(shape, generator).to(case.dtype)
        self.sinks = _normal(shape[1:2], generator) if case.with_sinks else None
        most = torch.randint(case.k + 1, shape[:1], dtype=torch.int64, device=device, generator=generator)
        self.limits = most.int() if case.with_limits else None
        self.where = (self.pages.block_table, self.pages.seq_lens)
        self.scaling = case.head_dim**-0.5

    def attend_arguments(self, slots: Tensor | None) -> tuple[Any, ...]:
        case = self.case
        return (self.query, self.pool, *self.where, slots, self.scaling, case.softcap, self.sinks, case.format)


def check_parts(inputs: Inputs, tally: Tally) -> tuple[Tensor, Tensor]:
    """Scoring, selection and attention one by one; returns scores and slots."""
    case = inputs.case
    rest = (case.page_size, case.digest, case.pooling, inputs.scaling)
    score: tuple[Any, ...] = (inputs.query, inputs.summary, inputs.state, *inputs.where, *rest)
    scores: Tensor = OPS.score_pages(*score)
    allowed = tolerance_of(case.digest)
    tally.add(f"score_pages, {case.digest}", scores, reference.score_pages(*score), allowed, case)
    most = (case.k, case.sink_tokens, case.recent_tokens, inputs.limits)
    select = (inputs.pages.seq_lens, case.page_size, *most, case.min_score, case.whole_tokens)
    slots: Tensor = OPS.select_pages(scores, *select)
    _same("select_pages", slots, reference.select_pages(scores, *select), case)
    for name, listed in (("attend_pages", slots), ("attend_pages, dense", None)):
        _check_attention(name, OPS.attend_pages(*inputs.attend_arguments(listed)), inputs, listed, tally)
    return scores, slots


def check_step(inputs: Inputs, scores: Tensor, slots: Tensor, tally: Tally) -> None:
    """The fused step, for which the newest token is not in its page yet."""
    case, pages, kind = inputs.case, inputs.pages, page_format(inputs.case.format)
    newest = pages.seq_lens.long() - 1
    page = pages.block_table.gather(1, (newest // case.page_size)[:, None])[:, 0].long()
    offset = newest % case.page_size
    newest_states = inputs.given.kv_pool[page, :, :, offset]  # [b, halves, hkv, d]
    pool, summary = inputs.pool.clone(), _summary_before(1, case, pages, inputs.state)
    empty = stored_as(kind, pages.emptied())
    for which in halves(pool):
        nothing = kind.stored(empty, case.head_dim, which)[:1, :, 0].expand(len(page), -1, -1)
        kind.write(nothing, pool, page, offset, case.head_dim, which)
    step = StepArguments(
        query=inputs.query,
        key=newest_states[:, 0, :, None],
        value=newest_states[:, -1, :, None],
        block_table=pages.block_table,
        seq_lens=pages.seq_lens,
        kv_pool=pool,
        summary=summary,
        state=inputs.state,
        limits=inputs.limits,
        digest=case.digest,
        group_pooling=case.pooling,
        k=case.k,
        sink_tokens=case.sink_tokens,
        recent_tokens=case.recent_tokens,
        scaling=inputs.scaling,
        softcap=case.softcap,
        sinks=inputs.sinks,
        format=case.format,
        min_score=case.min_score,
        whole_tokens=case.whole_tokens,
    )
    out, lse, chosen = OPS.sparse_decode(*step)
    _same("sparse_decode: pool", pool, inputs.pool, case)
    # A last page needs no digest before it is full: what lies there is not compared.
    unfinished = page[(newest + 1) % case.page_size > 0]
    for one, other in zip(summary, inputs.summary, strict=True):
        one[unfinished] = other[unfinished]
    same_summary(case.digest, summary, inputs.summary, pages.kv_pool.shape, "sparse_decode: digests", case)
    _check_attention("sparse_decode", (out, lse), inputs, chosen, tally)
    same_slots("sparse_decode: slots", chosen, slots, scores, case, case.digest, case.min_score)


def _check_attention(
    name: str, result: tuple[Tensor, Tensor], inputs: Inputs, slots: Tensor | None, tally: Tally
) -> None:
    out, lse = reference.attend_pages(*inputs.attend_arguments(slots))
    tally.add(name, result[0], out, ALLOWED[inputs.case.dtype], inputs.case)
    tally.add(f"{name}: log-sum-exp", result[1], lse, 1e-4, inputs.case)


def _same(name: str, actual: Tensor, expected: Tensor, case: object) -> None:
    if not torch.equal(actual.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0)):
        raise SparseKVError(f"{name} differs from the reference: {case}")


def same_summary(
    digest: str, actual: Sequence[Tensor], expected: Sequence[Tensor], pool: Sequence[int], name: str, case: object
) -> None:
    """A digest's fields are what they should be.

    Args:
        pool: the shape of the keys and values as they are, `[..., p, d]`.

    Raises:
        SparseKVError: they are not.
    """
    fault = formula(digest).why_unlike(actual, expected, *pool[-2:])
    if fault is not None:
        raise SparseKVError(f"{name}: {fault}: {case}")


def tolerance_of(digest: str) -> float:
    """The relative error of scores that a digest's kernel may make; without one, none."""
    kernel = kernel_of(digest)
    return kernel.tolerance if kernel is not None else 0.0


def same_slots(
    name: str,
    actual: Tensor,
    expected: Tensor,
    scores: Tensor,
    case: object,
    digest: str,
    min_score: float | None = None,
) -> None:
    """Slots are the same, or those that differ have nearly the same scores, or one that nearly leaves them out.

    Raises:
        SparseKVError: they are not.
    """
    if torch.equal(actual, expected):
        return

    tie = tolerance_of(digest)

    def listed(slots: Tensor) -> Tensor:
        of_slots = scores.gather(2, slots.clamp_min(0).long()).masked_fill(slots < 0, 0.0)
        if min_score is not None:
            of_slots = of_slots.masked_fill((of_slots - min_score).abs() <= tie * (1 + abs(min_score)), 0.0)
        return of_slots.sort(-1).values

    if not torch.allclose(listed(actual), listed(expected), rtol=tie, atol=tie):
        raise SparseKVError(f"{name} differ from the reference: {case}")


def soak(shapes: int, seed: int) -> Tally:
    """Checks so many random cases on the current GPU, or fewer if it is interrupted.

    Raises:
        SparseKVError: an op is wrong; the message holds the case.
    """
    rng, tally, device = random.Random(seed), Tally(), torch.device("cuda", torch.cuda.current_device())
    with contextlib.suppress(KeyboardInterrupt):
        for _ in track(range(shapes), "Checking", disable=shapes < 100):
            check(Case.draw(rng), device, tally)
    return tally


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m sparsekv.testing.soak`."""
    parser = argparse.ArgumentParser(prog="python -m sparsekv.testing.soak", description=__doc__)
    parser.add_argument("--shapes", type=int, default=1000, help="random cases (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the tally there, as JSON")
    args = parser.parse_args(argv)
    tally = soak(args.shapes, args.seed)
    command = "python -m sparsekv.testing.soak " + " ".join(argv if argv is not None else sys.argv[1:])
    versions = {"sparsekv": sparsekv.__version__, "torch": torch.__version__, "python": platform.python_version()}
    gpu = torch.cuda.get_device_name()
    here = {"command": command, "date": date.today().isoformat(), "gpu": gpu, "versions": versions}
    report = {**here, "kernels": compiler.fingerprint(), **asdict(tally)}
    print(json.dumps(report, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
