"""The link between host and device: copies from and to pinned memory, as the lanes make them.

On CUDA each direction has a stream of its own; on the `cpu` device, whose tiers are both host memory, a thread. Both directions are
measured alone and together (`spec/rates.py`), because what they share decides a step in which both are busy.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from overspill.probe.sampling import Sampling, measured_rate, sample_seconds
from overspill.spec.machine_file import LinkFigures
from overspill.tiers import HostMemory
from overspill.tiers.mapped import node_of_device

H2D, D2H = (0,), (1,)
BOTH = (0, 1)

_Copy = tuple[torch.Tensor, torch.Tensor]
"""(target, source)"""
_Run = Callable[[Sequence[int], int], object]
"""(directions, times)"""


class Link:
    """Copies of `size` bytes between a host buffer and a device buffer for each direction; made by `open_link`."""

    def __init__(self, copy: _Run, size: int, *, is_pinned: bool) -> None:
        self.size, self.is_pinned = size, is_pinned
        self._copy = copy

    def run(self, directions: Sequence[int], times: int) -> None:
        """Copy `times` times in each of the directions and wait; may be called from any thread, one at a time."""
        self._copy(directions, times)


@contextlib.contextmanager
def open_link(device: torch.device, size: int, *, room_bytes: int, num_slots: int = 1) -> Iterator[Link]:
    """Buffers of `size` bytes on host and device for each direction; all memory is given back, to the system too.

    Args:
        num_slots: buffers that are copied in turn: a host buffer that a cache holds is quicker than a step's.

    Raises:
        BudgetError: `room_bytes` is less than the host's buffers.
        torch.OutOfMemoryError: the device has no room.
    """
    is_cuda = device.type == "cuda"
    host = HostMemory(pin=is_cuda, budget_bytes=room_bytes, numa_node=node_of_device(device))
    with contextlib.ExitStack() as opened:
        opened.callback(_give_back, host, device)
        copies: list[list[_Copy]] = [[], []]
        for direction, slot in itertools.product(BOTH, range(num_slots)):
            here = host.allocate(f"{direction}[{slot}]", size).fill_(1)
            there = torch.ones(size, dtype=torch.uint8, device=device)
            copies[direction].append((there, here) if direction in H2D else (here, there))
            del here, there
        opened.callback(copies.clear)  # the views, before the pages go
        if is_cuda:
            torch.cuda.synchronize(device)
            copy = _on_streams(copies, device)
        else:
            copy = _on_threads(copies, opened.enter_context(ThreadPoolExecutor(2, thread_name_prefix="overspill-probe")))
        yield Link(copy, size, is_pinned=is_cuda and host.pin_refusal is None)


def measure_link(link: Link, sampling: Sampling, *, until_s: float = math.inf) -> LinkFigures:
    """Each direction alone, then both."""
    up, down, both = (
        measured_rate(sample_seconds(functools.partial(link.run, chosen), sampling, until_s=until_s), link.size)
        for chosen in (H2D, D2H, BOTH)
    )
    return LinkFigures(unit_bytes=link.size, is_pinned=link.is_pinned, h2d=up, d2h=down, duplex=both)


def _on_streams(copies: Sequence[Sequence[_Copy]], device: torch.device) -> _Run:
    streams = [torch.cuda.Stream(device) for _ in copies]

    def run(directions: Sequence[int], times: int) -> None:
        for turn, direction in itertools.product(range(times), directions):
            target, source = copies[direction][turn % len(copies[direction])]
            with torch.cuda.stream(streams[direction]):
                target.copy_(source, non_blocking=True)
        for direction in directions:
            streams[direction].synchronize()

    return run


def _on_threads(copies: Sequence[Sequence[_Copy]], pool: ThreadPoolExecutor) -> _Run:
    def copy(direction: int, times: int) -> None:
        for turn in range(times):
            target, source = copies[direction][turn % len(copies[direction])]
            target.copy_(source)

    def run(directions: Sequence[int], times: int) -> None:
        for future in [pool.submit(copy, direction, times) for direction in directions]:
            future.result()

    return run


def _give_back(host: HostMemory, device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # after Ctrl-C copies may be under way, and what they read must stay pinned
            torch.cuda.empty_cache()  # so that a step's device peak does not count these buffers
    finally:
        host.close()
