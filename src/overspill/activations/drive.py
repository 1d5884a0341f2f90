"""A way between the device and the SSD's file: what the mover asks of one, and what both of them have in common.

There are two. `ssd_lane.py` passes through host memory; `direct_lane.py` lets the drive reach the device's memory itself. Common are the
table of which bytes of the file belong to which record, a few threads each way, the first failure and the rates.

Rules:

1. Before a record moves, its **way** is taken: what the lane needs for it besides the file. A lane that has none left says so, and never
   waits; the mover does, for the oldest record under way.
2. A write that no thread has begun can be cancelled; one that has begun goes to its end, and the file's range is in use until then.
3. What is written is summed, what is read is compared: a flipped bit is an error and no gradient.
4. The first failure of a write is kept in `failure` and raised by the next hook; that of a read is its copy's. No lane tries again. A
   failure is raised as a new error each time (`again`): one that is kept would collect the frames that it passed, and with them the graph
   whose death everything here waits for.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from overspill.activations.links import THREAD_PREFIX, End, Link, Mark
from overspill.errors import BudgetError, OverspillError, StorageError
from overspill.tiers.extents import ExtentTable

IN_FLIGHT = 4
"""Transfers of one direction at a time, each of a whole record. Chosen, as in `runtime/rates`."""
MOST_SPANS = 4096
"""Transfers that a rate is made of; a lane that nobody asks does not grow."""
EXTENT = "saved-tensors"

Way = Any
"""Of rule 1; each lane has its own kind."""


def again(failure: BaseException) -> StorageError:
    """The failure as a new error (rule 4)."""
    if isinstance(failure, OverspillError):
        error = StorageError(str(failure))
        error.__cause__ = failure.__cause__
    else:
        error = StorageError(f"saved tensors could not be moved to or from the SSD: {type(failure).__name__}: {failure}")
        error.__cause__ = failure
    return error


class JobEnd:
    """The end of a thread's work, which threads can wait for and streams cannot. Meets the protocol `End`."""

    __slots__ = ("_job", "num_bytes")

    def __init__(self, job: Future[None], num_bytes: int) -> None:
        self._job, self.num_bytes = job, num_bytes

    @property
    def is_done(self) -> bool:
        return self._job.done()

    def wait(self) -> None:
        """Also for one that was cancelled."""
        futures.wait([self._job])

    def span_s(self) -> float | None:
        return None  # it is no copy over the link, whose rate such times would say


class DriveCopy:
    """A record's bytes on the SSD, or on the way there."""

    __slots__ = ("failure", "name", "num_bytes", "offset", "reading", "writing")

    def __init__(self, name: str, offset: int, num_bytes: int) -> None:
        self.name, self.offset, self.num_bytes = name, offset, num_bytes
        self.writing: Future[None] | None = None
        self.reading: Future[None] | None = None
        self.failure: BaseException | None = None
        """Of reading it."""

    def lend(self, start: Callable[[torch.Tensor], End]) -> End | None:
        """Let `start` begin a copy from where the bytes wait to be written; None: they wait nowhere but on the device."""
        return None

    def is_busy(self) -> bool:
        """Whether a thread may be using the file's range."""
        return any(job is not None and not job.done() for job in (self.writing, self.reading))

    def settle(self) -> None:
        """Wait until it is not."""
        for job in (self.writing, self.reading):
            if job is not None and not job.cancelled():
                job.result()


class DriveLane(abc.ABC):
    """Threads and table of one file.

    Args:
        capacity_bytes: of the file.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._table = ExtentTable(capacity_bytes)
        self._writers, self._readers = (ThreadPoolExecutor(IN_FLIGHT, f"{THREAD_PREFIX}-{way}") for way in ("write", "read"))
        self._numbers = 0
        self.failure: BaseException | None = None
        self.peak_bytes = 0
        self.spans: dict[str, list[tuple[float, float, int]]] = {"write": [], "read": []}
        """(begin, end, bytes) of the transfers since the last `take_rate`."""

    @property
    def used_bytes(self) -> int:
        return self._table.allocated_bytes

    # -- each lane's own ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def fits(self, num_bytes: int) -> bool:
        """Whether a record of this size can pass at all."""

    @abc.abstractmethod
    def take_way(self, num_bytes: int) -> Way | None:
        """The way of a record (rule 1); None: there is none now."""

    @abc.abstractmethod
    def give_way(self, way: Way) -> None:
        """Take back a way on which nothing has moved."""

    @abc.abstractmethod
    def reserve(self, way: Way) -> DriveCopy | None:
        """A place in the file for a record that has a way; None, and the way goes back, if the file has no room."""

    @abc.abstractmethod
    def start_out(self, copy: DriveCopy, source: torch.Tensor, link: Link, *, is_timed: bool) -> End:
        """Start a record's way out, behind compute so far; the end is that of reading `source`."""

    @abc.abstractmethod
    def landing_bytes(self, num_bytes: int) -> int:
        """Bytes of device memory that a record of so many bytes comes back to."""

    @abc.abstractmethod
    def start_in(
        self, copy: DriveCopy, way: Way, landing: torch.Tensor, mark: Mark, link: Link, note: Callable[[End], None], *, is_timed: bool
    ) -> None:
        """Start a record's way back into new device memory, which compute may still use until it has reached `mark`.

        Args:
            note: takes, on the thread, the end of a copy that the link does when the thread has done its part; not called where the
                bytes are there with the thread's end.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End the threads and close the file; no record may be alive."""

    # -- both lanes' -------------------------------------------------------------------------------------------------

    def cancel(self, copy: DriveCopy, arrived: End) -> bool:
        """Take a write back; False: it has begun or ended (rule 2), or was taken back before."""
        return copy.writing is not None and not copy.writing.cancelled() and copy.writing.cancel()

    def free(self, copy: DriveCopy, arrived: End | None) -> None:
        """Give the file's range back; the copy is not busy."""
        assert not copy.is_busy(), f"record {copy.name} is freed while a thread moves it"
        self._table.free(copy.name)

    def take_rate(self, way: str) -> float | None:
        """Bytes per second of the transfers of one direction since the last call, in the time in which there was one."""
        spans, self.spans[way] = sorted(self.spans[way]), []
        busy_s, reached_s = 0.0, 0.0
        for begin_s, end_s, _ in spans:
            busy_s += max(0.0, end_s - max(begin_s, reached_s))
            reached_s = max(reached_s, end_s)
        return sum(size for _, _, size in spans) / busy_s if busy_s > 0 else None

    def clear_spans(self) -> None:
        """Forget the transfers so far."""
        self.spans = {"write": [], "read": []}

    def _place(self, num_bytes: int) -> tuple[str, int] | None:
        """Name and offset of a new range of the file; None: there is no room."""
        self._numbers += 1
        name = str(self._numbers)
        try:
            extent = self._table.allocate(name, num_bytes)
        except BudgetError:
            return None
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return name, extent.offset

    def _end_threads(self) -> None:
        self._writers.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _fail(self, error: BaseException) -> None:
        """A write has failed: it belongs to the next hook, not to this thread."""
        self.failure = self.failure or error.with_traceback(None)

    def _note(self, way: str, begin_s: float, num_bytes: int) -> None:
        spans = self.spans[way]
        if len(spans) < MOST_SPANS:
            spans.append((begin_s, time.perf_counter(), num_bytes))
