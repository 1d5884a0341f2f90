"""The global gradient norm, and whether gradients are finite: what a step must know before it may update anything.

**The norm.** The sum of squares of a tensor is a float64 number defined by the values and their element numbers alone:

1. each element is widened to float64 and squared (exact: 2 * 24 significant bits fit in 53);
2. the tensor is cut into slices of 4 Mi elements, the last one padded with zeros; in a slice the second half is added to the
   first, element by element, until one number is left;
3. the slices' numbers are padded with zeros to a power of two and added up the same way.

Every addition is one elementwise float64 operation, so any number of threads gives the same bits, which `torch.sum` does not
promise. On CUDA three kernels (`fused_squares`) do this for many tensors at once, to the same bits: the definition in plain torch takes
some 25 kernels a slice (measured: 150 ms of a step of 500 on 1.10B parameters). Where those kernels cannot be used (`backends`) it is
one reduction a tensor with float64 accumulators instead, as deterministic there, which may differ from the definition in the last bits.

The global norm is the square root of all tensors' sums under `math.fsum`, which rounds once: the order in which tensors arrive, and
which rank owns them, does not matter. It is the norm of whole tensors; sums of parts of a tensor, added up, may differ in the last
bit.

A finite float64 sum cannot overflow here (3.4e38 squared times any number of elements is far below 1e308), so the sum is non-finite
exactly when an element is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from overspill.optim.backends import is_fused

SLICE_ELEMENTS = 4 * 1024 * 1024
"""Elements squared at once (32 MiB of temporaries): a power of two, part of the definition above. Chosen, not tuned."""


def sum_of_squares(tensor: Tensor) -> Tensor:
    """The sum of squares of `tensor`, defined above.

    Args:
        tensor: any floating dtype up to float32, any shape and device; elements are numbered in row-major order.

    Returns:
        float64, shape (), on the tensor's device; reading it waits for the device, so collect first and read once.
    """
    return sums_of_squares([tensor])[0]


@torch.no_grad()
def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """`sum_of_squares` of each of `tensors`, all on one device: float64, shape (number of tensors,), there.

    On CUDA this is a launch or three for all of them, if they are of one dtype.
    """
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"the gradient norm is defined for bfloat16, float16 and float32, got {tensor.dtype}")
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    if not flat:
        return torch.zeros(0, dtype=torch.float64)
    if not is_fused(flat[0].device):
        return torch.stack([_plain_sum_of_squares(values) for values in flat])
    from overspill.optim.fused_squares import sums_of_squares_fused

    if len({values.dtype for values in flat}) == 1:
        return sums_of_squares_fused(flat)
    return torch.cat([sums_of_squares_fused([values]) for values in flat])


def _plain_sum_of_squares(flat: Tensor) -> Tensor:
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=torch.float64).square_()
    sums = [_fold(flat[start : start + SLICE_ELEMENTS].double().square_()) for start in range(0, flat.numel(), SLICE_ELEMENTS)]
    return _fold(torch.stack(sums)) if sums else torch.zeros((), dtype=torch.float64)


def global_norm(sums_of_squares: Iterable[Tensor | float]) -> float:
    """The L2 norm of all gradients, from each tensor's `sum_of_squares`; non-finite when one of them is.

    Args:
        sums_of_squares: numbers, or float64 tensors of any shape on one device, which are read in one copy.
    """
    given = list(sums_of_squares)
    tensors = [value.reshape(-1) for value in given if isinstance(value, Tensor)]
    sums = [float(value) for value in given if not isinstance(value, Tensor)]
    sums += torch.cat(tensors).tolist() if tensors else []
    return math.sqrt(math.fsum(sums)) if all(map(math.isfinite, sums)) else math.nan


def count_non_finite(tensor: Tensor) -> int:
    """How many elements of `tensor` are infinite or NaN."""
    flat = tensor.detach().reshape(-1)
    return sum(int((~torch.isfinite(flat[start : start + SLICE_ELEMENTS])).sum()) for start in range(0, flat.numel(), SLICE_ELEMENTS))


def all_finite_reference(tensor: Tensor) -> bool:
    """Whether no element of `tensor` is infinite or NaN; stops at the first slice that has one."""
    flat = tensor.detach().reshape(-1)
    return all(bool(torch.isfinite(flat[start : start + SLICE_ELEMENTS]).all()) for start in range(0, flat.numel(), SLICE_ELEMENTS))


def _fold(values: Tensor) -> Tensor:
    """Halve `values` (float64, 1-D) by elementwise addition until one is left; consumes it. Missing elements count as zero."""
    length = values.numel()
    while length > 1:
        half = 1 << (length - 1).bit_length() - 1  # of the next power of two
        values[: length - half].add_(values[half:length])
        length = half
    return values[0]
