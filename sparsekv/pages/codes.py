"""Keys and values as whole numbers of a few bits: a channel is `scale * (code + zero)`.

`int8` has a scale and a zero for every token of a kv head, `int4` for every 32 channels of it; latents, wider than
any head, have some for every 64 at least, so that their rotary parts have their own. Keys decide where a model looks
and want more bits than values: six and four, with factors of a byte, take what four bits for both do with factors of
two bytes, of keys by channel of a page. They stay close to dense decoding (mean KL, in plain text and where a text
repeats itself: SmolLM2 .0013 and .0045 beside .0026 and .0175, Gemma 3 270M .0013 and .0041 beside .0013 and .0023),
and a token's record is made of that token alone: nothing waits for a full page, or is rounded again.

So digests are made of rounded keys: a page that fills token by token has no others left, and it may not matter how
tokens came. Of the original keys they would choose no better: on the same two models, 3,072 tokens, the pages chosen
from them and from rounded ones hold the same attention but for .0022 of it at most, to either side (standard errors
.0001 to .002; four digests, both formats, 256 and 512 tokens read).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.ops.formats import KEYS, FormatKernel, PageFormat
from sparsekv.pages.formats import register

UNIT = 16  # tokens that a warp attends to at a time
GROUP = 32  # channels that share factors, where codes have less than eight bits
MAX_HEAD, WIDE_GROUP = 256, 64  # of eight bits one head's channels do; what is wider is latents and rotary parts
MAX_ZERO = {8: 800, 6: 127, 4: 127}  # by bits of a code: kernels have code + zero exactly in half precision
MIN_SCALE, MIN_SHORT_SCALE = 2.0**-40, 2.0**-20  # of eight bits, and of less


class Coded(NamedTuple):
    """Tokens as numbers.

    Attributes:
        codes: `[..., d]` uint8.
        scale, zero: `[..., groups]` float32 and int32, of the groups of channels.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Codes(PageFormat):
    """A record is d codes of so many bits and their factors.

    In a page sixteen tokens' codes after sixteen lie in the order in which a warp's lanes hold them as operands of
    matrix products, so that its loads are of bytes that lie together; behind them lie all factors.

    Attributes:
        key_bits, value_bits: of a channel's code: 8 or 6, 8 or 4.
    """

    by_token = True
    key_bits = value_bits = 8

    def record(self, page_size: int, head_dim: int, dtype: torch.dtype, which: int) -> tuple[int, torch.dtype]:
        if head_dim % 8:
            raise ConfigError(f"head_dim={head_dim}: codes are packed for head sizes that are multiples of 8.")
        return sum(_sizes(head_dim, self._bits(which))), torch.uint8

    def encode(self, states: Tensor, valid: Tensor | None, which: int) -> Tensor:
        bits = self._bits(which)
        coded = _coded(_ordered(states.float(), which), bits)
        return torch.cat([_packed(coded.codes, bits), _factors(coded, bits)], -1)

    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        bits = self._bits(which)
        packed, factors = records.split(_sizes(head_dim, bits), -1)
        scale, zero = _read_factors(factors, bits)
        states, size = _unpacked(packed, bits, head_dim).float(), _group(head_dim, bits)
        for group, a_scale, a_zero in zip(states.split(size, -1), scale.split(1, -1), zero.split(1, -1), strict=True):
            group.add_(a_zero).mul_(a_scale)
        return _ordered(states, which, back=True).to(dtype)

    def places(self, page_size: int, head_dim: int, which: int) -> Tensor | None:
        """As kernels read them (cuda/common/code_keys.cuh, code_values.cuh); else one record after the other."""
        if page_size % UNIT or head_dim % GROUP or head_dim > MAX_HEAD:
            return None
        bits, (size, factors) = self._bits(which), _sizes(head_dim, self._bits(which))
        position, byte, of_lane = (torch.arange(n, device="cpu") for n in (page_size, size, factors))
        position = position[:, None]
        unit, token = position // UNIT, position % UNIT
        place = (_key_places if which == KEYS else _value_places)(token, byte, head_dim, bits)
        lane, own = token % 8 // 2, token // 8 * 2 + token % 2
        if bits == 8:
            of_lane = own * 4 + of_lane
        else:
            groups = factors // 2
            of_lane = of_lane % groups * 8 + of_lane // groups * 4 + own
        behind = page_size * size + (unit * 4 + lane) * 4 * factors + of_lane
        return torch.cat([unit * UNIT * size + place, behind], -1)

    def _bits(self, which: int) -> int:
        return self.key_bits if which == KEYS else self.value_bits


def _kernel(key_bits: int, value_bits: int) -> FormatKernel:
    def query_words(head_dim: int, tiles: int) -> int:
        return tiles * (head_dim + 2 + 2 * (head_dim // _group(head_dim, key_bits)))

    return FormatKernel("common/code_pages.cuh", f"Codes<{key_bits}, {value_bits}>", query_words)


@register("int8")
class Int8(Codes):
    """A byte a channel: at a head size of 128 0.52 of what 16 bits take."""

    kernel = _kernel(8, 8)


@register("int4")
class Int4(Codes):
    """Four bits for a value's channel, six for a key's: 0.34."""

    key_bits, value_bits, kernel = 6, 4, _kernel(6, 4)


@register("int8-int4")
class Int8Int4(Codes):
    """Keys as in `int8`, values as in `int4`: 0.40."""

    value_bits, kernel = 4, _kernel(8, 4)


@register("int4-int8")
class Int4Int8(Codes):
    """Keys as in `int4`, values as in `int8`: 0.46."""

    key_bits, kernel = 6, _kernel(6, 8)


# -- numbers


def _group(head_dim: int, bits: int) -> int:
    """Channels that share factors."""
    if bits < 8:
        return GROUP
    return head_dim if head_dim <= MAX_HEAD else WIDE_GROUP


def _ordered(states: Tensor, which: int, back: bool = False) -> Tensor:
    """Channels `[..., d]` in the order in which they are grouped and packed, or back from it. A lane of a kernel has
    eight values of every 64: of these come first all lanes' first four."""
    whole = states.shape[-1] // 64 * 64
    if which == KEYS or not whole:
        return states
    shape = (-1, 2, 8, 4) if back else (-1, 8, 2, 4)
    blocks = states[..., :whole].unflatten(-1, shape).transpose(-3, -2).flatten(-4)
    return blocks if whole == states.shape[-1] else torch.cat([blocks, states[..., whole:]], -1)


def _coded(states: Tensor, bits: int) -> Coded:
    """Channels `[..., d]` in float32, in order. What they are rounded to is at most half a scale away."""
    most, limit, parts = (1 << bits) - 1, MAX_ZERO[bits], []
    for group in states.split(_group(states.shape[-1], bits), -1):
        low, high = group.aminmax(dim=-1, keepdim=True)
        reach = torch.maximum((high - low) * (1 / most), torch.maximum(low.abs(), high.abs()) * (1 / limit))
        scale = _rounded_up(reach, bits)
        zero = (low * (1 / scale)).round()
        codes = ((group * (1 / scale)).round() - zero).clamp(0, most)
        parts.append(Coded(codes.to(torch.uint8), scale, zero.to(torch.int32)))
    return Coded(*(torch.cat(column, -1) for column in zip(*parts, strict=True)))


def _rounded_up(scale: Tensor, bits: int) -> Tensor:
    """To the next larger number that is kept: a bfloat16, or one of five bits of exponent and three of mantissa."""
    dropped = 16 if bits == 8 else 20
    least = MIN_SCALE if bits == 8 else MIN_SHORT_SCALE
    up = (scale.clamp_min(least).view(torch.int32) + ((1 << dropped) - 1)) >> dropped << dropped
    return up.view(torch.float32).clamp_max(least * 2.0**31 * 1.875 if bits < 8 else torch.inf)


def _factors(coded: Coded, bits: int) -> Tensor:
    """Scales and zeros as bytes."""
    if bits == 8:
        zero = coded.zero.to(torch.int16).view(torch.uint8)
        return torch.cat([coded.scale.bfloat16().view(torch.uint8), zero], -1)
    exponent = (coded.scale.view(torch.int32) >> 20) - _SHORT_BIAS
    return torch.cat([exponent.to(torch.uint8), coded.zero.to(torch.int8).view(torch.uint8)], -1)


_SHORT_BIAS = (127 - 20) << 3  # of a float32's exponent


def _read_factors(factors: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of `_factors`."""
    scale, zero = (x.contiguous() for x in factors.chunk(2, -1))
    if bits == 8:
        return scale.view(torch.bfloat16).float(), zero.view(torch.int16)
    return ((scale.int() + _SHORT_BIAS) << 20).view(torch.float32), zero.view(torch.int8)


# -- bytes


def _sizes(head_dim: int, bits: int) -> list[int]:
    """Bytes of a token's codes, and of their factors."""
    twos = -(-head_dim // 64) * 16  # of the upper bits of six
    codes = {8: head_dim, 6: head_dim // 2 + twos, 4: head_dim // 2}[bits]
    return [codes, (4 if bits == 8 else 2) * -(-head_dim // _group(head_dim, bits))]


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., d]` in as many bytes as they need. Of six bits, the lower four of all channels come first."""
    if bits == 8:
        return codes
    if bits == 4:
        low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
        return low | high << 4
    first, second = codes.unflatten(-1, (-1, 2, 4)).unbind(-2)  # of every eight channels, `[..., d / 8, 4]`
    lower = (first & 15) | (second & 15) << 4
    upper = (first >> 4) | (second >> 4) << 2
    even, odd = F.pad(upper.flatten(-2), (0, -upper.shape[-2] * 4 % 32)).unflatten(-1, (-1, 2, 16)).unbind(-2)
    return torch.cat([lower.flatten(-2), (even | odd << 4).flatten(-2)], -1)


def _unpacked(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    """The inverse of `_packed`."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    lower = packed[..., : head_dim // 2].unflatten(-1, (-1, 4))
    twos = packed[..., head_dim // 2 :].unflatten(-1, (-1, 16))
    upper = torch.stack([twos & 15, twos >> 4], -2).flatten(-3)[..., : head_dim // 2].unflatten(-1, (-1, 4))
    first, second = (lower & 15) | (upper & 3) << 4, (lower >> 4) | (upper >> 2) << 4
    return torch.stack([first, second], -2).flatten(-3)


def _key_places(token: Tensor, byte: Tensor, head_dim: int, bits: int) -> Tensor:
    """Where bytes of keys lie among those of sixteen tokens. Lane 4 r + c of a warp has channels 8 c to 8 c + 7 of
    every 32, of tokens r and r + 8."""
    row, half = token % 8, token // 8
    if bits == 8:
        return byte // 32 * 512 + row * 64 + byte % 32 // 8 * 16 + half * 8 + byte % 8
    pair, lane = byte // 32, row * 4 + byte % 16 // 4  # of 64 channels, of which the last 32 may be missing
    words = torch.where(pair < head_dim // 64, 16, 8)
    lower = pair * 512 + lane * words + byte % 32 // 16 * 8 + half * 4 + byte % 4
    two = byte - head_dim // 2
    pair, together = two // 16, min(-(-head_dim // 64), 2)  # pairs that are loaded together
    upper = pair // 2 * 512 + (row * 4 + two % 16 // 4) * together * 8 + pair % 2 * 8 + half * 4 + two % 4
    return torch.where(two < 0, lower, UNIT * head_dim // 2 + upper)


def _value_places(token: Tensor, byte: Tensor, head_dim: int, bits: int) -> Tensor:
    """The same of values, in order. Lane 4 r + c has channels 4 r to 4 r + 3 of every 32, of tokens 2 c, 2 c + 1,
    2 c + 8 and 2 c + 9."""
    if bits == 8:
        lane = byte % 32 // 4 * 4 + token % 8 // 2
        return byte // 32 * 512 + lane * 16 + byte % 4 * 4 + token // 8 * 2 + token % 2
    group, lane = byte // 16, byte % 16 // 2 * 4 + token % 8 // 2
    words = torch.where(group < head_dim // 64 * 2, 16, 8)
    return group // 2 * 512 + lane * words + group % 2 * 8 + byte % 2 * 4 + token % 2 * 2 + token // 8
