"""Latent attention without expanding what is past: the maps from latents to keys and values, absorbed into queries.

Let a head's key be [W_k c, r] and its value W_v c, of a latent c and a rotary part r that all heads share. Then
q.k = [W_k^T q_1, q_2].[c, r], and a sum of values is W_v times the same sum of latents: one kv head of keys [c, r],
whose first channels are the values. Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 0.01  # of a norm: last bits in bf16; other maps give more


@dataclass(frozen=True)
class Absorbed:
    """The maps of a layer's heads: `to_key [hq, nope, rank]`, `to_value [hq, dv, rank]`."""

    to_key: Tensor
    to_value: Tensor

    @classmethod
    def of(cls, module: Any, latent: Tensor, rotary: Tensor, key: Tensor, value: Tensor) -> Absorbed:
        """Those by which the `expand_kv` of an attention module has made keys and values of latents. They are the
        weights themselves where these lie in a plain linear layer; else (quantised, adapted) what becomes of unit
        vectors.

        Args:
            latent, rotary: `[b, 1, t, rank]`, `[b, 1, t, rotary]`.
            key, value: `[b, hq, n, nope + rotary]`, `[b, hq, n, dv]`.
        """
        dims = [key.shape[3] - rotary.shape[3], value.shape[3]]
        linear: Any = getattr(module, "kv_b_proj", None)
        if _is_plain(linear) and linear.weight.shape == (key.shape[1] * sum(dims), latent.shape[3]):
            return cls(*linear.weight.unflatten(0, (-1, sum(dims))).split(dims, dim=1))
        unit = torch.eye(latent.shape[3], dtype=latent.dtype, device=latent.device)[None, None]
        key, value = module.expand_kv(unit, unit.new_zeros(*unit.shape[:3], rotary.shape[3]))
        return cls(key[0, ..., : dims[0]].mT, value[0].mT)

    def query(self, query: Tensor) -> Tensor:
        """Queries of keys `[b, hq, t, nope + rotary]` as those of latents, `[b, hq, t, rank + rotary]`."""
        nope, rotary = query.tensor_split([self.to_key.shape[1]], dim=-1)
        return torch.cat([torch.einsum("bhtk,hkr->bhtr", nope, self.to_key.to(nope.dtype)), rotary], dim=-1)

    def value(self, latent: Tensor) -> Tensor:
        """Sums of latents `[b, hq, t, rank]` as those of values, `[b, hq, t, dv]`."""
        return torch.einsum("bhtr,hvr->bhtv", latent, self.to_value.to(latent.dtype))

    def explains(self, latent: Tensor, rotary: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether keys and values `[b, hq, t, ...]` are what the maps make of latents and rotary parts
        `[b, 1, t, ...]`, but for rounding."""
        latent, rotary = (x.expand(-1, key.shape[1], -1, -1) for x in (latent, rotary))
        made = torch.einsum("bhtr,hkr->bhtk", latent, self.to_key.to(latent.dtype)), rotary, self.value(latent)
        theirs = *key.tensor_split([self.to_key.shape[1]], dim=-1), value
        return all(
            x.shape == y.shape and bool((x - y).nan_to_num().norm() <= TOLERANCE * x.nan_to_num().norm())
            for x, y in zip(theirs, made, strict=True)
        )


def _is_plain(linear: Any) -> bool:
    """Whether a module multiplies by its weight, and that is all."""
    kinds = [type(linear), *(type(getattr(linear, name, None)) for name in ("weight", "bias"))]
    if kinds != [nn.Linear, nn.Parameter, type(None)]:
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
