"""The SSD tier: named extents in one address space of preallocated files, moved by the native I/O engine.

`extents.py` says where a name's bytes are, `striped_file.py` owns the files, and csrc/include/overspill/io.hpp moves bytes between them
and buffers: direct I/O by a few threads, every completion checked, checksums computed as the bytes go by. Its rules hold here.
This file puts the three together, and turns what the engine reports into errors that people can use.

Costs: starting a transfer takes about 10 us on the caller's thread, whatever its size (benchmarks/io). Each engine thread has one
request of at most `PART_BYTES` in flight. A full file system is waited for if `space` says so (`tiers/calls.py`).
Content ends with the store unless `keep()` was called. A forked child cannot use its copy of a store; dropping or closing it there, as an
ending child does, changes nothing for the parent.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from overspill import _native
from overspill.errors import StorageError
from overspill.spec.checkpoint import StripeSet
from overspill.tiers.calls import OS_CALLS, FileCalls, SpacePolicy, SpaceWaiter
from overspill.tiers.checksums import BLOCK_BYTES
from overspill.tiers.closing import Closing
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES, ExtentTable
from overspill.tiers.load import TransferSpan
from overspill.tiers.striped_file import Place, StripedFile
from overspill.tiers.transfer import DamagedBlock, EngineTransfer, TransferBook, build_storage_error, validate_buffer
from overspill.units import MIB

PART_BYTES = MIB
"""Most bytes of one request: a 32 MiB chunk is then 32 of them, and a block is summed while a core's cache holds it. docs/log.md has the
measurement."""

BACKENDS = ("threads", "io_uring")
BACKEND_VARIABLE = "OVERSPILL_IO"
"""Environment variable that chooses the backend of stores that were not told one."""


class SsdStore(Closing):
    """Extents in one or several directories or block devices. Meets the protocol `Store` and its rules.

    Args:
        directory: where the file is; made if missing. Several: striped over all of them. Two stores may share one only if at most one
            keeps its name.
        capacity_bytes: of all files together; reserved at once.
        num_threads: of the engine.
        unlink: for scratch (boundaries, gradients): no name, so nothing is left behind even by `kill -9`.
        existing: open what an earlier run kept; its extents are taken over with `adopt`.
        stripes, kept_bytes: with `existing`: the set that the checkpoint names, and how much of it must be there.
        before_discarding: see `ExtentFile`.
        read_only: with `existing`: only look; others may look at the same time.
        overwrite: block devices whose content may be lost (`block_device.py`).
        calls: the system calls; tests give a `FaultInjector`.
        space: what to do when the file system is full; None: fail.
        backend: `threads` or `io_uring`; None: what the environment says, else threads.

    Raises:
        ValueError, BudgetError, StorageError: a place cannot be used; see `StripedFile`.
    """

    def __init__(
        self,
        directory: Place | Sequence[Place],
        *,
        capacity_bytes: int,
        num_threads: int = 4,
        unlink: bool = False,
        existing: bool = False,
        stripes: StripeSet | None = None,
        kept_bytes: int = 0,
        read_only: bool = False,
        before_discarding: Callable[[], None] | None = None,
        overwrite: Sequence[str] = (),
        calls: FileCalls = OS_CALLS,
        space: SpacePolicy | None = None,
        backend: str | None = None,
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"an SSD store needs at least 1 thread, got {num_threads}")
        chosen = backend or os.environ.get(BACKEND_VARIABLE) or BACKENDS[0]
        if chosen not in BACKENDS:
            raise ValueError(f"I/O backend {chosen!r} is not known; choose one of {', '.join(BACKENDS)} ({BACKEND_VARIABLE})")
        self._file = StripedFile(
            [directory] if isinstance(directory, str | os.PathLike) else list(directory),
            ExtentTable(capacity_bytes).capacity_bytes,
            unlink=unlink,
            existing=existing,
            expected=stripes,
            kept_bytes=kept_bytes,
            read_only=read_only,
            before_discarding=before_discarding,
            overwrite=overwrite,
            calls=calls,
        )
        capacity = self._file.capacity_bytes if existing else ExtentTable(capacity_bytes).capacity_bytes
        self._table = ExtentTable(capacity)
        if existing or not self._file.is_fresh_zero:
            self._table.high_water = self._table.capacity_bytes  # anything may have been written anywhere
        self._space = SpaceWaiter(space or SpacePolicy(max_wait_s=0))
        self._engine = _open_engine(self._file, num_threads, chosen, calls, self._space)
        # A store that is dropped without close() still ends its threads and removes its files, at the latest when the interpreter exits.
        self._maker_pid = os.getpid()
        weakref.finalize(self, _shut, self._maker_pid, self._space, self._engine, self._file)
        self._book = TransferBook()
        self._table_lock = threading.Lock()
        self._read_bytes = 0
        self._written_bytes = 0
        self._is_closed = False

    @property
    def path(self) -> str:
        """The files, for messages; a scratch file's name no longer exists."""
        return self._file.path

    @property
    def is_direct(self) -> bool:
        """Whether transfers bypass the page cache."""
        return self._file.is_direct

    @property
    def stripe_set(self) -> StripeSet | None:
        """What a manifest must say to find the files again; None: one file, beside the manifest."""
        return self._file.stripe_set

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

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """(read, written) by system calls so far: payload, and the rests of pages besides."""
        read, written, _, _ = self._engine.counters
        return read, written

    @property
    def copied_bytes(self) -> int:
        """Payload that was not aligned and went through a copy; 0 is as it should be."""
        return self._engine.counters[2]

    def start_trace(self) -> None:
        """Note every request's times from now on."""
        self._engine.start_trace()

    def take_trace(self) -> list[TransferSpan]:
        """The requests since `start_trace`, in the order of their ends (`load.py` says what to do with them); ends the trace."""
        return [
            TransferSpan(start_s=start, end_s=end, num_bytes=size, is_write=is_write, file=file)
            for start, end, size, is_write, file in self._engine.take_trace()
        ]

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
        """The extent's first address; with one file, its offset there."""
        with self._table_lock:
            return self._table.find(name).offset

    def place(self, name: str, offset: int) -> str:
        """Where byte `offset` of an extent is, for messages."""
        file, at = self._file.locate(self.position(name) + offset)
        return f"offset {at} of {file.path}"

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
        """Whether closing leaves the files where they are.

        Raises:
            StorageError: a place could not be told that it belongs to this store.
        """
        try:
            self._file.keep(is_kept)
        except OSError as error:
            raise StorageError(f"{self.path} could not be marked as kept: {error.strerror or error}") from error

    def start_read(self, name: str, offset: int, buffer: torch.Tensor, *, expected: Sequence[int] | None = None) -> EngineTransfer:
        """Start reading bytes [offset, offset + len(buffer)) of an extent; `buffer` is lent until `wait()`."""
        transfer = self._start(False, name, offset, buffer, BLOCK_BYTES if expected is not None else 0, expected)
        self._read_bytes += buffer.numel()
        return transfer

    def start_write(self, name: str, offset: int, buffer: torch.Tensor, *, with_checksums: bool = False) -> EngineTransfer:
        """Start writing bytes [offset, offset + len(buffer)) of an extent; `buffer` is lent until `wait()`."""
        transfer = self._start(True, name, offset, buffer, BLOCK_BYTES if with_checksums else 0, None)
        self._written_bytes += buffer.numel()
        return transfer

    def interrupt(self) -> None:
        """See `Store.interrupt`: pauses for space end, and none begins."""
        self._space.interrupt()

    def proceed(self) -> None:
        """See `Store.proceed`."""
        self._space.proceed()

    def close(self) -> None:
        """Wait for the transfers in flight, stop the threads, remove the files, raise a failure that nobody waited for.

        The child of a fork closes its copies of the descriptors, and nothing else.
        """
        if self._is_closed:
            return
        self._is_closed = True
        _shut(self._maker_pid, self._space, self._engine, self._file)
        if os.getpid() == self._maker_pid:
            self._book.raise_unseen()

    def _start(
        self, is_write: bool, name: str, offset: int, buffer: torch.Tensor, block_bytes: int, expected: Sequence[int] | None
    ) -> EngineTransfer:
        self._assert_open(name)
        validate_buffer(name, buffer)
        with self._table_lock:
            extent = self._table.find(name)
        extent.validate_range(offset, buffer.numel())
        native = self._engine.submit(is_write, extent.offset + offset, buffer.data_ptr(), buffer.numel(), block_bytes, expected)
        explain = self._explain_write if is_write else self._explain_read
        return EngineTransfer(self._book, name, self._engine, native, buffer, explain)

    def _explain_write(self, name: str, native: _native.IoTransfer) -> StorageError | None:
        return self._explain("write", name, native)

    def _explain_read(self, name: str, native: _native.IoTransfer) -> StorageError | None:
        error = self._explain("read", name, native)
        if error is None and native.mismatch is not None:
            return DamagedBlock(name, *native.mismatch)
        return error

    def _explain(self, operation: str, name: str, native: _native.IoTransfer) -> StorageError | None:
        if native.is_cancelled:
            return StorageError(f"{operation} of {name} was taken back before it began")
        if native.failure is None:
            return None
        file, offset, wanted, done, error_number = native.failure
        error = build_storage_error(
            operation=operation,
            name=name,
            path=str(self._file.files[file].path),
            offset=offset,
            wanted_bytes=wanted,
            done_bytes=done,
            error_number=error_number or None,
        )
        error.__cause__ = OSError(error_number, os.strerror(error_number)) if error_number else None
        return error

    def _error(self, operation: str, name: str, address: int, wanted: int, done: int, error_number: int | None) -> StorageError:
        file, offset = self._file.locate(address)
        return build_storage_error(
            operation=operation,
            name=name,
            path=str(file.path),
            offset=offset,
            wanted_bytes=wanted,
            done_bytes=done,
            error_number=error_number,
        )

    def _assert_open(self, name: str) -> None:
        assert not self._is_closed, f"{name} is used in a store that is closed: {self.path}"


def _open_engine(file: StripedFile, num_threads: int, backend: str, calls: FileCalls, space: SpaceWaiter) -> _native.IoEngine:
    paths = [item.path for item in file.files]

    def on_full(index: int, error_number: int, waited_s: float) -> bool:
        return space.may_retry(paths[index], error_number, waited_s)

    try:
        return _native.IoEngine(
            files=[(item.fd, item.base_bytes) for item in file.files],
            stripe_bytes=file.layout.stripe_bytes,
            alignment=file.alignment_bytes,
            part_bytes=max(PART_BYTES, EXTENT_ALIGNMENT_BYTES),
            num_threads=num_threads,
            backend=backend,
            faults=getattr(calls, "table", None),
            on_full=on_full,
        )
    except BaseException as error:
        file.close()
        if isinstance(error, RuntimeError):
            raise StorageError(f"the I/O engine cannot start: {error}") from error
        raise


def _shut(maker_pid: int, space: SpaceWaiter, engine: _native.IoEngine, file: StripedFile) -> None:
    if os.getpid() == maker_pid:  # in the child of a fork nobody waits for space, and a thread of the parent may hold the lock
        space.stop()
    engine.close()
    file.close()
