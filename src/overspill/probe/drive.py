"""The SSD: whole units to and from a file without a name, through the store and engine that training uses, checksums included.

Rules:

1. Nothing is left: the file has no name at any time (`tiers/extent_file.py`), so it ends with the process however that ends.
2. Everything is written once before it is timed: the file system turns promised blocks into written ones then (docs/log.md).
3. A slow drive costs no more time than it is given. A pass starts no transfer after its end, but waits for those under way, so
   `choose_depth` asks a trial of `TRIALS_BYTES` how many may be; where not even one unit fits, that size is not measured.

4. A drive that becomes slow after its trial costs one pass more than its time at most: none begins when that is over.

Limits: a drive that is fast only while its cache lasts shows its cache's speed. One that hangs (a network file system whose server is
gone) hangs the probe, because the kernel gives a transfer back only when it has ended.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from overspill.errors import StorageError
from overspill.tiers import HostMemory, Store, Transfer
from overspill.units import KIB, MIB, format_bytes, format_seconds

IN_FLIGHT = 4
"""Transfers of a direction; the step's pipeline has as many (`scheduling.updating.UPDATED_CHUNKS`)."""
TRIALS_BYTES = (256 * KIB, 4 * MIB)
"""Chosen: the first ends soon on any drive, the second keeps four threads of the engine busy."""
TRIAL_S = 1.0
"""A trial that would take longer is not made. Chosen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """How long and how often the drive is asked to do one thing."""

    most_s: float = 0.2
    """Of a pass; what is under way then is waited for."""
    most_bytes: int
    """Of a pass and direction, for drives wear."""
    most_units: int = 64
    """The same, if that is less."""
    num_passes: int = 1
    mixed_factor: int = 1
    """How many times as long, and of as many bytes, a pass of both directions is: their shares are told apart by whole units only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriveSamples:
    """Bytes a second, one number a pass."""

    read: list[float]
    write: list[float]
    mixed_read: list[float]
    mixed_write: list[float]


OpenStore = Callable[[int], Store]
"""Capacity in bytes -> a store that leaves nothing behind."""


def measure_drive(
    open_store: OpenStore,
    unit_bytes: int,
    num_units: int,
    passes: Passes,
    *,
    written: list[int],
    room_bytes: int,
    in_flight: int = IN_FLIGHT,
    until_s: float = math.inf,
) -> DriveSamples:
    """All units are written, twice; then read; then one half is read while the other is written; and so on for each pass.

    Args:
        num_units: of the file, at least 2.
        written: a list of one number, to which the bytes written are added, also if this fails.
        room_bytes: of host memory for the buffers.
        until_s: of `time.perf_counter`; no pass begins later.

    Raises:
        BudgetError: no room for the file or the buffers.
        StorageError: a transfer failed, or there was not time for a pass of each kind.
    """
    with _opened(open_store, num_units * unit_bytes, room_bytes=room_bytes, written=written) as (store, host):
        names = [f"rate[{index}]" for index in range(num_units)]
        for name in names:
            store.allocate(name, unit_bytes)
        buffers = [[host.allocate(f"{way}[{slot}]", unit_bytes) for slot in range(in_flight)] for way in ("read", "write")]
        for buffer in itertools.chain(*buffers):
            torch.arange(unit_bytes // 8, out=buffer.view(torch.int64))  # no zeros, which some drives do not write

        def run(*ways: tuple[_Start, Sequence[str], Sequence[torch.Tensor]], once: bool = False) -> list[float]:
            stop, begin_s = threading.Event(), time.perf_counter()
            factor = passes.mixed_factor if len(ways) > 1 else 1
            most = num_units if once else factor * max(2, min(passes.most_bytes // unit_bytes, passes.most_units))
            end_s = begin_s + factor * passes.most_s

            def names_of(chosen: Sequence[str]) -> Iterator[str]:
                return itertools.islice(itertools.cycle(chosen), most)

            with ThreadPoolExecutor(len(ways), thread_name_prefix="overspill-probe") as pool:
                jobs = [
                    # No name twice at a time: two writes of the same bytes have no order.
                    functools.partial(_stream, store, start, names_of(chosen), lent[: len(chosen)], stop=stop, until_s=end_s)
                    for start, chosen, lent in ways
                ]
                moved = _run_all(pool, jobs, stop)
            took_s = max(time.perf_counter() - begin_s, 1e-9)
            return [number * unit_bytes / took_s for number in moved]

        run((_write, names, buffers[1]), once=True)
        there = names[: store.written_bytes // unit_bytes]  # a slow drive did not get to the end of them
        half = len(there) // 2
        samples = DriveSamples(read=[], write=[], mixed_read=[], mixed_write=[])
        kinds = (
            ((_write, there, buffers[1]),),
            ((_read, there, buffers[0]),),
            ((_read, there[:half], buffers[0]), (_write, there[half:], buffers[1])),
        )
        fields = ((samples.write,), (samples.read,), (samples.mixed_read, samples.mixed_write))
        for _, (ways, lists) in itertools.product(range(passes.num_passes), zip(kinds, fields, strict=True)):
            if time.perf_counter() >= until_s:
                break
            for found, rate in zip(lists, run(*ways), strict=True):
                found.append(rate)
        if not samples.mixed_read:
            raise StorageError(
                f"the drive became slow: its time was over after {format_bytes(store.written_bytes)} were written and "
                f"{format_bytes(store.read_bytes)} read"
            )
        return samples


def measure_trial(open_store: OpenStore, *, written: list[int]) -> float:
    """Bytes a second of a small write (its blocks' second, rule 2) and of reading it again; the slower of the two.

    Raises:
        BudgetError, StorageError: the directory cannot be used.
    """
    rate = 0.0
    for size in TRIALS_BYTES:
        if rate and 2 * size / rate > TRIAL_S:
            break
        with _opened(open_store, size, room_bytes=None, written=written) as (store, host):
            store.allocate("trial", size)
            buffer = host.allocate("trial", size)
            torch.arange(size // 8, out=buffer.view(torch.int64))
            took_s = []
            for start in (_write, _write, _read):
                begin_s = time.perf_counter()
                start(store, "trial", buffer).wait()
                took_s.append(time.perf_counter() - begin_s)
            rate = size / max(*took_s[1:], 1e-9)
            if took_s[0] > TRIAL_S:
                break
    return rate


@contextlib.contextmanager
def _opened(
    open_store: OpenStore, capacity_bytes: int, *, room_bytes: int | None, written: list[int]
) -> Iterator[tuple[Store, HostMemory]]:
    """A store, and memory for its buffers; both are closed, and what was written is added up, however it ends."""
    host = HostMemory(pin=False, budget_bytes=room_bytes)
    try:
        with open_store(capacity_bytes) as store:  # closing may raise a failure; after Ctrl-C that is only a note
            try:
                yield store, host
            finally:
                written[0] += store.written_bytes
    finally:
        host.close()


def choose_depth(unit_bytes: int, trial_bytes_per_s: float, passes: Passes, *, left_s: float, room_bytes: int) -> int:
    """Most transfers of a direction that may be under way so that one pass of each kind ends within `left_s` (rule 3).

    Raises:
        StorageError: not even one; with both times.
    """
    for depth in (IN_FLIGHT, IN_FLIGHT // 2, 1):
        needed_s = (3 + passes.mixed_factor) * passes.most_s + (2 + 1 + 1 + 2) * max(depth, 2) * unit_bytes / trial_bytes_per_s
        if needed_s <= left_s and 2 * depth * unit_bytes <= room_bytes:
            return depth
    raise StorageError(
        f"units of {format_bytes(unit_bytes)} would take {format_seconds(needed_s)} at the {trial_bytes_per_s / 1e6:.1f} MB/s of a trial "
        f"and {format_bytes(2 * unit_bytes)} of memory, {format_seconds(max(0.0, left_s))} and {format_bytes(room_bytes)} are left"
    )


# -- streams of transfers --------------------------------------------------------------------------------------------

_Start = Callable[[Store, str, torch.Tensor], Transfer]


def _run_all(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], int]], stop: threading.Event) -> list[int]:
    """Run side by side; the results, or the first failure when all have ended. Whatever interrupts the wait stops them."""
    futures = [pool.submit(job) for job in jobs]
    try:
        return [future.result() for future in futures]
    finally:
        stop.set()


def _stream(
    store: Store, start: _Start, names: Iterator[str], buffers: Sequence[torch.Tensor], *, stop: threading.Event, until_s: float
) -> int:
    """Go through `names` with all `buffers` under way; how many were moved. Whoever ends first stops the others."""
    under_way: collections.deque[Transfer] = collections.deque()
    num_moved = 0
    try:
        for index, name in enumerate(names):
            if len(under_way) == len(buffers):
                under_way.popleft().wait()
            if index >= 2 and (stop.is_set() or time.perf_counter() > until_s):
                break
            under_way.append(start(store, name, buffers[index % len(buffers)]))
            num_moved += 1
    finally:
        stop.set()
        for transfer in under_way:
            transfer.wait()
    return num_moved


def _read(store: Store, name: str, buffer: torch.Tensor) -> Transfer:
    return store.start_read(name, 0, buffer)


def _write(store: Store, name: str, buffer: torch.Tensor) -> Transfer:
    return store.start_write(name, 0, buffer, with_checksums=True)
