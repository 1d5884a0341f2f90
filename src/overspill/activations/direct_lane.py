"""The way to the SSD and back past host memory: device → file → device, by GPUDirect Storage (`tiers/gpudirect.py`).

A record on its way out waits on the device until the drive has read it; one that comes back is written by the drive to device memory that
is new. So a record takes no host memory at all, and the bytes cross the GPU's link once, not three times the host's memory.

Besides the rules of `drive.py`:

5. A thread waits until compute has reached the point at which its transfer was started, and until the transfer has ended. No stream can
   wait for a thread, so where compute would have to wait for a transfer the host does (`JobEnd`): beyond the window of what may be on its
   way out, and for a record that is wanted now. The host is then as far ahead of the device as the window is wide.
6. What is wanted while it is on its way out is given from the device, which has it still; a write that has not begun is cancelled.
7. Rule 3 without the CPU: the device adds up the 64-bit words of each block of 1 MiB, before and after it is written, and when it was
   read. One flipped bit, a page that was forgotten, and blocks in each other's place are found. Weaker than the CRC-32C of the other lane:
   changes of one block that cancel out in the sum are not. A block whose sums before and after differ was changed while it was written
   (bytes of the storage beside those that were saved); it is not compared.

SSDTrain reaches its drives so (Wu et al., arXiv:2408.10013), and registers what its allocator hands out with libcufile by a hook in
cudaMalloc; here nothing is registered.

Costs: a thread and its stream for each of four transfers each way, three passes over the record in device memory, two small ops where a
record is no whole number of pages.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import torch

from overspill.activations.drive import EXTENT, DriveCopy, DriveLane, JobEnd
from overspill.activations.links import End, Link, Mark
from overspill.errors import StorageError
from overspill.tiers.checksums import BLOCK_BYTES
from overspill.tiers.gpudirect import PAGE_BYTES, DirectFile, Queue
from overspill.units import align_up

_WORD_BYTES = 8
_BLOCK_WORDS = BLOCK_BYTES // _WORD_BYTES


class DirectCopy(DriveCopy):
    """One with the sums of rule 7."""

    __slots__ = ("sums",)

    def __init__(self, name: str, offset: int, num_bytes: int) -> None:
        super().__init__(name, offset, num_bytes)
        self.sums: tuple[int | None, ...] = ()
        """None: that block changed while it was written."""


class DirectLane(DriveLane):
    """The lane of one file; a record's way is its number of bytes, and there always is one.

    Args:
        file: of at least `capacity_bytes`; closed with the lane.
    """

    def __init__(self, file: DirectFile, capacity_bytes: int, device: torch.device) -> None:
        super().__init__(capacity_bytes)
        self.file, self._device = file, device
        self._own = threading.local()

    def fits(self, num_bytes: int) -> bool:
        return True

    def take_way(self, num_bytes: int) -> int:
        return num_bytes

    def give_way(self, way: int) -> None:
        """Nothing: the device's memory is the mover's."""

    def reserve(self, way: int) -> DirectCopy | None:
        place = self._place(way)
        return DirectCopy(*place, way) if place is not None else None

    def start_out(self, copy: DriveCopy, source: torch.Tensor, link: Link, *, is_timed: bool) -> End:
        """The end is that of the write."""
        assert isinstance(copy, DirectCopy)
        copy.writing = self._writers.submit(self._write, copy, source, link.mark())
        return JobEnd(copy.writing, copy.num_bytes)

    def landing_bytes(self, num_bytes: int) -> int:
        return align_up(num_bytes, PAGE_BYTES)

    def start_in(
        self, copy: DriveCopy, way: int, landing: torch.Tensor, mark: Mark, link: Link, note: Callable[[End], None], *, is_timed: bool
    ) -> None:
        assert isinstance(copy, DirectCopy)
        copy.reading = self._readers.submit(self._read, copy, landing, mark)

    def close(self) -> None:
        self._end_threads()
        self.file.close()

    def _write(self, copy: DirectCopy, source: torch.Tensor, mark: Mark) -> None:
        try:
            with self._queue_behind(mark) as queue:
                begin_s = time.perf_counter()
                pages = _whole_pages(source)
                before = torch.cat([_block_sums(part) for part in pages])
                offset = copy.offset
                for part in pages:
                    self.file.write(EXTENT, offset, part, queue)
                    offset += part.numel()
                self._note("write", begin_s, copy.num_bytes)
                after = torch.cat([_block_sums(part) for part in pages])
                copy.sums = tuple(one if one == other else None for one, other in zip(before.tolist(), after.tolist(), strict=True))
        except BaseException as error:
            self._fail(error)

    def _read(self, copy: DirectCopy, landing: torch.Tensor, mark: Mark) -> None:
        try:
            with self._queue_behind(mark) as queue:
                begin_s = time.perf_counter()
                self.file.read(EXTENT, copy.offset, landing, queue)
                self._note("read", begin_s, copy.num_bytes)
                found = torch.cat([_block_sums(part) for part in _split_as_written(landing, copy.num_bytes)]).tolist()
                for block, (sum_now, sum_then) in enumerate(zip(found, copy.sums, strict=True)):
                    if sum_then is not None and sum_now != sum_then:
                        raise StorageError(
                            f"{EXTENT} is damaged: block {block} of the record at offset {copy.offset} of {self.file.path} adds up to "
                            f"{sum_now}, {sum_then} was written"
                        )
        except BaseException as error:  # it belongs to whoever wants the record
            copy.failure = error.with_traceback(None)

    @contextlib.contextmanager
    def _queue_behind(self, mark: Mark) -> Iterator[Queue]:
        """This thread's own queue, current, when compute has reached `mark` (rule 5)."""
        if self._device.type != "cuda":
            yield _HOST_QUEUE
            return
        queue = getattr(self._own, "queue", None)
        if queue is None:
            queue = self._own.queue = _StreamQueue(self._device)
        with torch.cuda.stream(queue.stream):
            queue.stream.wait_event(mark.event)
            queue.settle()
            yield queue


class _StreamQueue:
    """A stream of one thread. Meets the protocol `Queue`."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @property
    def raw_stream(self) -> int:
        return int(self.stream.cuda_stream)

    def settle(self) -> None:
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        event.synchronize()


class _HostQueue:
    """On the CPU, where what was called has been done. Meets the protocol `Queue`."""

    raw_stream = 0

    def settle(self) -> None:
        """Nothing to wait for."""


_HOST_QUEUE = _HostQueue()


def _whole_pages(source: torch.Tensor) -> list[torch.Tensor]:
    """The bytes as whole pages: those that are, where they lie, and the rest at the head of a page of zeros."""
    body_bytes = source.numel() // PAGE_BYTES * PAGE_BYTES
    parts = [source[:body_bytes]] if body_bytes else []
    if body_bytes < source.numel():
        page = torch.zeros(PAGE_BYTES, dtype=torch.uint8, device=source.device)
        page[: source.numel() - body_bytes] = source[body_bytes:]
        parts.append(page)
    return parts


def _split_as_written(landing: torch.Tensor, num_bytes: int) -> list[torch.Tensor]:
    """The pages of `_whole_pages` again."""
    body_bytes = num_bytes // PAGE_BYTES * PAGE_BYTES
    return [part for part in (landing[:body_bytes], landing[body_bytes:]) if part.numel()]


def _block_sums(pages: torch.Tensor) -> torch.Tensor:
    """The sum of the 64-bit words of each block of whole pages, modulo 2⁶⁴, int64; the last block is as long as it is."""
    words = (pages if pages.storage_offset() % _WORD_BYTES == 0 else pages.clone()).view(torch.int64)
    full = words.numel() // _BLOCK_WORDS * _BLOCK_WORDS
    sums = [words[:full].view(-1, _BLOCK_WORDS).sum(dim=1)] if full else []
    return torch.cat([*sums, words[full:].sum().view(1)] if full < words.numel() else sums)
