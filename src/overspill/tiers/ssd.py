"""The SSD tier: named extents in one preallocated file, moved by a few threads of direct I/O.

How: `extents.py` says where a name's bytes are, `extent_file.py` owns the file, and this file moves bytes between it and
buffers. A transfer is cut into parts, at the page boundaries of the file:

```
file     |....####|########|########|##......|        #: bytes of the transfer    |: multiples of 4096
parts     edge     whole pages ...   edge
```

Rules:

1. Whole pages whose memory is aligned too move directly, with no copy. Edges, and whole pages of an unaligned buffer, go
   through a page-aligned bounce buffer. Bundles' chunks are aligned (`spec/tensors.py`), so training takes the direct way.
2. Writing an edge reads its page, changes the bytes and writes it back. A lock makes that one step for the whole store, so
   transfers of disjoint bytes stay independent even in one page.
3. Every part is repeated until all its bytes have moved; no bytes without an error is an error.

Costs: each thread has one request in flight; starting, handing over and waiting cost about 35 us a part (measured, 4 KiB read).
A full file system is waited for if `space` says so (`tiers/calls.py`). Content ends with the store unless `keep()` was called.
Limit: no checksums here; `tiers/records.py`, which stands before every store of a session, has them.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from overspill.errors import StorageError
from overspill.tiers.calls import OS_CALLS, FileCalls, SpacePolicy, SpaceWaiter
from overspill.tiers.extent_file import ExtentFile
from overspill.tiers.extents import ExtentTable
from overspill.tiers.transfer import PartsTransfer, TransferBook, build_storage_error, validate_buffer
from overspill.units import MIB, align_up

PART_BYTES = 8 * MIB
"""Most bytes of one part: a 32 MiB chunk then keeps four threads busy. Chosen, not tuned: on a virtual SSD of 1.6-2.0 GB/s, 2, 8 and
32 MiB with 1, 4 and 8 threads differed by no more than their spread; a fast NVMe drive has not been measured."""

_MAX_STALLS = 8
"""Calls in a row that may move less than one page before the part fails; direct I/O can only resume at a page. Chosen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes [start, start + num_bytes) of a buffer, which rest at `position` of the file."""

    position: int
    start: int
    num_bytes: int
    is_edge: bool
    """Covers a page in part; always inside one page."""


def split_parts(position: int, num_bytes: int, *, alignment: int, part_bytes: int = PART_BYTES) -> Iterator[Part]:
    """Cut file bytes [position, position + num_bytes) at multiples of `alignment` into edges and whole pages."""
    assert part_bytes % alignment == 0, (part_bytes, alignment)
    end = position + num_bytes
    at = position
    while at < end:
        if at % alignment or end - at < alignment:
            stop, is_edge = min(end, align_up(at + 1, alignment)), True
        else:
            stop, is_edge = min(end // alignment * alignment, at + part_bytes), False
        yield Part(position=at, start=at - position, num_bytes=stop - at, is_edge=is_edge)
        at = stop


class SsdStore:
    """Extents in a file of one directory. Meets the protocol `Store` and its rules.

    Args:
        directory: where the file is; made if missing. Two stores may share one only if at most one keeps its name.
        capacity_bytes: size of the file; reserved at once.
        num_threads: transfers' parts in flight.
        unlink: for scratch (boundaries, gradients): no name, so nothing is left behind even by `kill -9`.
        existing: open what an earlier run kept; its extents are taken over with `adopt`.
        before_discarding: see `ExtentFile`.
        read_only: with `existing`: only look; others may look at the same time.
        calls: the system calls; tests give a `FaultInjector`.
        space: what to do when the file system is full; None: fail.

    Raises:
        ValueError, BudgetError, StorageError: the directory cannot be used; see `ExtentFile`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        capacity_bytes: int,
        num_threads: int = 4,
        unlink: bool = False,
        existing: bool = False,
        read_only: bool = False,
        before_discarding: Callable[[], None] | None = None,
        calls: FileCalls = OS_CALLS,
        space: SpacePolicy | None = None,
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"a store needs at least 1 thread, got {num_threads}")
        capacity_bytes = ExtentTable(capacity_bytes).capacity_bytes
        self._file = ExtentFile(
            directory,
            capacity_bytes,
            unlink=unlink,
            existing=existing,
            read_only=read_only,
            before_discarding=before_discarding,
            calls=calls,
        )
        self._table = ExtentTable(self._file.capacity_bytes)
        if existing:
            self._table.high_water = self._table.capacity_bytes  # anything may have been written anywhere
        self._calls = calls
        self._space = SpaceWaiter(space or SpacePolicy(max_wait_s=0))
        # A store that is dropped without close() still removes its file, at the latest when the interpreter exits.
        weakref.finalize(self, self._file.close)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="overspill-ssd")
        self._book = TransferBook()
        self._table_lock = threading.Lock()
        self._edge_lock = threading.Lock()
        self._read_bytes = 0
        self._written_bytes = 0
        self._is_closed = False

    @property
    def path(self) -> str:
        """The file, for messages; a scratch file's name no longer exists."""
        return str(self._file.path)

    @property
    def is_direct(self) -> bool:
        """Whether transfers bypass the page cache."""
        return self._file.is_direct

    @property
    def capacity_bytes(self) -> int:
        return self._table.capacity_bytes

    @property
    def allocated_bytes(self) -> int:
        with self._table_lock:
            return self._table.allocated_bytes

    @property
    def read_bytes(self) -> int:
        return self._read_bytes

    @property
    def written_bytes(self) -> int:
        return self._written_bytes

    def allocate(self, name: str, num_bytes: int) -> None:
        """Make an extent of zeros; where its bytes were used before, they are zeroed now.

        Raises:
            BudgetError: no free range is long enough.
            StorageError: zeroing failed; nothing is allocated.
        """
        self._assert_open(name)
        with self._table_lock:
            fresh_from = self._table.high_water
            extent = self._table.allocate(name, num_bytes)
            used_bytes = min(extent.end, fresh_from) - extent.offset
            try:
                if used_bytes > 0:
                    self._file.zero(extent.offset, used_bytes)
            except OSError as error:
                self._table.free(name)
                raise self._error("write", name, extent.offset, used_bytes, 0, error.errno) from error

    def free(self, name: str) -> None:
        """Give an extent's range back; no transfer of it may be in flight."""
        self._assert_open(name)
        assert not self._book.num_in_flight(name), f"{name} is freed with {self._book.num_in_flight(name)} transfers in flight"
        with self._table_lock:
            self._table.free(name)

    def num_bytes(self, name: str) -> int:
        with self._table_lock:
            return self._table.find(name).num_bytes

    def position(self, name: str) -> int:
        """The extent's first byte in the file."""
        with self._table_lock:
            return self._table.find(name).offset

    def adopt(self, name: str, position: int, num_bytes: int) -> None:
        """Give a name the range that an earlier run gave it, with the content it has.

        Raises:
            ValueError: the range is not free, not aligned, or outside of the file.
        """
        with self._table_lock:
            self._table.adopt(name, position, num_bytes)

    def flush(self) -> None:
        """Make every write that has ended durable.

        Raises:
            StorageError: it failed; what is on the drive is unknown.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise self._error("flush", "all extents", 0, 0, 0, error.errno) from error

    def keep(self, is_kept: bool = True) -> None:
        """Whether closing leaves the file where it is."""
        self._file.keeps_content = is_kept

    def start_read(self, name: str, offset: int, buffer: torch.Tensor) -> PartsTransfer:
        """Start reading bytes [offset, offset + len(buffer)) of an extent; `buffer` is lent until `wait()`."""
        transfer = self._start(self._read_part, name, offset, buffer)
        with self._table_lock:
            self._read_bytes += buffer.numel()
        return transfer

    def start_write(self, name: str, offset: int, buffer: torch.Tensor) -> PartsTransfer:
        """Start writing bytes [offset, offset + len(buffer)) of an extent; `buffer` is lent until `wait()`."""
        transfer = self._start(self._write_part, name, offset, buffer)
        with self._table_lock:
            self._written_bytes += buffer.numel()
        return transfer

    def interrupt(self) -> None:
        """End the pauses for space that have begun: their transfers fail, so that nobody waits for them any longer."""
        self._space.interrupt()

    def close(self) -> None:
        """Wait for the transfers in flight, stop the threads, remove the file, raise a failure that nobody waited for."""
        if self._is_closed:
            return
        self._is_closed = True
        self._space.stop()
        self._pool.shutdown(wait=True)
        self._file.close()
        self._book.raise_unseen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except StorageError as unseen:
            if error is None:
                raise
            error.add_note(str(unseen))

    def _start(self, move: Callable[[str, Part, memoryview, bool], None], name: str, offset: int, buffer: torch.Tensor) -> PartsTransfer:
        self._assert_open(name)
        validate_buffer(name, buffer)
        with self._table_lock:
            extent = self._table.find(name)
        extent.validate_range(offset, buffer.numel())
        alignment = self._file.alignment_bytes
        # The array keeps the tensor's storage alive until the last part has ended.
        view = buffer.detach().numpy().data
        parts: list[Callable[[], None]] = []
        for part in split_parts(extent.offset + offset, buffer.numel(), alignment=alignment):
            is_direct = not part.is_edge and (buffer.data_ptr() + part.start) % alignment == 0
            parts.append(functools.partial(move, name, part, view[part.start : part.start + part.num_bytes], is_direct))
        return self._book.start(name, parts or [_move_nothing], self._pool)

    def _read_part(self, name: str, part: Part, view: memoryview, is_direct: bool) -> None:
        if is_direct:
            self._move_all("read", name, part.position, view)
            return
        first, bounce = self._bounce(part)
        self._move_all("read", name, first, bounce)
        view[:] = bounce[part.position - first : part.position - first + part.num_bytes]

    def _write_part(self, name: str, part: Part, view: memoryview, is_direct: bool) -> None:
        if is_direct:
            self._move_all("write", name, part.position, view)
            return
        first, bounce = self._bounce(part)
        if not part.is_edge:
            bounce[:] = view
            self._move_all("write", name, first, bounce)
            return
        with self._edge_lock:
            self._move_all("read", name, first, bounce)
            bounce[part.position - first : part.position - first + part.num_bytes] = view
            self._move_all("write", name, first, bounce)

    def _bounce(self, part: Part) -> tuple[int, memoryview]:
        """The file offset of the first page that the part touches, and page-aligned memory for all of its pages."""
        alignment = self._file.alignment_bytes
        first = part.position // alignment * alignment
        return first, memoryview(mmap.mmap(-1, align_up(part.position + part.num_bytes, alignment) - first))

    def _move_all(self, operation: str, name: str, position: int, view: memoryview) -> None:
        """Read or write all of `view` at `position` of the file, however short each call is (rule 3)."""
        move = self._calls.preadv if operation == "read" else self._calls.pwritev
        alignment = self._file.alignment_bytes
        done, num_stalls, wanted = 0, 0, len(view)
        while done < wanted:
            try:
                moved = self._space.call(self.path, lambda at=done: move(self._file.fd, [view[at:]], position + at))  # type: ignore[misc]
            except OSError as error:
                raise self._error(operation, name, position, wanted, done, error.errno) from error
            before, reached = done, done + moved
            done = reached if reached == wanted else reached // alignment * alignment
            num_stalls = num_stalls + 1 if done == before else 0
            if moved == 0 or num_stalls > _MAX_STALLS:
                raise self._error(operation, name, position, wanted, reached, None)

    def _error(self, operation: str, name: str, position: int, wanted: int, done: int, error_number: int | None) -> StorageError:
        return build_storage_error(
            operation=operation,
            name=name,
            path=self.path,
            offset=position,
            wanted_bytes=wanted,
            done_bytes=done,
            error_number=error_number,
        )

    def _assert_open(self, name: str) -> None:
        assert not self._is_closed, f"{name} is used in a store that is closed: {self.path}"


def _move_nothing() -> None:
    """The only part of an empty transfer."""
