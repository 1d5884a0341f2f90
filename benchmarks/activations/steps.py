"""Steps of one net in one mode after the other, in one process, with the figures of a fresh one.

Rules:

1. Before a mode the device holds the net and its inputs and nothing else. That is checked: what a mode leaves behind is in its row
   (`residue_bytes`), and beyond `MOST_RESIDUE_BYTES` no further mode runs in this process. (What `keep` leaves is no mode's.)
2. Torch's cached device memory is given back between modes, and so are cuBLAS' workspaces (32 MiB for each thread that multiplies, in
   torch's own allocator), pinned memory, ours with its context and torch's own by name, and the graph of a backward that failed, which
   torch's engine holds until the next one. So no mode finds memory that an earlier one pinned or split, and peaks start at the same floor.
   What stays is what every mode has: CUDA's context and loaded kernels; the first mode's warm-up pays for them, and no timed step.
3. Amounts are decided anew in each mode. It warms up until they have settled: the last of the first watched rounds has been decided from,
   two rounds are alike, and a step has allocated nothing on the device. Then until the device's clocks have: a device that comes out of a
   pause is quick for a moment, then held down hard, and steady after some seconds. So `WARM_S` at least (the first mode of a process
   `FIRST_WARM_S`), and until `NUM_STEADY` steps in a row are within `STEADY_FRACTION`, or `MOST_STEADY_S` are over.
4. A step is forward, backward and SGD, from the end of the step before it on the device to its own. The host does not wait for it, as a
   loop does not that reads its loss every few steps; it may be a step ahead (`MOST_AHEAD`), no more. `forward_launched_s` is when it had
   launched all of forward: as long as forward itself, where the device waited for the host. With a host that waits for the end of every
   step, each forward begins before anything is launched: what a mode comes to then beside keep is `of_keep_waiting`, of a few turns more.
   A step's activation peak is taken from torch's allocation history in one step more that is not timed: most bytes allocated at a time
   besides weights and gradients, by the address of each gradient. (The whole device's peak would count gradients, which come while
   activations go.)
5. A mode's steps take turns with keep's (`turns.py`). For these the mode's hooks are popped from torch's stack and pushed again, and
   recomputed blocks get their own forward back: nothing is left or entered, nothing pinned or given back, and what the mode knows of its
   rounds stays. A line has all steps of both. There is no keep in between where keep has not run in this process before, or takes most of
   the device (`MOST_KEEP_FRACTION`). `keep` itself, which all begins with, gives the absolute figures; `keep-again`, which is measured as
   any other mode, says how well 1 is found.
6. Python's collector of cycles runs between steps, in every mode, and not within. What was there before a mode (the net, and all that was
   imported) is frozen, so that it takes next to no time, and stays so: the next mode finds it again. What the mode makes is not.
7. No step that counts beside keep allocates on the device (cudaMalloc): one that did is done again, `MOST_TRIES` times at most. How often
   steps that count did after all is in the line (`device_allocs`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bounds import activation_peak, simulate_host  # noqa: E402
from gpu_state import GpuState  # noqa: E402
from just_in_time import JustInTime  # noqa: E402
from modes import MODES, EachStep, Known, Missing, Places, context  # noqa: E402
from net_shapes import NetShape  # noqa: E402
from nets import build_inputs, build_net, recompute  # noqa: E402
from turns import PARTS, Plan, columns, interval, middle, ratios  # noqa: E402

from overspill.activations.timeline import FIRST_WATCHED  # noqa: E402
from overspill.activations.windows import default_window_bytes  # noqa: E402
from overspill.spec.documents import to_plain  # noqa: E402

MOST_RESIDUE_BYTES = 256 << 20
"""Of weights, gradients and activations of 15 GB and more."""
WARMUP, WARMUP_ADAPTIVE = 2, max(FIRST_WATCHED) + 2
"""Of our own, the round after the last of the first watched ones is decided anew, and the next one has to be like it."""
MORE_WARMUP, MOST_WARM_S = 4, 6.0
"""Steps more at most, and no further one after so long, if nothing settles."""
FIRST_WARM_S, WARM_S, MOST_STEADY_S = 2.5, 1.5, 4.0
NUM_STEADY, STEADY_FRACTION = 3, 0.015
NUM_ALONE = 4
"""Chosen, all of them."""
MOST_AHEAD = 1
"""Steps that are under way on the device when the host launches the next."""
NUM_WAITING = 2
"""Turns with a host that waits for each step."""
MOST_TRIES = 3
MOST_KEEP_FRACTION = 0.7
"""Of the device, the peak of `keep`: the rest is for pieces that the allocator cannot use."""
SETTLED_FRACTION = 0.01
HISTORY_ENTRIES = 400_000
MOST_BLOCKS = 32
"""Of those at the fullest moment, in a line; the largest."""
MOST_TIMED_S = {False: 3.0, True: 10.0}
"""Where steps take seconds, fewer are timed, down to `LEAST_STEPS`; of others' tools (True), whose steps may take ten, the same."""
LEAST_STEPS = {False: 3, True: 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Launched:
    """One step that was launched."""

    marks: list[Any]
    """Before forward, behind it, behind backward and behind SGD."""
    after: Any
    """The end of the step before it; None: the host had waited for that."""
    forward_launched_s: float


class Bench:
    """A net on its device; modes are measured one after the other."""

    def __init__(self, shape: NetShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.net = build_net(shape, device, dtype)
        self.inputs = build_inputs(shape, shape.rows, device, dtype)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-6, fused=device.type == "cuda")
        self.residue_bytes = 0
        self._is_warm = False
        self._has_keep = False
        """Whether keep has run, and leaves room (rule 5)."""
        self._undo_recompute: Callable[[], None] | None = None
        self._gpu = GpuState(device)
        self._around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        """Hooks that are entered for each step anew."""
        self._under_way: collections.deque[tuple[dict[str, Any], _Launched]] = collections.deque()
        """Steps whose times are not read yet, and where to note them."""
        self._last_end: Any = None
        """Of the step that was launched last; None: the host has waited since."""
        self._is_ahead = device.type == "cuda"
        """Whether the host goes on while a step runs; on the CPU there is no such thing."""
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
        """One step with nothing before it, to its end on the device; seconds of its parts."""
        self.settle()
        begun_s, launched = time.perf_counter(), self._launch()
        self.synchronize()
        return self._parts(launched, time.perf_counter() - begun_s)

    def noted_step(self, *, is_keep: bool = False) -> dict[str, Any]:
        """One step, of the mode or of keep, what the device did beside it, and then the collector (rule 6). Its times (rule 4) are noted
        once it has ended, at the latest when the steps are settled."""
        self.settle(MOST_AHEAD if self._is_ahead else 0)
        found: dict[str, Any] = {}
        before = self._num_device_allocs()
        with self._as_keep() if is_keep else contextlib.nullcontext():
            if self._is_ahead:
                self._under_way.append((found, self._launch()))
            else:
                found |= self.step()
        found |= {"is_keep": is_keep, "device_allocs": self._num_device_allocs() - before, **self._gpu.read()}
        gc.collect()
        return found

    def settle(self, most: int = 0) -> None:
        """Wait until no more steps than these are under way, and note the times of the others."""
        while len(self._under_way) > most:
            found, launched = self._under_way.popleft()
            if self.is_cuda:
                launched.marks[-1].synchronize()
            begin = launched.after if launched.after is not None else launched.marks[0]
            found |= self._parts(launched, self._seconds(begin, launched.marks[-1]))
        if not self._under_way:
            self._last_end = None

    def _launch(self) -> _Launched:
        begun_s, marks = time.perf_counter(), [self._mark()]
        with self._around:
            loss = self.net(self.inputs)
            marks.append(self._mark())
            launched_s = time.perf_counter() - begun_s
            loss.backward()
            marks.append(self._mark())
        del loss
        self.optimizer.step()
        marks.append(self._mark())
        self.optimizer.zero_grad(set_to_none=True)
        after, self._last_end = self._last_end, marks[-1] if self.is_cuda else None
        return _Launched(marks=marks, after=after, forward_launched_s=launched_s)

    def _parts(self, launched: _Launched, step_s: float) -> dict[str, float]:
        parts_s = [self._seconds(*launched.marks[index : index + 2]) for index in range(3)]
        named = dict(zip(PARTS, (step_s, *parts_s, step_s - sum(parts_s)), strict=True))
        return {**named, "forward_launched_s": launched.forward_launched_s}

    def measure(
        self, name: str, places: Places, known: Known | None, *, steps: int, steps_s: float, plan: Plan | None = None
    ) -> dict[str, Any]:
        """The figures of one mode, or its error; then the device is as before.

        Args:
            steps: that are timed at least, where no keep comes in between.
            steps_s: more are, up to four times as many, while they take less.
            plan: of the turns; None: no keep in between.
        """
        begun_s = time.perf_counter()
        try:
            line = self._measure_least(places) if name == "least" else self._measure(name, places, known, steps, steps_s, plan)
        except Missing as reason:
            line = {"missing": str(reason)}
        except Exception as error:  # a row too: that a mode does not fit is a result
            is_oom = isinstance(error, torch.OutOfMemoryError)
            line = {"error": f"{type(error).__name__}: {error}"[:600], "is_oom": is_oom}
        self._under_way.clear()
        self._last_end = None
        left_bytes = self.clean()
        self.residue_bytes = max(0, left_bytes - self._floor_bytes)
        if name == "keep" and "step_s" in line:  # what plain steps leave is the process's, and found by every mode
            self._floor_bytes = max(self._floor_bytes, left_bytes)
            self._has_keep = self._leaves_room(line)
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

    def _leaves_room(self, keep: dict[str, Any]) -> bool:
        if not self.is_cuda:
            return True
        _, total_bytes = torch.cuda.mem_get_info(self.device)
        return bool(keep["device_peak_bytes"] <= MOST_KEEP_FRACTION * total_bytes)

    def _measure(self, name: str, places: Places, known: Known | None, steps: int, steps_s: float, plan: Plan | None) -> dict[str, Any]:
        mode = MODES[name]
        num_full = self.num_blocks if mode.is_checkpointed else 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_collector())
            if mode.is_checkpointed:
                stack.callback(self._set_recompute, False)
                self._set_recompute(True)
            active = stack.enter_context(self.entered(context(mode, self.net, places, known)))
            is_beside = plan is not None and name != "keep" and self._has_keep and _can_switch_hooks()
            warm = self._warm_up(
                active if mode.tier is not None else None, is_adaptive=mode.amount in ("adaptive", "ssdtrain"), is_beside=is_beside
            )
            num_warm, warm_s = sum(not step["is_keep"] for step in warm), warm[-1]["step_s"]
            num_rounds = _num_rounds(active) if mode.tier is not None else 0
            is_peer = mode.peer is not None
            peaks: list[int] = []
            if is_beside:
                assert plan is not None
                timed = self._take_turns(plan, peaks)
            else:
                steps = min(steps, max(LEAST_STEPS[is_peer], int(MOST_TIMED_S[is_peer] / warm_s)))
                timed = self._run_alone(steps, steps_s, peaks)
            waiting = self._take_waiting_turns() if is_beside and self._is_ahead and mode.amount != "nothing" else []
            counted = [step for step in timed if step["is_counted"]]
            own = [step for step in counted if not step["is_keep"]]
            line: dict[str, Any] = {"num_warm": num_warm, "num_steps": len(own), "num_full_blocks": num_full}
            line["full_inputs_bytes"] = num_full * self.shape.tokens() * self.shape.hidden * self.dtype.itemsize
            for part in PARTS:
                values = sorted(step[part] for step in own)
                line[part], line[f"{part}_spread"] = statistics.median(values), [values[0], values[-1]]
            if is_beside:
                line |= _beside(counted, warm)
                if waiting:
                    line["of_keep_waiting"] = middle(ratios(waiting))
            if self.is_cuda:
                line["device_peak_bytes"] = max(peaks)
                line |= self._activation_peak()
            if mode.tier is not None:
                line |= _amounts(to_plain(active.report()), num_rounds)
            if mode.tier == "host" and mode.amount == "adaptive":
                line["on_paper"] = _on_paper(active, mode.throughput)
            line["device_allocs"] = sum(step["device_allocs"] for step in counted)
            line["warm_steps"], line["timed_steps"] = columns(warm), columns(timed)
        return line

    def _measure_least(self, places: Places) -> dict[str, Any]:
        """The peak of a step in which every saved tensor is gone and comes back just in time (`just_in_time.py`); no update follows."""
        if not self.is_cuda:
            raise Missing("the CPU keeps no history of allocations")
        with self.entered(JustInTime(self.net, places.min_bytes)):
            self.net(self.inputs).backward()  # so that workspaces are there
            self.net.zero_grad(set_to_none=True)
            return {"least_peak_bytes": self._activation_peak()["activation_peak_bytes"]}

    def _warm_up(self, active: Any, *, is_adaptive: bool, is_beside: bool) -> list[dict[str, Any]]:
        """Steps until nothing changes (rule 3); the last is of the mode. In the end keep comes in between as it will: it wants other
        memory."""
        least = WARMUP_ADAPTIVE if active is not None and is_adaptive else WARMUP
        warm_s, begun_s = WARM_S if self._is_warm else FIRST_WARM_S, time.perf_counter()
        steps: list[dict[str, Any]] = []
        while True:
            steps.append(self.noted_step())
            is_still = not steps[-1]["device_allocs"] and (active is None or not is_adaptive or _has_settled(active.report().rounds))
            is_late = len(steps) >= least + MORE_WARMUP or time.perf_counter() - begun_s > MOST_WARM_S
            if len(steps) >= least and (is_still or is_late):
                break
        while self.is_cuda and not _is_steady(steps, time.perf_counter() - begun_s, warm_s):
            steps.append(self.noted_step())
        if is_beside:
            steps += [self.noted_step(is_keep=True), self.noted_step()]
        self.settle()
        self._is_warm = True
        return steps

    def _run_alone(self, steps: int, steps_s: float, peaks: list[int]) -> list[dict[str, Any]]:
        """Steps of the mode alone; `peaks` gets the device's."""
        timed: list[dict[str, Any]] = []
        with self._noting_peak(peaks):
            while len(timed) < steps or (math.fsum(item.get("step_s", 0.0) for item in timed) < steps_s and len(timed) < 4 * steps):
                timed.append(self.noted_step())
                timed[-1]["is_counted"] = True
        self.settle()
        return timed

    def _take_turns(self, plan: Plan, peaks: list[int]) -> list[dict[str, Any]]:
        """Steps of keep and of the mode in turns (rule 5); `peaks` gets the device's in each of the mode's."""
        timed: list[dict[str, Any]] = []
        begun_s = time.perf_counter()
        while not plan.is_enough(ratios([step for step in timed if step["is_counted"]]), time.perf_counter() - begun_s):
            if timed:
                timed += self._tried_step(peaks, is_keep=False)
            timed += self._tried_step([], is_keep=True)
        self.settle()
        return timed

    def _take_waiting_turns(self) -> list[dict[str, Any]]:
        """A few with a host that waits for the end of each step (rule 4)."""
        self._is_ahead = False
        try:
            return [self.noted_step(is_keep=index % 2 == 0) for index in range(2 * NUM_WAITING + 1)]
        finally:
            self._is_ahead = True

    def _tried_step(self, peaks: list[int], *, is_keep: bool) -> list[dict[str, Any]]:
        """A step, again while it allocates on the device (rule 7); the last one counts, and `peaks` gets the device's."""
        tried: list[dict[str, Any]] = []
        with self._noting_peak(peaks):
            while not tried or (tried[-1]["device_allocs"] and len(tried) < MOST_TRIES):
                tried.append(self.noted_step(is_keep=is_keep))
                tried[-1]["is_counted"] = False
        tried[-1]["is_counted"] = True
        return tried

    @contextlib.contextmanager
    def _as_keep(self) -> Iterator[None]:
        """Steps inside are keep's (rule 5)."""
        around, self._around = self._around, contextlib.nullcontext()
        is_recomputed = self._undo_recompute is not None
        self._set_recompute(False)
        hooks = _pop_hooks()
        try:
            yield
        finally:
            _push_hooks(hooks)
            self._set_recompute(is_recomputed)
            self._around = around

    def _set_recompute(self, is_on: bool) -> None:
        """Whether torch recomputes every block."""
        undo, self._undo_recompute = self._undo_recompute, None
        if undo is not None:
            undo()
        if is_on:
            self._undo_recompute = recompute(self.net, range(self.num_blocks))

    def _num_device_allocs(self) -> int:
        """So far: calls of cudaMalloc, and those that failed and were tried again after giving cached memory back."""
        if not self.is_cuda:
            return 0
        found = torch.cuda.memory_stats()
        return int(found.get("num_device_alloc", 0)) + int(found.get("num_alloc_retries", 0))

    @contextlib.contextmanager
    def _noting_peak(self, peaks: list[int]) -> Iterator[None]:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.is_cuda:
            peaks.append(torch.cuda.max_memory_allocated())

    def _activation_peak(self) -> dict[str, Any]:
        """Rule 4, and what was there then; None where this torch keeps no such history."""
        record = torch.cuda.memory._record_memory_history
        try:
            record("all", context=None, stacks="python", max_entries=HISTORY_ENTRIES)
        except (TypeError, RuntimeError):
            return {"activation_peak_bytes": None}
        try:
            num_before = len(self._history())
            with self._around:
                loss = self.net(self.inputs)
                num_forward = len(self._history()) - num_before
                loss.backward()
            del loss
            self.synchronize()
            events = self._history()[num_before:]
            gradients = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
            peak = activation_peak(events, {gradient.untyped_storage().data_ptr() for gradient in gradients})
            found = {"event": peak.event, "forward_events": num_forward, "events": len(events), "blocks": [*peak.blocks[:MOST_BLOCKS]]}
            return {"activation_peak_bytes": peak.num_bytes, "peak_moment": found}
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


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Rule 6: the collector runs when it is called, and looks at what is newer than this."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _can_switch_hooks() -> bool:
    return hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # not in every torch


def _pop_hooks() -> list[Any]:
    """All saved-tensor hooks of this thread, innermost first."""
    popped: list[Any] = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        popped.append(top)
    return popped


def _push_hooks(popped: list[Any]) -> None:
    for pack, unpack in reversed(popped):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def _is_steady(steps: list[dict[str, Any]], spent_s: float, warm_s: float) -> bool:
    """Rule 3."""
    last = [step["step_s"] for step in steps if "step_s" in step][-NUM_STEADY:]
    is_even = len(last) == NUM_STEADY and max(last) <= (1 + STEADY_FRACTION) * min(last)
    return spent_s >= warm_s and (is_even or spent_s >= MOST_STEADY_S)


def _beside(steps: list[dict[str, Any]], warm: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the mode beside keep, and alone before (`turns.py`)."""
    found, keeps = ratios(steps), [step["step_s"] for step in steps if step["is_keep"]]
    alone = [step["step_s"] for step in warm[: [step["is_keep"] for step in warm].index(True)]]
    return {
        "of_keep": middle(found), "of_keep_interval": list(interval(found)), "num_turns": len(found),
        "beside_step_s": statistics.median(keeps), "beside_step_s_spread": [min(keeps), max(keeps)],
        "alone_step_s": statistics.median(alone[-NUM_ALONE:]),
    }  # fmt: skip


def _num_rounds(active: Any) -> int:
    return int(active.report().num_rounds)


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


def _amounts(report: dict[str, Any], num_warm: int) -> dict[str, Any]:
    """Of the last round, how the rounds came to it, and whether it changed after so many of them, while steps were timed."""
    last = report["rounds"][-1]
    first = report["num_rounds"] - len(report["rounds"])
    timed = [item["host_bytes"] + item["ssd_bytes"] for item in report["rounds"][max(0, num_warm - first) :] or [last]]
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
        "timed_moved_bytes": [min(timed), max(timed)],
        "settling_bytes": [item["host_bytes"] + item["ssd_bytes"] for item in report["rounds"]][:12],
        "rates": report["rates"],
        "looks": report["looks"],
        "host_peak_bytes": report["host_peak_bytes"],
        "ssd_total_bytes": report["ssd_bytes"],
        "left_alone": report["left_alone"],
    }
