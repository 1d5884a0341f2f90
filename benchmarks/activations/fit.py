"""The largest micro-batch of a mode in a share of the device, and its speed there.

How, cheaply: the peaks of two small micro-batches give a line (weights and gradients at its foot), the line a guess, and a few steps say
whether it fits; `bounds.largest_rows` says what to try next, as long as there is time. torch's allocator is held to the share less what is
outside of it (CUDA's context and the kernels, some 0.5 GiB), so what it cannot give is an OutOfMemoryError and not a guess.

Our moving modes take a budget for what may stay (`device_budget`), and slow down rather than fail. For them the line is that of a step
in which everything leaves; the budget is what the share leaves beside it. Host memory is a limit of its own (`host_limited`), the same for
ours and for others' tools: without one these would take all that the machine has. No keep comes in between (it would not fit).

On the CPU there is no peak: one size is tried, so that the code runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bounds import largest_rows
from modes import MODES, Missing, Places, context, peer_bytes
from nets import recompute
from steps import LEAST_STEPS, MOST_TIMED_S, Bench, without_collector

USABLE_FRACTION = 0.97
"""Of the share: pieces that the allocator cannot use. Chosen."""
MOST_TRIALS = 4
MOST_TRIALS_S = 14.0
"""Of a mode: once something fits, no further try is begun after it. Chosen."""
MOST_ROWS = 256
SETTLING_STEPS = 5
"""Of modes with adaptive amounts; 2 of others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line:
    """Peak of so many rows: foot + slope · rows."""

    foot_bytes: float
    slope_bytes: float
    saved_bytes: float
    """Of a row, what needs host memory if it does not stay: A, or what is not rebuilt of it."""

    def rows(self, limit_bytes: float) -> int:
        return int((limit_bytes - self.foot_bytes) / max(1.0, self.slope_bytes))


def fit_mode(bench: Bench, mode: str, places: Places, share_bytes: int, *, steps: int, is_late: Callable[[], bool]) -> dict[str, Any]:
    """The row of a mode: `rows`, `tokens_per_s`, and what was tried."""
    begun_s, tried = time.perf_counter(), {}

    def has_no_time() -> bool:
        return is_late() or time.perf_counter() - begun_s > MOST_TRIALS_S

    try:
        with _limited(bench, share_bytes) as inside_bytes:
            line = _fit(bench, mode, places, inside_bytes, steps, has_no_time, tried)
    except Missing as reason:
        line = {"missing": str(reason)}
    except Exception as error:
        line = {"error": f"{type(error).__name__}: {error}"[:600], "is_oom": isinstance(error, torch.OutOfMemoryError)}
    bench.set_rows(bench.shape.rows)
    bench.clean()
    return {**line, "share_bytes": share_bytes, "tried": tried, "mode_wall_s": round(time.perf_counter() - begun_s, 2)}


def _fit(
    bench: Bench, mode: str, places: Places, inside_bytes: int, steps: int, has_no_time: Callable[[], bool], tried: dict[int, Any]
) -> dict[str, Any]:
    is_moving = MODES[mode].tier is not None and MODES[mode].amount == "adaptive"
    peaks = _line(bench, mode, places, is_moving) if bench.is_cuda else _Line(foot_bytes=0, slope_bytes=inside_bytes, saved_bytes=0)
    usable = USABLE_FRACTION * inside_bytes
    most, by_host = _most_rows(bench, mode, places, peaks, usable, is_moving)
    host_limited, most = by_host < most, min(most, by_host)
    predicted = most if is_moving else min(most, peaks.rows(usable))
    fits: dict[int, bool] = {}
    best: dict[str, Any] = {}
    rows = largest_rows(fits=fits, predicted=predicted, most=most)
    while rows is not None and len(fits) < (MOST_TRIALS if bench.is_cuda else 1) and not (best and has_no_time()):
        budget = int(max(0, usable - peaks.foot_bytes - peaks.slope_bytes * rows)) if is_moving and bench.is_cuda else None
        result = _try(bench, mode, places, rows, steps, budget, is_moving)
        fits[rows], tried[rows] = "error" not in result, result
        if fits[rows] and rows > best.get("rows", 0):
            best = {**result, "rows": rows, "tokens_per_s": bench.shape.tokens(rows) / result["step_s"]}
        rows = largest_rows(fits=fits, predicted=predicted, most=most)
    if not best:
        return {"error": f"none of {sorted(fits)} rows fits into {inside_bytes} B", "is_oom": True}
    is_known = rows is None
    return {**best, "is_largest_known": is_known, "host_limited": host_limited and best["rows"] == most, "most_rows": most}


def _most_rows(bench: Bench, mode: str, places: Places, peaks: _Line, usable: float, is_moving: bool) -> tuple[int, int]:
    """Rows beyond which no try is worth it: for the device, where it is the moving that fits, and for host memory."""
    by_device = max(1, min(MOST_ROWS, peaks.rows(usable))) if is_moving else MOST_ROWS
    if not peaks.saved_bytes:
        return by_device, MOST_ROWS
    if is_moving:
        # Of each row saved_bytes must rest somewhere: on the host, or in what the share leaves beside the line.
        room = places.most_host_bytes + usable - peaks.foot_bytes
        return by_device, max(1, int(room / (peaks.saved_bytes + peaks.slope_bytes)))
    peer = str(MODES[mode].peer)
    fixed_bytes = peer_bytes(peer, 0, bench.static_bytes / 2)
    return by_device, max(1, int((places.most_host_bytes - fixed_bytes) / peer_bytes(peer, peaks.saved_bytes, 0)))


def _line(bench: Bench, mode: str, places: Places, is_moving: bool) -> _Line:
    """From one step of one row, and one of two."""
    peaks, saved = [], 0.0
    if MODES[mode].peer is not None:
        bench.set_rows(1)
        with _context(bench, "counted", places, None, recompute_as="counted") as active:
            bench.step()
            saved = active.report().rounds[-1].packed_bytes
        bench.clean()
    for rows in (1, 2):
        bench.set_rows(rows)
        with _context(bench, "host-everything" if is_moving else mode, places, None, recompute_as=mode) as active:
            bench.step()
            torch.cuda.reset_peak_memory_stats()
            bench.step()
            peaks.append(torch.cuda.max_memory_allocated())
            if is_moving:
                saved = active.report().rounds[-1].packed_bytes / rows
        bench.clean()
    return _Line(foot_bytes=2 * peaks[0] - peaks[1], slope_bytes=max(1, peaks[1] - peaks[0]), saved_bytes=saved)


def _try(bench: Bench, mode: str, places: Places, rows: int, steps: int, budget: int | None, is_moving: bool) -> dict[str, Any]:
    """A few steps with so many rows; an error if they do not fit."""
    try:
        bench.set_rows(rows)
        with without_collector(), _context(bench, mode, places, budget, recompute_as=mode):
            for _ in range(SETTLING_STEPS if is_moving else 2):
                last_s = bench.step()["step_s"]
            number = min(steps, max(LEAST_STEPS[False], int(MOST_TIMED_S[False] / last_s)))
            timed = [bench.step()["step_s"] for _ in range(number)]
        return {"step_s": statistics.median(timed), "step_s_spread": [min(timed), max(timed)], "device_budget_bytes": budget}
    except torch.OutOfMemoryError as error:
        return {"error": str(error)[:200]}
    finally:
        bench.clean()


@contextlib.contextmanager
def _context(bench: Bench, mode: str, places: Places, budget: int | None, *, recompute_as: str) -> Any:
    with contextlib.ExitStack() as stack:
        if MODES[recompute_as].is_checkpointed:
            stack.callback(recompute(bench.net, range(bench.num_blocks)))
        chosen = dataclasses.replace(MODES[mode], recompute=MODES[recompute_as].recompute)
        yield stack.enter_context(bench.entered(context(chosen, bench.net, places, None, device_budget=budget)))


@contextlib.contextmanager
def _limited(bench: Bench, share_bytes: int) -> Any:
    """torch's allocator gives no more than the share less what is outside of it; gives that in bytes."""
    if not bench.is_cuda:
        yield share_bytes
        return
    free, total = torch.cuda.mem_get_info(bench.device)
    inside = share_bytes - max(0, total - free - torch.cuda.memory_reserved(bench.device))
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, inside) / total))
    try:
        yield inside
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
