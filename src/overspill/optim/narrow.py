"""Moments and parameters in fewer bits than fp32: the stochastic rounding and the 8-bit codes of `spec.state_formats`, in torch.

The plain form, on any device; csrc/src/numbers.hpp is the fast one, and tests hold them bit for bit together. Everything is
integer arithmetic on the bits of fp32, except that codes below the normal ones are made and widened by one exact multiplication.
Words and sums that exceed 31 bits are kept in int64, where nothing overflows on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from overspill.optim.segment import Rounding
from overspill.spec.state_formats import STATE_BLOCK_ELEMENTS

BROKEN = 255
"""Block exponent of a block with a value that is not finite."""
_LOW_32 = 0xFFFFFFFF
_SECOND_MULTIPLIER = 0x9E3779B1
_SMALLEST_NORMAL = 2.0**23


def rounding_words(rounding: Rounding, offset: int, num_elements: int, device: torch.device) -> Tensor:
    """`rng.rounding_words` of elements from `offset` on in the segment; int64 with values below 2**32, on `device`."""
    first = (rounding.first_element + offset) & _LOW_32
    x = torch.arange(first, first + num_elements, dtype=torch.int64, device=device)
    x = (x & _LOW_32) ^ (rounding.key & _LOW_32)
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW_32  # int64 wraps around; the low 32 bits are right
    x = x ^ (rounding.key >> 32)
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)


def second_words(words: Tensor) -> Tensor:
    """More bits from the same words, for the second moment."""
    return (words * _SECOND_MULTIPLIER) & _LOW_32


def round_to_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    """float32 `values` as bfloat16, rounded up with the probability of what is cut off; `random` (int64) has 16 bits."""
    return ((_bits(values) + random) >> 16).to(torch.int16).view(torch.bfloat16)


def encode_moment(values: Tensor, random: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """The 8-bit codes of a moment, and its blocks' exponents.

    Args:
        values: float32, shape (n,), the first one begins a block. Not negative unless `is_signed`.
        random: int64, shape (n,), 20 bits each.

    Returns:
        uint8, shape (n,), and uint8, shape (number of blocks,).
    """
    top = 15 if is_signed else 31
    bits = _blocks(_bits(values))
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude.amax(dim=1, keepdim=True) + 0xFFFFF) >> 23
    exponent = exponent.clamp(min=top + 22, max=BROKEN)
    # 2**23 is the smallest normal code (8) in 2**-20 of its last place; the multiplication is exact, the cut is to an integer.
    scaled = _floats(magnitude) * _floats((276 + top - exponent.clamp(max=BROKEN - 1)) << 23)
    denormal = scaled.clamp(max=_SMALLEST_NORMAL).to(torch.int64)
    normal = magnitude - ((exponent - top) << 23)
    code = (torch.where(scaled < _SMALLEST_NORMAL, denormal, normal) + _blocks(random)) >> 20
    code = code | ((bits >> 24) & 0x80) if is_signed else torch.where(magnitude != 0, code.clamp(min=1), code)
    code = torch.where(exponent == BROKEN, 0, code)
    return code.to(torch.uint8).view(-1)[: values.numel()].contiguous(), exponent.to(torch.uint8).view(-1)


def decode_moment(codes: Tensor, exponents: Tensor, *, is_signed: bool) -> Tensor:
    """The values that `encode_moment` stored; float32, shape (n,)."""
    top = 15 if is_signed else 31
    blocks = _blocks(codes.to(torch.int64))
    exponent = exponents.to(torch.int64).view(-1, 1)
    is_broken = exponent == BROKEN
    exponent = torch.where(is_broken, top + 22, exponent.clamp(min=top + 22))
    code = blocks & 0x7F if is_signed else blocks
    normal = _floats((code << 20) + ((exponent - top) << 23))
    denormal = code.float() * _floats((exponent - top - 2) << 23)
    values = torch.where(code >= 8, normal, denormal)
    if is_signed:
        values = torch.where(blocks >= 0x80, -values, values)
    return torch.where(is_broken, math.nan, values).view(-1)[: codes.numel()].contiguous()


def _bits(values: Tensor) -> Tensor:
    """The bits of float32 values as int64; negative for negative values, whose low 32 bits are what counts."""
    return values.view(torch.int32).to(torch.int64)


def _floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _blocks(values: Tensor) -> Tensor:
    """[number of blocks, 256], the last block filled up with zeros."""
    missing = -values.numel() % STATE_BLOCK_ELEMENTS
    return torch.nn.functional.pad(values, (0, missing)).view(-1, STATE_BLOCK_ELEMENTS)
