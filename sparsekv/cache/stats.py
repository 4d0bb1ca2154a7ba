"""Counters of what decoding read: the proof that the sparse path ran, and how much it saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefillStats:
    """What prompts have computed in the layers whose policy chose blocks of keys for them.

    Attributes:
        computed: blocks of keys that blocks of queries attended to, over all rows, heads and layers.
        causal: those that a dense prompt would have computed there.
        densities: the one over the other, by layer.
    """

    computed: int
    causal: int
    densities: dict[int, float]

    @property
    def density(self) -> float:
        """Share of the causal blocks that were computed; 1 where no blocks were chosen."""
        return self.computed / self.causal if self.causal else 1.0


class DecodeStats:
    """What the decode steps of one cache, or of all caches of one patch, have read.

    A step is one decoded token of a batch; a pass is a forward with several tokens (prefill, a chunk, a
    verification), which attends densely. Pages count per sequence, kv head and layer; bytes count whole pages, and
    the digests or keys that a policy read to choose them.

    Attributes:
        pages_total: pages that dense decoding would have read.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to zero."""
        self._sparse_steps: Counter[int] = Counter()
        self._dense_steps: Counter[int] = Counter()
        self._dense_passes: Counter[int] = Counter()
        # Pages of selections, summed where they were listed: for these layers, bytes of a page, and device.
        self._listed: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}
        self._bytes_total: Counter[int] = Counter()
        self._known_bytes: Counter[int] = Counter()  # read, where that is known without the device
        self._whole_pages = 0
        self.pages_total = 0
        self._whole_bytes = 0
        self._chosen_from_bytes = 0  # what dense decoding would have read where pages were chosen
        self._blocks: dict[int, Tensor] = {}  # of prompts, by layer, summed where they were chosen
        self._causal_blocks: Counter[int] = Counter()

    def record_pass(self, layer_idx: int) -> None:
        """A layer attended densely over several new tokens."""
        self._dense_passes[layer_idx] += 1

    def record_blocks(self, layer_idx: int, blocks: Tensor, causal: int) -> None:
        """A layer attended to those of a prompt's blocks that a policy chose. They are counted on their device.

        Args:
            blocks: of every row, head and block of queries, True for those that were computed.
            causal: the blocks of keys that are not later than their queries, over all rows and heads.
        """
        self._blocks[layer_idx] = blocks.sum() + self._blocks.get(layer_idx, 0)
        self._causal_blocks[layer_idx] += causal

    def record_step(
        self,
        layer_idx: int,
        read_all: bool,
        pages: int,
        page_nbytes: int,
        scoring_nbytes: int,
        new: bool = True,
    ) -> None:
        """A layer decoded one token. Where it has chosen, `count_listed` counts the pages that it read.

        Args:
            read_all: whether it read every page.
            pages: pages its sequences hold, times kv heads.
            page_nbytes: bytes of a page's keys and values in one kv head.
            scoring_nbytes: bytes read to choose the pages.
            new: False when another module reads the same step's cache again (shared KV).
        """
        nbytes = pages * page_nbytes
        self.pages_total += pages
        self._bytes_total[layer_idx] += nbytes
        self._known_bytes[layer_idx] += scoring_nbytes
        if read_all:
            self._dense_steps[layer_idx] += new
            self._whole_pages += pages
            self._whole_bytes += nbytes
            self._known_bytes[layer_idx] += nbytes
        else:
            self._sparse_steps[layer_idx] += new
            self._chosen_from_bytes += nbytes

    def count_listed(self, layers: tuple[int, ...], slots: Tensor, page_nbytes: int) -> None:
        """Counts the pages of selections on their device; they are read when asked for, so no step waits.

        Args:
            layers: whose selections they are; a layer that is read twice is there twice.
            slots: `[layers, b, hkv, k]` int32, -1 for none.
            page_nbytes: bytes of a page's keys and values in one kv head.
        """
        key = layers, page_nbytes, slots.device
        if key not in self._listed:
            with torch.inference_mode(False):  # else nothing could be added outside of it later
                self._listed[key] = torch.zeros(len(layers), dtype=torch.int64, device=slots.device)
        self._listed[key].add_((slots >= 0).flatten(1).sum(1))

    @property
    def sparse_steps(self) -> int:
        """Steps in which at least one layer chose its pages."""
        return max(self._sparse_steps.values(), default=0)

    @property
    def dense_steps(self) -> int:
        """Steps in which every layer read everything (short context, or the policy `all`)."""
        # A layer that is sometimes sparse was dense exactly when the whole step was.
        telling = self._sparse_steps or self._dense_steps
        return max((self._dense_steps[layer] for layer in telling), default=0)

    @property
    def dense_passes(self) -> int:
        """Forwards of several tokens at once."""
        return max(self._dense_passes.values(), default=0)

    @property
    def pages_read(self) -> int:
        """Pages read."""
        return self._whole_pages + sum(int(pages.sum()) for pages in self._listed.values())

    @property
    def bytes_total(self) -> int:
        """Bytes that dense decoding would have read."""
        return self._bytes_total.total()

    @property
    def bytes_read(self) -> int:
        """Bytes read, those read to choose included."""
        return self._bytes_read.total()

    @property
    def share(self) -> float:
        """Bytes read over the bytes dense decoding would have read; 0 before the first step."""
        return self.bytes_read / self.bytes_total if self.bytes_total else 0.0

    @property
    def sparse_share(self) -> float:
        """The same in the layers and steps that chose their pages only; 0 if none did."""
        chosen = self.bytes_read - self._whole_bytes
        return chosen / self._chosen_from_bytes if self._chosen_from_bytes else 0.0

    @property
    def shares(self) -> dict[int, float]:
        """`share` by layer, of those that decoded something."""
        read = self._bytes_read
        return {layer: read[layer] / total for layer, total in sorted(self._bytes_total.items()) if total}

    @property
    def prefill(self) -> PrefillStats:
        """What was computed of prompts, in the layers whose policy chose blocks."""
        computed = {layer: int(blocks) for layer, blocks in self._blocks.items()}
        densities = {layer: computed[layer] / causal for layer, causal in sorted(self._causal_blocks.items())}
        return PrefillStats(sum(computed.values()), self._causal_blocks.total(), densities)

    @property
    def _bytes_read(self) -> Counter[int]:
        found = self._known_bytes.copy()
        for (layers, page_nbytes, _), pages in self._listed.items():
            for layer_idx, number in zip(layers, pages.tolist(), strict=True):
                found[layer_idx] += number * page_nbytes
        return found

    def as_dict(self) -> dict[str, float]:
        """All counters of passes and decode steps, for a report."""
        steps = ("sparse_steps", "dense_steps", "dense_passes")
        reads = ("pages_read", "pages_total", "bytes_read", "bytes_total", "share", "sparse_share")
        return {name: getattr(self, name) for name in steps + reads}

    def __repr__(self) -> str:
        prompts = f"; {self.prefill.density:.1%} of prompts' blocks" if self._causal_blocks else ""
        return (
            f"DecodeStats({self.sparse_steps} sparse and {self.dense_steps} dense steps, {self.dense_passes} dense "
            f"passes; read {self.pages_read:,} of {self.pages_total:,} pages, {self.bytes_read / 2**20:,.1f} of "
            f"{self.bytes_total / 2**20:,.1f} MiB ({self.share:.1%}){prompts})"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> DecodeStats:
        """A copied cache goes on counting into the same counters."""
        return self
