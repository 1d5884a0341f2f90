"""Claims about `--serial`, `--trace` and what a run says about the time of its steps."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from overspill.cli import app
from overspill.cli.failures import ExitCode

Run = Callable[..., Result]
FLAGS = ("--steps", 3, "--micro-batch", 4, "--lr", 1e-2)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("clip", [(), ("--clip", 1.0)], ids=["immediate", "pending"])
def test_a_serial_run_has_the_losses_of_an_overlapped_one_to_the_last_bit(run: Run, tmp_path: Path, clip: tuple[object, ...]) -> None:
    found = []
    for serial in ((), ("--serial",)):
        result = run(*FLAGS, *clip, *serial, "--parameters", "ssd", "--states", "ssd", "--ssd-dir", tmp_path / "ssd")
        assert result.exit_code == 0, result.output
        found.append([(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / "out")])
    assert found[0] == found[1]
    weights = tmp_path / "out" / "run.yaml"
    assert "serial: true" in weights.read_text()


def test_every_step_on_file_says_where_its_time_went(run: Run, tmp_path: Path) -> None:
    result = run(*FLAGS, "--states", "ssd", "--ssd-dir", tmp_path / "ssd")
    assert result.exit_code == 0, result.output
    for row in metrics(tmp_path / "out"):
        assert sum(row["exposed_s"].values()) + row["lane_busy_s"]["compute"] == pytest.approx(row["step_s"], abs=2e-5)
        assert row["lane_bytes"]["ssd_read"] == row["ssd_read_bytes"] > 0
        assert row["step_over_floor"] == pytest.approx(row["step_s"] / row["floor_s"])
        assert row["floor_bound_by"] in {"compute", "chain", "ssd_read", "ssd_write", "host_update"}
        assert row["trace_s"] > 0
    last = result.output[result.output.index("Step 3: ") :]
    assert all(name in last for name in ("busy", "exposed", "moved", "floor", "ssd_read", "host_update", "dispatch"))
    assert "of its floor of" in last and "tracing it took" in last
    assert sorted(path.name for path in (tmp_path / "ssd").iterdir()) == ["overspill.written.json"], "the measurement left something"


def test_the_trace_of_the_chosen_step_is_written_and_the_last_one_otherwise(run: Run, tmp_path: Path) -> None:
    result = run(*FLAGS, "--trace", tmp_path / "chosen.json", "--trace-step", 2)
    assert result.exit_code == 0 and "trace of step 2" in result.output, result.output
    assert json.loads((tmp_path / "chosen.json").read_text())["otherData"]["step"] == 2
    assert run(*FLAGS, "--held-out", 4, "--trace", tmp_path / "out" / "last.json").exit_code == 0
    trace = json.loads((tmp_path / "out" / "last.json").read_text())
    assert trace["otherData"]["step"] == 3, "the evaluation after the last step has taken its place"


def test_a_run_that_goes_on_behind_the_traced_step_says_so_and_goes_on(run: Run, tmp_path: Path) -> None:
    flags = (*FLAGS, "--checkpoint-every", 1, "--trace", tmp_path / "trace.json", "--trace-step", 2)
    assert run(*flags).exit_code == 0
    (tmp_path / "trace.json").unlink()
    result = CliRunner().invoke(app, ["finetune", "--config", str(tmp_path / "out" / "run.yaml"), "--resume"])
    assert result.exit_code == 0 and "--trace-step 2 is done" in " ".join(result.output.split()), result.output
    assert not (tmp_path / "trace.json").exists()


def test_a_trace_that_cannot_be_written_does_not_cost_the_run_its_result(run: Run, tmp_path: Path) -> None:
    (tmp_path / "taken.json").mkdir(mode=stat.S_IRWXU)
    result = run(*FLAGS, "--trace", tmp_path / "taken.json")
    assert result.exit_code == 0 and "cannot write the trace of step 3" in result.output, result.output
    assert (tmp_path / "out" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trace-step", 2], "has no effect without a file for the trace; give --trace FILE too"),
        (["--trace", "t.json", "--trace-step", 9], "--trace-step 9 is behind the last step, 3"),
        (["--trace", "nowhere/t.json"], "make it, or name another file"),
    ],
)
def test_a_trace_that_could_not_be_is_refused_before_training(run: Run, flags: list[object], message: str) -> None:
    result = run(*FLAGS, *flags)
    assert result.exit_code == ExitCode.WRONG_INPUT and message in " ".join(result.stderr.split())
