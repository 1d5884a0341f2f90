"""The accuracy of predictions is measured as it says: calibration and held-out runs apart, a line a run, failures too; small, on a CPU."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "prediction"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prediction_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load()
workers = sys.modules["workers"]


def test_held_out_runs_calibrate_nothing_and_cover_the_shapes() -> None:
    assert len(run.HELD_OUT) == len(set(run.HELD_OUT)) >= 20 and not set(run.HELD_OUT) & set(run.CALIBRATION)
    found = [run.parse_name(name) for name in (*run.HELD_OUT, *run.CALIBRATION)]
    assert {(item["shape"], item["seq_len"], item["place"], item["clip"]) for item in found} == {
        (shape, length, place, clip)
        for place, shapes in (("host", ("160M", "0.5B", "1.10B", "moe")), ("ssd", ("160M", "0.5B", "moe")))
        for shape in shapes
        for length in (512, 2048, 8192)
        for clip in (None, 1.0)
    }


@pytest.mark.parametrize(("number", "least"), [(8, 2), (16, 5), (24, 7)])
def test_wherever_a_call_ends_every_shape_length_place_and_clip_was_had(number: int, least: int) -> None:
    found = [run.parse_name(name) for name in run.HELD_OUT[:number]]
    for key, values in {"shape": 4, "seq_len": 3, "place": 2, "clip": 2}.items():
        counts = collections.Counter(item[key] for item in found)
        assert len(counts) == values and min(counts.values()) >= (least if key != "shape" else number // 5), (key, counts)


def test_as_many_runs_as_a_call_must_show_fit_into_it_beside_loading_and_the_probe_on_a_slow_drive() -> None:
    assert sum(run.estimate_s(run.parse_name(name)) for name in run.HELD_OUT[:20]) < 440


@pytest.mark.parametrize("name", ["1.10B:2048", "9B:2048:host", "1.10B:long:host", "1.10B:2048:tape", "1.10B:2048:host:clap"])
def test_a_name_that_is_no_run_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a run"):
        run.parse_name(name)


def test_the_summary_has_median_and_worst_of_what_is_held_out_and_names_what_failed() -> None:
    def line(name: str, miss: float, **more: Any) -> dict[str, Any]:
        return {"name": name, "is_held_out": True, "missed_by": {figure: miss for figure in run.TARGETS}, **more}

    text = run.summarize([line("a", -0.5), line("a", -0.01), line("b", 0.02), line("c", 0.1), line("d", 9.0, is_held_out=False)])
    assert text.startswith("3 held-out runs") and "device_peak_bytes | 2.00% | 10.00% | 3% / 8% | c" in text
    drive = {"lanes_read_bytes": 300, "unwritten_read_bytes": 100, "kernel_read_bytes": 201}
    assert "bytes read as the kernel counted them | +0.500% | +0.500% | a" in run.summarize([line("a", 0.0, drive=drive)])
    assert run.summarize([{"name": "e", "error": "OOM"}]).endswith("failed: e")
    counted = dict(wall_s=2.0, own_s=3.0, busy_s=5.0, stolen_s=4.0)
    restless = line("b", 0.0, all_step_s=[9.0, 1.0, 1.2, 1.0], num_counted=3, num_cpus=4, disturbance={"counted": counted})
    text = run.summarize([line("a", 0.0, all_step_s=[5.0, 5.1, 5.0], num_counted=2), restless])
    assert "counted steps of a run are apart by | 11.0% | 20.0% | b" in text, "steps that warm up are not among them"
    assert text.endswith("of the cores others had meanwhile | 75.0% | 75.0% | b"), "stolen, or computing beside us: 6 s of 8"


def test_what_others_had_of_the_cores_is_what_the_kernel_counted(tmp_path: Path) -> None:
    from disturbance import counted_so_far as counted  # beside run.py, which is loaded above

    assert (counted(tmp_path).busy_s, counted(tmp_path).stolen_s, counted(tmp_path).throttled_s) == (0, 0, 0), "it does not tell"
    for name, text in {
        "proc/stat": "cpu  100 20 3 9000 50 4 5 600 0 0\ncpu0 1",
        "sys/fs/cgroup/cpu.stat": "usage_usec 9\nthrottled_usec 25",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    found = counted(tmp_path)
    assert (found.busy_s, found.stolen_s) == pytest.approx((132 * tick_s, 600 * tick_s)) and found.throttled_s == pytest.approx(25e-6)
    before = counted()
    assert sum(range(200_000)) and counted() - before != before
    assert (counted() - before).own_s >= 0 and (counted() - before).wall_s > 0


def test_a_run_is_a_process_of_its_own_and_its_line_has_both_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["--tokens", "128", "--warmup", "1", "--steps", "1", "--dtype", "float32", "--templates-s", "0.5"]
    options = run.parse_arguments(["--out", str(tmp_path / "out"), "--ssd-dir", str(tmp_path / "ssd"), *flags])
    options.ssd_dir.mkdir()
    with run.Crew(FOLDER / "one_run.py", num_waiting=2) as crew:
        line = run.run_one("tiny-moe:64:ssd:clip", options, crew, limit_s=60, num_runs=2)
        broken = run.run_one("tiny:64:host", options, crew, limit_s=0.6)
    assert "ran past its limit" in broken["error"], sys.executable
    assert not list((tmp_path / "ssd").iterdir()), "nothing of a run is left on the drive"
    assert "error" not in line, line
    assert line["missed_by"]["ssd_read_bytes"] == line["missed_by"]["ssd_written_bytes"] == line["missed_by"]["device_peak_bytes"] == 0
    assert line["measured"]["ssd_written_bytes"] > 0 and abs(line["missed_by"]["host_peak_bytes"]) < 0.5
    assert line["missed_by"]["step_s"] is None and "blocks" in line["source"] or "assumed" in line["source"], "no machine file, no time"
    assert json.loads(json.dumps(line)) == line
    for figures in (line["compute_s"], line["host_s"]):
        assert set(figures["measured"]) == set(figures["predicted"]) and all(value >= 0 for value in figures["measured"].values())
    assert {"blocks backward", "update", "fetch"} <= line["host_s"]["measured"].keys() and line["leads"]["measured"]["median_s"] < 1
    for kind, (number, seconds) in line["launched_s"].items():
        assert number == line["spans"]["kinds"].count(kind) > 0 and 0 < seconds <= line["compute_s"]["measured"][kind] * 1.01 + 1e-3, kind
    assert {"tail backward", "blocks forward", "compress"} <= line["launched_s"].keys(), "on a CPU launching is computing"
    kinds = line["spans"]["kinds"]
    for who in ("predicted", "measured"):
        assert all(-len(kinds) <= op < len(kinds) and begin <= end for op, _, _, _, begin, end in line["spans"][who] if op >= 0)
    assert line["replays"] == {"predicted": 0, "measured": 0}
    assert {"launch_s", "replays_s", "num_repetitions"} < line["templates"][0].keys()
    assert line["disturbance"]["counted"]["wall_s"] > 0 and len(line["rates"]["update_samples_per_s"]) >= 10, "two looks of five samples"
    drive = line["drive"]
    steps = 2  # the first of warming up, and the counted one: the second makes the first update, of states that nobody has written
    assert drive["lanes_written_bytes"] > (steps - 1) * line["measured"]["ssd_written_bytes"] > 0
    assert 0 < drive["unwritten_read_bytes"] < drive["lanes_read_bytes"]


def test_a_process_that_waits_is_told_what_to_do_or_ends_with_us(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text("import os, sys\nos.write(int(sys.argv[1]), b'!')\nline = sys.stdin.readline()\nprint('told', line)\n")
    with workers.Crew(script, num_waiting=2) as crew:
        outcome = crew.take(5).run({"run": 1}, limit_s=20)
        assert outcome.return_code == 0 and 'told {"run": 1}' in outcome.output_tail
        waiting = crew.take(4)
        waiting.close()
        assert waiting.close() == "", "twice is once"
    (tmp_path / "broken.py").write_text("raise ImportError('no torch here')")
    with workers.Crew(tmp_path / "broken.py", num_waiting=2) as crew, pytest.raises(RuntimeError, match="no torch here"):
        crew.take(2)


def test_a_run_that_hangs_says_where_before_it_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    lines = [
        "import sys, threading",
        f"sys.path.insert(0, {str(FOLDER)!r}), sys.path.insert(0, {str(FOLDER.parent / 'host_memory')!r})",
        "import workers",
        "def hang(): threading.Event().wait()",
        "workers.write_stacks_when_asked()",
        "assert workers.take_order(int(sys.argv[1]))",
        "threading.Thread(target=hang, daemon=True).start()",
        "hang()",
    ]
    script.write_text("\n".join(lines))
    with workers.Crew(script, num_waiting=1) as crew:
        outcome = crew.take(1).run({"run": 1}, limit_s=1.0)
    assert outcome.return_code is None, "however it ended once it was asked"
    assert outcome.output_tail.count("in hang") == 2 and "most recent call first" in outcome.output_tail


def test_a_run_ends_with_who_waits_for_it(tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C are exceptions here: what runs would go on with the device that the next call measures on."""
    script = tmp_path / "child.py"
    script.write_text("import os, sys, time\nos.write(int(sys.argv[1]), b'!')\nsys.stdin.readline()\ntime.sleep(60)\n")

    def leave(*args: object) -> None:
        raise SystemExit

    before = signal.signal(signal.SIGALRM, leave)
    try:
        with workers.Crew(script, num_waiting=1) as crew:
            worker = crew.take(1)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(SystemExit):
                worker.run({"run": 1}, limit_s=30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert worker._child.poll() == -signal.SIGKILL


def test_a_call_resumes_leaves_out_what_is_done_and_takes_what_still_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "out.jsonl", list[str]()
    cut_off = '{"name": "160M:2048:h'
    out.write_text(json.dumps({"name": "160M:512:host", "is_held_out": True, "missed_by": {}}) + "\n" + cut_off + "\n")

    def fake(name: str, options: Any, crew: Any, *, limit_s: float, num_runs: int) -> dict[str, Any]:
        asked.append(name)
        return {"wall_s": 1.0, "missed_by": dict.fromkeys(run.TARGETS, 0.0), "spans": {"kinds": []}}

    monkeypatch.setattr(run, "run_one", fake)
    monkeypatch.setattr(run, "provenance", dict)
    flags = ["--out", str(out), "--ssd-dir", str(tmp_path / "ssd"), "--machine", str(tmp_path / "machine.json"), "--deadline-s", "26"]
    flags += ["--spans", str(tmp_path / "spans.jsonl")]
    names = ["160M:512:host", "0.5B:512:ssd", "160M:2048:host"]
    assert run.measure_all(names, run.parse_arguments(flags)) == 0
    assert asked == ["160M:2048:host"] and "0.5B:512:ssd: not started" in capsys.readouterr().out
    assert json.loads((tmp_path / "spans.jsonl").read_text()) == {"name": "160M:2048:host", "kinds": []}
    assert "spans" not in out.read_text()
