"""Moves records between their tiers, and keeps every buffer alive until nothing touches it.

Rules:

1. A record that leaves keeps its device memory until its copy has ended, or until compute has been told to wait for the copy
   (`drop_left`): then torch's allocator may give the memory to what compute does afterwards. At most `window_bytes` are on their way out;
   beyond it compute waits for the oldest, on the device and not on the host. So the host may run as far ahead as it likes and memory
   stays bounded. What should have left by a measured round's pace is let go earlier: compute is told to wait for it as well, and finds
   it done. What leaves for the drive without the link (`JobEnd`) is waited for by the host, beyond the window alone.
2. What is wanted while the device still has it is given from there (forwarded), and a write to the SSD that has not begun is cancelled.
   What is wanted while host memory still has it, on its way to the SSD, is given from host memory.
3. A fetch gets its device memory from compute's own pool and starts behind compute so far; compute waits for the copy, the host does not.
4. A record is released when the last saved tensor of it dies. If a thread still moves it, that is put off until the thread has ended
   (`reap`).

One lock, the cache's, is around everything here; the SSD's threads never take it.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

import torch

from overspill.activations.amounts import Target
from overspill.activations.arena import HostArena
from overspill.activations.drive import DriveCopy, DriveLane, JobEnd, Way, again
from overspill.activations.identity import bytes_of
from overspill.activations.links import End, Link, Mark
from overspill.activations.records import Record
from overspill.activations.windows import Windows, default_window_bytes


class Mover:
    """Records of one device.

    Args:
        host: where records rest in host memory.
        ssd: None: there is none.
        window_bytes: device memory that may be on its way out, and as much that may have come back early; one record may always.
            None: what `windows.py` says, of the largest record seen.
    """

    def __init__(self, device: torch.device, link: Link, host: HostArena, ssd: DriveLane | None, *, window_bytes: int | None) -> None:
        self.device, self.link, self.host, self.ssd = device, link, host, ssd
        self._asked_window_bytes = window_bytes
        self._windows: Windows | None = None
        self.largest_bytes = 0
        """Of the records that have left."""
        self._leaving: collections.deque[Record] = collections.deque()
        self._leaving_bytes = 0
        self._under_way: collections.deque[DriveCopy] = collections.deque()
        """Writes and reads that may not have ended, oldest first."""
        self._busy: list[Record] = []
        """Dead records that a thread of the SSD still moves (rule 4)."""
        self.ahead_bytes = 0
        self.device_bytes = 0
        """Of records on the device now."""
        self.device_peak_bytes = 0
        self.has_told_failure = False
        self.num_waits, self.wait_s = 0, 0.0
        self.forwarded_bytes = self.cancelled_bytes = 0
        self.timed_out: list[End] = []
        self.timed_in: list[End] = []
        self.holds: list[tuple[Mark, Mark]] | None = None
        """Where to note how long compute waits; None: nowhere."""

    @property
    def has_own_windows(self) -> bool:
        """Whether nobody has asked for one."""
        return self._asked_window_bytes is None

    @property
    def usual_window_bytes(self) -> int:
        """While nothing is measured."""
        return self._asked_window_bytes if self._asked_window_bytes is not None else default_window_bytes(self.largest_bytes)

    @property
    def window_bytes(self) -> int:
        """Device memory that may be on its way out."""
        return self.usual_window_bytes if self._windows is None else self._windows.grown(self.largest_bytes).out_bytes

    @property
    def back_window_bytes(self) -> int:
        """Device memory that may have come back early."""
        return self.usual_window_bytes if self._windows is None else self._windows.grown(self.largest_bytes).back_bytes

    def set_windows(self, windows: Windows) -> None:
        """From a measured round, for rounds like it; nothing, if a window was asked for."""
        if self.has_own_windows:
            self._windows = windows

    # -- out ---------------------------------------------------------------------------------------------------------

    @property
    def is_leaving(self) -> bool:
        """Whether anything has device memory that it is to lose."""
        return bool(self._leaving)

    def keep(self, record: Record, storage: torch.UntypedStorage) -> None:
        """Let the device have it, in its form if that is exact."""
        if not record.is_whole:
            if not record.is_narrowed:
                record.form = None
            record.payload = _stored(record, storage)
        self.count(record.stored_bytes)

    def leave(self, record: Record, storage: torch.UntypedStorage, target: Target, *, may_wait: bool, is_timed: bool) -> None:
        """Start a record's way out, to `target` or to the other tier; it is kept if neither has room.

        Args:
            may_wait: for staging, if the SSD has room and only the way to it is full; this thread waits.
        """
        source, other = _stored(record, storage), Target.HOST if target is Target.SSD else Target.SSD
        if not (
            self._leave_to(record, source, target, may_wait=may_wait, is_timed=is_timed)
            or self._leave_to(record, source, other, may_wait=may_wait, is_timed=is_timed)
        ):
            self.keep(record, storage)
            return
        record.payload = source
        self.count(source.numel())
        self.largest_bytes = max(self.largest_bytes, source.numel())
        self._leaving.append(record)
        self._leaving_bytes += source.numel()
        if is_timed:
            assert record.leaving is not None
            self.timed_out.append(record.leaving)

    def _leave_to(self, record: Record, source: torch.Tensor, tier: Target, *, may_wait: bool, is_timed: bool) -> bool:
        if tier is Target.HOST:
            record.host = self.host.take(source.numel())
            if record.host is None:
                return False
            record.leaving = self.link.start_out(record.host.tensor, source, record.host.after, is_timed=is_timed)
        else:
            if self.ssd is None or not self.ssd.fits(source.numel()):
                return False
            way = self._take_way(self.ssd, source.numel(), must=may_wait)
            record.ssd = self.ssd.reserve(way) if way is not None else None
            if record.ssd is None:
                return False
            record.leaving = self.ssd.start_out(record.ssd, source, self.link, is_timed=is_timed)
            self._forget_ended()
            self._under_way.append(record.ssd)
        record.target = tier
        return True

    def drop_left(self, is_gone: Callable[[Record], bool] | None = None, *, forward_of: int | None = None, spared_bytes: int = 0) -> None:
        """Let go of device memory whose copy has ended, and of the oldest beyond the window (rule 1).

        Args:
            is_gone: says of which records the copy should have ended by now; compute waits for it.
            forward_of: the micro-batch whose forward runs. Its records go by `is_gone` alone, where that is given: to ask the device
                whether a copy has ended takes the host, which is what the device may wait for.
            spared_bytes: so much stays in any case, the newest.
        """
        while self._leaving and self._leaving_bytes > spared_bytes:
            record = self._leaving[0]
            end = record.leaving
            assert end is not None
            if record.num_users and not record.is_forwarded:
                pace = is_gone if not isinstance(end, JobEnd) else None  # the pace is the link's
                is_due = pace is not None and pace(record)
                may_stay = not is_due and (self._leaving_bytes <= self.window_bytes or len(self._leaving) == 1)
                if may_stay and ((pace is not None and record.micro_batch == forward_of) or not end.is_done):
                    return
                if not end.is_done:
                    self._hold(end)
                self._let_go(record)
                record.is_only_here = False
            self._leaving.popleft()
            self._leaving_bytes -= record.stored_bytes

    # -- in ----------------------------------------------------------------------------------------------------------

    def fetch(self, record: Record, *, must: bool, is_timed: bool) -> bool:
        """Start a record's way back; False: staging has no room for it now, which happens only without `must`.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """
        assert record.payload is None and record.leaving is not None
        if record.ssd is None:
            assert record.host is not None
            self._start_in(record, record.host.tensor, is_timed=is_timed)
            return True
        if record.coming is not None:
            return True
        assert self.ssd is not None
        if record.ssd.lend(lambda staging: self._start_in(record, staging, is_timed=is_timed)) is not None:
            self._note_forwarded(record)
            self._cancel(record)
            return True
        way = self._take_way(self.ssd, record.stored_bytes, must=must)
        if way is None:
            return False
        try:
            landing = torch.empty(self.ssd.landing_bytes(record.stored_bytes), dtype=torch.uint8, device=self.device)
            record.coming = landing[: record.stored_bytes]
            mark = record.mark = self.link.mark()
        except BaseException:  # no memory, or Ctrl-C: nobody reads
            record.coming = None
            self.ssd.give_way(way)
            raise
        self.count(record.stored_bytes)

        def note(end: End) -> None:
            record.arriving = end

        record.is_held = False
        self.ssd.start_in(record.ssd, way, landing, mark, self.link, note, is_timed=is_timed)
        self._under_way.append(record.ssd)
        return True

    def _start_in(self, record: Record, source: torch.Tensor, *, is_timed: bool) -> End:
        """From host memory, which has it as soon as it has left."""
        assert record.leaving is not None
        target = torch.empty(record.stored_bytes, dtype=torch.uint8, device=self.device)
        after = () if record.leaving.is_done else (record.leaving,)
        record.mark = self.link.mark()
        end = self.link.start_in(target, source, record.mark, after, is_timed=is_timed)
        record.payload, record.arriving, record.is_held = target, end, False
        self.count(target.numel())
        if is_timed:
            self.timed_in.append(end)
        return end

    def _take_way(self, ssd: DriveLane, num_bytes: int, *, must: bool) -> Way | None:
        """A record's way to the SSD or back; if it must be, after waiting for what is under way, the oldest first."""
        while True:
            way = ssd.take_way(num_bytes)
            if way is not None or not must:
                return way
            self._forget_ended()
            self.raise_failure()  # a write that failed keeps its way
            assert self._under_way, f"there is no way to the SSD for {num_bytes} B, and nothing is under way"
            self._wait(self._under_way[0].settle)

    def _forget_ended(self) -> None:
        while self._under_way and not self._under_way[0].is_busy():
            self._under_way.popleft()

    def arrive(self, record: Record) -> torch.Tensor:
        """The record's own bytes on the device, ready for what compute does next.

        Raises:
            StorageError: reading it failed.
        """
        if record.payload is None:
            self._finish_read(record)
        assert record.payload is not None
        if record.arriving is not None and not record.is_held:
            self._hold(record.arriving)
            record.is_held = True
        if record.mark is not None:
            self.link.touch(record.payload, record.mark)
        if record.form is None:
            return record.payload
        if record.decoded is None:
            with record.timed():
                values = record.form.decode(record.payload, record.dtype, record.num_bytes // record.dtype.itemsize)
                record.decoded = values.contiguous().view(torch.uint8)
        return record.decoded

    def forward(self, record: Record) -> None:
        """A record is wanted that has not left (rule 2): its device memory stays until it dies."""
        if record.target is Target.KEEP or not record.is_only_here or record.is_forwarded:
            return
        self._note_forwarded(record)
        self._cancel(record)

    def leave_again(self, record: Record) -> None:
        """Let go of what was fetched, for host or SSD have it still; and of what was made of another form."""
        if record.is_only_here or record.payload is None:
            record.decoded = None
            return
        if record.arriving is not None and not record.is_held:
            self.link.let_go(record.arriving)
        self._let_go(record)

    # -- ends --------------------------------------------------------------------------------------------------------

    def release(self, record: Record) -> None:
        """The last saved tensor of it is dead (rule 4)."""
        if record.is_ahead:
            self.ahead_bytes -= record.stored_bytes
            record.is_ahead = False
        if record.ssd is not None:
            self._cancel(record)
            if record.ssd.is_busy():
                self._busy.append(record)
                return
        self._release(record)

    def reap(self, *, wait: bool = False) -> None:
        """Release the dead whose threads have ended; all of them if `wait`."""
        if not self._busy:
            return
        busy, self._busy = self._busy, []
        for record in busy:
            assert record.ssd is not None
            if wait:
                record.ssd.settle()
            if record.ssd.is_busy():
                self._busy.append(record)
            else:
                self._release(record)

    def raise_failure(self) -> None:
        """Raise a write's failure, once there is one, in every hook.

        Raises:
            StorageError: there is.
        """
        if self.ssd is not None and self.ssd.failure is not None:
            self.has_told_failure = True
            raise again(self.ssd.failure)

    def close(self) -> None:
        """All records are released; wait for what is under way."""
        self.reap(wait=True)
        self._leaving.clear()
        self._leaving_bytes = 0
        self.link.close()
        if self.ssd is not None:
            self.ssd.close()

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _finish_read(self, record: Record) -> None:
        """Wait for the thread that reads it."""
        assert record.ssd is not None and record.ssd.reading is not None and record.coming is not None
        self._wait(record.ssd.reading.result)
        if record.ssd.failure is not None:
            raise again(record.ssd.failure)
        record.payload, record.coming = record.coming, None
        record.ssd.reading = None
        record.is_held = record.is_held or record.arriving is None  # there with the thread's end
        if self.holds is not None and record.arriving is not None:
            self.timed_in.append(record.arriving)

    def _release(self, record: Record) -> None:
        if record.coming is not None:  # read, and never wanted
            record.payload, record.coming = record.coming, None
        if record.arriving is not None and not record.is_held:
            self.link.let_go(record.arriving)
        ends = [end for end in (record.leaving, record.arriving) if end is not None and not end.is_done]
        self._let_go(record)
        if record.host is not None:
            self.host.give(record.host, ends)
            record.host = None
        if record.ssd is not None:
            assert self.ssd is not None
            self.ssd.free(record.ssd, record.leaving)
            record.ssd = None

    def _cancel(self, record: Record) -> None:
        """Take the write to the SSD back if it has not begun; the device then has the one copy."""
        if record.ssd is None or record.leaving is None:
            return
        assert self.ssd is not None
        if self.ssd.cancel(record.ssd, record.leaving):
            record.is_only_here = True
            self.cancelled_bytes += record.stored_bytes

    def _note_forwarded(self, record: Record) -> None:
        if not record.is_forwarded:
            record.is_forwarded = True
            self.forwarded_bytes += record.stored_bytes

    def count(self, num_bytes: int) -> None:
        """Bytes of records more on the device, or (negative) less."""
        self.device_bytes += num_bytes
        self.device_peak_bytes = max(self.device_peak_bytes, self.device_bytes)

    def _let_go(self, record: Record) -> None:
        if record.payload is not None:
            self.count(-record.payload.numel())
        elif record.is_whole:
            self.count(-record.stored_bytes)
            record.watch.let_go()
        record.payload = record.decoded = None

    def _hold(self, end: End) -> None:
        """Let compute wait for a copy. Where that is this thread, on the CPU or for what no stream can wait for, count it."""
        if isinstance(end, JobEnd):
            self._wait(end.wait)
            return
        if self.device.type == "cpu":
            if not end.is_done:
                self._wait(lambda: self.link.hold(end))
            return
        before = self.link.time_mark() if self.holds is not None else None
        self.link.hold(end)
        if self.holds is not None:
            self.holds.append((before, self.link.time_mark()))

    def _wait(self, until: Callable[[], object]) -> None:
        """Let this thread wait."""
        begin_s = time.perf_counter()
        before = self.link.time_mark() if self.holds is not None else None
        try:
            until()
        finally:
            self.num_waits += 1
            self.wait_s += time.perf_counter() - begin_s
            if self.holds is not None:
                self.holds.append((before, self.link.time_mark()))


def _stored(record: Record, storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a record that is being made, in its form, uint8; the record is told how many."""
    source = bytes_of(storage, record.start, record.stop)
    if record.form is not None:
        source = record.form.encode(source.view(record.dtype))
    record.stored_bytes = source.numel()
    return source
