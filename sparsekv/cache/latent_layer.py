"""The layer kind of latent attention: latents in pages, as one kv head, of which a decode step never expands any."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sparsekv.cache.absorbed import Absorbed
from sparsekv.cache.attention_layer import Attended
from sparsekv.cache.cache_layer import LAYER_KINDS
from sparsekv.cache.handshake import expects
from sparsekv.cache.layer_kinds import latent_dims
from sparsekv.cache.masks import visible_columns
from sparsekv.cache.paged_layer import PagedLayer

_UNKNOWN = "its keys and values are not what its `kv_b_proj` makes of the latents in the cache"


@LAYER_KINDS.register("latents")
class LatentLayer(PagedLayer):
    """Multi-head latent attention (MLA) over pages of latents and rotary parts, side by side: the keys of one kv head
    for all query heads, and its values. Several tokens are attended to as the model does it, all of them expanded.
    `keys` are the latents `[b, 1, n, rank]`, and `values` the rotary parts `[b, 1, n, rotary]`, as transformers has
    them. Arguments as `AttentionLayer`.
    """

    values_in_keys = True
    _absorbed: Absorbed | None = None  # between the handshake and the answer

    @classmethod
    def reason_against(cls, layer_type: str, text_config: Any, layer_idx: int) -> str | None:
        """Whether it keeps no latents: see `latent_dims`."""
        return None if latent_dims(text_config) else "it keeps no latents"

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new latents `[b, 1, t, rank]` and rotary parts `[b, 1, t, rotary]`; returns those that the module is
        to expand: of one token these alone, once it is known that its attention asks here; else all.

        Raises:
            CacheStateError: the batch has another size.
        """
        given = super().update(key_states, value_states, *args, **kwargs)
        if self.is_dense:
            return given
        expects(self)
        return (key_states, value_states) if self._is_step else cast("tuple[Tensor, Tensor]", self.content())

    def meet(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> bool:
        """The handshake: whether a module asks that has expanded what `update` gave. One whose keys and values are no
        linear maps of the last token's latents makes this a plain layer.

        Args:
            key, value: `[b, hq, n, d]`, `[b, hq, n, dv]`.

        Raises:
            CacheStateError: there are not as many as `update` gave, which was not all.
        """
        if self._pending is None:
            return False
        latent, rotary = self._pending
        is_known = key.shape[2] == (1 if self._is_step else self.get_seq_length())
        is_known &= (latent.shape[3], rotary.shape[3]) == latent_dims(self.layer_config)
        if is_known:
            self._absorbed = Absorbed.of(module, latent, rotary, key, value)
            newest = [x[:, :, -1:] for x in (latent, rotary, key, value)]
            is_known = self.is_served or self._absorbed.explains(*newest)
        if not is_known:
            self.refuse(_UNKNOWN)
        return True

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, is_plain: bool
    ) -> Attended:
        """Keys and values of all tokens, which the module has expanded, as in `AttentionLayer`."""
        self._absorbed = None
        self.commit(visible_columns(mask))
        self.stats.record_pass(self.layer_idx)
        if self.policy.chooses_blocks(self.config) and self.on_notice is not None:
            name = self.config.policy
            self.on_notice(f"a prompt is read densely, whatever policy {name!r} chooses of it: its keys are latents")
        return key, value

    def decode(
        self, query: Tensor, scaling: float, softcap: float, sinks: Tensor | None, visible: Tensor | None = None
    ) -> Attended:
        """Attention of one new token over the latents that the policy selects, as in `AttentionLayer`."""
        absorbed, self._absorbed = cast(Absorbed, self._absorbed), None
        latent = super().decode(absorbed.query(query), scaling, softcap, sinks, visible)
        return absorbed.value(cast(Tensor, latent))

    # -- how

    @property
    def _is_step(self) -> bool:
        """Whether the pending token is one that is attended to alone."""
        return self.is_served and self._pending is not None and self._pending[0].shape[2] == 1

    def _as_stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([key, value], dim=-1), key

    def _stored(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Latents and rotary parts of the first columns."""
        both, latent = super()._stored(num_tokens)
        return latent, both[..., latent.shape[3] :]
