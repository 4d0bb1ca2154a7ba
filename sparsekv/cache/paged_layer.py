"""The layer kind that lives in pages: full attention, of which a decode step reads what the policy chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv.cache import prefill, prompt_blocks
from sparsekv.cache.attention_layer import Attended
from sparsekv.cache.cache_layer import LAYER_KINDS
from sparsekv.cache.layer_kinds import why_not_paged
from sparsekv.cache.masks import is_causal, is_left_out, visible_columns
from sparsekv.cache.stored_layer import Accepted, StoredLayer, own_precision
from sparsekv.ops.prompt_cuda import why_plain
from sparsekv.policies import DecodeStep, PromptChunk


@LAYER_KINDS.register("pages")
class PagedLayer(StoredLayer):
    """Full attention over pages: dense for several tokens, by the policy for one. Arguments as `AttentionLayer`."""

    layer_types = ("full_attention",)
    is_sparse = True

    @classmethod
    def reason_against(cls, layer_type: str, text_config: Any, layer_idx: int) -> str | None:
        """Why it cannot live in pages: see `why_not_paged`."""
        return why_not_paged(text_config, layer_idx)

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_plain: bool
    ) -> Attended:
        """Dense attention of several new tokens, as in `AttentionLayer`. The model's own attention runs over all keys
        and values where there is a mask for it, or it is no plain one."""
        is_new = self._pending is not None
        self.commit(visible_columns(mask))
        if self.is_dense:
            return key, value
        if is_new:
            self.stats.record_pass(self.layer_idx)
        num_new, is_whole = query.shape[2], key.shape[2] == query.shape[2]  # else its last tokens alone are asked for
        if self.policy.chooses_blocks(self.config):
            if is_plain and is_whole and is_causal(mask, num_new):
                return prefill.attend(self, query, key, value, scaling, self._over_blocks)
            self._say_that_it_is_dense(is_plain)
        if is_plain and is_whole and self._is_left_out(mask, num_new):
            return prefill.attend(self, query, key, value, scaling)
        return self.with_past(key, value)

    def decode(
        self, query: Tensor, scaling: float, softcap: float, sinks: Tensor | None, visible: Tensor | None = None
    ) -> Attended:
        """Attention of one new token over the pages that the policy selects, as in `AttentionLayer`. Keys and values
        are given only if the layer turns out not to be servable.

        Raises:
            CacheStateError, CacheFullError: as `commit`.
            ConfigError: the policy asks for digests, and there are none.
        """
        new = self._pending
        if new is not None and not self.is_paged:
            self.commit(visible)
            if self.is_dense:
                return new
        accepted = self._accept(visible)
        if accepted is not None and (accepted[2] is not None or not self.store.is_in_place):
            self._write(accepted)  # some rows' token is padding, or what a step reads is no place to write to
            accepted = None
        step = self._step(query.squeeze(2), scaling, accepted)
        with torch.no_grad(), own_precision(query.device):
            out, slots = self.policy.decode(step, softcap, sinks)
            if accepted is not None:
                self._count_tokens(accepted[0])
            slots = None if step.fits else slots
            self._record(slots, new is not None)
            for observe in self.observers:
                observe(step, slots)
        value_dim = self.store.layers[self.layer_idx].value_dim
        (out,) = self._untracked(out[..., :value_dim], tracked=query.requires_grad)
        return out.unsqueeze(2)

    # -- how

    def _is_left_out(self, mask: Tensor | None, num_new: int) -> bool:
        """Whether a mask was not made because of its size. (A prompt that needs none is the model's own business.)"""
        return self.length > num_new if mask is None else is_left_out(mask)

    def _over_blocks(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of a prompt's newest tokens to the blocks that the policy chooses."""
        size = prompt_blocks.block_size(self.config.page_size)
        chunk = PromptChunk(self.layer_idx, query, key, size, scaling, self.config)
        chosen = self.policy.prompt_blocks(chunk)
        if chosen is None:
            return prefill.causal(query, key, value, scaling)
        blocks = prompt_blocks.settled(chunk, chosen)
        self.stats.record_blocks(self.layer_idx, blocks, chunk.num_causal_blocks * blocks.shape[0] * blocks.shape[1])
        out = prompt_blocks.attend(self.store.ops, chunk, value, blocks)
        reason = why_plain(query, value.shape[3], size) if query.device.type == "cuda" else None
        if reason is not None and self.on_notice is not None:
            self.on_notice(f"the chosen blocks of a prompt are attended to in plain torch: {reason}")
        return out

    def _say_that_it_is_dense(self, is_plain: bool) -> None:
        """Tells that the policy's blocks of a prompt are not followed."""
        reason = "a mask of its own is given, or the last tokens alone are asked for"
        if not is_plain:
            reason = "its attention is not sdpa's, or is more than softmax(q k^T) v"
        if self.on_notice is not None:
            name = self.config.policy
            self.on_notice(f"a prompt is read densely, whatever policy {name!r} chooses of it: {reason}")

    def _step(self, query: Tensor, scaling: float, new: Accepted | None = None) -> DecodeStep:
        pages, block_table, seq_lens = self.store.on(self.layer_idx)
        ordinal, memory = self.store.remembered(self.layer_idx)
        return DecodeStep(
            layer_idx=self.layer_idx,
            query=query,
            kv_pool=pages.kv,
            summary=pages.summary,
            state=pages.state,
            block_table=block_table,
            seq_lens=seq_lens,
            k=self.config.selection_width(block_table.shape[1]),
            scaling=scaling,
            config=self.config,
            ops=self.store.ops,
            is_covered=self.store.is_covered(self.config),
            key=None if new is None else new[0],
            value=None if new is None else new[1],
            view=None if self.store.is_in_place else pages.residency.view,
            ordinal=ordinal,
            phase=self.store.memory.phase,
            memory=memory,
        )
