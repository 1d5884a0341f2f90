"""A run while it runs: one line on the screen, one JSON object a step in a file.

`MetricsFile` is the record: a line is flushed as its step ends, so what is on file happened, whatever comes after. It never ends a run:
what a run has learnt is worth more than a line about it.
`LiveLine` is for a person: rewritten in place on a terminal; elsewhere (a log file, a pipe) a new line at most every
`PLAIN_INTERVAL_S` seconds and for the last step.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from overspill.errors import StorageError
from overspill.spec.prediction import MeasuredStep, compare
from overspill.spec.rates import Floor
from overspill.spec.report import Prediction
from overspill.units import format_bytes, format_seconds

PLAIN_INTERVAL_S = 10.0
"""Chosen, not tuned: a log of an hour stays readable."""

MOST_WAITING_ROWS = 10_000
"""Rows of some 350 B that wait for room on the drive; beyond that the oldest are given up. Chosen, not tuned."""

LOG = logging.getLogger("overspill")

_SPEED_WEIGHT = 0.2
"""Weight of the newest step in the smoothed step time behind the ETA. Chosen, not tuned."""


class StepFacts(MeasuredStep, Protocol):
    """What a step report must say to be shown, recorded, and held against its prediction; `overspill.spec.report.StepReport` does."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def lr(self) -> float: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def tokens_per_s(self) -> float: ...
    @property
    def pinned_bytes(self) -> int: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def lane_busy_s(self) -> Mapping[str, float]: ...
    @property
    def exposed_s(self) -> Mapping[str, float]: ...
    @property
    def lane_bytes(self) -> Mapping[str, int]: ...
    @property
    def floor(self) -> Floor | None: ...
    @property
    def step_over_floor(self) -> float | None: ...
    @property
    def trace_s(self) -> float: ...


def metrics_row(report: StepFacts, prediction: Prediction | None = None) -> dict[str, Any]:
    """One step as the metrics file has it; bytes and seconds are base units, what is not finite is null (JSON has no NaN).

    The time of its lanes are objects, lane -> seconds or bytes; the floor is null if nobody asked for the rates. `predicted` and
    `missed_by` (measured less predicted, over measured) are objects by figure, in which null is what nothing measured stands for; they are
    null where the step was not predicted.
    """
    row: dict[str, float | int | None] = {
        "step": report.step,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "tokens": report.num_tokens,
        "tokens_per_s": report.tokens_per_s,
        "step_s": report.step_s,
        "device_peak_bytes": report.device_peak_bytes,
        "host_peak_bytes": report.host_peak_bytes,
        "pinned_bytes": report.pinned_bytes,
        "ssd_read_bytes": report.ssd_read_bytes,
        "ssd_written_bytes": report.ssd_written_bytes,
    }
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
    lanes: dict[str, Any] = {
        "lane_busy_s": _rounded(report.lane_busy_s),
        "exposed_s": _rounded(report.exposed_s),
        "lane_bytes": dict(report.lane_bytes),
        "floor_s": report.floor.floor_s if report.floor is not None else None,
        "floor_bound_by": report.floor.bound_by if report.floor is not None else None,
        "step_over_floor": report.step_over_floor,
        "trace_s": report.trace_s,
    }
    compared = compare(prediction, report) if prediction is not None else None
    lanes["predicted"] = dict(compared.predicted) if compared is not None else None
    lanes["missed_by"] = _rounded_misses(compared.missed_by) if compared is not None else None
    return {**finite, **lanes, **({"skipped": True} if report.skipped else {})}


def _rounded_misses(misses: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is None else round(value, 4) for name, value in misses.items()}


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """To the microsecond: a row stays a line that a person can read."""
    return {lane: round(value, 6) for lane, value in seconds.items() if value}


class MetricsFile:
    """Appends one JSON object a step; a context manager. An older file of that name is replaced, as a whole or not at all.

    A row that cannot be written is taken back, so the file always ends with a whole row. It waits, said once, and is written before the
    next one that can be.

    Args:
        resume_after: keep the older file's rows up to this step; None: none of them.
        warn: takes what a person should know: rows wait, they no longer do, they are lost.

    Raises:
        StorageError: the file cannot be created.
    """

    def __init__(self, path: Path, *, resume_after: int | None = None, warn: Callable[[str], None] = LOG.warning) -> None:
        self.path = path
        self._warn = warn
        self._waiting: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=MOST_WAITING_ROWS)
        """(step, row) of what could not be written."""
        self._due: tuple[StepFacts, float | None, Prediction | None] | None = None
        """A step whose row can wait for the next one."""
        try:
            kept = _rows_up_to(path, resume_after) if resume_after is not None else []
            replace_text(path, "".join(kept))
            self._file = path.open("ab", buffering=0)  # no buffer: nothing is left that closing would have to write
        except OSError as error:
            raise StorageError(
                f"cannot create {path}: {error.strerror} (errno {error.errno}); make room, or choose another --out"
            ) from error

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.write_due()
        if self._waiting:
            self._write_waiting(is_last=True)
        try:
            self._file.close()
        except OSError as failure:
            self._warn(f"cannot close {self.path}: {failure.strerror} (errno {failure.errno}); its last rows may be missing")

    def write(
        self, report: StepFacts, *, held_out_loss: float | None = None, prediction: Prediction | None = None, can_wait: bool = False
    ) -> None:
        """Append one step, with the held-out loss if it was evaluated after it; a failure is a warning, and the row waits.

        Args:
            prediction: of the step's program.
            can_wait: until the next step, `write_due`, or the end: where its time went is then found out while that step computes.
        """
        self.write_due()
        if can_wait:
            self._due = (report, held_out_loss, prediction)
        else:
            self._write_row(report, held_out_loss, prediction)

    def write_due(self) -> None:
        """Append the step that waits for the next one, if there is one."""
        if self._due is not None:
            due, self._due = self._due, None
            self._write_row(*due)

    def _write_row(self, report: StepFacts, held_out_loss: float | None, prediction: Prediction | None) -> None:
        row = metrics_row(report, prediction)
        if held_out_loss is not None:
            row["held_out_loss"] = held_out_loss if math.isfinite(held_out_loss) else None
        self._waiting.append((report.step, (json.dumps(row) + "\n").encode()))
        self._write_waiting()

    def _write_waiting(self, *, is_last: bool = False) -> None:
        """All rows that are not on file, or none of them."""
        first, last = self._waiting[0][0], self._waiting[-1][0]
        try:
            _append(self._file, b"".join(row for _, row in self._waiting))
        except OSError as error:
            what = f"cannot write step {first} to {self.path}: {error.strerror} (errno {error.errno})"
            if is_last:
                self._warn(f"{what}; {len(self._waiting)} rows, to step {last}, are lost; the rows before them are whole")
            elif len(self._waiting) == 1:
                self._warn(f"{what}; the run goes on and keeps up to {MOST_WAITING_ROWS} rows until they can be written; make room")
            return
        if len(self._waiting) > 1 or is_last:
            self._warn(f"going on: {self.path} can be written again; {len(self._waiting)} rows that waited are in it")
        self._waiting.clear()


def replace_text(path: Path, text: str) -> None:
    """Give the file `path` this content: to a name beside it, flushed, renamed. A failure or crash leaves the old file whole.

    Raises:
        OSError: a call failed; what was written beside is removed.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb", buffering=0) as file:
            _append(file, text.encode())
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _append(file: io.FileIO, content: bytes) -> None:
    """Write all of `content` at the end, or nothing of it."""
    start, done = os.fstat(file.fileno()).st_size, 0
    try:
        while done < len(content):
            done += file.write(content[done:])
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(start)
        raise


def _rows_up_to(path: Path, step: int) -> list[str]:
    """The lines of steps up to `step`; a line that a kill cut in half is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            is_kept = False
        if is_kept:
            lines.append(line + "\n")
    return lines


class LiveLine:
    """Shows the newest step; a context manager."""

    def __init__(self, console: Console, *, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self._smoothed_step_s = 0.0
        self._last_printed_s = -PLAIN_INTERVAL_S
        self._held_out: tuple[int, float] | None = None

    def __enter__(self) -> LiveLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, report: StepFacts, *, held_out_loss: float | None = None) -> None:
        """Replace the line by this step's; the newest held-out loss stays in it."""
        if held_out_loss is not None:
            self._held_out = (report.step, held_out_loss)
        fresh = self._smoothed_step_s == 0.0
        self._smoothed_step_s += (report.step_s - self._smoothed_step_s) * (1.0 if fresh else _SPEED_WEIGHT)
        remaining_s = (self._num_steps - report.step) * self._smoothed_step_s
        line = format_step(report, num_steps=self._num_steps, remaining_s=remaining_s, held_out=self._held_out)
        if self._live is not None:
            self._live.update(Text(line), refresh=True)
            return
        now = time.monotonic()
        if now - self._last_printed_s >= PLAIN_INTERVAL_S or report.step == self._num_steps or held_out_loss is not None:
            self._console.print(line, soft_wrap=True, highlight=False)
            self._last_printed_s = now


def format_step(report: StepFacts, *, num_steps: int, remaining_s: float, held_out: tuple[int, float] | None = None) -> str:
    """One step for people.

    Args:
        held_out: the newest held-out loss, and the step after which it was taken.
    """
    parts = [f"step {report.step}/{num_steps}", f"loss {report.loss:.4f}"]
    if report.skipped:
        parts.append("skipped: fp16 gradients overflowed")
    if held_out is not None:
        parts.append(f"held-out {held_out[1]:.4f}" + ("" if held_out[0] == report.step else f" at {held_out[0]}"))
    parts += [
        f"grad {report.grad_norm:.3g}",
        f"lr {report.lr:.2e}",
        f"{report.tokens_per_s:.0f} tokens/s",
        f"host {format_bytes(report.host_peak_bytes)}",
    ]
    if report.device_peak_bytes:
        parts.append(f"device {format_bytes(report.device_peak_bytes)}")
    if report.ssd_read_bytes or report.ssd_written_bytes:
        parts.append(f"ssd r/w {format_bytes(report.ssd_read_bytes)}/{format_bytes(report.ssd_written_bytes)}")
    parts.append(f"ETA {format_seconds(max(remaining_s, 0.0))}")
    return " · ".join(parts)
