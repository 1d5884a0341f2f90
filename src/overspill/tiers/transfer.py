"""A started copy, what it says when it fails, and the book that a store keeps of its copies.

A transfer has one or more **parts** that run on worker threads in any order. Rules:

1. A transfer ends when its last part has ended, also after a failure: before that, some thread may still touch the buffer.
2. The first failure is the transfer's failure; parts that have not begun by then are skipped.
3. The book forgets a transfer that ended well, and one whose failure was raised by `wait()`. A failure that nobody waited
   for stays in the book until the store is closed, which raises it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import torch

from overspill.errors import StorageError

_CURES = {
    errno.ENOSPC: "; free space on its file system or give another --ssd-dir",
    errno.EDQUOT: "; raise the disk quota or give another --ssd-dir",
    errno.EIO: "; the drive reports a fault: look at the kernel log, and give another --ssd-dir",
}


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
    if buffer.device.type != "cpu" or buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"a buffer for {name} is a contiguous one-dimensional uint8 tensor on the CPU, got {buffer.dtype} of shape "
            f"{tuple(buffer.shape)} with strides {buffer.stride()} on {buffer.device}"
        )


class PartsTransfer:
    """A copy in parts; made by `TransferBook.start`. Meets the protocol `Transfer`."""

    def __init__(self, book: TransferBook, name: str, num_parts: int) -> None:
        self._book = book
        self._name = name
        self._num_left = num_parts
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.ended_s: float | None = None
        """When it ended, by `time.perf_counter`; None before."""

    @property
    def is_done(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        """Block until every part has ended; raise the first failure."""
        self._ended.wait()
        if self._error is not None:
            self._book._forget_failure(self)
            raise self._error

    def _run(self, part: Callable[[], None]) -> None:
        try:
            if self._error is None:
                part()
        except BaseException as error:  # it belongs to whoever waits, not to this worker thread
            with self._lock:
                self._error = self._error or error
        with self._lock:
            self._num_left -= 1
            is_last = self._num_left == 0
        if is_last:
            self._book._end(self, self._name, self._error)
            self.ended_s = time.perf_counter()
            self._ended.set()


class TransferBook:
    """The transfers of one store: how many are in flight per extent, and which failed unseen; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight: dict[str, int] = {}
        self._unseen: dict[PartsTransfer, BaseException] = {}

    def start(self, name: str, parts: Sequence[Callable[[], None]], pool: Executor) -> PartsTransfer:
        """Run `parts`, of which there is at least one, on `pool` as one transfer of the extent `name`."""
        assert parts, f"a transfer of {name} has no parts"
        transfer = PartsTransfer(self, name, len(parts))
        with self._lock:
            self._in_flight[name] = self._in_flight.get(name, 0) + 1
        for part in parts:
            pool.submit(transfer._run, part)
        return transfer

    def num_in_flight(self, name: str) -> int:
        with self._lock:
            return self._in_flight.get(name, 0)

    def raise_unseen(self) -> None:
        """Raise a failure that nobody waited for (rule 3), if there is one."""
        with self._lock:
            unseen = list(self._unseen.values())
            self._unseen.clear()
        if unseen:
            raise StorageError(f"{len(unseen)} failed transfers were never waited for; the first: {unseen[0]}") from unseen[0]

    def _end(self, transfer: PartsTransfer, name: str, error: BaseException | None) -> None:
        with self._lock:
            self._in_flight[name] -= 1
            if not self._in_flight[name]:
                del self._in_flight[name]
            if error is not None:
                self._unseen[transfer] = error

    def _forget_failure(self, transfer: PartsTransfer) -> None:
        with self._lock:
            self._unseen.pop(transfer, None)
