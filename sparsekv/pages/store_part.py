"""Layers' pages under one block table: how tokens get there and back."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv import ops
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS, Digest
from sparsekv.errors import CacheStateError
from sparsekv.pages.arena import Arena, Loan
from sparsekv.pages.block_table import BlockTable
from sparsekv.pages.device_table import width_for
from sparsekv.pages.layer_pages import LayerPages
from sparsekv.pages.masks import hidden_last
from sparsekv.pages.memory import Memory
from sparsekv.pages.page_pool import PagePool
from sparsekv.pages.page_rows import PageCopies
from sparsekv.pages.residency import RESIDENCIES, frames_of
from sparsekv.pages.step_state import Stage, StepState
from sparsekv.pages.window_table import WindowTable
from sparsekv.policies import POLICIES

Window = tuple[type[WindowTable], int]


class StorePart:
    """Pages of layers that hold the same tokens. The table moves once per forward pass, led by the first layer that
    appends.

    Args:
        config: page size, digest, policy, budgets, format, residency, limit and backend.
        reserve_pages: pages to allocate at once, for a cache of known size.
        arena: lends the tensors; None: they are this part's and its forks' alone.
        dense_layers: those that the policy does not decide for.
        window: what kind of table says which columns a token sees, and how many at most; None: all.
        step: where the cache is in a pass; None: at the beginning.
    """

    def __init__(
        self,
        config: SparseConfig,
        reserve_pages: int = 0,
        arena: Arena | None = None,
        dense_layers: Collection[int] = (),
        window: Window | None = None,
        step: StepState | None = None,
    ) -> None:
        self.config = config
        self.digest: Digest = DIGESTS.get(config.digest)()
        self.arena, self.loan = arena, Loan(arena)
        self.memory = Memory(POLICIES.get(config.policy)(), self.loan, dense_layers)
        steps = sorted({each.covered_pages for each in config.each if not each.is_fraction}) or [1]
        pool = PagePool(config.page_size, config.max_tokens)
        self._table: BlockTable
        if window is None:
            self._table = BlockTable(pool, partial(width_for, steps=steps), self.loan.tables)
        else:
            kind, size = window
            self._table = kind(pool, size, self.loan.tables)
        self.reserve_pages = min(reserve_pages, pool.max_pages or reserve_pages)
        self.step = StepState() if step is None else step
        self.is_torn = False  # the table names pages whose content, or digest, is not what it should be

    @property
    def table(self) -> BlockTable:
        """Which pages hold each sequence.

        Raises:
            CacheStateError: it names pages whose content is missing; nothing of this store can be used any more.
        """
        if self.is_torn:
            raise CacheStateError(
                "A copy of pages that sequences share broke off (memory ran out?), so this cache is not whole any "
                "more. Start from a new one, or reset it; other caches and forks are not affected."
            )
        return self._table

    @property
    def is_in_place(self) -> bool:
        """Whether pages lie where the ops read and write them."""
        return RESIDENCIES.get(self.config.residency).in_place

    @property
    def layers(self) -> dict[int, LayerPages]:
        """The pages of each layer that has stored something."""
        return self.loan.layers

    @property
    def ops(self) -> Any:
        """The namespace of the ops."""
        return ops.for_backend(self.config.backend)

    def on(self, layer_idx: int) -> tuple[LayerPages, Tensor, Tensor]:
        """A layer's tensors, and `block_table`, `seq_lens` on their device."""
        pages = self.layers[layer_idx]
        return pages, *self.table.on(pages.kv.device)

    def remembered(self, layer_idx: int) -> tuple[int, list[Tensor]]:
        """How many of the layers that the policy decides for come before one, and the memory of that one."""
        ordinal, keeper = self.memory.place_of(layer_idx)
        if keeper is None:
            return ordinal, []
        batch_size, width = self.on(keeper)[1].shape
        kept = self.memory.of(keeper, batch_size, self.config.at(keeper).selection_width(width), width)
        return ordinal, [tensor.to(self.layers[layer_idx].kv.device) for tensor in kept]

    def is_covered(self, config: SparseConfig) -> bool:
        """Whether a layer's fraction, rounded up to pages, covers every sequence of the length that it has. A step
        that may be captured must not depend on lengths: there it is never so, and only the width of the table counts.

        Args:
            config: the layer's.
        """
        lengths = self.table.lengths
        if not config.is_fraction or self.step.stage is not Stage.EAGER:
            return False
        if config.min_share and lengths.max(initial=0) > config.whole_tokens:
            return False
        return all(self.table.num_pages <= [config.budget_pages(int(length)) for length in lengths])

    def accept(
        self,
        layer_idx: int,
        length: int,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        scored: bool,
        is_shared: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Makes room for a layer's new tokens, which are then to be written: returns what `write` wants.

        Args:
            length: columns this layer holds already.
            key: `[b, hkv, t, d]`; value: `[b, hkv, t, dv]`, dv no more than d.
            visible: `[b, n]` bool for the first n columns, False for padding; later ones, or None: no padding.
            scored: whether the layer needs digests.
            is_shared: whether values are the first channels of keys, and are to be kept once.

        Raises:
            CacheStateError: batch or mask do not continue what is stored. CacheFullError: no room. OutOfMemoryError:
                no memory. The table is what it was.
        """
        batch_size, _, num_new, _ = key.shape
        leads = length == self.table.num_tokens
        goes_on = (length, length + num_new) == (self.step.past, self.step.end)
        if not goes_on and not (leads and length == self.step.end):
            raise CacheStateError(
                f"Layer {layer_idx} holds {length} tokens where the cache holds {self.step.end}: an earlier "
                "forward pass was interrupted. Start from a new cache."
            )
        if leads:
            self._make_room(batch_size, num_new, visible)
        is_new = layer_idx not in self.layers
        try:
            valid = None if self.step.valid is None else self.step.valid.to(key.device)
            pages = self._pages_of(layer_idx, key, value, valid, scored, is_shared)
            narrower = key.shape[3] - value.shape[3]
            value = key if is_shared else F.pad(value, (0, narrower)) if narrower else value
            return key.to(pages.no_tokens.dtype), value.to(pages.no_tokens.dtype), valid
        except BaseException:
            if is_new:
                self.layers.pop(layer_idx, None)
            if leads:
                self.table.crop(num_new) if length else self.table.clear()
                self.step.past = self.step.end = length
            raise

    def _pages_of(
        self, layer_idx: int, key: Tensor, value: Tensor, valid: Tensor | None, scored: bool, is_shared: bool
    ) -> LayerPages:
        """A layer's pages, made for its first tokens, with memory for all that the table names."""
        if layer_idx not in self.layers:
            wide = key.to(torch.promote_types(key.dtype, value.dtype))  # under autocast the two can differ
            return self.add_layer(layer_idx, wide, valid, scored, value.shape[3], is_shared)
        self._ensure(self.layers[layer_idx])
        return self.layers[layer_idx]

    def add_layer(
        self, layer_idx: int, key: Tensor, valid: Tensor | None, scored: bool, value_dim: int, is_shared: bool
    ) -> LayerPages:
        """Pages of a layer that has none yet, with memory for all that the table names.

        Args:
            key, valid: `[b, hkv, t, d]` and `[b, t]` bool, to which a digest is fitted.
            scored, is_shared: as in `accept`.
            value_dim: channels of values.

        Raises:
            OutOfMemoryError: no memory.
        """
        self.loan.draw()
        digest = self.digest if scored else None
        kind = self.config.page_format, RESIDENCIES.get(self.config.residency)
        self.loan.add(layer_idx, LayerPages(key, valid, self.config.page_size, digest, *kind, value_dim, is_shared))
        self._ensure(self.layers[layer_idx])
        return self.layers[layer_idx]

    def addresses(self) -> tuple[Any, ...]:
        """Where the tensors lie: as long as it is the same, so is what a captured step reads."""
        tables = [tensor.data_ptr() for device in self.devices for tensor in self.table.on(device)]
        return *tables, *(pages.addresses for pages in self.layers.values()), *self.memory.addresses

    @property
    def devices(self) -> set[torch.device]:
        """Where layers have stored something."""
        return {pages.kv.device for pages in self.layers.values()}

    def _share(self, other: StorePart) -> None:
        """Goes on from the pages of another."""
        self.digest, self.loan, self._table = other.digest, other.loan, other.table.fork()

    def dense(self, layer_idx: int, num_tokens: int | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys `[b, hkv, n, d]` and values `[b, hkv, n, dv]` in transformers' order; padding is zero.

        Args:
            num_tokens: the first so many columns (a layer that has not appended yet lags behind the table);
                None: all.
            start: without so many of them; what is before a window is not held.
        """
        table = self.table if num_tokens is None else self.table.at(num_tokens)
        columns = table.columns(start, num_tokens)
        passed = table.lengths - table.tokens_in(start, table.num_tokens)  # tokens that are held and not asked for
        keys, values = self.layers[layer_idx].tokens(table.first_pages(passed + columns.sum(1).numpy()), self.ops)
        if table.valid is None:
            here = slice(int(passed.max(initial=0)), int(passed.max(initial=0)) + columns.shape[1])
            return keys[:, :, here], values[:, :, here]
        real = columns.to(keys.device)
        position = real.cumsum(1) - 1 + torch.from_numpy(passed)[:, None].to(keys.device)
        position = position.clamp(0, keys.shape[2] - 1)[:, None, :, None]
        keys, values = (
            x.gather(2, position.expand(-1, x.shape[1], -1, x.shape[3])).masked_fill(~real[:, None, :, None], 0)
            for x in (keys, values)
        )
        return keys, values

    def sequences(self, layer_idx: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of sequences as long as one another, without padding, `[rows, hkv, length, d]` each."""
        pages = [self.table.pages_of(row) for row in range(self.table.batch_size)[rows]]
        keys, values = self.layers[layer_idx].tokens(np.stack(pages), self.ops)
        length = int(self.table.lengths[rows][0])
        return keys[:, :, :length], values[:, :, :length]

    def _ensure(self, pages: LayerPages) -> None:
        pool = self.table.pool
        pages.ensure(max(pool.num_pages, self.table.min_pages), pool.max_pages, self.reserve_pages)

    def _make_room(self, batch_size: int, num_new: int, visible: Tensor | None) -> None:
        """Moves the table on by `num_new` columns."""
        valid, hidden = self._told_by(batch_size, num_new, visible)
        if hidden is not None:
            self._renew(self.table.hide(hidden, num_new, valid))
        self._advance(batch_size, num_new, valid)

    def check(self, batch_size: int, num_new: int, visible: Tensor | None) -> None:
        """Raises what `accept` of the first layer would (CacheStateError, CacheFullError), and changes nothing."""
        valid, hidden = self._told_by(batch_size, num_new, visible)
        self.table.check_room(batch_size, num_new, valid, hidden)

    def _told_by(self, batch_size: int, num_new: int, visible: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What a mask says of new columns, `[b, num_new]` (None: no padding), and how many last tokens of each row it
        hides, `[b]` (None: none)."""
        self.table.check_batch(batch_size)
        past, valid = self.table.num_tokens, None
        if visible is not None:
            visible = self.table.told(visible.expand(batch_size, -1).cpu(), num_new)
            visible, valid = visible[:, :past], visible[:, past:]
            valid = None if bool(valid.all()) else valid
        told = past and (visible is not None or self.table.valid is not None)
        return valid, hidden_last(self.table.columns(), visible) if told else None

    def _advance(self, batch_size: int, num_new: int, valid: Tensor | None) -> None:
        copies = self.table.append(batch_size, num_new, valid)
        self.memory.begin(self.table.num_tokens, is_step=num_new == 1 and valid is None)
        self.step.past, self.step.end, self.step.valid = self.table.num_tokens - num_new, self.table.num_tokens, valid
        with self._whole_or_torn():
            self._copy(copies)

    def _renew(self, copies: PageCopies) -> None:
        """Follows a table that was cut: digests of pages that became partly filled are made anew."""
        self.memory.forget()
        with self._whole_or_torn():
            self._copy(copies)
            for layer_idx, pages in self.layers.items():
                no_tokens = pages.no_tokens.expand(self.table.batch_size, -1, -1, -1)
                self.write(layer_idx, no_tokens, no_tokens, None)

    def write(self, layer_idx: int, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        """Puts tokens `[b, hkv, t, d]` into the pages that the table has for them; without tokens, only renews the
        digests of partly filled pages."""
        held = slice(max(key.shape[2] - self.table.max_new, 0), None)
        key, value, valid = key[:, :, held], value[:, :, held], None if valid is None else valid[:, held]
        pages, table, lengths = self.on(layer_idx)
        content, summary, touched = pages.kv, pages.summary, None
        if not self.is_in_place:
            touched = self.table.touched_pages(key.shape[2] if valid is None else valid.sum(1).cpu().numpy())
            content, summary = pages.read(touched)
            table = frames_of(torch.from_numpy(touched).to(table.device), table)
        where = (table, lengths, content, summary, pages.state)
        self.ops.append_kv(key, value, valid, *where, self.config.digest, self.config.page_format)
        if touched is not None:
            pages.write(touched, content, summary)

    def _copy(self, copies: PageCopies) -> None:
        for pages in self.layers.values() if len(copies.source) else ():
            self._ensure(pages)
            pages.copy_pages(copies)

    @contextlib.contextmanager
    def _whole_or_torn(self) -> Iterator[None]:
        """Around what brings the pages to where the table is already."""
        try:
            yield
        except BaseException:
            self.is_torn = True
            raise
