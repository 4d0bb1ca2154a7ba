"""One bit per channel of every key: an estimate of each token's dot product, not a bound of the page's.

Source: the estimator of Gao and Long, "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound
for Approximate Nearest Neighbor Search" (SIGMOD 2024), section 3, applied to keys. The keys of a page are rotated at
random and centred about their own mean m; of what is left of a key the signs s and one factor f are kept, and q.k is
estimated by <Rq, m> + f <Rq, s>. As there (section 3.3), Rq is rounded to whole numbers, up to 124, so that a kernel
can multiply bytes; every other channel in steps of two, or of four at two bits, whose bits a kernel then need not
shift. A page scores the log-sum-exp of its tokens' logits, the mass that attention has for it: several good tokens
are worth more than one.

The mean is the page's, not the prompt's or the head's: what is kept of a page depends on nothing but its keys, and
rotary embeddings turn what the keys of a head have in common with their place, so that a page's own know it best. It
is kept as `sketch2` keeps a key, and need not be exact: keys are centred about what is kept of it, so that what it
has lost is a part of every key.

The rotation is made of random sign flips and Hadamard transforms, which a kernel does without a matrix in d log d
operations: Ailon and Chazelle, "The Fast Johnson-Lindenstrauss Transform" (SIAM J. Comput. 2009), section 2. There
are two rounds of it, because after one a channel that outweighs all others would decide every sign.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparsekv.digests.base import Digest, DigestKernel, Field, register

ROTATION_SEED = 0
ROUNDS = 2  # of flips and a transform
QUERY_LIMIT = 124  # the largest whole number of a rotated query: of a byte, and a multiple of every step
MEAN_BITS = 2  # per channel of a page's mean
LANES = 4  # threads of a kernel that share a token: each reads its part of the channels of several tokens at once
LANE_BYTES = 32  # what a lane reads of a page in one go
BLOCK_TOKENS = 16  # of a record
WORD = 16  # bytes that a kernel copies at once


def sketch_kernel(bits: int) -> DigestKernel:
    """For so many bits per channel.

    The query becomes whole numbers: a channel half-way between two of them may go either way, at a percent of the
    scores of its head.
    """

    def room(head_dim: int, heads: int) -> int:
        pitch = 304 if head_dim > 256 else 192 if head_dim == 96 else 144
        return 3 * pitch + 48  # three heads or rows, of latents pairs of rows, of sixteen pages, and their factors

    return DigestKernel(
        "common/sketch_score.cuh",
        f"Sketch<{{heads}}, {bits}>",
        (torch.uint8, torch.float32, torch.float32),
        staged=lambda head_dim, heads: (head_dim // 2 + 4) * -(-heads // 8),
        room=room,
        tolerance=2e-2,
        of_latents=True,
    )


class Layout(NamedTuple):
    """Where the parts of a page's record lie, in bytes. It is made of blocks of sixteen tokens: a head, which has the
    factors of their codes and, in the first block before them, the mean and its factor; then the codes. A page that
    is not of sixteens is one block.

    Attributes:
        mean, codes: shapes, as `_packed` packs them, of the mean and of a block's codes; bytes come last.
        factors: where they begin.
        head, block: bytes of a head, and of a block.
        blocks, tokens: of a page, and of a block.
    """

    mean: tuple[int, ...]
    codes: tuple[int, ...]
    factors: int
    head: int
    block: int
    blocks: int
    tokens: int

    @classmethod
    def of(cls, page_size: int, head_dim: int, bits: int) -> Layout:
        mean, (rows, *row) = _packing(1, head_dim, MEAN_BITS), _packing(page_size, head_dim, bits)
        tokens = page_size if page_size % BLOCK_TOKENS else BLOCK_TOKENS
        blocks = page_size // tokens
        codes = rows // blocks, *row
        factors = math.prod(mean) + WORD
        piece = 1 if page_size % BLOCK_TOKENS else 64 if head_dim < 128 else 128
        head = -(-(factors + 2 * tokens) // piece) * piece
        return cls(mean, codes, factors, head, head + math.prod(codes), blocks, tokens)


class Sketched(NamedTuple):
    """What is kept of pages.

    Attributes:
        mean: as the codes of a page of one token.
        unit: `[..., 1]` float32, the mean's factor.
        codes: `[..., blocks, rows, parts, words, 4]` uint8. A token's bits lie in up to four parts, as four threads
            of a kernel read them, and the parts of several tokens side by side, as `_packed` packs them.
        factor: `[..., p]`, in half precision in the record; NaN for no token.
    """

    mean: Tensor
    unit: Tensor
    codes: Tensor
    factor: Tensor

    @classmethod
    def of(cls, records: Tensor, head_dim: int, bits: int) -> Sketched:
        """The parts of records `[..., p, bytes of a token]`."""
        layout = Layout.of(records.shape[-2], head_dim, bits)
        size, records = math.prod(layout.mean), records.flatten(-2)[..., : layout.blocks * layout.block]
        blocks = records.unflatten(-1, (layout.blocks, layout.block))
        factors = blocks[..., layout.factors : layout.factors + 2 * layout.tokens]
        return cls(
            records[..., :size].unflatten(-1, layout.mean),
            _viewed(records[..., size : size + 4], torch.float32),
            blocks[..., layout.head :].unflatten(-1, layout.codes),
            _viewed(factors, torch.float16).flatten(-2).float(),
        )

    def record(self, head_dim: int, bits: int) -> Tensor:
        """One tensor `[..., p, bytes of a token]` uint8; zeros fill it up."""
        page_size = self.factor.shape[-1]
        layout = Layout.of(page_size, head_dim, bits)
        blocks = self.codes.new_zeros(*self.unit.shape[:-1], layout.blocks, layout.block)
        blocks[..., layout.head :] = self.codes.flatten(-4)
        factor = self.factor.to(torch.float16).unflatten(-1, (layout.blocks, -1)).view(torch.uint8)
        blocks[..., layout.factors : layout.factors + 2 * layout.tokens] = factor
        first = torch.cat([self.mean.flatten(-4), self.unit.float().view(torch.uint8)], dim=-1)
        blocks[..., 0, : first.shape[-1]] = first
        record = blocks.flatten(-2)
        return F.pad(record, (0, -record.shape[-1] % page_size)).unflatten(-1, (page_size, -1))


@register("sign_sketch")
class SignSketch(Digest):
    """Per token the packed signs (d / 8 bytes) and a half-precision factor, per page its mean in two bits a channel
    (d / 4 bytes) and a factor: at pages of 16 and d of 128, 24 bytes per token. They are one record (`Sketched`), as
    memory is read fastest by long pieces.

    Fixed, all float32: the rotation `[hkv, d, d]`, and the flips that it is made of `[hkv, rounds, d]`, from which
    kernels rotate without the matrix. A key whose d does not divide by 8 is rotated as one with zeros behind it,
    into as many channels as do: the rotation is `[hkv, rotated, d]`.

    Attributes:
        bits: per channel. They are a number n, of which 2 n + 1 - 2^bits is the channel's code: -1 or 1, or of two
            bits -3, -1, 1 or 3.
    """

    bits = 1

    # 1 had a rotation by QR decomposition and did not round the query; 2 centred all keys on the mean of the first
    # prompt's, and left q.mean out; 3 had means in bytes, and a page scored its best token; 4 had a field for each of
    # what is a record now, other bits, and queries up to 40.
    revision = 5
    kernel = sketch_kernel(bits)

    def fields(self, page_size: int, head_dim: int) -> list[Field]:
        layout = Layout.of(page_size, _rotated(head_dim), self.bits)
        return [Field((page_size, -(-layout.blocks * layout.block // page_size)), torch.uint8)]

    def fit(self, keys: Tensor, valid: Tensor | None) -> list[Tensor]:
        rotation, flips = _rotation(_rotated(keys.shape[3]), keys.device)
        return [x.expand(keys.shape[1], -1, -1).clone() for x in (rotation[:, : keys.shape[3]], flips)]

    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        exists = valid[:, None, :, None]
        rotated = torch.where(exists, keys.float(), 0.0) @ state[0].transpose(-1, -2)  # [m, hkv, p, d]
        mean = rotated.sum(2, keepdim=True) / exists.sum(2, keepdim=True)
        mean_numbers, code = _code(mean, MEAN_BITS)
        unit = _factor(mean, code)
        centred = torch.where(exists, rotated - code * unit[..., None], 0.0)
        numbers, code = _code(centred, self.bits)
        factor = _factor(centred, code).masked_fill(~valid[:, None], float("nan"))  # no token
        layout = Layout.of(rotated.shape[2], rotated.shape[3], self.bits)
        codes = _packed(numbers, self.bits).unflatten(2, (layout.blocks, -1))
        return [Sketched(_packed(mean_numbers, MEAN_BITS), unit, codes, factor).record(rotated.shape[3], self.bits)]

    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        numbers, worth = _whole(query @ state[0].transpose(-1, -2), self.bits)
        worth = rearrange(worth, "b h g 1 -> g 1 b 1 h")
        mean, unit, codes, factor = Sketched.of(summary[0], numbers.shape[-1], self.bits)
        of_mean = (_products(numbers, mean, MEAN_BITS, 1) * worth)[:, 0] * unit.squeeze(-1)  # [g, b, pages, h]
        products = _products(numbers, codes.flatten(3, 4), self.bits, factor.shape[-1]) * worth
        factor = rearrange(factor, "b pages h p -> p b pages h").contiguous()
        beyond = (products * factor).nan_to_num_(float("-inf"), float("inf"), float("-inf"))  # NaN is of no token
        return rearrange(of_mean + beyond.logsumexp(1), "g b pages h -> b h g pages")

    def why_unlike(
        self, summary: Sequence[Tensor], expected: Sequence[Tensor], page_size: int, head_dim: int
    ) -> str | None:
        """Up to the order of sums: it decides about bits of channels near a threshold, and last bits of factors."""
        (means, units, codes, factors), (expected_means, expected_units, expected_codes, expected_factors) = (
            Sketched.of(record, _rotated(head_dim), self.bits) for (record,) in (summary, expected)
        )
        same = (means == expected_means).flatten(2).all(-1)  # where a bit of a mean differs, all else may
        if int((~same).sum()) > 2 + 1e-2 * same.numel():
            return f"{int((~same).sum())} of {same.numel()} means are others"
        if not torch.allclose(units[same], expected_units[same], rtol=1e-5, equal_nan=True):
            return "other units of means"
        numbers, expected_numbers = (
            _unpacked(x.flatten(2, 3), self.bits, page_size)[same] for x in (codes, expected_codes)
        )
        differ = (numbers != expected_numbers) & ~expected_factors[same].isnan()[..., None]  # [m, p, d]
        if int(differ.sum()) > 2 + 1e-4 * differ.numel():
            return f"{int(differ.sum())} of {differ.numel()} codes are others"
        alike = ~differ.any(-1)  # a factor is that of the code
        mine, theirs = factors[same][alike], expected_factors[same][alike]
        if not torch.allclose(mine, theirs, rtol=4e-3, atol=1e-6, equal_nan=True):
            return "other factors"
        return None


def _viewed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of a copy, as another dtype: a tensor of one row is contiguous with strides that forbid a view."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def _rotated(head_dim: int) -> int:
    """Channels of a rotated key: eight make whole bytes."""
    return -(-head_dim // 8) * 8


def _packing(page_size: int, head_dim: int, bits: int) -> tuple[int, int, int, int]:
    """Rows of a page, parts of a token, words of the tokens of a row in a part, and bytes of a word."""
    parts = math.gcd(LANES, head_dim // 8)
    size = bits * head_dim // 8 // parts  # bytes of a token
    tokens = math.gcd(page_size, 1 << (-(-LANE_BYTES // size) - 1).bit_length())
    return page_size // tokens, parts, -(-tokens * size // 4), 4


@functools.lru_cache(16)  # every layer of a model has the same, and a GPU would wait for each
def _rotation(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rotation `[d, d]`, and the flips that it is made of `[rounds, d]`."""
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(ROTATION_SEED)
        drawn = torch.randint(2, (ROUNDS, head_dim), generator=generator, dtype=torch.int64, device="cpu")
        flips = (2 * drawn - 1).to(torch.float32)
        rotation, mixing = _identity(head_dim), _mixing(head_dim)
        for flip in flips:
            rotation = mixing @ (flip[:, None] * rotation)
        return rotation.to(device), flips.to(device)


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


def _whole(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Vectors `[..., d]` in whole numbers, up to the limit, every other a multiple of 2^bits; and what 1 is worth,
    `[..., 1]`."""
    unit = x.abs().amax(-1, keepdim=True) / QUERY_LIMIT
    steps = (1 << bits) ** (torch.arange(x.shape[-1], device=x.device) % 2).to(x.dtype)
    return (x / (unit.clamp_min(torch.finfo(unit.dtype).tiny) * steps)).round() * steps, unit


def _code(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Vectors `[..., d]` in so many bits a channel: the numbers n that these are, uint8, and the codes of these,
    `[..., d]`."""
    positive, squares = x > 0, x.square()
    planes = [positive, positive == (squares > squares.mean(-1, keepdim=True))][:bits]
    numbers = functools.reduce(lambda upper, lower: 2 * upper + lower, [plane.to(torch.uint8) for plane in planes])
    return numbers, 2 * numbers.to(x.dtype) + (1 - 2**bits)


def _factor(x: Tensor, code: Tensor) -> Tensor:
    """By which a code is to be multiplied so that its product with x is |x|^2, `[...]`."""
    return x.square().sum(-1) / (code * x).sum(-1).clamp_min(1e-20)


def _packed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers `[m, h, p, d]` -> bytes `[m, h, block, part, word, 4]`.

    Channels are cut into eights `[byte, part, 2]`. A byte of a word holds, from its lowest bits on, what follows in
    the order of tokens, of eights, of the last 2: so a register's four bytes are a shift and a mask away.
    """
    page_size, head_dim = numbers.shape[-2:]
    blocks, parts, words, _ = _packing(page_size, head_dim, bits)
    order = "m h (block token) (eight byte part two) -> m h block part (token eight two) byte"
    inner = rearrange(numbers, order, block=blocks, part=parts, byte=4, two=2)
    inner = F.pad(inner, (0, 0, 0, words * (8 // bits) - inner.shape[-2]))
    placed = rearrange(inner, "m h block part (word at) byte -> m h block part word byte at", word=words)
    return (placed << _shifts(bits, placed.device)).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor, bits: int, page_size: int) -> Tensor:
    """Bytes `[m, h, block, part, word, 4]`, all of whose bits are used -> numbers `[m, h, p, d]`."""
    numbers = packed[..., None] >> _shifts(bits, packed.device) & (1 << bits) - 1
    order = "m h block part word byte at -> m h block part (word at) byte"
    tokens = "m h block part (token eight two) byte -> m h (block token) (eight byte part two)"
    return rearrange(rearrange(numbers, order), tokens, token=page_size // packed.shape[2], two=2)


def _shifts(size: int, device: torch.device) -> Tensor:
    """Where the pieces of so many bits begin in a byte."""
    return torch.arange(0, 8, size, dtype=torch.uint8, device=device)


def _products(query: Tensor, packed: Tensor, bits: int, page_size: int) -> Tensor:
    """Sums of query by code: query, rotated, `[b, h, g, d]`, bytes `[b, pages, h, block, part, word, 4]` ->
    `[g, p, b, pages, h]`.

    Tokens are multiplied by units, as many as have whole words to themselves: a byte may have numbers of several.
    """
    blocks, parts = packed.shape[3:5]
    of_token, of_byte = query.shape[-1] // (4 * parts), 8 // bits  # numbers
    slots = min(page_size // blocks, of_byte // math.gcd(of_token, of_byte))
    size = -(-slots * of_token // of_byte)  # words
    words = _viewed(packed, torch.int32).squeeze(-1)
    order = "b pages h block part (unit word) -> (block unit) b pages h (word part)"
    places = _viewed(rearrange(words, order, word=size), torch.uint8)
    order = "b h g (eight byte part two) -> b h part byte (eight two) g"
    channels = rearrange(query, order, byte=4, part=parts, two=2)
    of_slot = torch.eye(slots, dtype=query.dtype, device=query.device).view(slots, 1, slots, 1)
    weights = (channels[..., None, :, None, :] * of_slot).flatten(4, 5).flatten(5)
    weights = F.pad(weights, (0, 0, 0, size * of_byte - weights.shape[4]))  # the rest fills a word up
    weights = rearrange(weights, "b h part byte (word at) n -> b h (word part byte) at n", word=size)
    sums = (_multiplied if query.is_cuda else _looked_up)(places, weights, bits)
    return rearrange(sums, "unit b pages h (slot g) -> g (unit slot) b pages h", slot=slots)


def _codes_of_bytes(bits: int, like: Tensor) -> Tensor:
    """The codes that the numbers of every byte stand for, `[256, numbers]`."""
    numbers = torch.arange(256, dtype=torch.uint8, device=like.device)[:, None] >> _shifts(bits, like.device)
    return 2 * (numbers & (1 << bits) - 1).to(like.dtype) + (1 - 2**bits)


def _looked_up(packed: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Bytes `[unit, b, pages, h, k]`, weights of what they have `[b, h, k, at, n]` -> sums `[unit, b, pages, h, n]`.

    A byte has few values, so what it adds comes from a table and no code is ever unpacked: fastest on a CPU.
    """
    table = (_codes_of_bytes(bits, weights) @ weights).flatten(0, 3)
    rows = torch.arange(0, len(table), 256, dtype=torch.int32, device=packed.device)
    places = packed.int().add_(rows.view(len(weights), 1, *weights.shape[1:3]))
    return F.embedding_bag(places.flatten(0, 3), table, mode="sum").view(*packed.shape[:-1], table.shape[1])


def _multiplied(packed: Tensor, weights: Tensor, bits: int) -> Tensor:
    """The same by a matrix product of unpacked codes, which are gathered a byte's at a time: fastest on a GPU. Whole
    numbers of so few digits are exact in bfloat16, and so are their sums in float32."""
    codes, weights = _codes_of_bytes(bits, weights.bfloat16()), weights.bfloat16()
    of_byte = codes.view(torch.complex128 if bits == 1 else torch.complex64).flatten()
    places = rearrange(packed, "unit b pages h k -> (b h) (unit pages) k")
    rows = of_byte.index_select(0, places.flatten().int()).view(torch.bfloat16).view(*places.shape[:2], -1)
    sums = torch.bmm(rows, weights.flatten(2, 3).flatten(0, 1), out_dtype=torch.float32)
    return rearrange(sums, "(b h) (unit pages) n -> unit b pages h n", unit=len(packed), b=len(weights))
