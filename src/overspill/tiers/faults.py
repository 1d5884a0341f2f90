"""Faults on purpose: system calls that fail, stop half-way, lie, or end the process, at the call you name.

`FaultInjector` meets `FileCalls` and stands before `os`; give it to an `SsdStore`, a `FakeStore` or a `Session`. It counts
every call from 0, so a clean run says how many there are, and a test can then break each of them once:

    clean = FaultInjector()
    run(calls=clean)
    for index, operation in enumerate(clean.log):
        run(calls=FaultInjector(Fault(kind=FaultKind.EIO, call_index=index)))

The faults themselves are a native table (csrc/include/overspill/faults.hpp): the I/O engine's threads ask it before every call, and so
do the calls below, which Python makes itself (manifests, renames). One counter numbers all of them.

Order of calls: a store with one thread has the same order in every run.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import mmap
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch

from overspill import _native

_PAGE = 4096


class FaultKind(enum.StrEnum):
    """What happens to a call."""

    EIO = "eio"
    """It fails and moves nothing."""
    ENOSPC = "enospc"
    """It fails for want of space and moves nothing; reads are not touched."""
    SHORT = "short"
    """It moves the first half, in whole pages, and says so: allowed at any time, and no error. Other calls are not touched."""
    TORN = "torn"
    """Only the first half reaches its target, but it says that all did, as after a power failure. Other calls are not touched."""
    DELAYED = "delayed"
    """It takes `delay_s` longer."""
    FLIPPED = "flipped"
    """One bit of what it moves is wrong. Other calls are not touched."""
    KILLED = "killed"
    """The first half is moved, then the process is killed as by `kill -9`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    kind: FaultKind
    call_index: int
    """The call that it happens to, counted from 0 over all operations."""
    num_calls: int = 1
    """How many calls in a row, this one included."""
    delay_s: float = 0.05
    """No effect but for DELAYED."""
    moved_bytes: int | None = None
    """What a SHORT call says it moved, 0 included; None: half, in whole pages. No effect for the other kinds."""


class FaultInjector:
    """System calls with faults; thread-safe. Meets `FileCalls`."""

    def __init__(self, *faults: Fault) -> None:
        self.table = _native.FaultTable(
            [
                (str(fault.kind), fault.call_index, fault.num_calls, fault.delay_s, -1 if fault.moved_bytes is None else fault.moved_bytes)
                for fault in faults
            ]
        )
        """What an `SsdStore` gives to its engine."""

    @property
    def log(self) -> list[str]:
        """The operation of every call so far: preadv, pwritev, fsync, replace, unlink; read, write of a `FakeStore`."""
        return self.table.log

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, /) -> int:
        view = memoryview(buffers[0])
        fault = self._next("preadv")
        if fault is None or fault.kind is FaultKind.ENOSPC:
            return os.preadv(fd, [view], offset)
        half = _half(len(view))
        if fault.kind is FaultKind.SHORT:
            return os.preadv(fd, [view[: _shorter(fault, len(view))]], offset)
        if fault.kind is FaultKind.KILLED:
            os.preadv(fd, [view[:half]], offset)
            _end_process()
        moved = os.preadv(fd, [view], offset)
        if fault.kind is FaultKind.TORN:
            view[half:] = bytes(len(view) - half)
        elif fault.kind is FaultKind.FLIPPED and moved:
            view[moved // 2] ^= 0x10
        return moved

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int, /) -> int:
        view = memoryview(buffers[0])
        fault = self._next("pwritev")
        if fault is None:
            return os.pwritev(fd, [view], offset)
        half = _half(len(view))
        if fault.kind is FaultKind.SHORT:
            return os.pwritev(fd, [view[: _shorter(fault, len(view))]], offset)
        if fault.kind in (FaultKind.TORN, FaultKind.KILLED):
            os.pwritev(fd, [view[:half]], offset)
            if fault.kind is FaultKind.KILLED:
                _end_process()
            return len(view)
        if fault.kind is FaultKind.FLIPPED:
            wrong = mmap.mmap(-1, len(view))  # page-aligned, as direct I/O wants it
            wrong[:] = view
            wrong[len(view) // 2] ^= 0x10
            return os.pwritev(fd, [wrong], offset)
        return os.pwritev(fd, [view], offset)

    def fsync(self, fd: int, /) -> None:
        self._apply_to_other("fsync")
        os.fsync(fd)

    def replace(self, source: Any, target: Any, /) -> None:
        self._apply_to_other("replace")
        os.replace(source, target)

    def unlink(self, path: Any, /) -> None:
        self._apply_to_other("unlink")
        os.unlink(path)

    def copy(self, operation: str, target: torch.Tensor, source: torch.Tensor) -> None:
        """A transfer of a `FakeStore`: uint8 tensors of one shape.

        Raises:
            OSError: the fault says so.
        """
        fault = self._next(operation)
        if fault is not None and fault.kind is FaultKind.KILLED:
            _end_process()
        target.copy_(source)
        if fault is not None and fault.kind is FaultKind.TORN:
            target[_half(target.numel()) :].zero_()
        elif fault is not None and fault.kind is FaultKind.FLIPPED and target.numel():
            target[target.numel() // 2] ^= 0x10

    def _next(self, operation: str) -> Fault | None:
        """Count one call; the fault for it. What only fails or waits is done here."""
        kind, call_index, num_calls, delay_s, moved_bytes = self.table.next(operation)
        if kind == "none":
            return None
        fault = Fault(
            kind=FaultKind(kind),
            call_index=call_index,
            num_calls=num_calls,
            delay_s=delay_s,
            moved_bytes=None if moved_bytes < 0 else moved_bytes,
        )
        if fault.kind is FaultKind.EIO:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault.kind is FaultKind.ENOSPC and operation not in ("preadv", "read", "fsync", "unlink"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault.kind is FaultKind.DELAYED:
            time.sleep(fault.delay_s)
        return fault

    def _apply_to_other(self, operation: str) -> None:
        fault = self._next(operation)
        if fault is not None and fault.kind is FaultKind.KILLED:
            _end_process()


def _half(num_bytes: int) -> int:
    """About half, in whole pages where there is more than one (direct I/O moves nothing else)."""
    return num_bytes // 2 // _PAGE * _PAGE if num_bytes >= 2 * _PAGE else num_bytes // 2


def _shorter(fault: Fault, num_bytes: int) -> int:
    """What a short call moves: all of a single page, which cannot be cut, and never nothing unless the fault says so."""
    if fault.moved_bytes is not None:
        return min(fault.moved_bytes, num_bytes)
    return num_bytes if num_bytes in (1, _PAGE) else max(1, _half(num_bytes))


def _end_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
