"""The accuracy of predictions is measured as it says: calibration and held-out runs apart, a line a run, failures too; small, on a CPU."""

from __future__ import annotations

import importlib.util
import json
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


def test_held_out_runs_calibrate_nothing_and_cover_the_shapes() -> None:
    assert len(run.HELD_OUT) == len(set(run.HELD_OUT)) >= 20 and not set(run.HELD_OUT) & set(run.CALIBRATION)
    found = [run.parse_name(name) for name in (*run.HELD_OUT, *run.CALIBRATION)]
    assert {(item["shape"], item["seq_len"], item["place"], item["clip"]) for item in found} == {
        (shape, length, place, clip)
        for shape in ("160M", "0.5B", "1.10B", "moe")
        for length in (512, 2048, 8192)
        for place in ("host", "ssd")
        for clip in (None, 1.0)
    }


@pytest.mark.parametrize("name", ["1.10B:2048", "9B:2048:host", "1.10B:long:host", "1.10B:2048:tape", "1.10B:2048:host:clap"])
def test_a_name_that_is_no_run_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a run"):
        run.parse_name(name)


def test_the_summary_has_median_and_worst_of_what_is_held_out_and_names_what_failed() -> None:
    def line(name: str, miss: float, **more: Any) -> dict[str, Any]:
        return {"name": name, "is_held_out": True, "missed_by": {figure: miss for figure in run.TARGETS}, **more}

    text = run.summarize([line("a", -0.5), line("a", -0.01), line("b", 0.02), line("c", 0.1), line("d", 9.0, is_held_out=False)])
    assert text.startswith("3 held-out runs") and "device_peak_bytes | 2.00% | 10.00% | 3% / 8% | c" in text
    assert run.summarize([{"name": "e", "error": "OOM"}]).endswith("failed: e")


def test_a_run_is_a_process_of_its_own_and_its_line_has_both_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["--tokens", "128", "--warmup", "1", "--steps", "1", "--dtype", "float32", "--templates-s", "0.5"]
    options = run.parse_arguments(["--out", str(tmp_path / "out"), "--ssd-dir", str(tmp_path / "ssd"), *flags])
    options.ssd_dir.mkdir()
    line = run.run_one("tiny-moe:64:ssd:clip", options, limit_s=60)
    assert "error" not in line, line
    assert line["missed_by"]["ssd_read_bytes"] == line["missed_by"]["ssd_written_bytes"] == line["missed_by"]["device_peak_bytes"] == 0
    assert line["measured"]["ssd_written_bytes"] > 0 and abs(line["missed_by"]["host_peak_bytes"]) < 0.5
    assert line["missed_by"]["step_s"] is None and "blocks" in line["source"] or "assumed" in line["source"], "no machine file, no time"
    assert json.loads(json.dumps(line)) == line
    broken = run.run_one("tiny:64:host", options, limit_s=0.2)
    assert "ran past its limit" in broken["error"], sys.executable
