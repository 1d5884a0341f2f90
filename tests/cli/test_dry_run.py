"""Claims about `overspill finetune --dry-run`: it says what a run would do, reads no weights and writes nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from overspill.cli.dry_run import require_fit
from overspill.cli.failures import ExitCode
from overspill.cli.finetune import FinetuneOptions
from overspill.errors import BudgetError
from overspill.spec.hardware import HardwareSpec
from overspill.spec.machine_file import ComputeFigures, MachineCapacities, MachineFile, MachineIdentity, MachineRates, MeasuredRate
from overspill.spec.prediction import MemoryTerm
from overspill.spec.report import Prediction

Run = Callable[..., Result]


@pytest.fixture
def config_alone(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder without weights or tokenizer."""
    folder = tmp_path / "config-alone"
    folder.mkdir()
    shutil.copy(model_folder / "config.json", folder)
    return folder


def test_a_dry_run_reads_no_weights_and_no_data_and_writes_nothing(run: Run, config_alone: Path, tmp_path: Path) -> None:
    ssd = tmp_path / "ssd"
    done = run("--dry-run", "--states", "ssd", "--ssd-dir", ssd, "--ssd-tbw", "600TB", model=config_alone, data="nowhere.jsonl")
    assert done.exit_code == ExitCode.OK, done.output
    assert not (tmp_path / "out").exists() and not ssd.exists()
    text = " ".join(done.stdout.split())
    assert "Placement" in text and "working memory of a unit" in text and text.endswith("it fits")
    assert "a step: no time is told, because rates are assumed; measure them with `overspill probe`" in text
    assert "written a step" in text and "a day" not in text, "a day has steps only if their time is known"


@pytest.mark.parametrize("mode", ["auto", "keep", "host"])
def test_a_dry_run_says_what_becomes_of_activations(mode: str, run: Run, config_alone: Path) -> None:
    done = run("--dry-run", "--activations", mode, model=config_alone)
    assert done.exit_code == ExitCode.OK, done.output
    where = "moved to host memory" if mode == "host" else "kept on the device"
    text = " ".join(done.stdout.split())
    assert f"activations: of 2 blocks {where}" in text and text.count("activations") >= 2
    refused = run("--dry-run", "--activations", "keep", "--compile", model=config_alone)
    assert refused.exit_code == ExitCode.WRONG_INPUT and "leave --compile out" in refused.stderr


def test_a_dry_run_of_what_does_not_fit_fails_with_what_is_missing_and_the_flag(run: Run, config_alone: Path) -> None:
    refused = run("--dry-run", "--host-budget", "1MiB", model=config_alone)
    assert refused.exit_code == ExitCode.WRONG_INPUT and "raise --host-budget" in refused.stderr and "missing" in refused.stderr
    assert "it fits" not in refused.stdout


@pytest.mark.filterwarnings("ignore:rates are those of:RuntimeWarning")
def test_with_a_machine_file_blocks_are_timed_and_step_and_wear_are_told(run: Run, config_alone: Path, tmp_path: Path) -> None:
    rate = MeasuredRate(median_per_s=1e10, min_per_s=1e10, max_per_s=1e10, num_samples=1, size=1)
    identity = MachineIdentity(cpu_model="x", num_cpus=1, memory_class_bytes=1, device="cpu", torch="x", overspill="x")
    capacities = MachineCapacities(memory_total_bytes=1, memory_total_after_bytes=1, host_available_bytes=1)
    rates = MachineRates(compute=ComputeFigures(what="a product", alone=rate, beside_copies=None), update={"fp32": rate})
    file = MachineFile(identity=identity, measured_at="2026-11-22T10:00:00+00:00", took_s=1.0, capacities=capacities, rates=rates)
    (tmp_path / "machine.json").write_text(file.to_json())
    flags = ("--dry-run", "--seq-len", 64, "--states", "ssd", "--ssd-dir", tmp_path / "ssd", "--ssd-tbw", "600TB")
    done = run(*flags, "--machine", tmp_path / "machine.json", model=config_alone)
    assert done.exit_code == ExitCode.OK, done.output
    text = " ".join(done.stdout.split())
    assert "tokens/s; measured (machine.json, 2026-11-22)" in text and "blocks timed on cpu" in text
    assert "compute is busy for" in text and "a day" in text and "rated end" in text


def test_a_peak_beyond_what_is_free_or_allowed_does_not_fit() -> None:
    prediction = Prediction(
        step_s=1.0, lane_bytes={}, num_ops=1,
        device_resident_peak_bytes=0, host_resident_peak_bytes=0, ssd_resident_peak_bytes=0,
        lane_busy_s={}, source="", device_terms=(MemoryTerm(name="homes", num_bytes=50),),
        host_terms=(MemoryTerm(name="homes", num_bytes=70),),
    )  # fmt: skip
    options = FinetuneOptions(model="m", data="d", out=Path("o"))
    require_fit(prediction, options, HardwareSpec())
    require_fit(prediction, options, HardwareSpec(device_capacity_bytes=50, host_capacity_bytes=60, process_bytes=10))
    with pytest.raises(BudgetError, match="the device peak is predicted at 50 B, 49 B may be used, 1 B are missing"):
        require_fit(prediction, options, HardwareSpec(device_capacity_bytes=49))
    with pytest.raises(BudgetError, match="the host peak is predicted at 70 B, 64 B may be used, 6 B are missing; raise --host-budget"):
        require_fit(prediction, dataclasses.replace(options, host_budget="64"), HardwareSpec())


def test_a_runs_rows_and_summary_say_what_was_predicted_and_missed(run: Run, tmp_path: Path) -> None:
    done = run("--steps", 2, "--states", "ssd", "--ssd-dir", tmp_path / "ssd")
    assert done.exit_code == ExitCode.OK, done.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["missed_by"]["ssd_read_bytes"] == rows[0]["missed_by"]["ssd_written_bytes"] == 0
    assert rows[0]["predicted"]["step_s"] is None and rows[0]["predicted"]["device_peak_bytes"] == rows[0]["device_peak_bytes"]
    assert "Predicted and measured" in done.stdout and "host peak was predicted as" in " ".join(done.stdout.split())
