"""When each op of a program would run: the lanes of `runtime/lanes.py`, on paper, slowed down by what runs beside them.

Words:

* **work**: seconds that an op takes alone. While others are under way it advances at a **speed** of at most 1.
* **stream**: what orders work on a device. An op is *issued* when it has been put there; it starts when the stream comes to it.

Rules, the executor's (there in the same order):

1. One thread goes through the program and takes its time for each op. A `Free` is done when it gets there. Every other op is handed to its
   lane, whose thread takes its ops in order.
2. An op is issued when all that it waits for has ended; but of two ops on streams of the device, the later is issued when the earlier
   has been, and starts when that has ended. The dispatching thread issues compute itself and blocks until it can. Its kernels are launched
   one after the other: it advances no sooner than the first has been launched, and ends no sooner than the last has been.
3. Where there are no streams (`cpu`), an op is under way until its thread can go on. A drive's thread goes on at once: any number of
   transfers of one direction may be in flight, and the drive serves them in order.
4. Steps of one program in a row: the next one begins when all of the step has ended, or, where steps overlap, when its compute has; all
   of it must then have ended before the first op of the next one that looks at gradients.

Speeds. Each rule is a factor; an op's speed is their product, computed anew whenever an op starts or ends:

* both directions of a link, or of a drive, are under way: each at its duplex rate over its rate alone;
* compute beside copies of the link, and copies beside compute: as measured, half of the loss with one direction;
* host memory: ops that would together use more than it has are all slowed down in proportion.

Cost: some 20 us an op. Sources: the fluid model of shared links is the usual one of network simulators (max-min fairness there; here
proportional, because a memory controller serves whoever asks).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from overspill.spec.hardware import HardwareSpec
from overspill.spec.schedule import Lane
from overspill.spec.trace import Span

_LANES = tuple(Lane)
_NUMBER = {lane: number for number, lane in enumerate(_LANES)}
_COMPUTE, _H2D, _D2H, _READ, _WRITE = (_NUMBER[lane] for lane in (Lane.COMPUTE, Lane.H2D, Lane.D2H, Lane.SSD_READ, Lane.SSD_WRITE))
_DRIVES = (_READ, _WRITE)
_NEVER = float("inf")
_DONE_S = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One op as the timeline sees it."""

    lane: Lane
    work_s: float
    host_bytes_per_s: float
    """Of host memory, while it runs alone."""
    waits: tuple[int, ...]
    """Earlier tasks."""
    dispatch_s: float = 0.0
    """Of the dispatching thread; of compute on a stream, to launch it."""
    before_s: float = 0.0
    """Of `dispatch_s`, until the first kernel of compute on a stream is launched."""
    is_free: bool = False
    needs_step_before: bool = False
    """It is not handed to its lane before all of the step before has ended (rule 4)."""
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threads:
    """How the program gets to the lanes."""

    has_streams: bool
    """Whether compute and both directions of the link are streams of a device."""
    overlaps_steps: bool = False
    """Rule 4."""


class Contention:
    """Speeds of what is under way (see above)."""

    def __init__(self, hardware: HardwareSpec) -> None:
        self._memory = hardware.host_memory_bytes_per_s
        self._factors = {
            _H2D: _share(hardware.h2d_duplex_bytes_per_s, hardware.h2d_bytes_per_s),
            _D2H: _share(hardware.d2h_duplex_bytes_per_s, hardware.d2h_bytes_per_s),
            _READ: _share(hardware.ssd_read_mixed_bytes_per_s, hardware.ssd_read_bytes_per_s),
            _WRITE: _share(hardware.ssd_write_mixed_bytes_per_s, hardware.ssd_write_bytes_per_s),
        }
        self._opposite = {_H2D: _D2H, _D2H: _H2D, _READ: _WRITE, _WRITE: _READ}
        self._compute_loss = 1 - hardware.compute_beside_copies
        self._copies_beside = hardware.copies_beside_compute

    def speeds(self, running: dict[int, int], tasks: Sequence[Task]) -> dict[int, float]:
        """Lane -> speed of the task that runs on it."""
        found = {}
        num_copies = (_H2D in running) + (_D2H in running)
        for lane in running:
            speed = 1.0
            if lane in self._opposite:
                speed = self._factors[lane] if self._opposite[lane] in running else 1.0
                if lane in (_H2D, _D2H) and _COMPUTE in running:
                    speed *= self._copies_beside
            elif lane == _COMPUTE and num_copies:
                speed = 1 - self._compute_loss * num_copies / 2
            found[lane] = speed
        if self._memory and len(running) > 1:
            wanted = sum(tasks[index].host_bytes_per_s * found[lane] for lane, index in running.items())
            if wanted > self._memory:
                slow = self._memory / wanted
                for lane, index in running.items():
                    if tasks[index].host_bytes_per_s:
                        found[lane] *= slow
        return found


def _share(both: float, alone: float) -> float:
    return min(1.0, both / alone) if both else 1.0


def run_timeline(
    tasks: Sequence[Task], step_starts: Sequence[int], threads: Threads, contention: Contention
) -> tuple[list[Span], list[float]]:
    """Run `tasks` in their order.

    Args:
        step_starts: the first task of each step; the first one's is 0.

    Returns:
        a span for each task that is no `Free`, in order; when each step had returned to its caller.
    """
    return _Timeline(tasks, step_starts, threads, contention).run()


class _Timeline:
    def __init__(self, tasks: Sequence[Task], step_starts: Sequence[int], threads: Threads, contention: Contention) -> None:
        self.tasks, self.threads, self.contention = tasks, threads, contention
        self.starts = [*step_starts[1:], len(tasks)]
        """Where each step ends."""
        number = len(tasks)
        self.lanes = [_NUMBER[task.lane] for task in tasks]
        self.streams = (_COMPUTE, _H2D, _D2H) if threads.has_streams else ()
        self.on_stream = [lane in self.streams for lane in self.lanes]
        self.num_issuable, self.num_over = [0] * number, [0] * number
        """Of each task's waits, in their order: how many were found to be no hindrance to issuing it, or to have ended. That does not
        change again, so each is looked at once, but for the one that it stands at."""
        self.submitted = [0.0] * number
        self.begun = [0.0] * number
        self.launched = [0.0] * number
        """When the first and the last kernel of compute have been, which nothing that is under way slows down."""
        self.start = [-1.0] * number
        self.end = [-1.0] * number
        self.ready = [0.0] * number
        self.issued = [False] * number
        self.ended = [False] * number
        self.left = [task.work_s for task in tasks]
        self.queues: dict[int, collections.deque[int]] = {lane: collections.deque() for lane in range(len(_LANES))}
        """Ops that a lane's thread has not issued."""
        self.flights: dict[int, collections.deque[int]] = {lane: collections.deque() for lane in range(len(_LANES))}
        """Issued, and not yet served: of streams and drives."""
        self.running: dict[int, int] = {}
        self.now = 0.0
        self.clock = 0.0
        """Of the dispatching thread."""
        self.next = 0
        self.step = 0
        self.returned: list[float] = []
        self.num_left: list[int] = []
        """Of each step, ops that have not ended."""
        self.step_of: list[int] = []
        for number, (begin, end) in enumerate(zip(step_starts, self.starts, strict=True)):
            self.num_left.append(sum(not task.is_free for task in tasks[begin:end]))
            self.step_of += [number] * (end - begin)

    def run(self) -> tuple[list[Span], list[float]]:
        while True:
            while self.dispatch() | self.issue() | self.serve():
                pass
            until = self.advance()
            if until == _NEVER:
                break
        assert self.next == len(self.tasks) and all(self.ended), "a program that gets stuck"
        if len(self.returned) < len(self.starts):
            self.returned.append(max(self.now, self.clock))  # the last `Free`s take the thread's time, too
        return self.spans(), self.returned

    # -- the dispatching thread ---------------------------------------------------------------------------------------

    def dispatch(self) -> bool:
        """Hand ops out as far as the thread gets; whether it got anywhere."""
        begun = self.next
        while self.next < len(self.tasks):
            if self.next == self.starts[self.step] and not self.end_step():
                break
            index = self.next
            task, lane = self.tasks[index], self.lanes[index]
            if task.needs_step_before and self.step and self.num_left[self.step - 1]:
                break
            if lane == _COMPUTE and not task.is_free:
                if not self.can_issue(index) or (not self.threads.has_streams and _COMPUTE in self.running):
                    break
                self.clock = max(self.clock, self.now)
                self.submitted[index] = self.clock
                self.issued[index] = True
                self.flights[_COMPUTE].append(index)
                self.begun[index] = self.clock + task.before_s
                self.clock += task.dispatch_s
                self.launched[index] = self.clock
                self.next += 1
                if not self.threads.has_streams:
                    break  # the thread computes
                continue
            if not self.threads.has_streams and _COMPUTE in self.running:
                break
            self.clock = max(self.clock, self.now)
            self.submitted[index] = self.clock
            self.next += 1
            self.clock += task.dispatch_s
            if task.is_free:
                self.issued[index] = self.ended[index] = True
                continue
            self.queues[lane].append(index)
        return self.next > begun

    def end_step(self) -> bool:
        """Whether the step that was dispatched has returned, so that the next one begins."""
        if self.threads.overlaps_steps:
            if _COMPUTE in self.running or self.flights[_COMPUTE]:
                return False
        elif self.num_left[self.step]:
            return False
        self.returned.append(self.now)
        self.step += 1
        return True

    # -- the lanes' threads -------------------------------------------------------------------------------------------

    def can_issue(self, index: int) -> bool:
        """Rule 2."""
        if not self.on_stream[index]:
            return self.is_over(index)
        waits, ended, issued, on_stream = self.tasks[index].waits, self.ended, self.issued, self.on_stream
        for at in range(self.num_issuable[index], len(waits)):
            wait = waits[at]
            if not (ended[wait] or (issued[wait] and on_stream[wait])):
                self.num_issuable[index] = at
                return False
        self.num_issuable[index] = len(waits)
        return True

    def is_over(self, index: int) -> bool:
        """Whether all that it waits for has ended."""
        waits, ended = self.tasks[index].waits, self.ended
        for at in range(self.num_over[index], len(waits)):
            if not ended[waits[at]]:
                self.num_over[index] = at
                return False
        self.num_over[index] = len(waits)
        return True

    def issue(self) -> bool:
        """Let each lane's thread take up what it can; whether any did."""
        has_moved = False
        for lane, queue in self.queues.items():
            while queue and (lane in self.streams or lane in _DRIVES or not self.flights[lane] and lane not in self.running):
                index = queue[0]
                if self.submitted[index] > self.now or not self.can_issue(index):
                    break
                queue.popleft()
                self.issued[index] = True
                self.ready[index] = self.now
                if lane in _DRIVES:
                    self.start[index] = self.now
                self.flights[lane].append(index)
                has_moved = True
        return has_moved

    def serve(self) -> bool:
        """Start what streams, drives and threads come to; whether anything started."""
        has_moved = False
        for lane, flight in self.flights.items():
            if not flight or lane in self.running:
                continue
            index = flight[0]
            if self.submitted[index] > self.now or not self.is_over(index):
                continue
            flight.popleft()
            if self.start[index] < 0:
                self.start[index] = self.now
            self.running[lane] = index
            has_moved = True
        return has_moved

    # -- time ---------------------------------------------------------------------------------------------------------

    def advance(self) -> float:
        """To the next moment at which something changes; infinity if nothing will."""
        speeds = self.contention.speeds(self.running, self.tasks)
        computing = self.running.get(_COMPUTE)
        if computing is not None and self.begun[computing] > self.now:
            speeds[_COMPUTE] = 0.0
        until = _NEVER
        for lane, index in self.running.items():
            if not speeds[lane]:
                until = min(until, self.begun[index])
                continue
            until = min(until, max(self.now + self.left[index] / speeds[lane], self.launched[index]))
        for lane in range(len(_LANES)):
            for line in (self.queues[lane], self.flights[lane]):
                if line and self.now < self.submitted[line[0]] < until:
                    until = self.submitted[line[0]]
        if until == _NEVER:
            return until
        passed = until - self.now
        self.now = until
        for lane, index in tuple(self.running.items()):
            self.left[index] -= passed * speeds[lane]
            if self.left[index] <= _DONE_S and self.launched[index] <= self.now:
                del self.running[lane]
                self.end[index], self.ended[index] = self.now, True
                self.num_left[self.step_of[index]] -= 1
        return until

    def spans(self) -> list[Span]:
        found, is_free, end = [], [task.is_free for task in self.tasks], self.end
        for index, task in enumerate(self.tasks):
            if not task.is_free:
                ready = max([self.submitted[index], *[end[wait] for wait in task.waits]])
                waits = tuple([wait for wait in task.waits if not is_free[wait]])
                start = max(self.start[index], ready) if task.lane is Lane.COMPUTE else self.start[index]
                found.append(Span(index, task.lane, start, end[index], self.submitted[index], ready, task.num_bytes, waits))
        return found
