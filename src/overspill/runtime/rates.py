"""A quick look at how fast a session's lanes are, for the floor of its steps: about half a second, once a session.

What is measured is what a step does, in the portions in which it does it (a chunk), but alone: copies over the link from and to pinned
memory, the optimizer's own update of chunks in host memory, reads and writes of a file without a name in the run's SSD directory.
Each for some tens of milliseconds (the SSD a fifth of a second a direction, at most), so a figure is good to a few per cent; both
directions of a link are measured alone and together (`spec/rates.py`).

Rules:

1. Nothing is left: memory is given back, to the system too; the file has no name and is closed.
2. It never fails a run. What cannot be measured (no room, a raw block device, which only one store may hold) has no rate and a note.
3. Nobody else uses the lanes meanwhile: it runs between steps.

Limits: a drive that is fast only while its cache lasts shows its cache's speed here.
"""

from __future__ import annotations

import collections
import functools
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from overspill.errors import OverspillError
from overspill.runtime.opening import Files
from overspill.runtime.updating import UpdateContext, Updater
from overspill.spec.plan import Plan
from overspill.spec.rates import LaneRates, LinkRates
from overspill.spec.schedule import Role, Update
from overspill.spec.tensors import Tier
from overspill.spec.update_rule import Optimizer
from overspill.tiers import HostMemory, Store
from overspill.tiers.block_device import is_block_device
from overspill.tiers.mapped import node_of_device
from overspill.units import MIB, align_up

COPY_BYTES = 32 * MIB
"""Most bytes of one copy over the link; 0.6 ms on PCIe 5, so that starting it does not count. Chosen."""
UPDATED_BYTES = 128 * MIB
"""Of all arrays that are updated in turn: more than a large last-level cache. Chosen."""
SSD_BYTES = 96 * MIB
"""Of the file, which is written two and a half times: 240 MiB. Chosen."""
SSD_IN_FLIGHT = 4
"""Transfers of a direction; the step's pipeline has as many (`scheduling.build.UPDATED_CHUNKS`)."""
LEAST_S, MOST_REPEATS = 0.03, 64
"""How long something is repeated, or how often: a tiny model's chunks take no time. Chosen."""
MOST_SSD_S = 0.2
"""How long the SSD is asked to do one thing; what is under way then is waited for. Chosen."""

_Result = TypeVar("_Result")


def measure_rates(plan: Plan, optimizer: Optimizer, files: Files, *, room_bytes: int) -> tuple[LaneRates, int]:
    """All rates of a session (rule 2), and the bytes that this wrote to the SSD.

    Args:
        files: how the session reaches the SSD.
        room_bytes: of host memory that may be taken for a moment (up to about 200 MiB are).
    """
    notes: list[str] = []
    written = [0]

    def attempt(what: str, measure: Callable[[], _Result]) -> _Result | None:
        try:
            return measure()
        except (OverspillError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: torch's, out of device memory as well
            notes.append(f"the rate of {what} was not measured: {error}")
            return None

    rates = LaneRates(
        link=attempt("the link to the device", lambda: _measure_link(plan, room_bytes)),
        update_parameters_per_s=attempt("the host's update", lambda: _measure_update(plan, optimizer, room_bytes)),
        ssd=attempt("the SSD", lambda: _measure_ssd(plan, files, written, room_bytes)),
    )
    return LaneRates(link=rates.link, ssd=rates.ssd, update_parameters_per_s=rates.update_parameters_per_s, notes=tuple(notes)), written[0]


# -- the link --------------------------------------------------------------------------------------------------------


def _measure_link(plan: Plan, room_bytes: int) -> LinkRates:
    """Copies between host and device of the size of the largest chunk of parameters."""
    device = torch.device(plan.device)
    is_cuda = device.type == "cuda"
    largest = max(bundle.chunks[0].num_elements * bundle.element_bytes for bundle in plan.bundles.values())
    size = min(COPY_BYTES, align_up(largest, 4096))
    host = HostMemory(pin=is_cuda, budget_bytes=room_bytes, numa_node=node_of_device(device))
    try:
        here = [host.allocate(name, size).fill_(1) for name in ("up", "down")]
        there = [torch.ones(size, dtype=torch.uint8, device=device) for _ in here]
        copies = ((there[0], here[0]), (here[1], there[1]))
        if is_cuda:
            streams = [torch.cuda.Stream(device) for _ in copies]
            torch.cuda.synchronize(device)

            def run(directions: Sequence[int], times: int) -> None:
                for _, direction in itertools.product(range(times), directions):
                    target, source = copies[direction]
                    with torch.cuda.stream(streams[direction]):
                        target.copy_(source, non_blocking=True)
                for direction in directions:
                    streams[direction].synchronize()

            return _link_rates(run, size)
        with ThreadPoolExecutor(max_workers=2) as pool:

            def copy(direction: int, times: int) -> None:
                target, source = copies[direction]
                for _ in range(times):
                    target.copy_(source)

            return _link_rates(lambda chosen, times: _all(pool, [functools.partial(copy, one, times) for one in chosen]), size)
    finally:
        here = there = copies = streams = ()  # type: ignore[assignment]  # before the host's pages go
        host.close()
        if is_cuda:
            torch.cuda.empty_cache()  # so that a step's device peak does not count these buffers


def _link_rates(run: Callable[[Sequence[int], int], object], size: int) -> LinkRates:
    up_s, down_s, both_s = (_seconds_each(functools.partial(run, chosen)) for chosen in ((0,), (1,), (0, 1)))
    return LinkRates(
        up_bytes_per_s=size / up_s,
        down_bytes_per_s=size / down_s,
        up_duplex_bytes_per_s=size / both_s,
        down_duplex_bytes_per_s=size / both_s,
    )


def _seconds_each(run: Callable[[int], object]) -> float:
    """Seconds of one of many repetitions; `run` is given how many."""
    run(1)
    times = 1
    while True:
        begin_s = time.perf_counter()
        run(times)
        took_s = time.perf_counter() - begin_s
        if took_s >= LEAST_S or times >= MOST_REPEATS:
            return took_s / times
        times = min(MOST_REPEATS, 4 * times)


# -- the update ------------------------------------------------------------------------------------------------------


def _measure_update(plan: Plan, optimizer: Optimizer, room_bytes: int) -> float | None:
    """Parameters a second of the optimizer's update in host memory, chunk by chunk, as the step calls it."""
    names = [name for name, bundle in plan.bundles.items() if bundle.trainable and plan.placements[name].update_tier is Tier.HOST]
    if not names:
        return None
    name = max(names, key=lambda name: plan.bundles[name].num_elements)
    bundle = plan.bundles[name]
    num_elements = bundle.chunks[0].num_elements
    sizes = {role: num_elements * bundle.element_bytes for role in (Role.PARAMETER, Role.GRADIENT)}
    if plan.has_state(name):
        sizes[Role.STATE] = plan.state_record_bytes(name, 0)
    num_sets = max(1, min(UPDATED_BYTES, room_bytes) // (sum(sizes.values()) + len(sizes) * 4096))  # each is rounded up to a page
    host = HostMemory(pin=False, budget_bytes=room_bytes)
    try:
        # Filled, because a page that was only read is everybody's one page of zeros, and sits in a cache.
        sets = [
            {role: host.allocate(f"{role}[{number}]", size).fill_(0) for role, size in sizes.items()} for number in range(min(num_sets, 8))
        ]
        updater, turns = Updater(plan), itertools.cycle(range(len(sets)))
        context = UpdateContext(optimizer, seed=0, step=1, lr=0.0, gradient_scale=1.0)
        op = Update(bundle=name, chunk=0, tier=Tier.HOST, num_elements=num_elements, num_bytes=sizes[Role.GRADIENT])

        def run(times: int) -> None:
            for _ in range(times):
                updater.run(op, context, sets[next(turns)])

        return num_elements / _seconds_each(run)
    finally:
        sets = []
        host.close()


# -- the SSD ---------------------------------------------------------------------------------------------------------


def _measure_ssd(plan: Plan, files: Files, written: list[int], room_bytes: int) -> LinkRates | None:
    """Whole chunks to and from a scratch file: all are written, twice, for a block's first write costs the file system more; then all
    read; then one half is read while the other is written."""
    size = _ssd_chunk_bytes(plan)
    if size is None:
        return None
    if any(is_block_device(Path(place)) for place in plan.ssd_places):
        raise ValueError("a raw block device can have one store only, which is the run's own")
    count = max(2, min(SSD_BYTES // size, MOST_REPEATS))
    host, store = HostMemory(pin=False, budget_bytes=room_bytes), files.open(plan.ssd_places, count * size, True).store
    try:
        names = [f"rate[{index}]" for index in range(count)]
        for name in names:
            store.allocate(name, size)
        buffers = [[host.allocate(f"{way}[{slot}]", size) for slot in range(SSD_IN_FLIGHT)] for way in ("read", "write")]
        for buffer in itertools.chain(*buffers):
            torch.arange(size // 8, out=buffer.view(torch.int64))  # no zeros, which some drives do not write

        def run(*ways: tuple[Callable[[Store, str, torch.Tensor], object], Sequence[str], Sequence[torch.Tensor]]) -> list[float]:
            stop = threading.Event()
            begin_s = time.perf_counter()
            with ThreadPoolExecutor(max_workers=len(ways)) as pool:
                moved = _all(pool, [functools.partial(_stream, store, *way, stop=stop, until_s=begin_s + MOST_SSD_S) for way in ways])
            took_s = time.perf_counter() - begin_s
            return [number * size / took_s for number in moved]

        run((_write, names, buffers[1]))
        there = names[: store.written_bytes // size]  # a slow drive did not get to the end of them
        (down,) = run((_write, there, buffers[1]))
        (up,) = run((_read, there, buffers[0]))
        half = len(there) // 2
        up_both, down_both = run((_read, there[:half], buffers[0]), (_write, there[half:], buffers[1]))
        return LinkRates(up_bytes_per_s=up, down_bytes_per_s=down, up_duplex_bytes_per_s=up_both, down_duplex_bytes_per_s=down_both)
    finally:
        written[0] = store.written_bytes
        store.close()
        host.close()


def _ssd_chunk_bytes(plan: Plan) -> int | None:
    """Of the largest piece that rests on the SSD, in whole pages; None if nothing does."""
    sizes = [plan.boundary_bytes(unit.name) for unit in plan.units[1:]] if plan.boundaries is Tier.SSD else []
    for name, bundle in plan.bundles.items():
        placement = plan.placements[name]
        if placement.parameters is Tier.SSD:
            sizes.append(bundle.chunks[0].num_elements * bundle.element_bytes)
        if placement.states is Tier.SSD:
            sizes.append(plan.state_record_bytes(name, 0))
    largest = min(max(sizes, default=0), SSD_BYTES // 4)
    return align_up(largest, 4096) if largest else None


def _stream(
    store: Store,
    start: Callable[[Store, str, torch.Tensor], object],
    names: Sequence[str],
    buffers: Sequence[torch.Tensor],
    *,
    stop: threading.Event,
    until_s: float,
) -> int:
    """Go through `names` with all `buffers` under way; how many were moved. Whoever ends first stops the others."""
    under_way: collections.deque = collections.deque()
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


def _read(store: Store, name: str, buffer: torch.Tensor) -> object:
    return store.start_read(name, 0, buffer)


def _write(store: Store, name: str, buffer: torch.Tensor) -> object:
    return store.start_write(name, 0, buffer, with_checksums=True)


def _all(pool: ThreadPoolExecutor, jobs: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """Run side by side; the results, or the first failure when all have ended."""
    futures = [pool.submit(job) for job in jobs]
    return [future.result() for future in futures]
