"""Splitting fp32 master weights into a bf16 parameter and a 16-bit remainder, and joining them again without loss.

With `bits` the master's 32 bits:

    high      = (bits + 0x8000) >> 16      the nearest bf16, ties away from zero: what the model reads
    remainder = low 16 bits, signed        how far the master is from its bf16, in units of its last place
    bits      = (high << 16) + remainder   modulo 2**32

This is exact on all 2**32 patterns. Two consequences of the modulo: masters above the largest bf16 give an infinite high
half while the master stays finite, and some NaN patterns give a high half of -0. So whether a value is finite is asked of
the fp32 value, never of the high half; the update stores only the quiet NaN 0x7fc00000, whose high half is a NaN.

Written with shifts and masks that never overflow a signed integer, so that every device gives the same bits.
Cost: 4 + 4 bytes an element of temporaries; callers slice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of `master`.

    Args:
        master: float32, any shape and device.

    Returns:
        parameter (bfloat16) and remainder (int16), new tensors of the same shape.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"master weights are float32, got {master.dtype}")
    bits = master.view(torch.int32)
    # (bits + 0x8000) >> 16 without the overflow: the carry out of the low half is its own top bit.
    high = ((bits >> 16) + ((bits >> 15) & 1)).to(torch.int16)
    return high.view(torch.bfloat16), bits.to(torch.int16)


def merge_master(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The master that `split_master` split; exact.

    Args:
        parameter: bfloat16.
        remainder: int16, the same shape and device.

    Returns:
        float32, a new tensor of that shape.
    """
    if parameter.dtype != torch.bfloat16 or remainder.dtype != torch.int16 or parameter.shape != remainder.shape:
        raise ValueError(
            f"a split master is a bfloat16 parameter and an int16 remainder of one shape, "
            f"got {parameter.dtype} {tuple(parameter.shape)} and {remainder.dtype} {tuple(remainder.shape)}"
        )
    low = remainder.to(torch.int32)
    high = parameter.view(torch.int16).to(torch.int32) + (low >> 31)  # a negative remainder borrows one
    return ((high << 16) | (low & 0xFFFF)).view(torch.float32)
