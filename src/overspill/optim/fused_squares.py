"""The sums of squares of many tensors in three kernels, by the definition of `gradient_checks`: the same bits as on the CPU.

The definition halves a slice of 4 Mi elements: the second half is added to the first until one number is left. So the elements
j, j + COLUMNS, j + 2 * COLUMNS, ... of a slice meet each other first, in a tree of their own:

1. `_columns_kernel`: a program takes LANES columns of a slice and adds each column's ROWS squares up in that tree.
2. `_slices_kernel`: one program a slice halves its COLUMNS numbers to one.
3. `_tensors_kernel`: one program a tensor halves its slices' numbers to one. Left out where no tensor has two slices.

Missing elements are zeros, which change no sum: squares are not negative. Each addition is one float64 operation of two numbers,
so the result depends neither on warps and layouts nor on alignment and neighbours; widening and squaring are exact.

Cost: every element is read once, and 8 bytes a column written and read again: 12 % of a bf16 slice, most of it in the cache. What
`torch.linalg.vector_norm(dtype=float64)` takes: ATen's make_reduction casts its input first, unless the result is float32. With bf16
that is 18 bytes an element instead of 2, and a temporary four times the tensor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from overspill.optim.fused_kernels import EXACT, launching_on, load, stream_of, widen
from overspill.tiers.cuda import to_device

SLICE_ELEMENTS = 4 * 1024 * 1024
"""As `gradient_checks.SLICE_ELEMENTS`, of the definition."""

ROWS = 64
COLUMNS = SLICE_ELEMENTS // ROWS
LANES = 512
"""Columns of a program: 4 a thread. Chosen with ROWS so that the loads of a program stay in registers (compiled for sm_90: 159, nothing
spilled; 128 rows spill), not tuned on a device; without effect on the result."""

TABLES_KEPT = 4096
"""Tables on the device, of 16 bytes a slice and 8 a tensor."""


@triton.jit(do_not_specialize=["num_slices"])
def _columns_kernel(
    elements, table, columns, num_slices, NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, IS_ALIGNED: tl.constexpr
):
    """Step 1.

    Args:
        elements: of the first tensor.
        table: int64 [2, slices]: first element, counted from the first tensor's, and number of elements.
        columns: float64 [slices, NUM_COLUMNS]; written as far as the slice has elements.
    """
    programs_of_slice: tl.constexpr = NUM_COLUMNS // WIDTH
    index = (tl.program_id(0) // programs_of_slice).to(tl.int64)
    column = (tl.program_id(0) % programs_of_slice) * WIDTH
    first, number = tl.load(table + index), tl.load(table + num_slices + index).to(tl.int32)
    if IS_ALIGNED:
        first, number = tl.multiple_of(first, 8), tl.multiple_of(number, 8)
    places = column + tl.arange(0, WIDTH)
    if column < number:
        sums = _fold_rows(elements + first, places, number, NUM_COLUMNS, NUM_ROWS)
        tl.store(columns + index * NUM_COLUMNS + places, sums)


@triton.jit
def _fold_rows(elements, places, number, STEP: tl.constexpr, NUM_ROWS: tl.constexpr):
    """The tree over rows places, places + STEP, ...: the rows of even number and those of odd number meet last."""
    if NUM_ROWS == 1:
        values = widen(load(elements, places, places < number, True)).to(tl.float64)
        sums = values * values
    else:
        even = _fold_rows(elements, places, number, 2 * STEP, NUM_ROWS // 2)
        sums = even + _fold_rows(elements, places + STEP, number, 2 * STEP, NUM_ROWS // 2)
    return sums


@triton.jit(do_not_specialize=["num_slices"])
def _slices_kernel(columns, table, sums, num_slices, NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Step 2; `sums`: float64 [slices]."""
    index = tl.program_id(0).to(tl.int64)
    number = tl.load(table + num_slices + index)
    values = _fold_numbers(columns + index * NUM_COLUMNS, tl.arange(0, WIDTH), number, WIDTH, NUM_COLUMNS // WIDTH)
    tl.store(sums + index + tl.arange(0, 1), _halve(values, WIDTH))


@triton.jit
def _tensors_kernel(sums, table, totals, WIDTH: tl.constexpr):
    """Step 3; `table`: int64, each tensor's first slice, and behind the last the number of slices. `totals`: float64 [tensors]."""
    index = tl.program_id(0)
    first, end = tl.load(table + index), tl.load(table + index + 1)
    places = tl.arange(0, WIDTH)
    values = tl.load(sums + first + places, mask=places < end - first, other=0)
    tl.store(totals + index + tl.arange(0, 1), _halve(values, WIDTH))


@triton.jit
def _fold_numbers(numbers, places, number, STEP: tl.constexpr, NUM_ROWS: tl.constexpr):
    """As `_fold_rows`, of float64 numbers; those at `number` and beyond were not written and count as zero."""
    if NUM_ROWS == 1:
        sums = tl.load(numbers + places, mask=places < number, other=0)
    else:
        even = _fold_numbers(numbers, places, number, 2 * STEP, NUM_ROWS // 2)
        sums = even + _fold_numbers(numbers, places + STEP, number, 2 * STEP, NUM_ROWS // 2)
    return sums


@triton.jit
def _halve(values, WIDTH: tl.constexpr):
    """[WIDTH] -> [1]. Each reduction has two numbers to add, so its order is no question."""
    if WIDTH > 1:
        values = _halve(tl.sum(tl.reshape(values, (2, WIDTH // 2)), axis=0), WIDTH // 2)
    return values


@torch.no_grad()
def sums_of_squares_fused(tensors: Sequence[Tensor]) -> Tensor:
    """`sum_of_squares` of each tensor; float64, shape (number of tensors,), on their device. Starts kernels and does not wait.

    Args:
        tensors: at least one; contiguous, of one dtype and on one device.
    """
    base = tensors[0]
    size, device = base.element_size(), base.device
    places = tuple(((tensor.data_ptr() - base.data_ptr()) // size, tensor.numel()) for tensor in tensors)
    table, first_slices, num_slices, most, is_aligned = _tables_on(device, stream_of(device), places)
    if num_slices == 0:
        return torch.zeros(len(tensors), dtype=torch.float64, device=device)
    totals = torch.empty(len(tensors), dtype=torch.float64, device=device)
    columns = torch.empty(num_slices * COLUMNS, dtype=torch.float64, device=device)
    is_one_each = num_slices == len(tensors) and most == 1
    sums = totals if is_one_each else torch.empty(num_slices, dtype=torch.float64, device=device)
    with launching_on(device):
        _columns_kernel[(num_slices * (COLUMNS // LANES),)](
            base, table, columns, num_slices, NUM_ROWS=ROWS, NUM_COLUMNS=COLUMNS, WIDTH=LANES, IS_ALIGNED=is_aligned, num_warps=4, **EXACT
        )
        _slices_kernel[(num_slices,)](columns, table, sums, num_slices, NUM_COLUMNS=COLUMNS, WIDTH=1024, num_warps=8, **EXACT)
        if not is_one_each:
            _tensors_kernel[(len(tensors),)](sums, first_slices, totals, WIDTH=1 << (most - 1).bit_length(), num_warps=1, **EXACT)
    return totals


@functools.lru_cache(maxsize=TABLES_KEPT)
def _tables_on(device: torch.device, stream: int, places: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor, int, int, bool]:
    """The kernels' tables for tensors of (first element, number of elements).

    Args:
        stream: `stream_of` the device.

    Returns:
        table of slices, table of each tensor's first slice, number of slices, most slices of a tensor, and whether every slice begins
        and ends at a multiple of 8 elements.
    """
    slices = [
        (first + start, min(SLICE_ELEMENTS, number - start)) for first, number in places for start in range(0, number, SLICE_ELEMENTS)
    ]
    counts = [-(-number // SLICE_ELEMENTS) for _, number in places]
    is_aligned = all(first % 8 == 0 and number % 8 == 0 for first, number in slices)
    table = torch.tensor([*(first for first, _ in slices), *(number for _, number in slices)], dtype=torch.int64)
    first_slices = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64)
    on_device = to_device(torch.cat([table, first_slices]), device)
    return on_device[: 2 * len(slices)], on_device[2 * len(slices) :], len(slices), max(counts), is_aligned
