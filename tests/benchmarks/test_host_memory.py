"""The host-memory comparison runs small, on a CPU, in every configuration that the GPU script has; failures become results."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_python import run_loaded

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "host_memory"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import attempt  # noqa: E402
import longest  # noqa: E402
import measure  # noqa: E402
import run_deepspeed  # noqa: E402
import run_overspill  # noqa: E402
import summarize  # noqa: E402
import switched_off  # noqa: E402
from shapes import SHAPES, build_model, build_windowed_model  # noqa: E402

SMALL = ["--samples", "1", "--seq-len", "32", "--dtype", "float32", "--steps", "2"]
MIB = 1 << 20


def gpu_configurations() -> dict[str, list[str]]:
    """Name -> arguments of every overspill run in run_gpu.sh, in fp32 format."""
    script = (FOLDER / "run_gpu.sh").read_text()
    found = {}
    for name, arguments in re.findall(r'^ +overspill "?([\w$-]+)"? \d+ "\$\w+"(.*)$', script, flags=re.MULTILINE):
        placed = arguments.replace('"${all_ssd[@]}"', "--parameters ssd --states ssd --boundaries ssd")
        placed = placed.replace('"${ssd_states[@]}"', "--parameters ssd --states ssd --boundaries device")
        placed = placed.replace('"$half"', "2")
        for off in switched_off.PARTS if "$off" in name else ("",):
            found[name.replace("$off", off)] = shlex.split(placed.replace('"$off"', off))
    return {name: arguments for name, arguments in found.items() if "--state-format" not in arguments}


def small_run(name: str, arguments: list[str], folder: Path) -> dict[str, Any]:
    line = ["--name", name, "--out", str(folder / "out"), "--ssd-dir", str(folder / "ssd"), *arguments, "--shape", "tiny", *SMALL]
    options = run_overspill.parse_arguments(line)
    watch = measure.HostWatch()
    try:
        return {"system": "overspill", "name": name, "shape": "tiny", **run_overspill.measure_run(options, watch)}
    finally:
        watch.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {name: small_run(name, arguments, tmp_path_factory.mktemp("run")) for name, arguments in gpu_configurations().items()}


def test_every_gpu_configuration_runs_small(runs: dict[str, dict[str, Any]]) -> None:
    assert {"host", "host-clip", "ssd", "ssd-clip", "all-ssd", "half-depth", "whole-depth", "parts-no-check-flat"} <= runs.keys()
    for name, result in runs.items():
        assert len(result["steps"]) == 2, name
        assert result["host"]["training"]["vm_hwm_bytes"] > result["process_own_bytes"] / 2, name


def test_the_waste_of_the_pools_is_on_record(runs: dict[str, dict[str, Any]]) -> None:
    """At this size whole pages are most of it; the shape of 1.10B is where 5 % are claimed."""
    for name, result in runs.items():
        assert {pool["name"] for pool in result["pools"]} == {"device", "host"}, name
        assert all(0 <= pool["waste_fraction"] < 1 and pool["peak_bytes"] >= 0 for pool in result["pools"]), name
    (device,) = (pool for pool in runs["all-ssd"]["pools"] if pool["name"] == "device")
    assert device["waste_fraction"] <= 0.05 and device["one_size_bytes"] > device["peak_bytes"] > 0


def test_a_part_that_is_switched_off_changes_no_loss(runs: dict[str, dict[str, Any]]) -> None:
    expected = [step["loss"] for step in runs["parts-as-is"]["steps"]]
    for part in switched_off.PARTS:
        assert [step["loss"] for step in runs[f"parts-no-{part}"]["steps"]] == expected, part


def test_counted_ssd_bytes_are_those_of_the_lanes(runs: dict[str, dict[str, Any]]) -> None:
    step = runs["all-ssd"]["steps"][-1]
    moved = step["lane_bytes"]["ssd_read"] + step["lane_bytes"]["ssd_write"]
    if step["io"]["process_written_bytes"] == 0:
        pytest.skip("this file system is in memory, or the kernel does not count")
    assert moved <= summarize.ssd_bytes(runs["all-ssd"]) <= 1.05 * moved


def test_the_table_has_a_line_a_run_and_the_ratios(
    runs: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for result in runs.values():
        measure.append_result(tmp_path / "host-memory-overspill.jsonl", result)
    measure.append_result(tmp_path / "host-memory-deepspeed.jsonl", {"system": "deepspeed", "name": "infinity-both", "error": "no | room"})
    monkeypatch.setattr(sys, "argv", ["summarize.py", str(tmp_path)])
    summarize.main()
    text = (tmp_path / "host-memory.md").read_text()
    assert all(f"| {name} |" in text for name in runs) and "no / room" in text
    found = json.loads((tmp_path / "host-memory.json").read_text())
    assert 0.5 < found["host peak, whole depth of half depth, VmHWM alone"] < 1.5


def test_one_size_slots_and_rounded_memory_take_more(tmp_path: Path) -> None:
    from overspill.tiers import HostMemory, SlotPool

    with switched_off.exchanged(HostMemory, switched_off.PowerOfTwoMemory):
        import overspill.runtime.opening as opening

        memory = opening.HostMemory(pin=False, budget_bytes=None)
        memory.allocate("a", 5 * MIB)
        assert memory.peak_bytes == 8 * MIB
    host = HostMemory(pin=False, budget_bytes=None)
    pool = switched_off._one_size_pool(3 * MIB)(host, "host")
    slots = [pool.acquire(4096), pool.acquire(MIB)]
    assert [slot.tensor.numel() for slot in slots] == [4096, MIB] and pool.peak_bytes == 6 * MIB
    for slot in slots:
        slot.release()
    pool.close()
    with pytest.raises(RuntimeError, match="no module of overspill refers to"), switched_off.exchanged(SlotPool(host, "x"), None):
        pass


def test_the_elementwise_check_sees_what_is_not_finite() -> None:
    with pytest.raises(FloatingPointError):
        switched_off.ElementwiseCheck(None)(torch.tensor([1.0, float("nan")]))
    flat = switched_off.ElementwiseCheck(3)
    assert float(flat(torch.tensor([2.0]))) == 4.0
    with pytest.raises(FloatingPointError):
        flat(torch.tensor([1.0, float("inf")]))


def test_the_watch_sees_memory_come_and_tells_phases_apart() -> None:
    watch = measure.HostWatch()
    block = torch.ones(200 * MIB, dtype=torch.uint8)
    during = watch.read()
    held = block.numel()
    del block
    watch.read()
    after = watch.read()
    watch.close()
    assert during["vm_hwm_bytes"] >= held
    if watch.is_resettable:
        assert after["vm_hwm_bytes"] <= during["vm_hwm_bytes"] - held / 2


def test_the_floor_ends_the_process_and_leaves_last_words(tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    code = f"import measure, pathlib, time; measure.HostWatch(floor_bytes=1 << 60, last_words=pathlib.Path({str(words)!r})); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=False, capture_output=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    assert "below the floor" in json.loads(words.read_text())["error"]


def test_an_attempt_that_hangs_is_ended_at_its_limit() -> None:
    outcome = attempt.run_attempt([sys.executable, "-S", "-c", "import time; print('begun', flush=True); time.sleep(60)"], limit_s=1)
    assert outcome.return_code is None and "begun" in outcome.output_tail
    assert "past its limit" in outcome.describe_failure(1)


def test_ending_the_supervisor_ends_its_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = f"import attempt, sys; attempt.run_attempt([sys.executable, '-S', '-c', {child!r}], limit_s=60)"
    with subprocess.Popen([sys.executable, "-S", "-c", code], cwd=FOLDER, start_new_session=True) as supervisor:
        while not (pid_file.exists() and pid_file.read_text()):
            assert supervisor.poll() is None
            time.sleep(0.05)
        supervisor.terminate()
        assert supervisor.wait(timeout=20) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


SIGNALLED_WITH_THE_LOCK = """
import os, signal, subprocess, sys, threading, types
class Lock:
    def __init__(self):
        self.inner, self.is_first = threading.Lock(), True
    def acquire(self, *args):
        got = self.inner.acquire(*args)
        if got and self.is_first:
            self.is_first = False
            os.kill(os.getpid(), signal.SIGTERM)
        return got
    def release(self):
        self.inner.release()
    def __enter__(self):
        self.acquire()
    def __exit__(self, *exc_info):
        self.release()
subprocess.threading = types.SimpleNamespace(Lock=Lock)
"""


@pytest.mark.parametrize("supervisor", ["attempt", "worker"])
def test_a_supervisor_ended_while_it_holds_a_lock_of_popen_ends_all_the_same(supervisor: str) -> None:
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    code = f"import attempt\nattempt.run_attempt({command!r}, limit_s=60)"
    if supervisor == "worker":
        code = "import attempt, workers\nattempt.REAP_S = 0.5\nworkers.on_termination(lambda: None)\n"
        code += f"workers.Worker({command!r}).run({{}}, limit_s=60)"
    path = os.pathsep.join(str(folder) for folder in (FOLDER, FOLDER.parent / "prediction"))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-S", "-c", SIGNALLED_WITH_THE_LOCK + code], env=environment, check=False, timeout=30)
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(("capacity", "expected"), [(0, 0), (1, 1), (5, 5), (9, 8), (100, 64)])
def test_the_search_finds_the_largest_size_that_runs(capacity: int, expected: int) -> None:
    size, good = longest.search(1, 64, 2, 1, lambda size: size <= capacity)
    assert size == expected and all(item <= capacity for item in good)


def test_a_whole_trial_may_take_the_time_that_later_ones_do_not_need_and_never_less_than_an_equal_share() -> None:
    assert longest.share_of_time(480, [140]) == 340
    assert longest.share_of_time(480, [400]) == 240
    assert longest.share_of_time(480, []) == 480


def test_a_run_that_had_company_is_judged_by_its_own_resident_memory() -> None:
    result = {"host": {"training": {"vm_hwm_bytes": 2, "available_fall_bytes": 5}}}
    assert summarize.host_peak_bytes(result) == 5
    assert summarize.host_peak_bytes({**result, "beside": "tests"}) == 2


def test_longest_searches_and_confirms_at_full_depth(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["--shape", "tiny", "--state-format", "fp32", "--dtype", "float32", "--start-tokens", "32", "--most-tokens", "64"]
    arguments += ["--search", "context", "--ssd-dir", str(tmp_path / "ssd"), "--out", str(out)]
    done = run_script("longest.py", *arguments)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(result["search"], result["confirmed"]) for result in results] == [("context", 64)]
    assert results[0]["whole"][0]["boundaries"] == "host" and results[0]["whole"][0]["runs"]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is there")
def test_without_deepspeed_its_run_is_a_result_that_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run_script("run_deepspeed.py", "--name", "zero3-cpu", "--shape", "tiny", "--limit-s", "60", "--out", str(out))
    assert done.returncode == 1
    assert json.loads(out.read_text())["error"] == "ModuleNotFoundError: No module named 'deepspeed'"


def test_deepspeed_is_tuned_for_little_host_memory(tmp_path: Path) -> None:
    arguments = ["--name", "infinity-both", "--ssd-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    config = run_deepspeed.build_config(run_deepspeed.parse_arguments(arguments), largest_elements=1000)
    zero = config["zero_optimization"]
    assert zero["offload_param"]["buffer_size"] == zero["sub_group_size"] == 1000
    assert zero["stage3_max_live_parameters"] == zero["stage3_prefetch_bucket_size"] == 0
    assert config["aio"]["intra_op_parallelism"] == 16 and config["aio"]["queue_depth"] == 64


def test_a_windowed_model_has_the_shape_and_no_memory_of_its_own() -> None:
    shape = SHAPES["tiny"]
    model = build_windowed_model(shape, dtype=torch.float32, max_positions=64)
    drawn = build_model(shape, torch.device("cpu"))
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in drawn.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == shape.num_parameters
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < shape.num_parameters * 4 / 20
    assert torch.linalg.matrix_rank(model.model.layers[0].mlp.up_proj.weight.detach().contiguous()) == shape.hidden_size
    assert SHAPES["8B"].num_parameters == 8_030_261_248


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_loaded(FOLDER / name, *arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
