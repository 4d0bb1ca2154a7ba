"""The decode step that is timed on a GPU, and the proof that it is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv import ops
from sparsekv.errors import SparseKVError
from sparsekv.ops import reference
from sparsekv.ops.formulas import formula
from sparsekv.ops.step import sparse_decode
from sparsekv.testing.soak import same_summary, tolerance_of

from .attention_inputs import Inputs

CHECKED_SEQUENCES = 2  # by the reference, whose float32 copies of more would not fit
NEAR_TIE = 1e-3  # of the score: sums of floats in another order may choose another of two such pages


class DecodeStep:
    """One decode step of each layer, whole and in parts, by the operators a cache calls."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.point = inputs, inputs.point
        self.ops = ops.for_backend("auto")
        config = self.point.config
        self.digest = config.digest
        self._chosen = (self.point.k, config.sinks, config.recent_tokens)

    def append(self, i: int) -> None:
        """The new token into its page, and that page's digest."""
        layer = self.inputs.layers[i]
        self.ops.append_kv(
            layer.key, layer.value, None, *self._lengths, layer.kv_pool, layer.summary, layer.state, self.digest
        )

    def score(self, i: int) -> Tensor:
        """`[b, hkv, max_pages]` float32."""
        layer, point = self.inputs.layers[i], self.point
        scores: Tensor = self.ops.score_pages(
            layer.query,
            layer.summary,
            layer.state,
            *self._lengths,
            point.config.page_size,
            self.digest,
            "max",
            point.scaling,
        )
        return scores

    def select(self, scores: Tensor) -> Tensor:
        """Slots `[b, hkv, k]` int32."""
        slots: Tensor = self.ops.select_pages(
            scores, self.inputs.seq_lens, self.point.config.page_size, *self._chosen
        )
        return slots

    def attend(self, i: int, slots: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Output `[b, hq, d]`; all pages where slots is None."""
        layer = self.inputs.layers[i]
        out: Tensor = self.ops.attend_pages(
            layer.query, layer.kv_pool, *self._lengths, slots, self.point.scaling, 0.0, sinks
        )[0]
        return out

    def dense(self, i: int) -> Tensor:
        """Attention to all pages, without the append, as the competitors."""
        return self.attend(i, None, self.inputs.sinks)

    def composed(self, i: int) -> tuple[Tensor, Tensor | None]:
        """The whole step by one operator per part: output and slots; nothing is chosen where everything fits."""
        self.append(i)
        slots = None if self.point.fits else self.select(self.score(i))
        return self.attend(i, slots, self.inputs.sinks), slots

    def sparse(self, i: int) -> tuple[Tensor, Tensor | None]:
        """The whole step as a cache takes it, by one operator; slots are None where everything is read."""
        layer = self.inputs.layers[i]
        out, _, slots = self.ops.sparse_decode(
            layer.query, layer.key, layer.value, *self._lengths, layer.kv_pool, layer.summary, layer.state, None,
            self.digest, "max", *self._chosen, self.point.scaling, 0.0, self.inputs.sinks,
        )  # fmt: skip
        return out, None if self.point.fits else slots

    @property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        return self.inputs.block_table, self.inputs.seq_lens


class Check:
    """Compares steps with the reference in float32 on the same inputs.

    Raises:
        SparseKVError: they disagree, so that there is no speed to be told.
    """

    def __init__(self, step: DecodeStep) -> None:
        self.step, self.inputs, self.point = step, step.inputs, step.point
        self.rows = slice(0, min(self.point.batch, CHECKED_SEQUENCES))

    def all(self) -> None:
        """Both ways to take the step, and dense decoding."""
        for name in ("sparse", "composed"):
            self._spoil_last_token()
            out, slots = getattr(self.step, name)(0)
            self._append(name)
            self._selection(name, slots)
            self._output(name, out, None if slots is None else slots[self.rows])
        self.rows = slice(0, 1)
        self._output("dense", self.step.dense(0), None)

    def competitor(self, name: str, compete: Any) -> None:
        """A competitor must give what our attention, itself checked, gives over the same pages."""
        expected = self.step.attend(0, compete.slots(0), None)
        self._compare(name, compete(0), expected)

    def _spoil_last_token(self) -> None:
        """What the append has to write is not there already."""
        last, offset = divmod(self.point.context - 1, self._page_size)
        layer, pages = self.inputs.layers[0], self.inputs.block_table[:, last]
        layer.kv_pool[pages, :, :, offset] = 9.0
        before = (torch.arange(self._page_size, device=pages.device) < offset).expand(len(pages), -1)
        for field, computed in zip(layer.summary, self._summarize(pages, before), strict=True):
            field[pages] = computed.to(field.dtype)

    def _summarize(self, pages: Tensor, valid: Tensor) -> list[Tensor]:
        """The digests of some pages, by their formula."""
        layer = self.inputs.layers[0]
        return formula(self.step.digest).summarize(layer.kv_pool[pages, 0], valid, layer.state)

    def _append(self, name: str) -> None:
        """The new token is in its page, and the digests of that page, if it is full, and of the first ones are their
        formula's."""
        layer, table = self.inputs.layers[0], self.inputs.block_table
        last, offset = divmod(self.point.context - 1, self._page_size)
        stored = layer.kv_pool[table[:, last], :, :, offset]  # [b, 2, hkv, d]
        if not torch.equal(stored, torch.stack([layer.key[:, :, 0], layer.value[:, :, 0]], 1)):
            raise SparseKVError(f"The {name} step did not store the new token: no speed.")
        full = last + (offset + 1 == self._page_size)
        slots = torch.tensor([*range(min(4, full)), *range(full)[-1:]], dtype=torch.int64, device=table.device)
        pages = table[self.rows][:, slots].flatten()
        position = slots[:, None] * self._page_size + torch.arange(self._page_size, device=table.device)
        valid = (position < self.point.context).repeat(self.rows.stop, 1)
        expected = [x.to(field.dtype) for x, field in zip(self._summarize(pages, valid), layer.summary, strict=True)]
        try:
            same_summary(self.step.digest, [field[pages] for field in layer.summary], expected, "digests", self.point)
        except SparseKVError as error:
            message = f"Digests after the {name} step are not those of their pages: no speed."
            raise SparseKVError(message) from error

    def _selection(self, name: str, slots: Tensor | None) -> None:
        if slots is None:
            return
        layer, point, lengths = self.inputs.layers[0], self.point, self._lengths
        query = layer.query[self.rows].float()
        scores = reference.score_pages(
            query, layer.summary, layer.state, *lengths, self._page_size, self.step.digest, "max", point.scaling
        )
        expected = sparse_decode(
            query, None, None, *lengths, layer.kv_pool, layer.summary, layer.state, None, self.step.digest, "max",
            point.k, point.config.sinks, point.config.recent_tokens, point.scaling, 0.0, self.inputs.sinks,
        )[2]  # fmt: skip
        if not same_pages(slots[self.rows], expected, scores, max(NEAR_TIE, tolerance_of(self.step.digest))):
            raise SparseKVError(f"The {name} step reads other pages than the reference chooses: no speed.")

    def _output(self, name: str, out: Tensor, slots: Tensor | None) -> None:
        """Over the pages that the step chose, since one of two pages with a tie may be another."""
        layer = self.inputs.layers[0]
        exact, _ = reference.attend_pages(
            layer.query[self.rows].float(), layer.kv_pool, *self._lengths, slots, self.point.scaling, 0.0,
            self.inputs.sinks,
        )  # fmt: skip
        self._compare(name, out[self.rows], exact)

    @staticmethod
    def _compare(name: str, out: Tensor, expected: Tensor) -> None:
        error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
        allowed = 1e-4 if out.dtype == torch.float32 else 1e-2
        if not error < allowed:
            raise SparseKVError(f"The output of {name} is {error:.1e} off; allowed is {allowed}: no speed.")

    @property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        return self.inputs.block_table[self.rows], self.inputs.seq_lens[self.rows]

    @property
    def _page_size(self) -> int:
        return self.point.config.page_size


def same_pages(slots: Tensor, expected: Tensor, scores: Tensor, tie: float = NEAR_TIE) -> bool:
    """Whether two selections `[b, hkv, k]` are the same but for pages whose scores `[b, hkv, pages]` nearly tie."""
    if torch.equal(slots, expected):
        return True
    listed, wanted = (_mask(pages, scores) for pages in (slots, expected))
    if not torch.equal(listed.sum(-1), wanted.sum(-1)):
        return False
    differ = listed ^ wanted
    highest = scores.masked_fill(~differ, float("-inf")).amax(-1)
    lowest = scores.masked_fill(~differ, float("inf")).amin(-1)
    near = highest - lowest <= tie * highest.abs()
    return bool((near | ~differ.any(-1)).all())


def _mask(slots: Tensor, scores: Tensor) -> Tensor:
    """`[b, hkv, pages]` bool: which pages are listed."""
    spare = scores.shape[-1]
    mask = torch.zeros(*scores.shape[:2], spare + 1, dtype=torch.bool, device=scores.device)
    mask.scatter_(2, slots.long().where(slots >= 0, spare), True)
    return mask[..., :spare]
