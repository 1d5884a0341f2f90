"""Host memory: a copy, an update in place, and the optimizer's own update, over more bytes than a cache holds.

An update reads and writes in place, which a memory controller does faster than a copy between two places (the copy's target is read as
well before it is written). So both are measured: the first bounds the update, the second what passes from buffer to buffer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from overspill import _native
from overspill.optim import Rounding, update_chunk
from overspill.optim.segment import segment_table
from overspill.probe.sampling import Sampling, measured_rate, sample_seconds
from overspill.spec.machine_file import MeasuredRate
from overspill.spec.schedule import Role
from overspill.spec.state_formats import resolve_state_format
from overspill.spec.tensors import CHUNK_ALIGNMENT_ELEMENTS, DTYPE_BYTES
from overspill.spec.update_rule import AdamW
from overspill.tiers import HostMemory

MOST_SETS = 64
"""Chunks that are updated in turn. Chosen: tiny ones need not fill a cache."""


def measure_copy(num_bytes: int, sampling: Sampling, *, room_bytes: int, until_s: float = math.inf) -> MeasuredRate:
    """Bytes read and written a second of a copy of `num_bytes` from host memory to host memory, by torch with its threads.

    Raises:
        BudgetError: there is no room.
    """
    host = HostMemory(pin=False, budget_bytes=room_bytes)
    try:
        target, source = (host.allocate(name, num_bytes).fill_(1) for name in ("target", "source"))

        def run(times: int) -> None:
            for _ in range(times):
                target.copy_(source)

        return measured_rate(sample_seconds(run, sampling, until_s=until_s), 2 * num_bytes)
    finally:
        target = source = torch.empty(0)  # before the pages go
        host.close()


def measure_in_place(num_bytes: int, sampling: Sampling, *, room_bytes: int, until_s: float = math.inf) -> MeasuredRate:
    """Bytes read and written a second of x = a * x + b over `num_bytes` of fp32, by the native core with its threads.

    Raises:
        BudgetError: there is no room.
    """
    host = HostMemory(pin=False, budget_bytes=room_bytes)
    try:
        values = host.allocate("values", num_bytes).fill_(0).view(torch.float32)

        def run(times: int) -> None:
            for _ in range(times):
                _native.scale_in_place(values.data_ptr(), num_elements=values.numel(), factor=0.5, summand=0.5)

        return measured_rate(sample_seconds(run, sampling, until_s=until_s), 2 * num_bytes)
    finally:
        values = torch.empty(0)
        host.close()


def measure_update(
    num_elements: int,
    sizes: Mapping[Role, int],
    update: Callable[[Mapping[Role, torch.Tensor]], object],
    sampling: Sampling,
    *,
    updated_bytes: int,
    room_bytes: int,
    until_s: float = math.inf,
) -> MeasuredRate:
    """Parameters a second of `update`, which is given the copies of one chunk after another.

    Args:
        num_elements: of a chunk.
        sizes: bytes of each role of a chunk.
        updated_bytes: of all chunks, at most; more than a large last-level cache.

    Raises:
        BudgetError: `room_bytes` does not hold one chunk.
    """
    each = sum(sizes.values()) + len(sizes) * 4096  # each is rounded up to a page
    num_sets = max(1, min(updated_bytes, room_bytes) // each)
    host = HostMemory(pin=False, budget_bytes=room_bytes)
    try:
        # Filled, because a page that was only read is everybody's one page of zeros, and sits in a cache.
        sets = [
            {role: host.allocate(f"{role}[{number}]", size).fill_(0) for role, size in sizes.items()}
            for number in range(min(num_sets, MOST_SETS))
        ]
        turns = itertools.cycle(range(len(sets)))

        def run(times: int) -> None:
            for _ in range(times):
                update(sets[next(turns)])

        return measured_rate(sample_seconds(run, sampling, until_s=until_s), num_elements)
    finally:
        sets = []
        host.close()


def measure_adamw(
    state_format: str,
    sampling: Sampling,
    *,
    parameter_dtype: str,
    chunk_bytes: int,
    updated_bytes: int,
    room_bytes: int,
    until_s: float = math.inf,
) -> MeasuredRate:
    """Parameters a second of AdamW in `state_format`, in chunks of `chunk_bytes` over all roles, by the core that a session calls.

    Raises:
        BudgetError: there is no room for one chunk.
    """
    layout = resolve_state_format(state_format, parameter_dtype, "adamw")
    itemsize = DTYPE_BYTES[parameter_dtype]
    number = int(chunk_bytes / (2 * itemsize + layout.bytes_per_element)) // CHUNK_ALIGNMENT_ELEMENTS * CHUNK_ALIGNMENT_ELEMENTS
    ranges, dtype = layout.field_ranges(number), getattr(torch, parameter_dtype)
    scalars = [AdamW(lr=1e-4, weight_decay=0.01).scalars(step=100)]
    table: np.ndarray = segment_table(number, Rounding(key=1) if layout.is_rounded_stochastically else None)

    def update(copies: Mapping[Role, torch.Tensor]) -> None:
        record = copies[Role.STATE]
        update_chunk(
            scalars,
            table,
            state_format=layout,
            parameter=copies[Role.PARAMETER].view(dtype),
            gradient=copies[Role.GRADIENT].view(dtype),
            states={field.name: record[slice(*ranges[field.name])].view(getattr(torch, field.dtype)) for field in layout.fields},
            with_stats=False,
        )

    sizes = {Role.PARAMETER: number * itemsize, Role.GRADIENT: number * itemsize, Role.STATE: layout.record_bytes(number)}
    return measure_update(number, sizes, update, sampling, updated_bytes=updated_bytes, room_bytes=room_bytes, until_s=until_s)
