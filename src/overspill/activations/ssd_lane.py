"""The way to the SSD and back through host memory: host range → file → host range, on threads of its own.

A record on its way to the SSD is first copied to a range of host memory (staging), then written. A record that comes back is read into
such a range, then copied to the device. The file is one extent of a store without a name, so nothing is left even by `kill -9`; which
bytes of it belong to which record is a table here: no file a tensor, and no zeroing when bytes are used again.

Besides the rules of `drive.py`:

5. A staging range belongs to its copy until the write has ended; then the thread gives it back. A record that is wanted before that is
   given from there (`SsdCopy.lend`), and the range goes back with the copy that reads it. So staging never waits for backward.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from overspill.activations.arena import HostArena, Range
from overspill.activations.drive import EXTENT, DriveCopy, DriveLane
from overspill.activations.links import End, Link, Mark
from overspill.tiers import Store
from overspill.units import align_up


class SsdCopy(DriveCopy):
    """One that has, or had, a staging range."""

    __slots__ = ("_lent", "_lock", "_staging", "checksums")

    def __init__(self, name: str, offset: int, staging: Range) -> None:
        super().__init__(name, offset, staging.tensor.numel())
        self._staging: Range | None = staging
        self._lent: list[End] = []
        self._lock = threading.Lock()
        self.checksums: tuple[int, ...] = ()

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
        """Let `start` begin a copy from the staging range; None if that has gone back (rule 5)."""
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


class SsdLane(DriveLane):
    """The lane of one store; a record's way is a staging range.

    Args:
        store: where `capacity_bytes` are allocated as one extent; closed with the lane. Its engine cuts transfers into parts of 1 MiB.
        staging: whose ranges are between device and file.
    """

    def __init__(self, store: Store, capacity_bytes: int, staging: HostArena) -> None:
        self.store, self.staging = store, staging
        store.allocate(EXTENT, capacity_bytes)
        super().__init__(capacity_bytes)

    def fits(self, num_bytes: int) -> bool:
        return align_up(num_bytes, 4096) <= self.staging.limit_bytes

    def take_way(self, num_bytes: int) -> Range | None:
        return self.staging.take(num_bytes)

    def give_way(self, way: Range) -> None:
        self.staging.give(way, way.after)

    def reserve(self, way: Range) -> SsdCopy | None:
        place = self._place(way.tensor.numel())
        if place is None:
            self.give_way(way)
            return None
        return SsdCopy(*place, way)

    def start_out(self, copy: DriveCopy, source: torch.Tensor, link: Link, *, is_timed: bool) -> End:
        """The end is that of the copy to staging."""
        assert isinstance(copy, SsdCopy)
        arrived = link.start_out(copy.arrival, source, copy.after, is_timed=is_timed)
        self.start_write(copy, arrived)
        return arrived

    def landing_bytes(self, num_bytes: int) -> int:
        return num_bytes

    def start_in(
        self, copy: DriveCopy, way: Range, landing: torch.Tensor, mark: Mark, link: Link, note: Callable[[End], None], *, is_timed: bool
    ) -> None:
        def then(read: torch.Tensor) -> End:
            end = link.start_in(landing, read, mark, (), is_timed=is_timed)
            note(end)
            return end

        assert isinstance(copy, SsdCopy)
        self.start_read(copy, way, then)

    def start_write(self, copy: SsdCopy, arrived: End) -> None:
        """Queue the write of what arrives in the copy's staging range."""
        copy.writing = self._writers.submit(self._write, copy, copy.arrival, arrived)

    def start_read(self, copy: SsdCopy, staging: Range, then: Callable[[torch.Tensor], End]) -> None:
        """Queue reading the record into a staging range; `then` starts the copy to the device, on the thread, when the bytes are there."""
        copy.reading = self._readers.submit(self._read, copy, staging, then)

    def cancel(self, copy: DriveCopy, arrived: End) -> bool:
        """The staging range goes back with the write."""
        is_cancelled = super().cancel(copy, arrived)
        if is_cancelled:
            self._give_staging(copy, arrived)
        return is_cancelled

    def free(self, copy: DriveCopy, arrived: End | None) -> None:
        assert not copy.is_busy(), f"record {copy.name} is freed while a thread moves it"
        self._give_staging(copy, *([arrived] if arrived is not None else []))  # there still if the write failed
        super().free(copy, arrived)

    def close(self) -> None:
        self._end_threads()
        self.store.close()

    def _give_staging(self, copy: DriveCopy, *ends: End) -> None:
        assert isinstance(copy, SsdCopy)
        taken = copy.take_staging()
        if taken is not None:
            self.staging.give(taken[0], (*taken[1], *ends))

    def _write(self, copy: SsdCopy, staging: torch.Tensor, arrived: End) -> None:
        try:
            arrived.wait()
            begin_s = time.perf_counter()
            transfer = self.store.start_write(EXTENT, copy.offset, staging, with_checksums=True)
            transfer.wait()
            copy.checksums = transfer.checksums
            self._note("write", begin_s, copy.num_bytes)
        except BaseException as error:
            self._fail(error)
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
