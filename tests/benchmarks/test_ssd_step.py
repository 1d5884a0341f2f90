"""The benchmark of an SSD-bound step runs small and says what it promises."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from loaded_python import run_loaded

ROOT = Path(__file__).resolve().parents[2]


def test_the_ssd_step_benchmark_runs_small(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--samples", "1", "--seq-len", "16", "--dtype", "float32", "--raw-gib", "0.125"]
    arguments += ["--chunk-mib", "0.0625", "--ssd-dir", str(tmp_path / "ssd"), "--out", str(tmp_path / "o.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = run_loaded("benchmarks/host_memory/ssd_step.py", *arguments, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert len(result["raw_gb_per_s"]) == 2 and len(result["step_over_bound"]) == 2
    assert all(0 < step["busy_fraction"] <= 1 and step["peak_to_mean"] >= 1 and step["bytes"] > 0 for step in result["steps"])
    assert list((tmp_path / "ssd").iterdir()) in ([], [tmp_path / "ssd" / "run"])
