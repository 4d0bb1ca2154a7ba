"""A policy's decode step taken apart, and the proof that it computes what it should."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekv.errors import SparseKVError
from sparsekv.ops.reference import listed
from sparsekv.pages.formats import KEYS
from sparsekv.policies import DecodeStep, Policy
from sparsekv.testing.soak import same_summary, tolerance_of

from .attention_inputs import Inputs

CHECKED_SEQUENCES = 2  # by the reference, whose float32 copies of more would not fit
NEAR_TIE = 1e-3  # of the score: sums of floats in another order may choose another of two such pages

Decode = Callable[[DecodeStep, float, Tensor | None], tuple[Tensor, Tensor | None]]


def ways_to_decode(policy: Policy) -> Mapping[str, Decode]:
    """The policy's own step and, if that is one op, the same by one op per part."""
    is_one_op = type(policy).decode is not Policy.decode
    return {"sparse": policy.decode} | ({"composed": partial(Policy.decode, policy)} if is_one_op else {})


@dataclass(frozen=True)
class WatchedStep(DecodeStep):
    """A step that notes the digests' scores that a policy asks for, and the scores that it chooses by."""

    noted: dict[str, Any] = field(default_factory=dict)

    def digest_scores(self) -> Tensor:
        scores = self.noted["digests"] = super().digest_scores()
        return scores

    def select(self, scores: Tensor, min_score: float | None = None) -> Tensor:
        self.noted.update({"chosen by": scores, "least": min_score})
        return super().select(scores, min_score)


@dataclass(frozen=True)
class Choice:
    """What a policy chose, and by what.

    Attributes:
        slots: `[b, hkv, k]` int32; None: every page.
        asks_digests: whether it asked for the digests' scores.
        scores: `[b, hkv, max_pages]`, of which it took the best; None: it chose without `DecodeStep.select`.
        is_by_digests: whether these are the digests' scores and nothing else.
        min_score: the least of a page that is read without being forced; None: any.
    """

    slots: Tensor | None
    asks_digests: bool
    scores: Tensor | None
    is_by_digests: bool
    min_score: float | None

    @classmethod
    def of(cls, policy: Policy, step: DecodeStep) -> Choice:
        """Has the policy choose, once the new token is in its page."""
        watched = WatchedStep(**vars(step))
        slots = policy.select(watched)
        digests, scores = watched.noted.get("digests"), watched.noted.get("chosen by")
        is_by_digests = digests is not None and scores is digests
        return cls(slots, digests is not None, scores, is_by_digests, watched.noted.get("least"))


class Check:
    """Compares steps with the reference in float32 on the same inputs.

    Raises:
        SparseKVError: they disagree, so that there is no speed to be told.
    """

    def __init__(self, inputs: Inputs, policy: Policy) -> None:
        self.inputs, self.point, self.policy = inputs, inputs.point, policy
        self.step = inputs.layers[0]
        self.rows = slice(0, min(self.point.batch, CHECKED_SEQUENCES))

    def all(self) -> int:
        """Every way to take the step, and dense decoding. Returns how many pages the policy listed for a head."""
        slots = None
        for name, decode in ways_to_decode(self.policy).items():
            self._spoil_last_token()
            out, slots = decode(self.step, 0.0, self.inputs.sinks)
            self._append(name)
            self._selection(name, slots)
            self._output(name, out, slots)
        self.rows = slice(0, 1)
        self._output("dense", self.step.attend(None, 0.0, self.inputs.sinks), None)
        return self.point.num_pages if slots is None else int((slots >= 0).sum(-1).float().mean().ceil())

    def competitor(self, name: str, compete: Any) -> None:
        """A competitor must give what our attention, itself checked, gives over the same pages."""
        self._compare(name, compete(0), self.step.attend(compete.slots(0)))

    def _spoil_last_token(self) -> None:
        """What the append has to write is not there already."""
        last, offset = divmod(self.point.context - 1, self.point.config.page_size)
        pages = self.inputs.block_table[:, last]
        self._write(pages, offset, torch.full_like(self._new(), 9.0))
        before = torch.arange(self.point.config.page_size, device=pages.device) < offset
        for stored, computed in self._summaries(pages, before.expand(len(pages), -1)):
            stored[pages] = computed

    def _append(self, name: str) -> None:
        """The new token is in its page, and the digests of that page, if it is full, and of the first ones are their
        formula's."""
        step, table, page_size = self.step, self.inputs.block_table, self.point.config.page_size
        last, offset = divmod(self.point.context - 1, page_size)
        pages = table[:, last]
        stored = step.kv_pool[pages]
        self._write(pages, offset, self._new())
        if not torch.equal(stored, step.kv_pool[pages]):
            raise SparseKVError(f"The {name} step did not store the new token: no speed.")
        full = last + (offset + 1 == page_size)
        slots = torch.tensor([*range(min(4, full)), *range(full)[-1:]], dtype=torch.int64, device=table.device)
        pages = table[self.rows][:, slots].flatten()
        position = slots[:, None] * page_size + torch.arange(page_size, device=table.device)
        pairs = self._summaries(pages, (position < self.point.context).repeat(self.rows.stop, 1))
        if pairs:
            try:
                kept, computed = [kept[pages] for kept, _ in pairs], [new for _, new in pairs]
                shape = (self.point.config.page_size, self.point.geometry.head_dim)
                same_summary(self.point.config.digest, kept, computed, shape, "digests", self.point)
            except SparseKVError as error:
                message = f"Digests after the {name} step are not those of their pages: no speed."
                raise SparseKVError(message) from error

    def _new(self) -> Tensor:
        """Key and value of the new token, `[2, b, hkv, 1, d]`."""
        return torch.stack([x for x in (self.step.key, self.step.value) if x is not None])

    def _write(self, pages: Tensor, offset: int, states: Tensor) -> None:
        """Puts a token's keys and values into its pages, as the pages' format says."""
        kind = self.point.format
        for which, new in enumerate(states):
            records, places = kind.encode(new, None, which)[:, :, 0], torch.full_like(pages, offset)
            kind.write(records, self.step.kv_pool, pages, places, new.shape[3], which)

    def _summaries(self, pages: Tensor, valid: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of the digests, and what some pages' entries of it are by their formula."""
        if self.point.digest is None:
            return []
        keys = self.inputs.read(self.step.kv_pool[pages], KEYS)
        computed = self.point.digest.summarize(keys, valid, self.step.state)
        return [(kept, new.to(kept.dtype)) for kept, new in zip(self.step.summary, computed, strict=True)]

    def _selection(self, name: str, slots: Tensor | None) -> None:
        """A policy that chooses by the digests' scores and nothing else reads what the reference would."""
        choice = None if slots is None or self.step.fits else Choice.of(self.policy, self.step)
        if slots is None or choice is None or not choice.is_by_digests:
            return
        exact, tie = self.inputs.exact(self.rows), max(NEAR_TIE, tolerance_of(self.point.config.digest))
        scores = exact.digest_scores()
        expected = exact.select(scores, choice.min_score)
        if not same_pages(slots[self.rows], expected, scores, tie, choice.min_score):
            raise SparseKVError(f"The {name} step reads other pages than the reference chooses: no speed.")

    def _output(self, name: str, out: Tensor, slots: Tensor | None) -> None:
        """Over the pages that the step chose, since one of two pages with a tie may be another."""
        chosen = None if slots is None else slots[self.rows]
        exact = self.inputs.exact(self.rows).attend(chosen, 0.0, self.inputs.sinks)
        self._compare(name, out[self.rows], exact)

    @staticmethod
    def _compare(name: str, out: Tensor, expected: Tensor) -> None:
        error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
        allowed = 1e-4 if out.dtype == torch.float32 else 1e-2
        if not error < allowed:
            raise SparseKVError(f"The output of {name} is {error:.1e} off; allowed is {allowed}: no speed.")


def same_pages(
    slots: Tensor, expected: Tensor, scores: Tensor, tie: float = NEAR_TIE, min_score: float | None = None
) -> bool:
    """Whether two selections `[b, hkv, k]` are the same but for pages whose scores `[b, hkv, pages]` nearly tie, with
    each other or with the least score."""
    read, wanted = (listed(pages, scores.shape[-1]) for pages in (slots, expected))
    if min_score is not None:
        clear = (scores - min_score).abs() > tie * abs(min_score)
        read, wanted = read & clear, wanted & clear
    if not torch.equal(read.sum(-1), wanted.sum(-1)):
        return False
    differ = read ^ wanted
    highest = scores.masked_fill(~differ, float("-inf")).amax(-1)
    lowest = scores.masked_fill(~differ, float("inf")).amin(-1)
    near = highest - lowest <= tie * highest.abs()
    return bool((near | ~differ.any(-1)).all())
