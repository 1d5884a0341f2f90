"""Lanes: in-order queues of ops that run beside each other, and what it means for an op to be complete.

Words:

* **lane**: one queue of `spec.schedule.Lane`. Every lane but `compute` has a thread that takes its jobs in order; `compute` is
  the thread that dispatches, because autograd runs there.
* **job**: what one op does on its lane, with the completions it has to wait for first.
* **issued**: the job's function has returned. On the lanes of a CUDA link the copy is then in the lane's stream, with an event
  behind it; on the lanes of an SSD the transfer has been started, on `host_update` the core's threads have the update; elsewhere the
  work is done.
* **complete**: issued, and its event or transfer has ended.
* **group**: the jobs of one schedule: what one failure ends.

Rules:

1. Within a lane jobs are issued in the order in which they were submitted.
2. A CUDA lane waits for another CUDA lane on the device (its stream waits for the event) and for all others on its own thread. No
   thread but the one that asks waits for a device.
3. After a failure no job of its group that has not begun is begun any more: it fails as `Abandoned`. Jobs end in any case, so whoever
   waits is released, and `settle` says when nobody uses a buffer any more. Jobs of other groups go on, but for those that wait for
   one that has failed. A failure of lane `compute` is raised to the one who dispatches, and he decides what it ends.
4. On the `cpu` device the links are lanes with threads too, so that everything above it is the same code.

5. The interpreter belongs to lanes first: a host update wants it to be prepared, and whatever waits for the chunk afterwards.
   So Python switches threads promptly from the first job until `close` (`overspill/switching`), and the dispatching thread, where it only
   waits, does other work (`while_blocked`) in small pieces with pauses between them, and none while the host updates.
6. On lane `host_update` the next job is prepared and issued while one is under way, so that the core's threads go from chunk to chunk
   without the interpreter; no more than that (`MOST_UNDER_WAY`). Where no job is left the lane's thread waits for the core before it
   rests (a job that comes then is not prepared under the last one): until then the lane is updating, whoever drains it or ends it waits,
   and what is under way keeps its buffers, no longer. What the core has been given is made, whatever fails meanwhile.

Costs: about 20 us of a lane's thread for each job; five threads a session, started with the first job.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from overspill.errors import OverspillError
from overspill.spec.schedule import MOST_UNDER_WAY, Lane
from overspill.switching import PromptSwitches
from overspill.tiers import Transfer

BREATH_S = 50e-6
"""Between two pieces of other work (rule 5)."""

Job = Callable[[], Transfer | None]
"""The work of one op; an SSD op, and a host update, returns what it has started."""


class Abandoned(OverspillError):
    """A job that was not begun because another one of its group failed."""


class JobGroup:
    """The jobs of one schedule (rule 3)."""

    def __init__(self) -> None:
        self.has_failed = False
        """Set by the first failure, and by who gives the schedule up."""
        self.taken: list[Completion] = []
        """All that the lanes' threads have taken up: their own record, which Ctrl-C in another thread spares. Emptied when all have
        ended."""


class Completion:
    """The end of one op. Made by `Lanes`; thread-safe."""

    __slots__ = ("lane", "group", "_lanes", "_issued", "_event", "_begin_event", "_transfer", "_error", "_begin_s", "_end_s")

    def __init__(self, lanes: Lanes, lane: Lane) -> None:
        self.lane = lane
        self.group = lanes.group
        self._lanes = lanes
        self._issued = False
        self._event: torch.cuda.Event | None = None
        self._begin_event: torch.cuda.Event | None = None
        self._transfer: Transfer | None = None
        self._error: BaseException | None = None
        self._begin_s = self._end_s = 0.0

    @property
    def is_issued(self) -> bool:
        """Whether the job's function has returned, or will never be called."""
        return self._issued

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        if not self._issued:
            return False
        if self._error is not None:
            return True
        if self._event is not None:
            return bool(self._event.query())
        return self._transfer is None or self._transfer.is_done

    def wait(self) -> None:
        """Block this thread until the op is complete.

        Raises:
            BaseException: what the op failed with.
        """
        self._wait_issued()
        if self._event is not None:
            self._event.synchronize()
        if self._transfer is not None:
            self._transfer.wait()

    def wait_on(self, stream: torch.cuda.Stream | None) -> None:
        """Let what is put into `stream` from now on wait for the op; without a stream this thread waits (rule 2)."""
        self._wait_issued()
        if stream is None or self._event is None:
            self.wait()
        elif self._lanes.stream(self.lane) != stream:
            stream.wait_event(self._event)

    def settle(self) -> BaseException | None:
        """Wait for the end, whatever it is; the failure if it was one.

        Raises:
            KeyboardInterrupt: this thread was told to stop waiting; the op may not have ended.
        """
        try:
            self.wait()
        except Exception as error:  # handed to the caller, who decides which failure of a step is told
            return error
        except BaseException as error:
            if error is not self._error:
                raise
            return error
        return None

    def settle_issue(self) -> BaseException | None:
        """Wait until the job's function has returned; what it failed with."""
        if not self._issued:
            with self._lanes.condition:
                self._lanes.condition.wait_for(lambda: self._issued)
        return self._error

    @property
    def is_on_stream(self) -> bool:
        """Of an op that has been issued: whether it ends in the order of its lane's stream."""
        return self._event is not None

    def span_s(self, base: torch.cuda.Event | None, base_s: float) -> tuple[float, float]:
        """When the complete op ran, in seconds after the base; zeros if it never ran."""
        if self._begin_event is not None and self._event is not None and base is not None:
            return base.elapsed_time(self._begin_event) / 1e3, base.elapsed_time(self._event) / 1e3
        begin_s = getattr(self._transfer, "began_s", None) or self._begin_s  # of an update, which was issued under the one before it
        end_s = getattr(self._transfer, "ended_s", None) or self._end_s
        return (begin_s - base_s, end_s - base_s) if self._begin_s else (0.0, 0.0)

    def issue_span_s(self, base_s: float) -> tuple[float, float]:
        """When the job's function ran, on the host, in seconds after the base; of an op that has been issued; zeros if it never ran."""
        return (self._begin_s - base_s, self._end_s - base_s) if self._begin_s else (0.0, 0.0)

    def _wait_issued(self) -> None:
        error = self.settle_issue()
        if error is not None:
            raise error

    def _end(self, *, transfer: Transfer | None = None, error: BaseException | None = None) -> None:
        self._transfer, self._error = transfer, error
        self._end_s = time.perf_counter()
        with self._lanes.condition:
            self._issued = True
            self._lanes.condition.notify_all()


def settle_all(completions: Iterable[Completion]) -> list[BaseException]:
    """Wait for the end of all, whatever it is; what failed.

    A stream ends its work in order, so of each only the last event is waited for: asking the driver takes microseconds, and a step has
    hundreds of ops.

    Raises:
        KeyboardInterrupt: this thread was told to stop waiting; some may not have ended.
    """
    failures: list[BaseException] = []
    last: dict[Lane, Completion] = {}
    for completion in completions:
        error = completion.settle_issue()
        if error is None and completion.is_on_stream:
            last[completion.lane] = completion
        elif error is not None or (error := completion.settle()) is not None:
            failures.append(error)
    return failures + [error for completion in last.values() if (error := completion.settle()) is not None]


class Lanes:
    """The lanes of one session.

    Args:
        device: where `compute` runs; `cuda` gives the link lanes a stream each.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.condition = threading.Condition()
        """Notified whenever an op is issued."""
        self.group = JobGroup()
        """That jobs submitted now belong to."""
        self.while_blocked: Callable[[], bool] = lambda: False
        """A little work for the dispatching thread that can be done at any time (rule 5); whether there was any."""
        self._queues: dict[Lane, _Queue] = {}
        self._streams: dict[Lane, torch.cuda.Stream] = {}
        self._switches = PromptSwitches()
        self._is_closed = False
        if device.type == "cuda":
            self._streams = {lane: torch.cuda.Stream(device) for lane in (Lane.H2D, Lane.D2H)}

    def stream(self, lane: Lane) -> torch.cuda.Stream | None:
        """The lane's CUDA stream; None where it works on the host."""
        if self.device.type == "cuda" and lane is Lane.COMPUTE:
            return torch.cuda.current_stream(self.device)
        return self._streams.get(lane)

    def submit(self, lane: Lane, job: Job, waits: Iterable[Completion]) -> Completion:
        """Queue a job of any lane but `compute`."""
        assert lane is not Lane.COMPUTE and not self._is_closed, lane
        completion = Completion(self, lane)
        queue = self._queues.get(lane)
        if queue is None:
            self._switches.hold()
            queue = self._queues[lane] = _Queue(self, lane)
        queue.put((job, tuple(waits), completion))
        return completion

    def run_here(self, job: Callable[[], Any], waits: Sequence[Completion]) -> Completion:
        """Do a job of lane `compute` on this thread, which waits as rule 2 says.

        Raises:
            BaseException: what the job, or something that it waits for, failed with.
        """
        completion = Completion(self, Lane.COMPUTE)
        stream = self.stream(Lane.COMPUTE)
        for wait in waits:
            self.use_wait(wait)
        self._run(completion, job, waits, stream)
        if completion._error is not None:
            raise completion._error
        return completion

    def use_wait(self, wait: Completion) -> None:
        """On the dispatching thread, before it waits for an op to be issued: do what there is to do until it is (rule 5)."""
        while not wait.is_issued and not self.is_updating and self.while_blocked():
            with self.condition:
                self.condition.wait_for(lambda: wait.is_issued, timeout=BREATH_S)

    @property
    def is_updating(self) -> bool:
        """Whether the host has updates to do, or to wait for."""
        queue = self._queues.get(Lane.HOST_UPDATE)
        return queue is not None and not queue.is_idle

    def compute_so_far(self) -> tuple[Completion, ...]:
        """All that was put into the stream of lane `compute` until now; nothing where compute is done when it returns."""
        stream = self.stream(Lane.COMPUTE)
        if stream is None:
            return ()
        completion = Completion(self, Lane.COMPUTE)
        completion._event = torch.cuda.Event()
        completion._event.record(stream)
        completion._issued = True
        return (completion,)

    def done(self, lane: Lane) -> Completion:
        """The completion of an op that has nothing to do."""
        completion = Completion(self, lane)
        completion._issued = True
        return completion

    def drain(self) -> None:
        """Block until every job has been taken up, and all of the present group have ended, well or not, also one that nobody has the
        completion of.

        Raises:
            KeyboardInterrupt: something may be under way still; drain again.
        """
        for queue in tuple(self._queues.values()):
            queue.wait_until_empty()
        settle_all(tuple(self.group.taken))

    def begin(self) -> None:
        """From now on jobs belong to another group; those of the present one may be under way."""
        self.group = JobGroup()

    def reset(self) -> None:
        """Forget a failure; all ops of the present group must have settled."""
        self.group.taken.clear()
        self.begin()

    def close(self) -> None:
        """End the threads, after what is queued; closing again does nothing."""
        self._is_closed = True
        for queue in self._queues.values():
            queue.put(None)
        for queue in self._queues.values():
            queue.thread.join()
        self._queues = {}
        self._switches.release()

    def _run(self, completion: Completion, job: Job, waits: Iterable[Completion], stream: torch.cuda.Stream | None) -> None:
        transfer = None
        try:
            for wait in waits:
                wait.wait_on(stream)
            if completion.group.has_failed:  # not raised: a traceback would hold the job, and whatever it was to move
                completion._end(error=Abandoned(f"not begun on lane {completion.lane}: another op of the step failed"))
                return
            completion._begin_s = time.perf_counter()
            if stream is None:
                transfer = job()
            else:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record(stream)
                with torch.cuda.stream(stream):
                    transfer = job()
                end.record(stream)
                completion._begin_event, completion._event = begin, end
        except BaseException as error:
            if completion.lane is not Lane.COMPUTE:  # else who has called it decides
                completion.group.has_failed = True
            completion._end(error=error)
            return
        completion._end(transfer=transfer)


class _Queue:
    """One lane's thread and its jobs."""

    def __init__(self, lanes: Lanes, lane: Lane) -> None:
        self._lanes, self._lane = lanes, lane
        self._jobs: collections.deque[tuple[Job, tuple[Completion, ...], Completion] | threading.Event | None] = collections.deque()
        self._wake = threading.Semaphore(0)
        self._is_serving = False
        self.thread = threading.Thread(target=self._serve, name=f"overspill-{lane.value}", daemon=True)
        """Started by the first `put`: Ctrl-C while it starts then finds a queue that its lanes know, and end."""

    @property
    def is_idle(self) -> bool:
        """Whether every job has been issued, and the lane has nothing under way that its thread sees to; as of about now."""
        return not self._jobs and not self._is_serving

    def put(self, item: tuple[Job, tuple[Completion, ...], Completion] | threading.Event | None) -> None:
        self._jobs.append(item)
        self._wake.release()
        if self.thread.ident is None:
            self.thread.start()

    def wait_until_empty(self) -> None:
        """Block until all that was put before has been issued, and what of it the lane's thread sees to has ended."""
        reached = threading.Event()
        self.put(reached)
        reached.wait()

    def _serve(self) -> None:
        stream, most = self._lanes.stream(self._lane), MOST_UNDER_WAY.get(self._lane)
        under_way: collections.deque[Completion] = collections.deque()
        while True:
            self._is_serving = False
            self._wake.acquire()
            self._is_serving = True
            while self._jobs:  # all that is there: Ctrl-C within `put` may have lost a wake-up
                item = self._jobs.popleft()
                if item is None or isinstance(item, threading.Event):
                    _settle_down_to(under_way, 0)
                    if item is None:
                        return
                    item.set()
                    continue
                job, waits, completion = item
                completion.group.taken.append(completion)
                self._lanes._run(completion, job, waits, stream)
                if most is not None:
                    under_way.append(completion)
                del item, job, waits, completion  # an idle lane keeps no buffer alive
                if most is not None:
                    _settle_down_to(under_way, most - 1)
            _settle_down_to(under_way, 0)


def _settle_down_to(under_way: collections.deque[Completion], most: int) -> None:
    """Wait for the first of what is under way until no more than `most` is."""
    while len(under_way) > most:
        under_way.popleft().settle()
