"""A started copy, what it says when it fails, and the book that a store keeps of its copies.

Two kinds meet the protocol `Transfer`: `EngineTransfer` is moved by the native engine (`SsdStore`), `ThreadTransfer` by a Python
thread (`FakeStore`). Rules of both:

1. A transfer ends when nothing touches its buffer any more, also after a failure.
2. The book holds a transfer, and so its buffer, until it is seen to have ended: a caller who drops both has the bytes moved.
3. The book forgets a transfer that ended well, and one whose failure was raised by `wait()`. A failure that nobody waited
   for stays in the book until the store is closed, which raises it.

Costs: the book looks at the two oldest transfers at every start, so those that nobody waits for are let go one by one.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

import torch

from overspill import _native
from overspill.errors import StorageError

_CURES = {
    errno.ENOSPC: "; free space on its file system or give another --ssd-dir",
    errno.EDQUOT: "; raise the disk quota or give another --ssd-dir",
    errno.EIO: "; the drive reports a fault: look at the kernel log, and give another --ssd-dir",
}


class DamagedBlock(StorageError):
    """A block that was read has not the checksum that was expected; `RecordStore` says which record's.

    Attributes:
        block: counted from the first byte of the read.
    """

    def __init__(self, name: str, block: int, expected: int, found: int) -> None:
        super().__init__(f"{name} is damaged: block {block} has CRC-32C {found:08x}, {expected:08x} was expected")
        self.block, self.expected, self.found = block, expected, found


def build_storage_error(
    *, operation: str, name: str, path: str, offset: int, wanted_bytes: int, done_bytes: int, error_number: int | None
) -> StorageError:
    """The one form in which a failed read or write is reported.

    Args:
        operation: `read` or `write`.
        offset: first byte of the failed part in the file (not in the extent).
        wanted_bytes: bytes of the failed part; `done_bytes` of them were moved.
        error_number: the errno; None when the system call moved nothing and gave none, as at the end of a file.
    """
    if error_number is None:
        what, reason = f"short {operation} of {name}", "no error, but no more bytes: was the file cut?"
    else:
        what = f"{operation} of {name} failed"
        reason = f"{errno.errorcode.get(error_number, error_number)}: {os.strerror(error_number)}"
    verb = "got" if operation == "read" else "wrote"
    cure = _CURES.get(error_number or 0, "")
    return StorageError(f"{what}: wanted {wanted_bytes} B at offset {offset} of {path}, {verb} {done_bytes} B ({reason}){cure}")


def validate_buffer(name: str, buffer: torch.Tensor) -> None:
    """Raise ValueError unless `buffer` is a contiguous uint8 CPU tensor of shape [n]."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise ValueError(
            f"a buffer for {name} is a contiguous one-dimensional uint8 tensor on the CPU, got {buffer.dtype} of shape "
            f"{tuple(buffer.shape)} with strides {buffer.stride()} on {buffer.device}"
        )


class BookedTransfer(Protocol):
    """What a book asks of a transfer."""

    name: str

    @property
    def is_done(self) -> bool: ...
    def failure(self) -> BaseException | None:
        """Of a transfer that has ended."""
        ...


class TransferBook:
    """The transfers of one store: what is in flight, and what failed unseen; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[BookedTransfer, None] = {}
        self._unseen: dict[BookedTransfer, BaseException] = {}

    def add(self, transfer: BookedTransfer) -> None:
        """Note a transfer that has been started; let go of old ones that have ended."""
        with self._lock:
            self._entries[transfer] = None
            for oldest in [old for old, _ in zip(self._entries, range(2), strict=False) if old.is_done]:
                self._move_unseen(oldest)

    def settle(self, transfer: BookedTransfer) -> None:
        """The transfer has ended and its caller knows how."""
        with self._lock:
            self._entries.pop(transfer, None)
            self._unseen.pop(transfer, None)

    def num_in_flight(self, name: str) -> int:
        with self._lock:
            return sum(transfer.name == name and not transfer.is_done for transfer in self._entries)

    def raise_unseen(self) -> None:
        """Raise a failure that nobody waited for (rule 3), if there is one; nothing is in flight any more."""
        with self._lock:
            for transfer in list(self._entries):
                self._move_unseen(transfer)
            unseen = list(self._unseen.values())
            self._unseen.clear()
        if unseen:
            raise StorageError(f"{len(unseen)} failed transfers were never waited for; the first: {unseen[0]}") from unseen[0]

    def _move_unseen(self, transfer: BookedTransfer) -> None:
        del self._entries[transfer]
        error = transfer.failure()
        if error is not None:
            self._unseen[transfer] = error


class EngineTransfer:
    """A copy that the native engine does. Meets the protocol `CheckedTransfer`.

    Args:
        native: has been submitted; `buffer` is what it was given.
        explain: a failed transfer's error.
    """

    __slots__ = ("_book", "_buffer", "_engine", "_error", "_explain", "_native", "name")

    def __init__(
        self,
        book: TransferBook,
        name: str,
        engine: _native.IoEngine,
        native: _native.IoTransfer,
        buffer: torch.Tensor,
        explain: Callable[[str, _native.IoTransfer], StorageError | None],
    ) -> None:
        self._book, self.name, self._engine, self._native, self._explain = book, name, engine, native, explain
        self._buffer: torch.Tensor | None = buffer.detach()  # keeps the memory, whatever becomes of the caller's tensor
        self._error: StorageError | None = None
        book.add(self)

    @property
    def is_done(self) -> bool:
        return self._native.is_done

    def wait(self) -> None:
        """Block until the copy has ended; raise its failure."""
        self._native.wait()
        self._book.settle(self)
        self._buffer = None
        error = self.failure()
        if error is not None:
            raise error

    @property
    def ended_s(self) -> float:
        """When it ended, by `time.perf_counter`; 0 before."""
        return self._native.ended_s

    def cancel(self) -> bool:
        """Whether the copy was taken back: nothing has moved and nothing will; `wait()` then raises. False: it goes on."""
        return self._engine.cancel(self._native)

    @property
    def checksums(self) -> tuple[int, ...]:
        """CRC-32C of each block, after `wait()`, if they were asked for."""
        return tuple(self._native.checksums)

    def failure(self) -> StorageError | None:
        if self._error is None:
            self._error = self._explain(self.name, self._native)
        return self._error


class ThreadTransfer:
    """A copy that runs on a Python thread. Meets the protocol `CheckedTransfer`.

    Args:
        move: does the copy and returns the checksums of its blocks.
    """

    def __init__(self, book: TransferBook, name: str, move: Callable[[], tuple[int, ...]], pool: Executor) -> None:
        self._book, self.name = book, name
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self.checksums: tuple[int, ...] = ()
        self.ended_s = 0.0
        """When it ended, by `time.perf_counter`; 0 before."""
        book.add(self)
        pool.submit(self._run, move)

    @property
    def is_done(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        """Block until the copy has ended; raise its failure."""
        self._ended.wait()
        self._book.settle(self)
        if self._error is not None:
            raise self._error

    def failure(self) -> BaseException | None:
        return self._error

    def _run(self, move: Callable[[], tuple[int, ...]]) -> None:
        try:
            self.checksums = move()
        except BaseException as error:  # it belongs to whoever waits, not to this worker thread
            self._error = error
        self.ended_s = time.perf_counter()
        self._ended.set()
