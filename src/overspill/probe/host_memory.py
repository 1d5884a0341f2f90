"""Host memory: a copy, an update in place, and the optimizer's own update, chunk after chunk over far more bytes than the caches hold.

An update reads and writes in place, which a memory controller does faster than a copy between two places (the copy's target is read as
well before it is written). So both are measured: the first bounds the update, the second what passes from buffer to buffer.

Rules:

1. What a step updates lies in memory and in no cache: by the time it comes to a chunk again it has been through all others. So everything
   here goes in turn through the portions of one **working set**, `COLD_FACTOR` times what the caches of all sockets hold. A server's last
   level is 100 to 500 MiB a socket today: arrays of 256 MiB showed 387 GB/s on a machine whose memory moves 140.
2. The working set is resident before anything is measured, and each portion is of the size in which a session updates.
3. Beside a GPU the update is measured with the threads that a session gives it, alone and while copies keep both directions of the link
   busy, for that is how it runs there; and the copies beside the update, so that what all of them reach together is known.

Limits: what is updated beside copies are other bytes than the copies have just brought; in a session they are the same. A virtual machine
may show smaller caches than it has (`LEAST_SET_BYTES`), and where memory is short the working set is smaller; both are in the machine file.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from overspill import _native
from overspill.errors import BudgetError
from overspill.optim import Rounding, start_update_chunk
from overspill.optim.segment import segment_table
from overspill.probe.link import BOTH, Link
from overspill.probe.sampling import Run, Sampling, measured_rate, sample_beside, sample_seconds
from overspill.spec.machine_file import MeasuredRate
from overspill.spec.schedule import MOST_UNDER_WAY, Lane, Role
from overspill.spec.state_formats import StateFormat, resolve_state_format
from overspill.spec.tensors import CHUNK_ALIGNMENT_ELEMENTS, DTYPE_BYTES
from overspill.spec.update_rule import AdamW
from overspill.tiers import HostMemory, Transfer
from overspill.tiers.mapped import populate
from overspill.units import GIB, MIB, align_up, format_bytes

COLD_FACTOR = 4
"""Working set over the bytes of all last-level caches. Chosen: a cache that keeps what it can still hits one time in four at most."""
LEAST_SET_BYTES = 2 * GIB
"""Unless there is no room for it: where the caches are not told, or told too small. Chosen: four times the largest that are common."""
MOST_SET_BYTES = 8 * GIB
"""Chosen: touching it takes about a second of 16 cores."""
LEAST_BYTES = 1 * MIB
"""Chosen: a few chunks of the smallest size in each of its portions."""
TOUCHED_BYTES = 128 * MIB
"""At a time, before the clock is looked at."""
LEAST_PORTIONS = 4
"""Of a small working set; its portions are then smaller than a session's."""
MOST_SETS = 64
"""Chunks that are updated in turn where they are allocated one by one. Chosen: tiny ones need not fill a cache."""

_Copies = Mapping[Role, torch.Tensor]
_Update = Callable[[_Copies], Transfer | None]
"""Starts the update of a chunk; None: it is made."""


def choose_set_bytes(cache_bytes: int | None, room_bytes: int) -> int:
    """Size of the working set: whole pages, within the room.

    Args:
        cache_bytes: of all last-level caches; None: the machine does not say.
    """
    wanted = min(MOST_SET_BYTES, max(LEAST_SET_BYTES, COLD_FACTOR * (cache_bytes or 0)))
    return min(wanted, room_bytes) // 4096 * 4096


@contextlib.contextmanager
def open_working_set(num_bytes: int, *, room_bytes: int, numa_node: int | None = None, until_s: float = math.inf) -> Iterator[torch.Tensor]:
    """Resident memory, uint8; given back to the system at the end.

    Args:
        num_bytes: at most; less where touching it takes too long (a virtual machine whose host has to find the pages first).
        until_s: of `time.perf_counter`.

    Raises:
        BudgetError: there is no room.
    """
    if num_bytes < LEAST_BYTES:
        raise BudgetError(f"a working set of {format_bytes(LEAST_BYTES)} is needed at least, {format_bytes(num_bytes)} may be taken")
    host = HostMemory(pin=False, budget_bytes=room_bytes, numa_node=numa_node)
    try:
        block = host.allocate("working set", num_bytes)
        touched = 0
        while touched < num_bytes and (touched < LEAST_PORTIONS * TOUCHED_BYTES or time.perf_counter() < until_s):
            size = min(TOUCHED_BYTES, num_bytes - touched)
            populate(block.data_ptr() + touched, size)
            touched += size
        block = block[:touched]
        yield block
    finally:
        block = torch.empty(0)  # before the pages go
        host.close()


def measure_copy(block: torch.Tensor, portion_bytes: int, sampling: Sampling, *, until_s: float = math.inf) -> MeasuredRate:
    """Bytes read and written a second of copies from one half of a working set to the other, by torch with its threads."""
    half = block.numel() // 2
    size = min(portion_bytes, half // LEAST_PORTIONS) // 4096 * 4096
    starts = itertools.cycle(range(0, half - size + 1, size))

    def run(times: int) -> None:
        for start in itertools.islice(starts, times):
            block[start : start + size].copy_(block[half + start : half + start + size])

    return measured_rate(sample_seconds(run, sampling, until_s=until_s), 2 * size)


def measure_in_place(block: torch.Tensor, portion_bytes: int, sampling: Sampling, *, until_s: float = math.inf) -> MeasuredRate:
    """Bytes read and written a second of x = a * x + b over a working set of fp32, by the native core with its threads."""
    size = min(portion_bytes, block.numel() // LEAST_PORTIONS) // 4096 * 4096
    starts = itertools.cycle(range(0, block.numel() - size + 1, size))

    def run(times: int) -> None:
        for start in itertools.islice(starts, times):
            _native.scale_in_place(block.data_ptr() + start, num_elements=size // 4, factor=0.5, summand=0.5)

    return measured_rate(sample_seconds(run, sampling, until_s=until_s), 2 * size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkUpdates:
    """Updates of the chunks of a working set, one after the other; made by `adamw_updates`."""

    num_elements: int
    """Of a chunk."""
    run: Run

    def alone(self, sampling: Sampling, *, until_s: float = math.inf) -> MeasuredRate:
        """Parameters a second."""
        return measured_rate(sample_seconds(self.run, sampling, until_s=until_s), self.num_elements)

    def beside(self, link: Link, sampling: Sampling, *, until_s: float = math.inf) -> tuple[MeasuredRate, MeasuredRate]:
        """Parameters a second while both directions of a link are busy, and bytes a second of each direction while chunks are updated."""
        copies = functools.partial(link.run, BOTH)
        updated = measured_rate(sample_beside(self.run, copies, sampling, until_s=until_s), self.num_elements)
        return updated, measured_rate(sample_beside(copies, self.run, sampling, until_s=until_s), link.size)


def adamw_updates(block: torch.Tensor, state_format: str, *, parameter_dtype: str, chunk_bytes: int, num_threads: int = 0) -> ChunkUpdates:
    """AdamW in `state_format` over a working set, in chunks of `chunk_bytes` over all roles, by the core that a session calls.

    Args:
        num_threads: as a session gives it (`cores.update_threads`).
    """
    layout, itemsize = resolve_state_format(state_format, parameter_dtype, "adamw"), DTYPE_BYTES[parameter_dtype]
    within = min(chunk_bytes, block.numel() // LEAST_PORTIONS)
    number = int(within / (2 * itemsize + layout.bytes_per_element)) // CHUNK_ALIGNMENT_ELEMENTS * CHUNK_ALIGNMENT_ELEMENTS
    sizes = {Role.PARAMETER: number * itemsize, Role.GRADIENT: number * itemsize, Role.STATE: layout.record_bytes(number)}
    each = sum(align_up(size, 4096) for size in sizes.values())
    update = _adamw(layout, number, parameter_dtype, num_threads)
    return ChunkUpdates(
        num_elements=number, run=_in_turn([_cut(block[start:], sizes) for start in range(0, block.numel() - each + 1, each)], update)
    )


def _cut(block: torch.Tensor, sizes: Mapping[Role, int]) -> _Copies:
    """The roles of one chunk, each from a page on, at the beginning of `block`."""
    found, start = {}, 0
    for role, size in sizes.items():
        found[role] = block[start : start + size]
        start += align_up(size, 4096)
    return found


def _in_turn(sets: Sequence[_Copies], update: _Update) -> Run:
    """Chunk after chunk as a session hands them over: the next is prepared while one is under way, if it is another one."""
    turns, most = itertools.cycle(sets), min(MOST_UNDER_WAY[Lane.HOST_UPDATE], len(sets))

    def run(times: int) -> None:
        under_way: collections.deque[Transfer] = collections.deque()
        for copies in itertools.islice(turns, times):
            if len(under_way) == most:
                under_way.popleft().wait()
            started = update(copies)
            if started is not None:
                under_way.append(started)
        for started in under_way:
            started.wait()

    return run


def _adamw(layout: StateFormat, number: int, parameter_dtype: str, num_threads: int) -> _Update:
    """An update of one chunk of so many elements."""
    ranges, dtype = layout.field_ranges(number), getattr(torch, parameter_dtype)
    scalars = [AdamW(lr=1e-4, weight_decay=0.01).scalars(step=100)]
    table: np.ndarray = segment_table(number, Rounding(key=1) if layout.is_rounded_stochastically else None)

    def update(copies: _Copies) -> Transfer | None:
        record = copies[Role.STATE]
        return start_update_chunk(
            scalars,
            table,
            state_format=layout,
            parameter=copies[Role.PARAMETER].view(dtype),
            gradient=copies[Role.GRADIENT].view(dtype),
            states={field.name: record[slice(*ranges[field.name])].view(getattr(torch, field.dtype)) for field in layout.fields},
            num_threads=num_threads,
        )

    return update


def time_updates(
    sizes: Mapping[Role, int],
    update: _Update,
    sampling: Sampling,
    *,
    updated_bytes: int,
    room_bytes: int,
    until_s: float = math.inf,
) -> list[float]:
    """Seconds of `update`, which is given the copies of one chunk after another and starts it, one number a sample: a session's own look.
    What is updated in little memory a large cache may hold; it is then quicker than in a step.

    Args:
        sizes: bytes of each role of a chunk.
        updated_bytes: of all chunks, at most.

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
        return sample_seconds(_in_turn(sets, update), sampling, until_s=until_s)
    finally:
        sets = []
        host.close()
