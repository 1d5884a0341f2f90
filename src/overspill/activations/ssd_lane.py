"""The way to the SSD and back: host range → file → host range, on threads of its own.

A record on its way to the SSD is first copied to a range of host memory (staging), then written. A record that comes back is read into
such a range, then copied to the device. The file is one extent of a store without a name, so nothing is left even by `kill -9`; which
bytes of it belong to which record is a table here: no file a tensor, and no zeroing when bytes are used again.

Rules:

1. A staging range belongs to its copy until the write has ended; then the thread gives it back. A record that is wanted before that is
   given from there (`SsdCopy.lend`), and the range goes back with the copy that reads it. So staging never waits for backward.
2. A write that no thread has begun can be cancelled; one that has begun goes to its end, and the file's range is in use until then.
3. What is written is summed, what is read is compared: a flipped bit is an error and no gradient.
4. The first failure of a write is kept in `failure` and raised by the next hook; that of a read is its copy's. The lane does not try
   again. A failure is raised as a new error each time (`again`): one that is kept would collect the frames that it passed, and with them
   the graph whose death everything here waits for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from overspill.activations.arena import HostArena, Range
from overspill.activations.links import THREAD_PREFIX, End
from overspill.errors import BudgetError, OverspillError, StorageError
from overspill.tiers import Store
from overspill.tiers.extents import ExtentTable
from overspill.units import align_up

IN_FLIGHT = 4
"""Transfers of one direction at a time, each of a whole record; the engine cuts them into parts of 1 MiB. Chosen, as in `runtime/rates`."""
MOST_SPANS = 4096
"""Transfers that a rate is made of; a lane that nobody asks does not grow."""
EXTENT = "saved-tensors"


def again(failure: BaseException) -> StorageError:
    """The failure as a new error (rule 4)."""
    if isinstance(failure, OverspillError):
        error = StorageError(str(failure))
        error.__cause__ = failure.__cause__
    else:
        error = StorageError(f"saved tensors could not be moved between host memory and SSD: {type(failure).__name__}: {failure}")
        error.__cause__ = failure
    return error


class SsdCopy:
    """A record's bytes on the SSD, or on the way there."""

    __slots__ = ("_lent", "_lock", "_staging", "checksums", "failure", "name", "num_bytes", "offset", "reading", "writing")

    def __init__(self, name: str, offset: int, staging: Range) -> None:
        self.name, self.offset, self.num_bytes = name, offset, staging.tensor.numel()
        self._staging: Range | None = staging
        self._lent: list[End] = []
        self._lock = threading.Lock()
        self.checksums: tuple[int, ...] = ()
        self.writing: Future[None] | None = None
        self.reading: Future[None] | None = None
        self.failure: BaseException | None = None
        """Of reading it."""

    @property
    def arrival(self) -> torch.Tensor:
        """Where the bytes go before they are written; before `start_write`."""
        assert self._staging is not None
        return self._staging.tensor

    @property
    def after(self) -> tuple[End, ...]:
        """What still touches that range; before `start_write`."""
        assert self._staging is not None
        return self._staging.after

    def lend(self, start: Callable[[torch.Tensor], End]) -> End | None:
        """Let `start` begin a copy from the staging range; None if that has gone back (rule 1)."""
        with self._lock:
            if self._staging is None:
                return None
            end = start(self._staging.tensor)
            self._lent.append(end)
            return end

    def take_staging(self) -> tuple[Range, list[End]] | None:
        """The staging range and what it was lent to, which are the caller's now; None if it has gone back."""
        with self._lock:
            staging, self._staging = self._staging, None
            return (staging, self._lent) if staging is not None else None

    def is_busy(self) -> bool:
        """Whether a thread may be using the file's range."""
        return any(job is not None and not job.done() for job in (self.writing, self.reading))

    def settle(self) -> None:
        """Wait until it is not."""
        for job in (self.writing, self.reading):
            if job is not None and not job.cancelled():
                job.result()


class SsdLane:
    """Threads, table and staging of one store.

    Args:
        store: where `capacity_bytes` are allocated as one extent; closed with the lane.
        staging: whose ranges are between device and file.
    """

    def __init__(self, store: Store, capacity_bytes: int, staging: HostArena) -> None:
        self.store, self.staging = store, staging
        store.allocate(EXTENT, capacity_bytes)
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

    def reserve(self, staging: Range) -> SsdCopy | None:
        """A place in the file for a record that will be in `staging`; None, and the range goes back, if the file has no room."""
        self._numbers += 1
        name = str(self._numbers)
        try:
            extent = self._table.allocate(name, staging.tensor.numel())
        except BudgetError:
            self.staging.give(staging, staging.after)
            return None
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return SsdCopy(name, extent.offset, staging)

    def fits(self, num_bytes: int) -> bool:
        """Whether a record of this size can pass at all."""
        return align_up(num_bytes, 4096) <= self.staging.limit_bytes

    def start_write(self, copy: SsdCopy, arrived: End) -> None:
        """Queue the write of what arrives in the copy's staging range."""
        copy.writing = self._writers.submit(self._write, copy, copy.arrival, arrived)

    def start_read(self, copy: SsdCopy, staging: Range, then: Callable[[torch.Tensor], End]) -> None:
        """Queue reading the record into a staging range; `then` starts the copy to the device, on the thread, when the bytes are there."""
        copy.reading = self._readers.submit(self._read, copy, staging, then)

    def cancel(self, copy: SsdCopy, arrived: End) -> bool:
        """Take a write back, and the staging range with it; False: it has begun or ended (rule 2), or was taken back before."""
        if copy.writing is None or copy.writing.cancelled() or not copy.writing.cancel():
            return False
        self._give_staging(copy, arrived)
        return True

    def free(self, copy: SsdCopy, arrived: End | None) -> None:
        """Give the file's range back; the copy is not busy."""
        assert not copy.is_busy(), f"record {copy.name} is freed while a thread moves it"
        self._give_staging(copy, *([arrived] if arrived is not None else []))  # there still if the write failed
        self._table.free(copy.name)

    def _give_staging(self, copy: SsdCopy, *ends: End) -> None:
        taken = copy.take_staging()
        if taken is not None:
            self.staging.give(taken[0], (*taken[1], *ends))

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

    def close(self) -> None:
        """End the threads and close the store; no record may be alive."""
        self._writers.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self.store.close()

    def _write(self, copy: SsdCopy, staging: torch.Tensor, arrived: End) -> None:
        try:
            arrived.wait()
            begin_s = time.perf_counter()
            transfer = self.store.start_write(EXTENT, copy.offset, staging, with_checksums=True)
            transfer.wait()
            copy.checksums = transfer.checksums
            self._note("write", begin_s, copy.num_bytes)
        except BaseException as error:  # it belongs to the next hook, not to this thread
            self.failure = self.failure or error.with_traceback(None)
            return
        self._give_staging(copy)

    def _read(self, copy: SsdCopy, staging: Range, then: Callable[[torch.Tensor], End]) -> None:
        ends: tuple[End, ...] = ()
        try:
            for end in staging.after:
                end.wait()
            begin_s = time.perf_counter()
            self.store.start_read(EXTENT, copy.offset, staging.tensor, expected=copy.checksums).wait()
            self._note("read", begin_s, copy.num_bytes)
            ends = (then(staging.tensor),)
        except BaseException as error:  # it belongs to whoever wants the record
            copy.failure = error.with_traceback(None)
        finally:
            self.staging.give(staging, ends)

    def _note(self, way: str, begin_s: float, num_bytes: int) -> None:
        spans = self.spans[way]
        if len(spans) < MOST_SPANS:
            spans.append((begin_s, time.perf_counter(), num_bytes))
