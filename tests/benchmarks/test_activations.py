"""The benchmark of saved tensors runs small and agrees on what was saved; its bounds are right on paper; a call that ends early is gone on
with."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_python import run_loaded

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "activations"
sys.path.append(str(FOLDER))

sys.path.append(str(ROOT / "benchmarks" / "host_memory"))

import bounds  # noqa: E402
import host_time  # noqa: E402
import modes  # noqa: E402
import net_shapes  # noqa: E402
import nets  # noqa: E402
import pipeline  # noqa: E402
import stored  # noqa: E402
import tables  # noqa: E402
from attempt import Outcome  # noqa: E402

from overspill.activations.cache import TensorCache  # noqa: E402
from overspill.activations.mix import spread  # noqa: E402
from overspill.tiers.fake import FakeStore  # noqa: E402

BASE = {"all_bytes": 10_000, "inputs_bytes": 500, "cheap_bytes": 3_000, "full_s": 1.0, "cheap_s": 0.05, "d2h_bytes_per_s": 4_000.0}


def load(name: str) -> ModuleType:
    """A script whose name other benchmarks have too."""
    spec = importlib.util.spec_from_file_location(f"activations_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calls = load("run")


def call(*arguments: str) -> int:
    """`run.py` in this process."""
    return int(calls.main(list(arguments)))


def terms(**changes: Any) -> bounds.Terms:
    return bounds.Terms(**{**BASE, "forward_s": 1.0, "step_s": 3.0, "h2d_bytes_per_s": 4_000.0, **changes})


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_loaded(
        FOLDER / "run.py", "--tiny", "--steps", "2", "--steps-s", "0", "--waiting", "2", "--ssd-dir", tmp_path / "ssd",
        "--shm-dir", tmp_path / "shm", *arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "src"},
    )  # fmt: skip


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    return {line["mode"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_every_mode_writes_a_line_and_the_bound_is_a_share(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    names = [name for name in modes.MODES if not name.startswith("keep")]
    done = run(tmp_path, "--out", str(out), "--shapes", "gpt-64x4", "--jobs", "core", "--modes", *names, "keep-again")
    assert done.returncode == 0, done.stderr
    found = lines_of(out)
    assert set(found) == {*modes.MODES, "bounds"}, done.stdout
    ours = [name for name in names if modes.MODES[name].tier and modes.MODES[name].throughput is None]
    assert all(
        "step_s" in found[name] for name in [*ours, "mix-97", "mix-90", "keep", "checkpoint", "save_on_cpu", "save_on_cpu-pinned"]
    ), found
    assert len({found[name]["packed_bytes"] + found[name]["rebuilt_bytes"] for name in ours}) == 1
    assert found["cheap"]["rebuilt_bytes"] == found["mix"]["rebuilt_bytes"] > 0 == found["cheap"]["moved_bytes"]
    assert found["counted"]["moved_bytes"] == 0 < found["host-everything"]["moved_bytes"]
    assert all(found[name]["ssd_bytes"] > 0 == found[name]["host_bytes"] for name in ("ssd-everything", "ssd-7", "ssd-14"))
    assert all("missing" in found[name] for name in ("trl", "torchtune", "least"))
    assert all(line["of_keep"] > 0 and line["of_keep_interval"][0] <= line["of_keep"] for name, line in found.items() if name in ours)
    assert found["checkpoint"]["num_full_blocks"] == 4 and all(line.get("residue_bytes", 0) == 0 for line in found.values())
    assert 0 < found["bounds"]["bound_fraction"] <= 1 and "bound of the link" in done.stdout


def test_a_call_that_ends_early_is_gone_on_with_and_nothing_is_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calls, "on_termination", lambda act: None)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    shape = ("--shapes", "gpt-64x4", "--jobs", "core", "fit")
    assert call("--tiny", "--out", str(first), *shape, "--deadline-s", "1") == 0
    assert capsys.readouterr().out.count("not started") == 2 and not first.exists()
    had = {"shape": "gpt-64x4", "job": "core", "tokens": 32, "step_s": 0.01, "step_s_spread": [0.01, 0.01], "num_steps": 2}
    had |= {"forward_s": 0.003, "packed_bytes": 532_480, "rebuilt_bytes": 0}
    first.write_text("".join(json.dumps({**had, "mode": mode}) + "\n" for mode in ("counted", "checkpoint", "cheap")))
    with first.open("a") as file:
        file.write('{"shape": "gpt-64x4", "job": "core", "mode": "host", "error": "ended", "is_oom": false}\n{"shape": "gpt-')
    rest = run(tmp_path, "--out", str(second), "--done", str(first), *shape)
    assert rest.returncode == 0 and "is no JSON" in rest.stderr, rest.stderr
    found = [json.loads(text) for text in second.read_text().splitlines()]
    core = [line["mode"] for line in found if line["job"] == "core"]
    assert core == ["keep", "bounds", "mix", "mix-97", "mix-90", "keep-again", "least", "host"], (
        "keep is each process's own; what failed comes last"
    )
    fits = {line["mode"]: line for line in found if line["job"] == "fit"}
    assert set(fits) == set(calls.MODES_OF["fit"]) and "missing" in fits.pop("trl")
    assert all(line["rows"] >= 1 and line["tokens_per_s"] > 0 for line in fits.values())


def test_a_process_that_is_ended_leaves_a_line_that_says_at_which_mode_and_is_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    options = calls.parse_arguments(["--tiny", "--out", str(out)])
    under_test = calls.Call(options, net_shapes.TINY, time.monotonic())

    class Worker:
        def run(self, order: dict[str, Any], *, limit_s: float) -> Any:
            assert order["modes"] == list(calls.MODES_OF["ssd"]) and order["limit_s"] == limit_s
            Path(order["running"]).write_text("ssd-7")
            return Outcome(return_code=None, wall_s=limit_s, output_tail="")

        def close(self) -> None:
            pass

    crew: Any = SimpleNamespace(take=lambda number: Worker(), loading_s=0.0)
    assert under_test._run_job("ssd", "gpt-64x4", under_test._pending("ssd", "gpt-64x4"), crew, 1), "the job is gone on with"
    (line,) = tables.read_lines(out)
    assert line["mode"] == "ssd-7" and "ran past its limit" in line["error"] and not line["is_oom"]
    assert under_test._pending("ssd", "gpt-64x4") == ["ssd", "ssd-14"], "without it in this call"
    under_test = calls.Call(options, net_shapes.TINY, time.monotonic())
    assert under_test._pending("ssd", "gpt-64x4") == ["ssd", "ssd-14", "ssd-7"], "and with it, last, in the next"
    for more in ({"step_s": 1.0}, {"error": "OutOfMemoryError", "is_oom": True}, {"missing": "no drive"}):
        with out.open("a") as file:
            file.write(json.dumps({"shape": "gpt-64x4", "job": "ssd", "mode": f"ssd{'-7' if 'step_s' in more else '-14'}", **more}) + "\n")
    assert under_test._pending("ssd", "gpt-64x4") == ["ssd"]


@pytest.mark.parametrize(
    ("code", "running", "is_gone_on_with", "num_lines"),
    [(0, "", False, 0), (calls.WANTS_ANOTHER_PROCESS, "", True, 0), (-9, None, True, 1), (1, "the net", False, 1), (1, "keep", False, 1)],
)
def test_another_process_is_begun_where_it_may_help(
    tmp_path: Path, code: int, running: str | None, is_gone_on_with: bool, num_lines: int
) -> None:
    out = tmp_path / "a.jsonl"
    under_test = calls.Call(calls.parse_arguments(["--tiny", "--out", str(out)]), net_shapes.TINY, time.monotonic())

    class Worker:
        def run(self, order: dict[str, Any], *, limit_s: float) -> Any:
            if running is not None:
                Path(order["running"]).write_text(running)
            return Outcome(return_code=code, wall_s=1.0, output_tail="")

        def close(self) -> None:
            pass

    crew: Any = SimpleNamespace(take=lambda number: Worker(), loading_s=0.0)
    assert under_test._run_job("ssd", "gpt-64x4", ["ssd"], crew, 1) == is_gone_on_with
    assert len(tables.read_lines(out)) == num_lines


def test_each_claim_has_its_line_early_and_the_core_of_all_shapes_comes_before_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--list") == 0
    rows = [tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert rows[:3] == [("gpt-12288x3", job) for job in ("core", "ssd", "peers")]
    assert [job for _, job in rows[3:11]] == ["core"] * 7 + ["fit"] and [job for _, job in rows[:17]].count("core") == 10
    assert len(set(rows)) == len(rows) and set(rows) >= {
        (shape, job) for shape in net_shapes.SHAPES for job in ("core", "ssd", "peers", "more")
    }
    assert {shape for shape, job in rows if job == "fit"} == {"llama-1.10B-2048", "gpt-8192x4"}
    claimed = {mode for modes_of, *_ in (*tables.CLAIMS, *tables.FALLS) for mode in modes_of}
    assert claimed <= {mode for modes_of in calls.MODES_OF.values() for mode in modes_of} <= set(modes.MODES)


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_without_extra_time_the_optimum_is_what_the_link_takes_in_a_forward() -> None:
    best = bounds.best_mix(terms(), throughput_fraction=1.0)
    assert best.gone_fraction == pytest.approx(0.4) and best.moved_bytes == pytest.approx(4_000)
    assert best.full_fraction == best.cheap_fraction == pytest.approx(0.0)


def test_time_that_may_be_lost_goes_to_what_saves_most_a_second_first() -> None:
    """0.05 s buy 3,000 bytes by cheap recomputation; a second buys 4,000 of the link and 9,500 of whole blocks."""
    left_s = (1 / 0.97 - 1) * 3
    best = bounds.best_mix(terms(), throughput_fraction=0.97)
    # Whole blocks leave less to rebuild cheaply: f + c <= 1, so each further f costs 1.0 - 0.05 s and saves 9,500 - 3,000 bytes.
    full = (left_s - 0.05) / 0.95
    assert best.full_fraction == pytest.approx(full) and best.cheap_fraction == pytest.approx(1 - full)
    assert best.gone_fraction == pytest.approx(0.4 + 0.3 + 0.65 * full)


def test_a_slow_way_back_limits_what_leaves_and_nothing_is_gone_twice() -> None:
    slow = bounds.best_mix(terms(h2d_bytes_per_s=1_000.0, cheap_bytes=0), throughput_fraction=1.0)
    assert slow.moved_bytes == pytest.approx(2_000)
    assert bounds.best_mix(terms(d2h_bytes_per_s=1e9, h2d_bytes_per_s=1e9), throughput_fraction=0.9).gone_fraction == pytest.approx(1.0)
    with pytest.raises(ValueError, match="share|\\(0, 1\\]"):
        bounds.best_mix(terms(), throughput_fraction=0.0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_mix_on_a_grid_is_better_than_the_optimum(data: st.DataObject) -> None:
    case = terms(
        cheap_bytes=data.draw(st.integers(0, 5_000)), inputs_bytes=data.draw(st.integers(0, 3_000)), full_s=data.draw(st.floats(0, 2)),
        cheap_s=data.draw(st.floats(0, 0.5)), d2h_bytes_per_s=data.draw(st.floats(100, 20_000)),
        h2d_bytes_per_s=data.draw(st.floats(100, 20_000)),
    )  # fmt: skip
    share = data.draw(st.floats(0.7, 1.0))
    best = bounds.best_mix(case, throughput_fraction=share)
    allowed_s = (1 / share - 1) * case.step_s
    for full, cheap, wait in ((f / 6, c / 6, w / 6) for f in range(7) for c in range(7 - f) for w in range(7)):
        left_s = allowed_s - full * case.full_s - cheap * case.cheap_s
        if left_s < 0:
            continue
        backward_s = case.step_s - case.forward_s + full * case.full_s + cheap * case.cheap_s
        moved = min(case.d2h_bytes_per_s * (case.forward_s + wait * left_s), case.h2d_bytes_per_s * (backward_s + (1 - wait) * left_s))
        gone = full * (case.all_bytes - case.inputs_bytes) + cheap * case.cheap_bytes + moved
        assert min(1.0, gone / case.all_bytes) <= best.gone_fraction + 1e-6


def test_the_activation_peak_leaves_gradients_out_and_counts_what_is_freed_late() -> None:
    def event(action: str, address: int, size: int) -> dict[str, object]:
        return {"action": action, "addr": address, "size": size}

    events = [
        event("alloc", 1, 100), event("alloc", 2, 50), event("free_requested", 2, 50), event("alloc", 3, 10),
        event("free_completed", 2, 50), event("alloc", 2, 500), event("alloc", 4, 20), event("free_completed", 1, 100),
        event("alloc", 1, 70), event("free_completed", 9, 1),
    ]  # fmt: skip
    without = bounds.activation_peak(events, {2})
    assert without.num_bytes == 160, "what lay at the gradient's address before it counts"
    assert (without.event, without.blocks) == (3, (100, 50, 10))
    assert bounds.activation_peak(events, set()) == bounds.ActivationPeak(num_bytes=630, event=6, blocks=(500, 100, 20, 10))


@settings(max_examples=100, deadline=None)
@given(limit=st.integers(1, 200), predicted=st.integers(0, 400))
def test_the_search_ends_at_the_largest_micro_batch_that_fits(limit: int, predicted: int) -> None:
    fits: dict[int, bool] = {}
    while (rows := bounds.largest_rows(fits=fits, predicted=predicted, most=256)) is not None:
        assert rows not in fits and 1 <= rows <= 256
        fits[rows] = rows <= limit
        assert len(fits) < 80
    assert max(rows for rows, fit in fits.items() if fit) == limit
    if predicted in (limit, limit + 1):
        assert len(fits) <= 3 + math.ceil(math.log2(max(2, predicted // 6)))


# -- nets, pacing, tables, pipeline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", net_shapes.TINY)
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    shape = net_shapes.TINY[name]
    net = nets.build_net(shape, torch.device("cpu"), torch.float32)
    inputs = nets.build_inputs(shape, shape.rows, torch.device("cpu"), torch.float32)

    def gradients() -> list[torch.Tensor]:
        net.zero_grad()
        net(inputs).backward()
        return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]

    plain = gradients()
    undo = nets.recompute(net, spread(shape.layers - 1, shape.layers))
    assert all(map(torch.equal, plain, gradients()))
    undo()
    assert all("forward" not in vars(block) for block in net.blocks)


def test_blocks_are_spread_evenly_and_the_last_is_recomputed_only_with_all() -> None:
    assert spread(0, 4) == [] and spread(1, 4) == [1] and spread(2, 7) == [1, 4] and spread(28, 28) == list(range(28))
    for total in range(2, 30):
        for count in range(1, total):
            assert len(set(spread(count, total))) == count and total - 1 not in spread(count, total)


@pytest.mark.clock
def test_a_paced_store_moves_no_faster_than_its_pace_and_the_same_bytes() -> None:
    with FakeStore(1 << 20) as inner:
        store = modes.PacedStore(inner, 1e6)
        store.allocate("x", 40_000)
        given, back = torch.arange(40_000).to(torch.uint8), torch.zeros(40_000, dtype=torch.uint8)
        begun_s = time.perf_counter()
        for transfer in [store.start_write("x", offset, given[offset : offset + 20_000]) for offset in (0, 20_000)]:
            transfer.wait()
        written_s = time.perf_counter() - begun_s
        store.start_read("x", 0, back).wait()
        assert written_s >= 0.04 and time.perf_counter() - begun_s >= 0.08 and torch.equal(given, back)


def test_the_table_compares_with_the_keep_of_the_same_process_and_counts_the_drives_life() -> None:
    base = {"shape": "s", "tokens": 100, "num_steps": 5, "all_bytes": 1000, "keep_step_s": 1.0, "net": {"hidden": 12288, "length": 1}}
    peaks = {"keep_activation_peak_bytes": 100, "activation_peak_bytes": 40}
    bound = {
        "shape": "s", "job": "core", "mode": "bounds", "bound_fraction": 0.5, "is_keep_measured": True,
        "terms": {"all_bytes": 1000, "forward_s": 0.3, "d2h_bytes_per_s": 1.0, "h2d_bytes_per_s": 1.0},
        **{f"mix_{share}": {"gone_fraction": 0.8} for share in (98, 97, 90)},
    }  # fmt: skip
    host = {
        **base,
        **peaks,
        "job": "core",
        "mode": "host",
        "step_s": 1.01,
        "step_s_spread": [1.0, 1.1],
        "kept_bytes": 520,
        "moved_bytes": 480,
    }
    slow = {
        **base,
        **peaks,
        "job": "core",
        "mode": "mix",
        "step_s": 2.0,
        "step_s_spread": [2.0, 2.0],
        "kept_bytes": 200,
        "moved_bytes": 500,
    }
    ssd = {
        **base, "job": "ssd", "mode": "ssd", "step_s": 86.4, "step_s_spread": [86, 87], "kept_bytes": 900, "moved_bytes": 100,
        "ssd_bytes": 2e9, "written_bytes": 1e9, "rates": {"ssd_write_bytes_per_s": 300.0},
    }  # fmt: skip
    old = {**host, "error": "late"}
    text = tables.summarize([bound, host, slow, ssd, old, {**base, "job": "core", "mode": "cheap", "error": "OutOfMemoryError: so much"}])
    assert "yes s: host tier: 0.9 of the bound at 0.98 of keep's throughput: host: 0.96 at 0.990" in text
    assert "NO  s: mix: 0.9 of the optimum at 0.97: mix: 1.00 at 0.500" in text and "OutOfMemoryError: so much" in text
    assert "yes s: the peak falls by 47%" in text and "NO  s: the peak falls by 75%" in text
    assert "1.00 GB a step, 1 TB a day: 600.0 days" in text


@pytest.mark.parametrize(("stages", "micro"), [(1, 3), (2, 1), (4, 2), (4, 16), (8, 64)])
def test_the_simulated_pipeline_has_the_bubble_of_the_formula(stages: int, micro: int) -> None:
    done = pipeline.simulate(num_stages=stages, num_micro=micro, forward_s=0.5)
    assert done.bubble_fraction == pytest.approx((stages - 1) / (micro + stages - 1))
    assert done.most_alive == min(stages, micro)


def test_the_pipeline_on_file_is_what_the_script_gives() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "activations-bubbles.json").read_text())
    for case in kept["cases"]:
        again = pipeline.table(sequences=case["sequences"], stages=[2, 4, 8], fixed_fraction=case["fixed"], gone=[0.0, 0.5, 0.75])
        assert again == case["lines"]


def test_plots_are_drawn_from_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = load("plot")
    base = {"shape": "s", "tokens": 100, "all_bytes": 1000, "num_steps": 2, "net": {"hidden": 8, "length": 4}, "job": "core"}
    found = [
        {**base, "mode": mode, "step_s": 1.0, "step_s_spread": [0.9, 1.2], "kept_bytes": 500, "moved_bytes": 500}
        for mode in ("keep", "host", "mix")
    ]
    fit = {**base, "job": "fit", "mode": "host", "step_s": 1.0, "rows": 3, "tokens_per_s": 12.0, "share_bytes": 24 << 30}
    bound = {"shape": "s", "job": "core", "mode": "bounds", "bound_fraction": 0.6, "mix_97": {"gone_fraction": 0.8}}
    results = tmp_path / "a.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in [*found, fit, bound]))
    assert plot.main([str(tmp_path / "plots"), str(results)]) == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"activations-s.svg", "activations-reached.svg", "activations-fit.svg"}


def test_a_peer_that_would_take_the_machines_memory_is_left_out() -> None:
    known = modes.Known(all_bytes=10**15, largest_bytes=1, forward_s=1.0, d2h_bytes_per_s=1.0)
    places: Any = SimpleNamespace()
    with pytest.raises(modes.Missing, match="host memory"):
        modes.context(modes.MODES["save_on_cpu-pinned"], torch.nn.Linear(2, 2), places, known)


def test_what_has_to_be_stored_is_counted_from_a_configuration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "stored.json"
    monkeypatch.setattr(stored, "CASES", (("tiny", 32, 2), ("tiny", 32, 4)))
    monkeypatch.setattr(sys, "argv", ["stored.py", "--out", str(out)])
    stored.main()
    one, two = json.loads(out.read_text())
    assert two["whole_bytes"] > 1.9 * one["whole_bytes"] > 0 and two["rebuilt_moved_bytes"] == 2 * one["rebuilt_moved_bytes"] > 0
    assert 0 < one["stored_fraction"] < 0.5 and one["stored_fraction"] == one["stored_bytes"] / one["whole_bytes"]


def test_host_time_says_what_each_hook_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    command = ["host_time.py", "--shape", "llama-tiny-32", "--modes", "keep", "counted", "host", "--min-bytes", "256"]
    command += ["--host-bytes", str(64 << 20), "--rounds", "2", "--dtype", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    plain = TensorCache.pack
    assert host_time.main() == 0 and TensorCache.pack is plain
    keep, counted, host = (json.loads(line) for line in out.read_text().splitlines())
    assert "calls" not in keep and min(line["launched_s"] for line in (keep, counted, host)) > 0
    again, leaves = counted["calls"]["pack: new, kept again"], host["calls"]["Mover.leave"]
    first = counted["calls"]["pack: new, keep"]["a_forward"]
    assert first + again["a_forward"] == counted["num_records"] > first > 0 and again["median_us"] > 0
    assert host["host_bytes"] > 0 and leaves["a_forward"] == host["calls"]["pack: new, host"]["a_forward"] > 0
    assert all(found["all_ms"] >= 0 for line in (counted, host) for found in line["calls"].values())


@pytest.mark.gpu
def test_the_calls_of_a_copy_are_timed_on_an_idle_and_on_a_busy_device() -> None:
    idle, busy = (host_time.device_calls(torch.device("cuda"), is_busy=is_busy) for is_busy in (False, True))
    assert (idle["device_calls"], busy["device_calls"]) == ("idle", "busy")
    assert idle["median_us"].keys() == busy["median_us"].keys() and min(*idle["median_us"].values(), *busy["median_us"].values()) > 0
