"""The benchmark of the update runs small and its rows add up."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from loaded_python import run_loaded

pytest.importorskip("overspill._native", reason="the native core is not built")


SMALL = ("--parameters", "8192", "--repetitions", "1", "--threads", "1")


def rows_of(script: str, tmp_path: Path, *, options: tuple[str, ...] = SMALL) -> list[dict]:
    path = Path(__file__).parents[2] / "benchmarks" / "update" / script
    out = tmp_path / "update.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = run_loaded(path, "--out", out, *options, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["rows"]


def test_the_update_benchmark_runs_small(tmp_path):
    rows = rows_of("run.py", tmp_path)
    measured = {(row["what"], row.get("optimizer"), row.get("state_format")): row for row in rows if "skipped" not in row}
    assert measured["update", "adamw", "fp32"]["bytes_per_parameter"] == 26
    assert measured["update", "adamw", "bf16"]["bytes_per_parameter"] == 14
    assert measured["update", "adamw", "int8"]["bytes_per_parameter"] == pytest.approx(10 + 4 / 256)
    assert {what for what, _, _ in measured} >= {"stream", "update", "in_cache", "torch_fused"}
    assert all(row["min_s"] <= row["median_s"] <= row["max_s"] for row in measured.values())


def test_the_comparison_of_variants_runs_small_and_marks_the_defaults(tmp_path):
    rows = rows_of("variants.py", tmp_path)
    assert {row["state_format"] for row in rows} == {"fp32", "bf16", "int8"}
    assert sum(row["variant"].startswith("*") for row in rows) == 3


@pytest.mark.gpu
def test_the_update_benchmark_of_the_device_runs_small(tmp_path):
    rows = rows_of("device.py", tmp_path, options=("--parameters", "1000000", "--chunk", "300000", "--repetitions", "1"))
    assert {row["what"].split()[0] for row in rows} == {"copy", "fused", "reference", "torch_fused", "squares"}
    assert {row["state_format"] for row in rows if row["what"] == "fused"} == {"fp32", "bf16", "int8"}
    assert all(row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
