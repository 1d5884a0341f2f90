"""Steps of one net in one mode after the other, in one process, with the figures of a fresh one.

Rules:

1. Before a mode the device holds the net and its inputs and nothing else. That is checked: what a mode leaves behind is in its row
   (`residue_bytes`), and beyond `MOST_RESIDUE_BYTES` no further mode runs in this process. (What `keep` leaves is no mode's.)
2. Torch's cached device memory is given back between modes, and so are cuBLAS' workspaces (32 MiB for each thread that multiplies, in
   torch's own allocator), pinned memory, ours with its context and torch's own by name, and the graph of a backward that failed, which
   torch's engine holds until the next one. So no mode finds memory that an earlier one pinned or split, and peaks start at the same floor.
   What stays is what every mode has: CUDA's context and loaded kernels; the first mode's warm-up pays for them, and no timed step.
3. Amounts are decided anew in each mode. It warms up until they have settled (two rounds alike), and the first mode of a process for
   `FIRST_WARM_S`, so that the device's clocks have settled under load too. `keep` is run first and last: their difference is the drift of a
   process, beside the spread of steps.
4. A step is forward, backward, SGD and the end of it on the device. Its activation peak is taken from torch's allocation history in one
   step more that is not timed: most bytes allocated at a time besides weights and gradients, by the address of each gradient. (The whole
   device's peak would count gradients, which come while activations go.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bounds import activation_peak_bytes, simulate_host  # noqa: E402
from modes import MODES, EachStep, Known, Missing, Places, context  # noqa: E402
from net_shapes import NetShape  # noqa: E402
from nets import build_inputs, build_net, recompute  # noqa: E402

from overspill.activations.windows import default_window_bytes  # noqa: E402
from overspill.spec.documents import to_plain  # noqa: E402

MOST_RESIDUE_BYTES = 256 << 20
"""Of weights, gradients and activations of 15 GB and more."""
WARMUP, WARMUP_ADAPTIVE, MOST_WARMUP = 2, 5, 9
"""Rounds 2 and 3 of our own are measured, and decide."""
FIRST_WARM_S = 1.5
"""Chosen."""
SETTLED_FRACTION = 0.01
HISTORY_ENTRIES = 400_000
MOST_TIMED_S = {False: 3.0, True: 10.0}
"""Where steps take seconds, fewer are timed, down to `LEAST_STEPS`; of others' tools (True), whose steps may take ten, the same."""
LEAST_STEPS = {False: 3, True: 2}


class Bench:
    """A net on its device; modes are measured one after the other."""

    def __init__(self, shape: NetShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.net = build_net(shape, device, dtype)
        self.inputs = build_inputs(shape, shape.rows, device, dtype)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-6, fused=device.type == "cuda")
        self.residue_bytes = 0
        self._is_warm = False
        self._around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        """Hooks that are entered for each step anew."""
        self._floor_bytes = self.clean()
        self.rates = self._link_rates()

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def num_blocks(self) -> int:
        return len(self.net.blocks)  # type: ignore[arg-type]

    @property
    def static_bytes(self) -> int:
        """Weights and their gradients."""
        return 2 * sum(parameter.numel() * parameter.itemsize for parameter in self.net.parameters())

    def set_rows(self, rows: int) -> None:
        self.inputs = build_inputs(self.shape, rows, self.device, self.dtype)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def clean(self) -> int:
        """Rule 2; bytes that are allocated on the device afterwards."""
        self.net.zero_grad(set_to_none=True)
        torch.ones(1, requires_grad=True).sum().backward()  # the engine lets go of what a failed backward was about to run
        gc.collect()
        if not self.is_cuda:
            return 0
        self.synchronize()
        for name in ("_cuda_clearCublasWorkspaces", "_host_emptyCache"):
            empty = getattr(torch._C, name, None)
            if empty is not None:
                empty()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def step(self) -> dict[str, float]:
        """One step; seconds of its parts (rule 4)."""
        begun_s, marks = time.perf_counter(), [self._mark()]
        with self._around:
            loss = self.net(self.inputs)
            marks.append(self._mark())
            loss.backward()
            marks.append(self._mark())
        del loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.synchronize()
        wall_s = time.perf_counter() - begun_s
        forward_s, backward_s = (self._seconds(*marks[index : index + 2]) for index in (0, 1))
        return {"step_s": wall_s, "forward_s": forward_s, "backward_s": backward_s}

    def measure(
        self, name: str, places: Places, known: Known | None, *, steps: int, steps_s: float, device_budget: int | None = None
    ) -> dict[str, Any]:
        """The figures of one mode, or its error; then the device is as before."""
        begun_s = time.perf_counter()
        try:
            line = self._measure(name, places, known, steps, steps_s, device_budget)
        except Missing as reason:
            line = {"missing": str(reason)}
        except Exception as error:  # a row too: that a mode does not fit is a result
            is_oom = isinstance(error, torch.OutOfMemoryError)
            line = {"error": f"{type(error).__name__}: {error}"[:600], "is_oom": is_oom}
        left_bytes = self.clean()
        self.residue_bytes = max(0, left_bytes - self._floor_bytes)
        if name == "keep" and "step_s" in line:  # what plain steps leave is the process's, and found by every mode
            self._floor_bytes = max(self._floor_bytes, left_bytes)
        return {**line, "residue_bytes": self.residue_bytes, "mode_wall_s": round(time.perf_counter() - begun_s, 2)}

    @contextlib.contextmanager
    def entered(self, hooks: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        """What a mode is, around its steps or in each of them."""
        with hooks as active:
            self._around = hooks.hooks if isinstance(hooks, EachStep) else contextlib.nullcontext()
            try:
                yield active
            finally:
                self._around = contextlib.nullcontext()

    def _measure(
        self, name: str, places: Places, known: Known | None, steps: int, steps_s: float, device_budget: int | None
    ) -> dict[str, Any]:
        mode = MODES[name]
        num_full = self.num_blocks if mode.is_checkpointed else 0
        with contextlib.ExitStack() as stack:
            if mode.is_checkpointed:
                stack.callback(recompute(self.net, range(self.num_blocks)))
            active = stack.enter_context(self.entered(context(mode, self.net, places, known, device_budget=device_budget)))
            num_warm, warm_s = self._warm_up(active if mode.tier is not None else None, is_adaptive=mode.amount in ("adaptive", "ssdtrain"))
            is_peer = mode.peer is not None
            steps = min(steps, max(LEAST_STEPS[is_peer], int(MOST_TIMED_S[is_peer] / warm_s)))
            if self.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            timed: list[dict[str, float]] = []
            while len(timed) < steps or (sum(item["step_s"] for item in timed) < steps_s and len(timed) < 4 * steps):
                timed.append(self.step())
            line: dict[str, Any] = {"num_warm": num_warm, "num_steps": len(timed), "num_full_blocks": num_full}
            line["full_inputs_bytes"] = num_full * self.shape.tokens() * self.shape.hidden * self.dtype.itemsize
            for part in timed[0]:
                values = sorted(item[part] for item in timed)
                line[part], line[f"{part}_spread"] = statistics.median(values), [values[0], values[-1]]
            if self.is_cuda:
                line["device_peak_bytes"] = torch.cuda.max_memory_allocated()
                line["activation_peak_bytes"] = self._activation_peak()
            if mode.tier is not None:
                line |= _amounts(to_plain(active.report()))
            if mode.tier == "host" and mode.amount == "adaptive":
                line["on_paper"] = _on_paper(active, mode.throughput)
        return line

    def _warm_up(self, active: Any, *, is_adaptive: bool) -> tuple[int, float]:
        """Steps until nothing changes (rule 3); how many, and seconds of the last."""
        least = WARMUP_ADAPTIVE if active is not None and is_adaptive else WARMUP
        for number in range(1, MOST_WARMUP + 1):
            last_s = self.step()["step_s"]
            if number >= least and (active is None or not is_adaptive or _has_settled(active.report().rounds)):
                break
        begun_s = time.perf_counter()
        while self.is_cuda and not self._is_warm and time.perf_counter() - begun_s < FIRST_WARM_S:
            last_s = self.step()["step_s"]
        self._is_warm = True
        return number, last_s

    def _activation_peak(self) -> int | None:
        """Rule 4; None where this torch keeps no such history."""
        record = torch.cuda.memory._record_memory_history
        try:
            record("all", context=None, stacks="python", max_entries=HISTORY_ENTRIES)
        except (TypeError, RuntimeError):
            return None
        try:
            num_before = len(self._history())
            with self._around:
                self.net(self.inputs).backward()
            self.synchronize()
            events = self._history()[num_before:]
            gradients = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
            return activation_peak_bytes(events, {gradient.untyped_storage().data_ptr() for gradient in gradients})
        finally:
            record(None)
            self.net.zero_grad(set_to_none=True)

    def _history(self) -> list[dict[str, Any]]:
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        return list(torch.cuda.memory._snapshot()["device_traces"][index])

    def _link_rates(self) -> dict[str, float]:
        """Bytes per second out and back of one large copy."""
        size = (256 << 20) if self.is_cuda else (4 << 20)
        buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=self.is_cuda)
        if self.is_cuda:
            from overspill.tiers.pinned import measure_copy_rates

            rates = measure_copy_rates(buffer)
            found = {"d2h_bytes_per_s": rates.d2h_bytes_per_s, "h2d_bytes_per_s": rates.h2d_bytes_per_s}
        else:
            other, begun_s = torch.empty_like(buffer), time.perf_counter()
            other.copy_(buffer)
            rate = size / (time.perf_counter() - begun_s)
            found = {"d2h_bytes_per_s": rate, "h2d_bytes_per_s": rate}
        del buffer
        self.clean()
        return found

    def _mark(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self.is_cuda else end - begin


def _has_settled(rounds: Any) -> bool:
    if len(rounds) < 2 or not (rounds[-1].is_planned and rounds[-2].is_planned):
        return False
    before, now = (item.host_bytes + item.ssd_bytes for item in rounds[-2:])
    return abs(now - before) <= SETTLED_FRACTION * max(now, before, 1)


def _on_paper(active: Any, throughput: float | None) -> dict[str, Any]:
    """What `bounds.simulate_host` says of the measured round: with the windows that are chosen, and with the usual ones."""
    profile, rates = active.profile(), active.report().rates
    if profile is None or rates.d2h_bytes_per_s is None:
        return {}
    usual = default_window_bytes(max(profile.stored_bytes))
    found = {}
    for name, windows in (("chosen", None), ("usual", (usual, usual))):
        back = rates.h2d_bytes_per_s or rates.d2h_bytes_per_s
        item = simulate_host(profile, d2h_bytes_per_s=rates.d2h_bytes_per_s, h2d_bytes_per_s=back, windows=windows, throughput=throughput)
        found[name] = dataclasses.asdict(item)
    return found


def _amounts(report: dict[str, Any]) -> dict[str, Any]:
    """Of the last round, and how the rounds came to it."""
    last = report["rounds"][-1]
    return {
        **{name: last[name] for name in ("packed_bytes", "kept_bytes", "host_bytes", "ssd_bytes", "rebuilt_bytes", "forwarded_bytes")},
        "moved_bytes": last["host_bytes"] + last["ssd_bytes"],
        "written_bytes": last["ssd_bytes"] - min(last["ssd_bytes"], last["cancelled_bytes"]),
        "records_peak_bytes": last["device_peak_bytes"],
        "window_bytes": last["window_bytes"],
        "back_window_bytes": last["back_window_bytes"],
        "wait_s": last["wait_s"],
        "num_run_again": last["num_run_again"],
        "num_records": last["num_records"],
        "settling_bytes": [item["host_bytes"] + item["ssd_bytes"] for item in report["rounds"]][:12],
        "rates": report["rates"],
        "host_peak_bytes": report["host_peak_bytes"],
        "ssd_total_bytes": report["ssd_bytes"],
        "left_alone": report["left_alone"],
    }
