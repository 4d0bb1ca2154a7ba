"""One bit per channel of every key: an estimate of each token's dot product, not a bound of the page's.

Source: the estimator of Gao and Long, "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound
for Approximate Nearest Neighbor Search" (SIGMOD 2024), section 3, applied to keys. The keys of a page are rotated at
random and centred about their own mean m; of what is left of a key the signs s and one factor f are kept, and q.k is
estimated by <Rq, m> + f <Rq, s>. As there (section 3.3), Rq is rounded to whole numbers, so that a kernel can count
bits; up to 40, which adds 0.1 % to the error's variance. A page scores the log-sum-exp of its tokens' logits, the
mass that attention has for it: several good tokens are worth more than one.

The mean is the page's, not the prompt's or the head's: what is kept of a page depends on nothing but its keys, and
rotary embeddings turn what the keys of a head have in common with their place, so that a page's own know it best. It
is kept in two bits a channel, as `sketch2` keeps a key, and need not be exact: keys are centred about what is kept of
it, so that what it has lost is a part of every key.

The rotation is made of random sign flips and Hadamard transforms, which a kernel does without a matrix in d log d
operations: Ailon and Chazelle, "The Fast Johnson-Lindenstrauss Transform" (SIAM J. Comput. 2009), section 2. There
are two rounds of it, because after one a channel that outweighs all others would decide every sign.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparsekv.digests.base import Digest, DigestKernel, Field, register
from sparsekv.errors import ConfigError

ROTATION_SEED = 0
ROUNDS = 2  # of flips and a transform
QUERY_LIMIT = 40  # the largest whole number of a rotated query: four balanced digits at base 3
MEAN_PLANES = 2  # bits per channel of a page's mean
LANES = 4  # threads of a kernel that share a token: each reads its part of the channels of several tokens at once
LANE_BYTES = 32  # what a lane reads of a page in one go: a sector of the GPU's memory


def sketch_kernel(planes: int) -> DigestKernel:
    """For so many bits per channel.

    The query becomes whole numbers up to 40: a channel half-way between two of them may go either way, at a percent
    of the scores of its head.
    """
    return DigestKernel(
        "common/sketch_score.cuh",
        f"Sketch<{{heads}}, {planes}>",
        (torch.uint8, torch.float16, torch.uint8, *[torch.float32] * 3),
        staged=lambda head_dim, heads: (2 * head_dim + 8) * -(-heads // 8),
        tolerance=2e-2,
    )


@register("sign_sketch")
class SignSketch(Digest):
    """Per token the packed signs (d / 8 bytes) and a half-precision factor, per page two planes of bits of its mean
    (d / 4 bytes) and their factor (float32): at pages of 16, d / 8 + 2 and d / 64 + 1/4 bytes per token.

    Fixed, all float32: the rotation `[hkv, d, d]`, and the flips that it is made of `[hkv, rounds, d]`, from which
    kernels rotate without the matrix.

    A token's bytes lie in up to four parts, and the parts of several tokens side by side, as kernels read them:
    signs `[p / tokens, parts, tokens, bytes of a part]`. The mean's lie as those of a page of one token.

    Attributes:
        planes: bits per channel. Two are the digits of a whole number, each +1 or -1, the higher first: the signs are
            its first plane, and a part of a token has both planes of its channels, one after the other.
    """

    planes = 1

    # 1 had a rotation by QR decomposition and did not round the query; 2 centred all keys on the mean of the first
    # prompt's, and left q.mean out; 3 had means in bytes, and a page scored its best token.
    revision = 4
    kernel = sketch_kernel(planes)

    def fields(self, page_size: int, head_dim: int) -> list[Field]:
        if head_dim % 8:
            raise ConfigError(f"The sketches of keys pack 8 channels a byte: head_dim={head_dim} must divide by 8.")
        signs = Field(_layout(page_size, head_dim, self.planes), torch.uint8)
        mean = Field(_layout(1, head_dim, MEAN_PLANES), torch.uint8)
        return [signs, Field((page_size,), torch.float16), mean, Field((), torch.float32)]

    def fit(self, keys: Tensor, valid: Tensor | None) -> list[Tensor]:
        num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
        generator = torch.Generator("cpu").manual_seed(ROTATION_SEED)
        drawn = torch.randint(2, (ROUNDS, head_dim), generator=generator, dtype=torch.int64, device="cpu")
        flips = (2 * drawn - 1).to(torch.float32)
        rotation, mixing = _identity(head_dim), _mixing(head_dim)
        for flip in flips:
            rotation = mixing @ (flip[:, None] * rotation)
        return [x.to(keys.device).expand(num_kv_heads, -1, -1).contiguous() for x in (rotation, flips)]

    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        exists = valid[:, None, :, None]
        rotated = torch.where(exists, keys.float(), 0.0) @ state[0].transpose(-1, -2)  # [m, hkv, p, d]
        mean = rotated.sum(2, keepdim=True) / exists.sum(2, keepdim=True)
        mean_bits, code = _code(mean, MEAN_PLANES)
        unit = (code * mean).sum(-1) / code.square().sum(-1)  # the nearest multiple of the code
        centred = torch.where(exists, rotated - code * unit[..., None], 0.0)
        bits, code = _code(centred, self.planes)
        factor = centred.square().sum(-1) / (code * centred).sum(-1).clamp_min(1e-20)
        factor = factor.masked_fill(~valid[:, None], float("nan"))  # no token
        return [_packed(bits), factor, _packed(mean_bits), unit.squeeze(-1)]

    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        # [b, pages, hkv, block, part, token, byte], [b, pages, hkv, p], [b, pages, hkv, 1, part, 1, byte],
        # [b, pages, hkv]
        signs, factor, mean, unit = summary
        rotated, worth = _whole(torch.einsum("bhgd,hed->bhge", query, state[0]), QUERY_LIMIT)
        of_mean = _products(rotated, mean, MEAN_PLANES).squeeze(-1) * rearrange(unit, "b pages h -> b h 1 pages")
        beyond = _products(rotated, signs, self.planes) * rearrange(factor.float(), "b pages h p -> b h 1 pages p")
        beyond = beyond * worth[..., None]
        return of_mean * worth + beyond.masked_fill(beyond.isnan(), float("-inf")).logsumexp(-1)

    def why_unlike(self, summary: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
        """Up to the order of sums: it decides about bits of channels near a threshold, and last bits of factors."""
        signs, factors, means, units = summary
        expected_signs, expected_factors, expected_means, expected_units = expected
        same = (means == expected_means).flatten(2).all(-1)  # where a bit of a mean differs, all else may
        if int((~same).sum()) > 2 + 1e-2 * same.numel():
            return f"{int((~same).sum())} of {same.numel()} means are others"
        if not torch.allclose(units[same], expected_units[same], rtol=1e-5, equal_nan=True):
            return "other units of means"
        by_token = rearrange(signs ^ expected_signs, "m h block part token byte -> m h (block token) (part byte)")
        differ = by_token[same].masked_fill(expected_factors[same].isnan()[..., None], 0)
        bits = (differ[..., None] >> torch.arange(8, device=differ.device, dtype=torch.uint8)) & 1
        if int(bits.sum()) > 2 + 1e-4 * bits.numel():
            return f"{int(bits.sum())} of {bits.numel()} signs are others"
        alike = (differ == 0).all(-1)  # a factor is that of the bits
        mine, theirs = factors[same][alike], expected_factors[same][alike]
        if not torch.allclose(mine, theirs, rtol=4e-3, atol=1e-6, equal_nan=True):
            return "other factors"
        return None


def _layout(page_size: int, head_dim: int, planes: int) -> tuple[int, int, int, int]:
    """Blocks of a page, parts of a token, tokens of a block, and bytes of a token's part."""
    parts = math.gcd(LANES, head_dim // 8)
    size = planes * head_dim // 8 // parts
    tokens = math.gcd(page_size, 1 << (-(-LANE_BYTES // size) - 1).bit_length())
    return page_size // tokens, parts, tokens, size


def _mixing(head_dim: int) -> Tensor:
    """A symmetric orthogonal matrix in which every channel has a share of every other.

    A Hadamard transform over the largest power of two in `head_dim`, times a reflection over the odd rest.
    """
    odd = head_dim // (head_dim & -head_dim)
    mixing = _identity(odd) - (2 / odd if odd > 1 else 0)
    butterfly = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device="cpu") / math.sqrt(2)
    for _ in range((head_dim // odd).bit_length() - 1):
        mixing = torch.kron(mixing, butterfly)
    return mixing


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float32, device="cpu")


def _whole(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Whole numbers `[..., d]`, the largest of which is the limit, and what one of them is worth `[..., 1]`."""
    unit = x.abs().amax(-1, keepdim=True) / limit
    return (x / unit.clamp_min(torch.finfo(unit.dtype).tiny)).round(), unit


def _code(x: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Vectors `[..., d]` in so many bits a channel: bool `[planes, ..., d]`, True for +1, and the whole numbers that
    these are, `[..., d]`: -1 and 1, or -3, -1, 1 and 3."""
    positive, squares = x > 0, x.square()
    bits = torch.stack([positive, positive == (squares > squares.mean(-1, keepdim=True))][:planes])
    return bits, functools.reduce(lambda high, low: 2 * high + low, 2.0 * bits - 1)


def _packed(bits: Tensor) -> Tensor:
    """Bits `[planes, m, h, p, d]` -> bytes `[m, h, block, part, token, byte]`, the first channel in a lowest bit."""
    planes, _, _, page_size, head_dim = bits.shape
    _, parts, tokens, _ = _layout(page_size, head_dim, planes)
    eights = rearrange(bits, "plane m h p (c eight) -> plane m h p c eight", eight=8)
    weights = 2 ** torch.arange(8, dtype=torch.int64, device=bits.device)
    order = "plane m h (block token) (part byte) -> m h block part token (plane byte)"
    return rearrange((eights * weights).sum(-1).to(torch.uint8), order, part=parts, token=tokens)


def _products(query: Tensor, codes: Tensor, planes: int) -> Tensor:
    """Query, rotated, `[b, h, g, d]`, codes `[b, pages, h, block, part, token, byte]` -> `[b, h, g, pages, p]`."""
    order = "b pages h block part token (plane byte) -> b h (pages block token) (plane part byte)"
    weighted = torch.cat([query * (1 << i) for i in reversed(range(planes))], dim=-1)
    products = _sign_products(weighted, rearrange(codes, order, plane=planes))
    return rearrange(products, "b h g (pages p) -> b h g pages p", p=codes.shape[3] * codes.shape[5])


def _sign_products(query: Tensor, signs: Tensor) -> Tensor:
    """Sum of +-query by the packed signs: query `[b, h, g, d]`, signs `[b, h, n, d / 8]` -> `[b, h, g, n]`.

    Every byte has only 256 values, so the partial sums come from a table and no sign is ever unpacked.
    """
    b, h = query.shape[:2]
    byte, bit = (torch.arange(n, dtype=torch.int64, device=query.device) for n in (256, 8))
    bits = ((byte[:, None] >> bit) & 1).to(query.dtype)
    table = rearrange(query, "b h g (c eight) -> b h c g eight", eight=8) @ (2.0 * bits - 1).t()
    table = rearrange(table, "b h c g byte -> (b h c byte) g")
    num_bytes = signs.shape[-1]
    first_row = 256 * torch.arange(b * h * num_bytes, dtype=torch.int64, device=query.device).view(b, h, 1, num_bytes)
    sums = F.embedding_bag((signs.long() + first_row).reshape(-1, num_bytes), table, mode="sum")
    return rearrange(sums, "(b h n) g -> b h g n", b=b, h=h)
