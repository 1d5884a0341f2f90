"""What may go wrong on a machine with a GPU, tried without one: modes that hang, crash or run out of memory, and functions of torch.cuda
with stand-ins. Nothing that was measured is lost, and the rest is measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import json
import os
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_python import run_loaded

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "activations"
sys.path.append(str(FOLDER))

import estimates  # noqa: E402
import fit  # noqa: E402
import gpu_state  # noqa: E402
import modes  # noqa: E402
import net_shapes  # noqa: E402
import steps  # noqa: E402
import tables  # noqa: E402
import turns  # noqa: E402

GIB = 1 << 30
PLACES = modes.Places(
    ssd_dir=None, shm_dir=None, min_bytes=1024, window_bytes=16384, most_host_bytes=16 << 20, least_host_bytes=1 << 20
)  # fmt: skip
BREAKING = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import one_shape, steps, torch
from modes import MODES
inner = steps.context
def breaking(mode, *arguments, **more):
    if mode is MODES["host"]:
        time.sleep(1000)
    if mode is MODES["checkpoint"] and not os.path.exists({once!r}):
        open({once!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if mode is MODES["mix"]:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if mode is MODES["keep-again"]:
        raise RuntimeError("CUDA error: something else")
    return inner(mode, *arguments, **more)
steps.context = breaking
status = one_shape.main(int(sys.argv[1]))
sys.stdout.flush()
os._exit(status)
"""


def test_a_hang_a_crash_and_a_mode_without_memory_cost_their_own_lines_alone(tmp_path: Path) -> None:
    worker, out = tmp_path / "worker.py", tmp_path / "a.jsonl"
    worker.write_text(BREAKING.format(folder=str(FOLDER), once=str(tmp_path / "once")))
    start = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import run; run.WORKER = {str(worker)!r}; sys.exit(run.main(sys.argv[1:]))"
    command = [
        "-c", start, "--tiny", "--out", str(out), "--shapes", "gpt-64x4", "bert-64x2", "t5-64x3", "--jobs", "core",
        "--steps", "2", "--steps-s", "0", "--waiting", "4", "--mode-limit-s", "8",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = run_loaded(*command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    lines = tables.newest(tables.read_lines(out))
    found = {(line["shape"], line["mode"]): line for line in lines}
    for shape in ("gpt-64x4", "bert-64x2", "t5-64x3"):
        assert all("step_s" in found[shape, mode] for mode in ("keep", "counted", "cheap")), done.stdout[-3000:]
        assert found[shape, "mix"]["is_oom"] and "something else" in found[shape, "keep-again"]["error"]
        assert 0 < found[shape, "bounds"]["bound_fraction"] <= 1 and ("mix_97" in found[shape, "bounds"]) == (shape != "gpt-64x4")
    assert "SIGKILL" in found["gpt-64x4", "checkpoint"]["error"] and "step_s" in found["bert-64x2", "checkpoint"]
    assert [found[shape, "host"]["error"] for shape in ("gpt-64x4", "bert-64x2")] == ["ran past 8 s"] * 2
    assert ("t5-64x3", "host") not in found, "what ended two processes is not begun in a third"
    assert "time.sleep" in done.stdout or "in breaking" in done.stdout, "the stacks of a hang are in the log"
    assert "bound of the link" in done.stdout


def test_a_machine_on_which_nothing_loads_ends_the_call_at_once(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import no_such_module")
    start = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import run; run.WORKER = {str(worker)!r}; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "--tiny", "--out", str(tmp_path / "a.jsonl"), "--waiting", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": "src"})
    assert done.returncode == 1 and "no_such_module" in done.stdout
    assert len(tables.read_lines(tmp_path / "a.jsonl")) == 2


# -- one process -------------------------------------------------------------------------------------------------------


def bench_of(name: str = "gpt-64x4") -> steps.Bench:
    return steps.Bench(net_shapes.TINY[name], torch.device("cpu"), torch.float32)


PLAN = turns.Plan(turns=3, limit_s=0.0, most_s=10.0, within=0.005)


def measure(bench: steps.Bench, mode: str, known: modes.Known | None = None, plan: turns.Plan | None = None) -> dict[str, Any]:
    return bench.measure(mode, PLACES, known, steps=2, steps_s=0.0, plan=plan)


class Held:
    """Something that a graph holds."""


class Branches(torch.nn.Module):
    """Two branches; the backward of the one that was made last, and comes first, runs out of memory while the other waits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.held: weakref.ref[Held] | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        held = Held()
        self.held = weakref.ref(held)
        waiting, failing = (self.weight * 2).exp(), (self.weight * 3).exp()
        waiting.register_hook(lambda gradient, held=held: None)
        failing.register_hook(self.fail)
        return (waiting + failing).sum()

    def fail(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_backward_without_memory_leaves_no_graph_behind() -> None:
    bench = bench_of()
    net, bench.net = bench.net, Branches()
    line = measure(bench, "keep")
    assert line["is_oom"] and bench.net.held is not None and bench.net.held() is None
    bench.net = net
    assert "step_s" in measure(bench, "counted")


class Hooks(torch.autograd.graph.saved_tensors_hooks):
    """`OffloadActivations` as a package of others has it: it expects to be entered for each step."""

    entered, most_entered = 0, 0

    def __init__(self, *, use_pin_memory: bool, use_streams: bool) -> None:
        assert use_pin_memory and use_streams
        super().__init__(lambda tensor: tensor, lambda tensor: tensor)

    def update_model_params(self, model: torch.nn.Module) -> None:
        pass

    def __enter__(self) -> None:
        Hooks.entered += 1
        super().__enter__()


def test_others_hooks_are_entered_for_each_step_and_left_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("trl.models.activation_offloading")
    package.OffloadActivations = Hooks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", types.ModuleType("trl"))
    monkeypatch.setitem(sys.modules, "trl.models", types.ModuleType("trl.models"))
    monkeypatch.setitem(sys.modules, "trl.models.activation_offloading", package)
    monkeypatch.setattr(modes.torch.cuda, "is_available", lambda: True)
    bench = bench_of()
    line = measure(bench, "trl")
    assert "step_s" in line, line
    assert Hooks.entered == line["num_warm"] + line["num_steps"]
    bench.net.blocks[1].forward = lambda *arguments: 1 / 0  # type: ignore[index]
    assert "ZeroDivisionError" in measure(bench, "trl")["error"]
    del bench.net.blocks[1].forward  # type: ignore[index]
    torch._C._autograd._saved_tensors_hooks_enable()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert "step_s" in measure(bench, "keep")


def test_a_package_that_cannot_be_imported_for_whatever_reason_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("Failed to import trl.models because of something")

    monkeypatch.setattr(modes.importlib, "import_module", fail)
    assert "because of something" in measure(bench_of(), "trl")["missing"]


# -- keep in between ---------------------------------------------------------------------------------------------------


class Seen:
    """What each step of a bench had around it."""

    def __init__(self, bench: steps.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hooks: list[Any] = []
        self.has_own_forward: list[bool] = []
        self.is_collecting: list[bool] = []
        inner = bench.step

        def step() -> dict[str, float]:
            top = torch._C._autograd._top_saved_tensors_default_hooks(True)
            self.hooks.append(top[0] if top is not None else None)
            self.has_own_forward.append("forward" not in vars(bench.net.blocks[0]))  # type: ignore[index]
            self.is_collecting.append(gc.isenabled())
            return inner()

        monkeypatch.setattr(bench, "step", step)


def test_keeps_steps_in_between_have_no_hooks_and_the_mode_goes_on_as_if_there_were_none(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    seen = Seen(bench, monkeypatch)
    measure(bench, "keep", plan=PLAN)
    known = modes.Known(all_bytes=532_480, largest_bytes=1, forward_s=1.0, d2h_bytes_per_s=1e9)
    alone, opened = measure(bench, "host", known), []
    inner = steps.context

    def context(*arguments: Any, **more: Any) -> Any:
        opened.append(inner(*arguments, **more))
        return opened[-1]

    monkeypatch.setattr(steps, "context", context)
    seen.hooks.clear()
    line = measure(bench, "host", known, PLAN)
    assert line["num_turns"] == line["num_steps"] == 3 and line["of_keep_interval"][0] <= line["of_keep"] <= line["of_keep_interval"][1]
    assert line["timed_steps"]["is_keep"] == [True, False] * 3 + [True] and all(line["timed_steps"]["is_counted"])
    flags = line["warm_steps"]["is_keep"] + line["timed_steps"]["is_keep"]
    assert [hooks is None for hooks in seen.hooks] == flags and len({hooks for hooks in seen.hooks if hooks is not None}) == 1
    (active,) = opened
    assert active.report().num_rounds == flags.count(False), "keep's steps are no rounds, and nothing was entered anew"
    assert line["timed_moved_bytes"] == [line["moved_bytes"]] * 2
    assert line["packed_bytes"] == alone["packed_bytes"] and line["host_peak_bytes"] == alone["host_peak_bytes"]
    assert not any(seen.is_collecting) and gc.isenabled()
    assert all(len(line["timed_steps"][part]) == 7 for part in turns.PARTS) and line["alone_step_s"] > 0


def test_recomputed_blocks_run_plainly_in_keeps_steps_and_others_hooks_around_all_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    measure(bench, "keep", plan=PLAN)
    seen = Seen(bench, monkeypatch)
    line = measure(bench, "checkpoint", plan=PLAN)
    flags = line["warm_steps"]["is_keep"] + line["timed_steps"]["is_keep"]
    assert seen.has_own_forward == flags and "forward" not in vars(bench.net.blocks[0])  # type: ignore[index]
    seen.hooks.clear()
    line = measure(bench, "save_on_cpu", plan=PLAN)
    flags = line["warm_steps"]["is_keep"] + line["timed_steps"]["is_keep"]
    assert [hooks is None for hooks in seen.hooks] == flags
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_modules_that_may_be_run_again_run_plainly_in_keeps_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    measure(bench, "keep", plan=PLAN)
    known = modes.Known(all_bytes=532_480, largest_bytes=1, forward_s=1.0, d2h_bytes_per_s=1e9)
    assert "of_keep" in measure(bench, "mix-90", known, PLAN)
    monkeypatch.setattr(steps, "recompute", None)
    bench.net.blocks[2].forward = lambda *arguments: 1 / 0  # type: ignore[index]
    assert "ZeroDivisionError" in measure(bench, "host", known, PLAN)["error"]
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None and gc.isenabled()


def test_keep_that_fails_in_between_ends_the_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    measure(bench, "keep", plan=PLAN)
    inner = bench.step

    def step() -> dict[str, float]:
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner()

    with monkeypatch.context() as patch:
        patch.setattr(bench, "step", step)
        assert measure(bench, "counted", plan=PLAN)["is_oom"]
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None and "of_keep" in measure(bench, "counted", plan=PLAN)


def test_where_keep_does_not_fit_modes_are_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    assert "of_keep" not in measure(bench, "counted", plan=PLAN), "keep has not run"
    monkeypatch.setattr(steps.Bench, "_leaves_room", lambda self, line: False)
    assert "of_keep" not in measure(bench, "keep", plan=PLAN)
    line = measure(bench, "counted", plan=PLAN)
    assert line["num_steps"] == 2 and line["timed_steps"]["is_keep"] == [False] * 2


# -- stand-ins for torch.cuda ------------------------------------------------------------------------------------------


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return (other.at_s - self.at_s) * 1e3

    def synchronize(self) -> None:
        assert self.at_s > 0


class Device:
    """Numbers that torch.cuda would say, and what was called."""

    def __init__(self) -> None:
        self.allocated_bytes = 1000
        self.peak_bytes = 0
        self.most_bytes = 80 * GIB
        self.calls: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.num_allocs = 0
        self.is_recording = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A CPU that is taken for a GPU by `steps` and `fit`; arguments are checked against torch's own functions."""
    found = Device()

    def record(enabled: str | None = "all", **more: Any) -> None:
        inspect.signature(torch.cuda.memory._record_memory_history_impl).bind(enabled, **more)
        found.is_recording = enabled is not None
        if not enabled:
            found.history.clear()

    def snapshot() -> dict[str, Any]:
        return {"device_traces": [list(found.history)]}

    def limit(fraction: float) -> None:
        assert 0.0 <= fraction <= 1.0
        found.most_bytes = int(fraction * 80 * GIB)

    cuda: dict[str, Any] = {
        "Event": Event, "synchronize": lambda: None, "empty_cache": lambda: found.calls.append("empty_cache"),
        "memory_allocated": lambda: found.allocated_bytes, "max_memory_allocated": lambda: found.peak_bytes, "current_device": lambda: 0,
        "reset_peak_memory_stats": lambda: None, "mem_get_info": lambda device: (78 * GIB, 80 * GIB), "memory_reserved": lambda device: GIB,
        "set_per_process_memory_fraction": limit,
        "memory_stats": lambda: {"num_device_alloc": found.num_allocs, "num_alloc_retries": 0},
    }  # fmt: skip
    for name, stand_in in cuda.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    for name in ("_cuda_clearCublasWorkspaces", "_host_emptyCache"):
        monkeypatch.setattr(torch._C, name, lambda name=name: found.calls.append(name), raising=False)
    monkeypatch.setattr(steps.Bench, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(steps.Bench, "_link_rates", lambda self: {"d2h_bytes_per_s": 50e9, "h2d_bytes_per_s": 50e9})
    for name, seconds in (("FIRST_WARM_S", 0.05), ("WARM_S", 0.0), ("MOST_STEADY_S", 0.0)):
        monkeypatch.setattr(steps, name, seconds)
    yield found


def test_workspaces_and_pinned_memory_go_before_each_mode_and_the_floor_is_what_plain_steps_leave(device: Device) -> None:
    bench = bench_of()
    assert {"_cuda_clearCublasWorkspaces", "_host_emptyCache", "empty_cache"} == set(device.calls)
    assert device.calls.index("_cuda_clearCublasWorkspaces") < device.calls.index("empty_cache")
    device.allocated_bytes += 2 * steps.MOST_RESIDUE_BYTES  # such as cuBLAS' workspaces, of a torch that has no way to free them
    line = measure(bench, "keep")
    assert line["residue_bytes"] == 2 * steps.MOST_RESIDUE_BYTES and line["num_steps"] == 2
    assert measure(bench, "counted")["residue_bytes"] == 0
    device.allocated_bytes += 77
    assert measure(bench, "checkpoint")["residue_bytes"] == 77


def test_the_first_mode_of_a_process_warms_the_device_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, count = bench_of(), [0]
    inner = bench.step

    def step() -> dict[str, float]:
        count[0] += 1
        time.sleep(0.01)
        return inner()

    monkeypatch.setattr(bench, "step", step)
    monkeypatch.setattr(steps, "FIRST_WARM_S", 1.0)
    measure(bench, "keep")
    first, count[0] = count[0], 0
    measure(bench, "keep-again")
    assert first > count[0] == steps.WARMUP + 2


def test_the_peak_is_read_from_the_history_of_one_step_and_recording_ends(device: Device) -> None:
    bench = bench_of()
    device.history.append({"action": "alloc", "addr": 1, "size": 10**9})  # before the step: not counted

    class Net(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert device.is_recording
            device.history.extend({"action": "alloc", "addr": 10 + number, "size": 100} for number in range(3))
            device.history.append({"action": "free_completed", "addr": 10, "size": 100})
            device.history.append({"action": "snapshot", "addr": 0, "size": 0})
            return bench_net(inputs)

    bench_net, bench.net = bench.net, Net()
    moment = {"event": 2, "forward_events": 5, "events": 5, "blocks": [100, 100, 100]}
    assert bench._activation_peak() == {"activation_peak_bytes": 300, "peak_moment": moment} and not device.is_recording

    class Failing(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench.net = Failing()
    with pytest.raises(torch.OutOfMemoryError):
        bench._activation_peak()
    assert not device.is_recording, "or every later step would be recorded"


def test_a_step_in_which_the_device_allocates_is_done_again_and_a_mode_warms_up_until_it_does_not(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, count, allocating = bench_of(), [0], set(range(5))
    inner = bench.step

    def step() -> dict[str, float]:
        device.num_allocs += count[0] in allocating
        count[0] += 1
        return inner()

    monkeypatch.setattr(bench, "step", step)
    line = measure(bench, "keep", plan=PLAN)
    assert line["num_warm"] > 5 and line["device_allocs"] == 0
    count[0], allocating = 0, {4, 6, 7}
    line = measure(bench, "keep-again", plan=PLAN)
    num_warm = len(line["warm_steps"]["step_s"])
    assert line["warm_steps"]["device_allocs"] == [0] * 4 and line["warm_steps"]["is_keep"] == [False, False, True, False]
    timed = line["timed_steps"]
    assert timed["is_keep"] == [True, True, False, False, False, True, False, True, False, True] and num_warm + 10 == count[0]
    assert timed["is_counted"] == [False, True, False, False, *[True] * 6] and line["device_allocs"] == 0 and line["num_turns"] == 3
    allocating = set(range(10_000))
    line = measure(bench, "keep-again", plan=PLAN)
    assert line["num_warm"] == steps.WARMUP + steps.MORE_WARMUP + 1
    assert line["device_allocs"] == 7 and len(line["timed_steps"]["step_s"]) == 7 * steps.MOST_TRIES


def test_the_least_peak_is_read_from_a_step_without_an_update(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    before = [parameter.detach().clone() for parameter in bench.net.parameters()]
    monkeypatch.setattr(bench, "_history", lambda: [{"action": "alloc", "addr": 1, "size": 70}] * (1 + device.is_recording))
    recorded: list[Any] = []
    peak = steps.activation_peak([{"action": "alloc", "addr": 1, "size": 70}], set())
    monkeypatch.setattr(steps, "activation_peak", lambda events, gradients: recorded.append(events) or peak)
    line = measure(bench, "least")
    assert line["least_peak_bytes"] == 70 and len(recorded) == 1 and "step_s" not in line
    assert all(map(torch.equal, before, bench.net.parameters()))
    assert all(parameter.grad is None for parameter in bench.net.parameters())


def test_every_mode_of_the_first_job_takes_its_turns_on_a_device(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "NUM_STEADY", 1)
    bench = bench_of()
    bench._gpu = state_of("12ab", monkeypatch)
    known = modes.Known(all_bytes=532_480, largest_bytes=16_384, forward_s=1.0, d2h_bytes_per_s=1e9)
    for mode in (
        "keep",
        "counted",
        "checkpoint",
        "cheap",
        "host",
        "mix",
        "mix-97",
        "mix-90",
        "mix-everything",
        "save_on_cpu",
        "keep-again",
    ):
        line = measure(bench, mode, known, PLAN)
        assert ("of_keep" in line) == (mode != "keep") and line["device_allocs"] == 0, (mode, line)
        assert set(line["timed_steps"]) >= {*turns.PARTS, "is_keep", "is_counted", "device_allocs", "sm_mhz", "watts"}
        assert json.loads(json.dumps(line)) == line and line["step_s_spread"][0] <= line["step_s"]


def test_the_devices_peak_is_that_of_the_modes_own_steps(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    device.peak_bytes = GIB
    assert measure(bench, "keep", plan=PLAN)["device_peak_bytes"] == GIB
    inner = bench.step

    def step() -> dict[str, float]:
        is_keep = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        device.peak_bytes = 5 * GIB if is_keep else 2 * GIB
        return inner()

    monkeypatch.setattr(bench, "step", step)
    line = measure(bench, "counted", plan=PLAN)
    assert line["device_peak_bytes"] == 2 * GIB and "of_keep" in line
    device.peak_bytes = 70 * GIB
    bench = bench_of()
    measure(bench, "keep", plan=PLAN)
    assert "of_keep" not in measure(bench, "counted", plan=PLAN), "it takes most of the device"


def test_a_mode_warms_up_until_the_devices_clocks_are_steady(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    for name, seconds in (("WARM_S", 0.0), ("FIRST_WARM_S", 0.0), ("MOST_STEADY_S", 60.0)):
        monkeypatch.setattr(steps, name, seconds)
    times = iter([2.0, 1.9, 1.8, 1.6, 1.4, 1.2, 1.01, 1.0, 1.0, *[1.0] * 100])
    inner = bench.step
    monkeypatch.setattr(bench, "step", lambda: {**inner(), "step_s": next(times)})
    assert measure(bench, "keep")["num_warm"] == 9


def test_the_host_is_at_most_a_step_ahead_and_steps_go_from_end_to_end(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, ahead = bench_of(), []
    bench._is_ahead = True
    launch = bench._launch

    def noted() -> steps._Launched:
        ahead.append(len(bench._under_way))
        return launch()

    monkeypatch.setattr(bench, "_launch", noted)
    measure(bench, "keep", plan=PLAN)
    line = measure(bench, "host", plan=PLAN)
    assert set(ahead) == {0, 1} == {0, steps.MOST_AHEAD} and not bench._under_way
    assert line["num_turns"] in (3, 4) and line["of_keep"] > 0 and line["of_keep_waiting"] > 0
    assert "of_keep_waiting" not in measure(bench, "counted", plan=PLAN), "no claim is about it"
    timed = line["timed_steps"]
    assert len(timed["step_s"]) >= 7 and None not in timed["step_s"]
    parts = zip(*(timed[name] for name in turns.PARTS[1:]), strict=True)
    assert all(sum(own) == pytest.approx(step, abs=1e-5) for step, own in zip(timed["step_s"], parts, strict=True))
    ahead.clear()
    first, second, third = bench.noted_step(), bench.noted_step(), bench.noted_step()
    assert ahead == [0, 1, 1] and "step_s" in first and "step_s" not in second, "a step is read before the next but one is launched"
    bench.settle()
    assert "step_s" in third and second["rest_s"] > 0, "from the end of the one before it"
    assert second["step_s"] > second["forward_s"] + second["backward_s"]


def test_a_mode_that_fails_with_steps_under_way_leaves_none_to_the_next(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, count = bench_of(), [0]
    bench._is_ahead = True
    launch = bench._launch

    def fail() -> steps._Launched:
        count[0] += 1
        if count[0] == 3:
            raise torch.OutOfMemoryError("no room")
        return launch()

    monkeypatch.setattr(bench, "_launch", fail)
    assert measure(bench, "keep")["is_oom"] and not bench._under_way and bench._last_end is None
    assert measure(bench, "keep")["num_steps"] == 2


class Nvml:
    """A stand-in for libnvidia-ml."""

    def __init__(self, known: bytes) -> None:
        self.known = known

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 77
        return 0 if uuid.value == self.known else 6

    def nvmlDeviceGetClockInfo(self, handle: ctypes.c_void_p, kind: ctypes.c_int, found: Any) -> int:  # noqa: N802
        assert handle.value == 77 and kind.value == 1
        found._obj.value = 1755
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, found: Any) -> int:  # noqa: N802
        found._obj.value = 698_432
        return 0

    def nvmlDeviceGetTemperature(self, handle: ctypes.c_void_p, kind: ctypes.c_int, found: Any) -> int:  # noqa: N802
        return 3


def state_of(uuid: str, monkeypatch: pytest.MonkeyPatch) -> gpu_state.GpuState:
    """Of a machine that knows one device."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=uuid))
    monkeypatch.setattr(gpu_state.ctypes, "CDLL", lambda name: Nvml(b"GPU-12ab"))
    return gpu_state.GpuState(torch.device("cuda"))


def test_clock_and_power_are_told_where_the_machine_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_state.GpuState(torch.device("cpu")).read() == {} and gpu_state.GpuState(torch.device("cuda")).read() == {}
    assert state_of("12ab", monkeypatch).read() == state_of("GPU-12ab", monkeypatch).read() == {"sm_mhz": 1755, "watts": 698.4}
    assert state_of("34cd", monkeypatch).read() == {}


def simulate_memory(
    bench: steps.Bench, device: Device, monkeypatch: pytest.MonkeyPatch, *, row_bytes: float, step_s: float = 0.0
) -> list[int]:
    """Steps take 10 GiB and so much a row, and run out of memory at the limit; the rows that were tried."""
    tried = []

    def step() -> dict[str, float]:
        rows = bench.inputs.shape[0]
        tried.append(rows)
        device.peak_bytes = int(10 * GIB + rows * row_bytes)
        if device.peak_bytes > device.most_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"step_s": step_s or 0.001 * rows}

    monkeypatch.setattr(bench, "step", step)
    return tried


def fit_of(bench: steps.Bench, mode: str, host_gib: int = 40) -> dict[str, Any]:
    places = modes.Places(**{**vars(PLACES), "most_host_bytes": host_gib * GIB})
    return fit.fit_mode(bench, mode, places, 24 * GIB, steps=5, is_late=lambda: False)


def test_the_largest_micro_batch_fits_beside_the_context_and_memory_is_unlimited_again(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of()
    simulate_memory(bench, device, monkeypatch, row_bytes=0.7 * GIB)
    line = fit_of(bench, "keep")
    assert line["rows"] == int((23 - 10) / 0.7) and line["is_largest_known"] and not line["host_limited"], line
    assert device.most_bytes == 80 * GIB and bench.inputs.shape[0] == bench.shape.rows
    assert any("error" in item for item in line["tried"].values())


def test_a_guess_that_is_far_too_large_still_ends_with_rows_that_fit(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    tried = simulate_memory(bench, device, monkeypatch, row_bytes=0.7 * GIB)
    monkeypatch.setattr(fit, "_line", lambda *_: fit._Line(foot_bytes=10 * GIB, slope_bytes=0.5 * GIB, saved_bytes=0.0))
    monkeypatch.setattr(fit, "MOST_TRIALS_S", 0.0)
    assert fit_of(bench, "checkpoint")["rows"] > 12 and max(tried) == 24


def test_others_tools_get_no_more_host_memory_than_ours(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    tried = simulate_memory(bench, device, monkeypatch, row_bytes=0.01 * GIB)
    counted = types.SimpleNamespace(report=lambda: types.SimpleNamespace(rounds=[types.SimpleNamespace(packed_bytes=2 * GIB)]))
    monkeypatch.setattr(fit, "context", lambda mode, *_, **__: contextlib.nullcontext(counted))
    line = fit_of(bench, "save_on_cpu-pinned")
    assert line["host_limited"] and line["rows"] == max(tried) == int(40 / (2 * modes.ROUNDING[True])), line


# -- estimates and tables ----------------------------------------------------------------------------------------------


def test_estimates_grow_with_the_shape_and_fit_what_was_measured_of_a_step() -> None:
    """1.10B with 8 x 2048 tokens: 280 ms without recomputation on an H100; its blocks save 1,698 MiB each."""
    shape = net_shapes.SHAPES["llama-1.10B-2048"]
    assert estimates.step_s(shape) == pytest.approx(0.28, rel=0.2)
    assert estimates.saved_bytes(shape) == pytest.approx(16 * 1698 * 2**20, rel=0.05)
    for job in estimates.MODES_OF:
        assert estimates.estimate_s(job, net_shapes.SHAPES["gpt-8192x4"]) <= estimates.estimate_s(job, net_shapes.SHAPES["gpt-12288x3"]) + 1


def line_of(mode: str, *, speed: float, peak: int = 50, gone: float = 0.5, job: str = "core", **more: Any) -> dict[str, Any]:
    return {
        "shape": "s", "job": job, "mode": mode, "tokens": 1, "num_steps": 3, "all_bytes": 1000, "keep_step_s": 1.0, "step_s": 1 / speed,
        "step_s_spread": [1 / speed, 1 / speed], "kept_bytes": 1000 * (1 - gone), "net": {"hidden": 8192, "length": 1},
        "keep_activation_peak_bytes": 100, "activation_peak_bytes": peak, **more,
    }  # fmt: skip


BOUNDS = {
    "shape": "s", "job": "core", "mode": "bounds", "bound_fraction": 0.5, "is_keep_measured": True,
    "terms": {"all_bytes": 1000, "forward_s": 0.3, "d2h_bytes_per_s": 1.0, "h2d_bytes_per_s": 1.0},
    **{f"mix_{share}": {"gone_fraction": 0.8 + (100 - share) / 100} for share in (98, 97, 90)},
}  # fmt: skip


def test_a_mix_that_recomputes_for_its_throughput_may_meet_the_claim_and_inputs_that_stay_count() -> None:
    more = {"full_inputs_bytes": 20, "num_run_again": 3}
    lines = [BOUNDS, line_of("mix", speed=0.99, gone=0.6), line_of("mix-97", speed=0.975, gone=0.8, peak=20, **more)]
    text = tables.summarize(lines)
    assert "mix-97 (3 run again)" in text
    assert "yes s: mix: 0.9 of the optimum at 0.97: mix-97: 0.94 at 0.975" in text
    assert "yes s: the peak falls by 75% at 0.97 of keep's speed: mix-97: 0.80 at 0.975" in text
    assert "NO  s: mix: 0.9 of the optimum at 0.90: mix-97: 0.87" in text


def test_a_claim_is_met_by_any_row_of_its_tier_and_a_miss_is_held_against_the_least_peak() -> None:
    everything = line_of("mix-everything", speed=0.98, gone=1.0, peak=24, job="peers")
    text = tables.summarize([BOUNDS, line_of("mix", speed=0.99, gone=0.6), everything, line_of("host-everything", speed=0.985, gone=0.49)])
    assert "yes s: mix: 0.9 of the optimum at 0.97: mix-everything: 1.20 at 0.980" in text
    assert "yes s: host tier: 0.9 of the bound at 0.98 of keep's throughput: host-everything: 0.98 at 0.985" in text
    assert "yes s: the peak falls by 75% at 0.97 of keep's speed: mix-everything: 0.76 at 0.980" in text and "the most that" not in text
    least = {"shape": "s", "job": "core", "mode": "least", "least_peak_bytes": 23, "net": {"hidden": 8192}}
    text = tables.summarize([BOUNDS, line_of("mix", speed=0.99, peak=30), least])
    assert "mix: 0.70 at 0.990; 0.77 is the most that can (measured)" in text and "\nleast |" not in text
    net = {"kind": "gpt", "hidden": 8192, "layers": 4, "rows": 4, "length": 1024}
    text = tables.summarize([BOUNDS, line_of("mix", speed=0.99, peak=3 * 10**9, net=net, keep_activation_peak_bytes=4_900_000_000)])
    assert "least peak of a backward to which everything comes back just in time: 0.87 GB, 82.2% below keep's (on paper)" in text


def test_what_was_measured_beside_keep_counts_before_what_was_measured_after_it() -> None:
    line = line_of("host", speed=0.9, of_keep=0.985, of_keep_interval=[0.981, 0.99])
    text = tables.summarize([BOUNDS, line, line_of("keep-again", speed=0.5)])
    assert "0.985 (0.981 to 0.990)" in text and "yes s: host tier: 0.9 of the bound at 0.98" in text and "alone" not in text
    text = tables.summarize([BOUNDS, {**line, "alone_step_s": 1.02 / 0.9}, line_of("host", speed=0.9, alone_step_s=1.0 / 0.9, shape="t")])
    assert "host: +1.0% (+0.0% to +2.0%, 2)" in text


def test_drift_of_a_process_is_halved_and_a_drive_is_credited_with_what_it_was_written() -> None:
    again = line_of("keep-again", speed=0.96, kept_bytes=None)
    ssd = line_of("ssd-7", speed=0.99, job="ssd", moved_bytes=900, written_bytes=60, ssd_bytes=900, rates={"ssd_write_bytes_per_s": 200.0})
    other = {**ssd, "keep_step_s": 1.1}
    drifted, same = tables.between_keeps([line_of("host", speed=0.98), other, again])[:2]
    assert drifted["keep_step_s"] == pytest.approx((1 + 1 / 0.96) / 2) and same is other
    known = tables.figures(ssd, BOUNDS)
    assert known["allowed"] == pytest.approx(0.06) and known["reached"] == pytest.approx(1.0)
    assert "ssd-7 (0.0 GB/s)" in tables.summarize([BOUNDS, ssd])


def test_a_tool_of_others_is_beaten_only_at_no_higher_peak() -> None:
    trl = line_of("trl", speed=0.5, peak=40, job="peers", kept_bytes=None)
    low, fast = line_of("mix-everything", speed=0.6, peak=39, job="peers"), line_of("host", speed=0.99, peak=41)
    text = tables.summarize([trl, low, fast])
    assert "yes s: faster than trl at no higher peak: mix-everything 0.600 of keep at 0.00 GB, trl 0.500" in text
    assert "NO  s: faster than trl at no higher peak: host" in tables.summarize([trl, fast])
    assert "NO  s: faster than trl" in tables.summarize([trl, {**low, "step_s": 2.5}])


def test_whatever_lines_there_are_tables_are_made(tmp_path: Path) -> None:
    lines = [
        {"shape": "s", "job": "core", "mode": "the net", "error": "ran past 50 s", "is_oom": False},
        {"shape": "s", "job": "fit", "mode": "loading", "error": "exit status 1", "is_oom": False},
        {"shape": "s", "job": "peers", "mode": "torchtune", "missing": "not here"},
        line_of("host", speed=0.9, residue_bytes=1 << 30),
    ]
    results = tmp_path / "a.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut of')
    text = tables.summarize(tables.read_lines(results))
    assert "host !" in text and "the net | ran past 50 s" in text and "not here" in text
