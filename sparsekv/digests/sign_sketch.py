"""One bit per channel of every key: an estimate of each token's dot product, not a bound of the page's.

Source: the estimator of Gao and Long, "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound
for Approximate Nearest Neighbor Search" (SIGMOD 2024), section 3, applied to keys. Keys are centred on the head's
mean and rotated at random; a key k is then kept as the signs s of R(k - mean) and one factor f, and q.k is estimated
by q.mean + f <Rq, s>. The first term is the same for all pages, so it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparsekv.digests.base import Digest, Field, register
from sparsekv.errors import ConfigError

ROTATION_SEED = 0


@register("sign_sketch")
class SignSketch(Digest):
    """Per token the packed signs (d / 8 bytes) and a half-precision factor; a page scores its best token.

    Per kv head: the mean key of the first prefill `[hkv, d]` and the rotation `[hkv, d, d]`, both float32.
    """

    def fields(self, page_size: int, head_dim: int) -> list[Field]:
        if head_dim % 8:
            raise ConfigError(f"digest='sign_sketch' packs 8 channels a byte: head_dim={head_dim} must divide by 8.")
        return [Field((page_size, head_dim // 8), torch.uint8), Field((page_size,), torch.float16)]

    def fit(self, keys: Tensor, valid: Tensor | None) -> list[Tensor]:
        num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
        valid = torch.ones_like(keys[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
        mean = torch.where(valid[:, None, :, None], keys.float(), 0.0).sum((0, 2)) / valid.sum().clamp_min(1)
        generator = torch.Generator().manual_seed(ROTATION_SEED)
        rotation, _ = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))
        return [mean, rotation.to(keys.device).expand(num_kv_heads, -1, -1)]

    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        mean, rotation = state
        centred = torch.where(valid[:, None, :, None], keys.float() - mean[:, None], 0.0)  # [m, hkv, p, d]
        rotated = centred @ rotation.transpose(-1, -2)
        factor = centred.square().sum(-1) / rotated.abs().sum(-1).clamp_min(1e-20)
        factor = factor.masked_fill(~valid[:, None], float("nan"))  # no token: never the best of its page
        return [_pack(rotated > 0), factor]

    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        signs, factor = summary  # [b, pages, hkv, p, d / 8], [b, pages, hkv, p]
        rotated = torch.einsum("bhgd,hed->bhge", query, state[1])
        products = _sign_products(rotated, rearrange(signs, "b pages h p c -> b h (pages p) c"))
        factor = rearrange(factor.float(), "b pages h p -> b h 1 (pages p)")
        estimate = (products * factor).nan_to_num(nan=float("-inf"))
        return rearrange(estimate, "b h g (pages p) -> b h g pages p", p=signs.shape[3]).amax(-1)


def _pack(positive: Tensor) -> Tensor:
    """Eight signs to a byte, the first channel in the lowest bit: `[..., d]` bool -> `[..., d / 8]` uint8."""
    weights = 2 ** torch.arange(8, device=positive.device)
    return (rearrange(positive, "... (c eight) -> ... c eight", eight=8) * weights).sum(-1).to(torch.uint8)


def _sign_products(query: Tensor, signs: Tensor) -> Tensor:
    """Sum of +-query by the packed signs: query `[b, h, g, d]`, signs `[b, h, n, d / 8]` -> `[b, h, g, n]`.

    Every byte has only 256 values, so the partial sums come from a table and no sign is ever unpacked.
    """
    b, h = query.shape[:2]
    bits = (torch.arange(256, device=query.device)[:, None] >> torch.arange(8, device=query.device)) & 1
    table = rearrange(query, "b h g (c eight) -> b h c g eight", eight=8) @ (2.0 * bits - 1).t()
    table = rearrange(table, "b h c g byte -> (b h c byte) g")
    num_bytes = signs.shape[-1]
    first_row = 256 * torch.arange(b * h * num_bytes, device=query.device).view(b, h, 1, num_bytes)
    sums = F.embedding_bag((signs.long() + first_row).reshape(-1, num_bytes), table, mode="sum")
    return rearrange(sums, "(b h n) g -> b h g n", b=b, h=h)
