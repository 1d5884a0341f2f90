"""The benchmark of saved tensors runs small, and its modes agree on what was saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_mode_writes_a_line_and_the_bound_is_a_share(tmp_path: Path) -> None:
    out = tmp_path / "activations.jsonl"
    done = subprocess.run(
        [
            sys.executable, "benchmarks/activations/run.py", "--hidden", "64", "--layers", "2", "--rows", "2", "--length", "16",
            "--steps", "2", "--dtype", "float32", "--min-bytes", "1KiB", "--window", "16KiB",
            "--host-budget", "16MiB", "--ssd-host-budget", "256KiB",
            "--ssd-dir", str(tmp_path / "ssd"), "--ssd-budget", "16MiB", "--out", str(out),
        ],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = {line["mode"]: line for line in map(json.loads, out.read_text().splitlines())}
    names = ["keep", "rebuild", "host", "host-everything", "host-rebuild", "host-ssdtrain", "ssd", "ssd-everything", "ssd-ssdtrain"]
    assert set(lines) == {*names, "save_on_cpu", "save_on_cpu-pinned"} and all("error" not in lines[name] for name in names)
    assert len({lines[name]["packed_bytes"] + lines[name]["rebuilt_bytes"] for name in names}) == 1
    assert lines["rebuild"]["rebuilt_bytes"] == lines["host-rebuild"]["rebuilt_bytes"] > 0 == lines["rebuild"]["moved_bytes"]
    assert lines["keep"]["moved_bytes"] == 0 < lines["host-everything"]["moved_bytes"]
    assert lines["ssd-everything"]["report"]["ssd_bytes"] > 0
    assert 0 < lines["keep"]["bound_fraction"] <= 1 and "bound:" in done.stdout
