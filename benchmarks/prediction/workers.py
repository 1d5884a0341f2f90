"""Fresh processes that have loaded everything before they are needed, several at a time, while nothing is measured.

Rules:

1. A worker is started by exec, does one run and ends; no two runs share a process, so contexts, libraries and peaks are a fresh one's.
2. Workers load side by side, and nothing is measured before all of them wait for an order: loading takes a core each.
3. Whatever becomes of a worker, there is an `Outcome`; one that runs past its limit is asked where its threads are, and ended with all that
   it started. So is one whose run is given up by an exception here (Ctrl-C, SIGTERM).
4. One that is still waiting when this process ends, ends by itself: its input does.

Standard library only. A waiting worker holds some 0.4 GB of host memory and nothing of the device.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attempt import Outcome, reap

LOADING_LIMIT_S = 120.0
"""Of one batch. Chosen: many times what loading takes from a slow disk."""
STACKS_S = 1.0
"""That a worker past its limit has for writing the stacks of all its threads, before it is ended."""
TAIL_BYTES = 24_000
"""Of a worker's output, from its end: room for the stacks of all threads of a run that hangs."""
MOST_WAITING = 12
"""Chosen: what a call has time for needs two or three batches."""


def take_order(ready_fd: int) -> dict[str, Any] | None:
    """The worker's own side: say that all is loaded, and wait for the order. None: nobody gives one any more."""
    os.write(ready_fd, b"!")
    os.close(ready_fd)
    line = sys.stdin.readline()
    return dict(json.loads(line)) if line.strip() else None


def write_stacks_when_asked() -> None:
    """The worker's own side: SIGUSR1 has the stacks of all threads written to the standard error, also where the interpreter hangs.

    To be asked only of a process that is ended next: reading the stacks of threads that run can crash it.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


class Worker:
    """One process.

    Args:
        command: its program; the number of the file to tell that it is ready is added.
    """

    def __init__(self, command: Sequence[str]) -> None:
        ready, told = os.pipe()
        self._ready = os.fdopen(ready, "rb", buffering=0)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the worker)
        try:
            self._child = subprocess.Popen(
                [*command, str(told)],
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(told,),
            )
        except BaseException:
            self._ready.close()
            self._output.close()
            raise
        finally:
            os.close(told)

    def wait_until_ready(self, limit_s: float) -> bool:
        """Whether it is, within the limit; False too where it has ended."""
        found, _, _ = select.select([self._ready], [], [], max(0.0, limit_s))
        return bool(found) and self._ready.read(1) == b"!"

    def run(self, order: dict[str, Any], *, limit_s: float) -> Outcome:
        """Let it do `order`, to its end or to `limit_s`, and end it, also where an exception comes while it runs."""
        started = time.monotonic()
        try:
            with contextlib.suppress(BrokenPipeError):
                assert self._child.stdin is not None
                self._child.stdin.write(json.dumps(order).encode() + b"\n")
                self._child.stdin.flush()
            try:
                code: int | None = self._child.wait(timeout=max(0.0, limit_s))
            except subprocess.TimeoutExpired:
                code = None
                self._ask_for_stacks()
            wall_s = time.monotonic() - started
        finally:
            tail = self.close()
        return Outcome(return_code=code, wall_s=wall_s, output_tail=tail)

    def _ask_for_stacks(self) -> None:
        self._child.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=STACKS_S)

    def close(self) -> str:
        """End it and what it started; the end of what it wrote. Twice is once."""
        if self._output.closed:
            return ""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        reap(self._child)
        with contextlib.suppress(BrokenPipeError):
            assert self._child.stdin is not None
            self._child.stdin.close()
        self._ready.close()
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - TAIL_BYTES))
        tail = self._output.read().decode(errors="replace")
        self._output.close()
        return tail


class Crew:
    """Workers for runs that come one after the other.

    Args:
        script: what each runs.
        num_waiting: most at a time; None: two cores stay free, `MOST_WAITING` at most.
    """

    def __init__(self, script: Path, *, num_waiting: int | None = None) -> None:
        self._command = (sys.executable, str(script))
        self._most = num_waiting or max(1, min(MOST_WAITING, (os.cpu_count() or 1) - 2))
        self._waiting: list[Worker] = []
        self.loading_s = 0.0
        """Spent on waiting for batches."""

    def take(self, num_wanted: int) -> Worker:
        """A worker that is ready; if none is, as many as are wanted load first.

        Args:
            num_wanted: by this run and those after it.

        Raises:
            RuntimeError: it cannot load; with the end of what it wrote.
        """
        if not self._waiting:
            self._load(min(self._most, max(1, num_wanted)))
        return self._waiting.pop(0)

    @property
    def num_ready(self) -> int:
        """Workers that can be taken without loading any."""
        return len(self._waiting)

    def _load(self, number: int) -> None:
        started = time.monotonic()
        self._waiting = [Worker(self._command) for _ in range(number)]
        broken: list[Worker] = []
        for worker in list(self._waiting):
            if not worker.wait_until_ready(LOADING_LIMIT_S - (time.monotonic() - started)):
                self._waiting.remove(worker)
                broken.append(worker)
        tails = [worker.close() for worker in broken]
        self.loading_s += time.monotonic() - started
        if not self._waiting:
            raise RuntimeError(f"none of {number} processes came to load torch and overspill within {LOADING_LIMIT_S:.0f} s: {tails[0]}")

    def close(self) -> None:
        for worker in self._waiting:
            worker.close()
        self._waiting = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def on_termination(act: Callable[[], None]) -> None:
    """Let SIGTERM end this process by way of `act` and an ordinary exit."""

    def leave(number: int, frame: object) -> None:
        act()
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
