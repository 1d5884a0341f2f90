"""A child process that may fail, hang, or be killed for memory: whatever happens, there is a result that says what.

Standard library only. The child is started in a session of its own; when it ends, or is ended, so is what it started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

TAIL_BYTES = 6000
"""Of the child's output, kept with a failure."""
REAP_S = 10.0
"""For a killed child to be gone, before its end is asked of the system itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a child ended."""

    return_code: int | None
    """None: it ran past its limit and was ended."""
    wall_s: float
    output_tail: str

    def describe_failure(self, limit_s: float) -> str:
        """What went wrong, as one sentence and the last lines that look like an error."""
        if self.return_code is None:
            head = f"ran past its limit of {limit_s:.0f} s"
        elif self.return_code < 0:
            head = f"ended by signal {signal.Signals(-self.return_code).name} after {self.wall_s:.0f} s"
        else:
            head = f"exit status {self.return_code} after {self.wall_s:.0f} s"
        errors = [line.strip() for line in self.output_tail.splitlines() if "Error" in line or "Not enough" in line]
        return "; ".join([head, *errors[-2:]])


def run_attempt(command: list[str], *, limit_s: float, environment: dict[str, str] | None = None) -> Outcome:
    """Run `command` to its end or to `limit_s`; its output goes to a file, of which the end is kept, and to the screen.

    A SIGTERM that this process gets meanwhile ends the child too, and then this process (SystemExit). The handler only ends the child: an
    exception from it could come while `subprocess` holds its lock, and the next wait would be for ever.
    """
    children: list[int] = []
    ended_by: list[int] = []

    def end(number: int, frame: object) -> None:
        ended_by.append(number)
        for child_pid in children:
            _end_group(child_pid)

    before = signal.signal(signal.SIGTERM, end)
    started = time.monotonic()
    try:
        with tempfile.TemporaryFile() as output:
            child = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **(environment or {})}
            )
            children.append(child.pid)
            if ended_by:  # while it was started
                _end_group(child.pid)
            try:
                code: int | None = child.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # Also after an ordinary end: a worker process that outlives its parent would hold memory that the next run measures.
                _end_group(child.pid)
                reap(child)
                children.clear()
            size = output.seek(0, os.SEEK_END)
            output.seek(max(0, size - TAIL_BYTES))
            tail = output.read().decode(errors="replace")
    finally:
        signal.signal(signal.SIGTERM, before)
    if ended_by:
        raise SystemExit(128 + ended_by[0])
    print(tail[-1500:], flush=True)
    return Outcome(return_code=code, wall_s=time.monotonic() - started, output_tail=tail)


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def reap(child: subprocess.Popen[bytes]) -> None:
    """Wait for a child that was killed. An exception from a signal handler may have come while `Popen` held its lock; a wait with a limit
    gives up asking for that lock."""
    try:
        child.wait(timeout=REAP_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child.pid, 0)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that may not be there, or not be whole."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return dict(json.loads(path.read_text()))
    return {}
