"""The system calls behind everything durable, and what is done when a file system is full.

`FileCalls` is the seam at which faults are injected (`tiers/faults.py`): the module `os` meets it, and so does anything that
stands before `os`. Checkpoints read, write, flush, rename and remove through it; a store's data moves in the native engine, which
asks the injector's table instead (`FaultInjector.table`), and its flushes come through here.

Full means waiting: a run of days must not end because a disk filled up for a minute. Whoever meets `ENOSPC` says so once,
tries again every `poll_s`, and goes on where it was; the bytes are still in memory, so nothing can be lost by waiting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")
LOG = logging.getLogger("overspill")
FULL = (errno.ENOSPC, errno.EDQUOT)


class FileCalls(Protocol):
    """The functions of `os` that move bytes, or make their names durable."""

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, /) -> int: ...
    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int, /) -> int: ...
    def fsync(self, fd: int, /) -> None: ...
    def replace(self, source: Any, target: Any, /) -> None: ...
    def unlink(self, path: Any, /) -> None: ...


OS_CALLS: FileCalls = os


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpacePolicy:
    """What to do on a full file system."""

    poll_s: float = 5.0
    """Time between two tries. Chosen, not tuned."""
    max_wait_s: float | None = None
    """After this the write fails; None: wait until there is space or the run is stopped. 0: fail at once."""
    report: Callable[[str], None] = LOG.warning
    """Takes the message when a pause begins and when it ends; may be called on any thread."""
    gives_up: Callable[[], bool] = lambda: False
    """Asked at every try, on any thread; once it says yes, the write fails."""


class SpaceWaiter:
    """Repeats calls that fail for want of space; thread-safe.

    `stop()` ends all pauses with the failure, now and in future; `interrupt()` does so until `proceed()`.
    """

    def __init__(self, policy: SpacePolicy) -> None:
        self._policy = policy
        self._ends = threading.Condition()
        self._is_stopped = False
        self._is_interrupted = False
        self._num_paused = 0

    def stop(self) -> None:
        with self._ends:
            self._is_stopped = True
            self._ends.notify_all()

    def interrupt(self) -> None:
        with self._ends:
            self._is_interrupted = True
            self._ends.notify_all()

    def proceed(self) -> None:
        with self._ends:
            self._is_interrupted = False

    def _has_ended(self) -> bool:
        return self._is_stopped or self._is_interrupted

    def may_retry(self, path: object, error_number: int, waited_s: float) -> bool:
        """Whether a call that failed with ENOSPC or EDQUOT is to be made again; pauses before it says yes.

        Args:
            error_number: 0: the call has succeeded, after `waited_s`.
            waited_s: time since its first failure; 0 at the first.
        """
        policy = self._policy
        if not error_number:
            if self._leave_pause():
                policy.report(f"going on: {path} can be written again after {waited_s:.1f} s")
            return True
        if not waited_s and (policy.max_wait_s == 0 or policy.gives_up() or self._has_ended()):
            return False
        if not waited_s and self._enter_pause():
            policy.report(
                f"paused: {path} cannot be written ({errno.errorcode[error_number]}); free space on its file system and the run "
                f"goes on with nothing lost (looked at every {policy.poll_s:g} s), or stop it with Ctrl-C"
            )
        is_over = policy.gives_up() or (policy.max_wait_s is not None and waited_s >= policy.max_wait_s)
        if not is_over:
            with self._ends:
                is_over = self._ends.wait_for(self._has_ended, timeout=policy.poll_s)
        if is_over:
            self._leave_pause()
        return not is_over

    def _enter_pause(self) -> bool:
        """Whether this is the only call that waits: the first one speaks for all."""
        with self._ends:
            self._num_paused += 1
            return self._num_paused == 1

    def _leave_pause(self) -> bool:
        """Whether no call waits any more."""
        with self._ends:
            self._num_paused -= 1
            return self._num_paused == 0

    def call(self, path: object, function: Callable[[], Result]) -> Result:
        """The result of `function()`, tried again while it raises ENOSPC or EDQUOT; other errors pass through."""
        started_s: float | None = None
        while True:
            try:
                result = function()
            except OSError as error:
                waited_s = 0.0 if started_s is None else time.monotonic() - started_s
                started_s = time.monotonic() if started_s is None else started_s
                if error.errno not in FULL or not self.may_retry(path, error.errno, waited_s):
                    raise
                continue
            if started_s is not None:
                self.may_retry(path, 0, time.monotonic() - started_s)
            return result


def write_durably(path: Path, content: bytes, *, calls: FileCalls, space: SpaceWaiter) -> None:
    """Put `content` under the name `path` so that a crash leaves either the old file or the new one, never a part.

    To a name beside it, flushed, renamed, and the rename flushed.

    Raises:
        OSError: a call failed; what was written beside is removed.
    """
    partial = path.with_name(f".{path.name}.partial")
    fd = space.call(partial, lambda: os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    try:
        try:
            view = memoryview(content)
            done = 0
            while done < len(view):
                moved = space.call(partial, lambda at=done: calls.pwritev(fd, [view[at:]], at))  # type: ignore[misc]
                if moved == 0:
                    raise OSError(errno.EIO, f"wrote {done} of {len(view)} B")
                done += moved
            calls.fsync(fd)
        finally:
            os.close(fd)
        space.call(path, lambda: calls.replace(partial, path))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    flush_folder(path.parent, calls)


def read_whole(path: Path, *, calls: FileCalls) -> bytes:
    """The content of a small file, through the seam."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = bytearray(os.fstat(fd).st_size)
        done = 0
        while done < len(content):
            moved = calls.preadv(fd, [memoryview(content)[done:]], done)
            if moved == 0:
                raise OSError(errno.EIO, f"got {done} of {len(content)} B")
            done += moved
        return bytes(content)
    finally:
        os.close(fd)


def flush_folder(folder: Path, calls: FileCalls) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        calls.fsync(fd)
    finally:
        os.close(fd)
