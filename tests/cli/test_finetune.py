"""Claims about `overspill finetune`: the files it leaves, what it prints, and the exit code of every way to fail."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import Result

from overspill.cli import training_run
from overspill.cli.failures import ExitCode, exit_code_of
from overspill.errors import NonFiniteError, StorageError
from overspill.spec.hardware import HardwareSpec
from overspill.spec.machine_file import MachineCapacities, MachineFile, MachineIdentity, MachineRates
from overspill.spec.report import EvaluationReport, StepReport
from overspill.tiers.wear import COUNTER_NAME

Run = Callable[..., Result]

METRICS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_s",
    "step_s",
    "device_peak_bytes",
    "host_peak_bytes",
    "pinned_bytes",
    "ssd_read_bytes",
    "ssd_written_bytes",
    "lane_busy_s",
    "exposed_s",
    "lane_bytes",
    "floor_s",
    "floor_bound_by",
    "step_over_floor",
    "trace_s",
    "predicted",
    "missed_by",
}


def report(step: int, loss: float) -> StepReport:
    return StepReport(
        step=step,
        loss=loss,
        grad_norm=math.inf if math.isnan(loss) else 1.0,
        lr=1e-3,
        num_tokens=30,
        num_targets=20,
        skipped=False,
        loss_scale=1.0,
        device_peak_bytes=0,
        host_peak_bytes=1 << 20,
        pinned_bytes=0,
        step_s=0.5,
        lane_bytes={"ssd_read": 7, "ssd_write": 5},
        num_ops=1,
        device_resident_peak_bytes=0,
        host_resident_peak_bytes=0,
        ssd_resident_peak_bytes=0,
    )


class ScriptedSession:
    """Stands in for `Session` where a failure is wanted that a real one does not have; `losses` may hold exceptions."""

    losses: list[float | BaseException] = []
    saved: list[Path] = []
    memory_warning: str | None = None
    wear: None = None
    rates = types.SimpleNamespace(notes=())
    hardware = HardwareSpec()

    def __init__(self, model: Path, *, plan: Any, **settings: Any) -> None:
        self.plan = types.SimpleNamespace(
            table=lambda: [("parameters", {"device": 0, "host": 4 << 20, "ssd": 0})],
            notes=("a reason",),
            num_parameters=1 << 20,
            dtype=plan.dtype,
            device="cpu",
            to_json=lambda: json.dumps({"seq_len": plan.seq_len}),
        )
        self._step = 0

    def __enter__(self) -> ScriptedSession:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def pool_reports(self) -> tuple[()]:
        return ()

    def flush(self) -> None:
        pass

    def predict_if_cheap(self, micro_batches: list[dict[str, torch.Tensor]], *, trained_s: float) -> None:
        return None

    def step(self, micro_batches: list[dict[str, torch.Tensor]]) -> StepReport:
        outcome = self.losses[self._step]
        self._step += 1
        if isinstance(outcome, BaseException):
            raise outcome
        return report(self._step, outcome)

    def evaluate(self, micro_batches: list[dict[str, torch.Tensor]]) -> EvaluationReport:
        return EvaluationReport(loss=2.0, num_targets=3)

    def save_pretrained(self, directory: Path, *, tokenizer: object) -> None:
        self.saved.append(directory)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[ScriptedSession]]:
    """`scripted(loss, …)` puts a session in place whose steps give these losses, or raise them."""

    def script(*losses: float | BaseException) -> type[ScriptedSession]:
        session = type("Scripted", (ScriptedSession,), {"losses": list(losses), "saved": []})
        monkeypatch.setattr(training_run, "Session", session)
        return session

    return script


def metrics(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_model_metrics_and_plan(run: Run, tmp_path: Path) -> None:
    result = run("--steps", 12, "--micro-batch", 4, "--accumulate", 2, "--lr", 1e-2, "--held-out", 8, "--warmup-steps", 2)
    assert result.exit_code == 0, result.output
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(set(row) == METRICS for row in rows)
    assert rows[0]["lr"] == pytest.approx(5e-3) and rows[1]["lr"] == pytest.approx(1e-2)
    before, after = (float(line.split(":")[1].split()[0]) for line in result.output.splitlines() if line.startswith("held-out loss"))
    assert after < before
    assert "parameters" in result.output and "step 12/12" in result.output and "ETA" in result.output
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["micro_batch"] == 4
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.dtype == torch.float32
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")("w3").input_ids == [4]


def test_weights_and_states_on_the_ssd_give_the_same_losses(run: Run, tmp_path: Path) -> None:
    flags = ("--steps", 3, "--micro-batch", 4, "--lr", 1e-2)
    losses = []
    for placement in ((), ("--parameters", "ssd", "--states", "ssd", "--ssd-dir", tmp_path / "ssd")):
        (tmp_path / "ssd").mkdir(exist_ok=True)
        result = run(*flags, *placement)
        assert result.exit_code == 0, result.output
        losses.append([row["loss"] for row in metrics(tmp_path)])
    assert losses[0] == losses[1]
    assert all(row["ssd_read_bytes"] > 0 and row["ssd_written_bytes"] > 0 for row in metrics(tmp_path))


def test_kept_activations_give_the_same_losses_and_the_plan_says_where_they_are(run: Run, tmp_path: Path) -> None:
    first = run("--steps", 3)
    assert first.exit_code == ExitCode.OK, first.output
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(tmp_path / "out")
    moved = run("--steps", 3, "--activations", "ssd", "--ssd-dir", tmp_path / "ssd")
    assert moved.exit_code == ExitCode.OK, moved.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == losses and all(row["ssd_written_bytes"] > 0 for row in rows)
    shutil.rmtree(tmp_path / "out")
    second = run("--steps", 3, "--activations", "keep")
    assert second.exit_code == ExitCode.OK, second.output
    assert [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()] == losses
    assert "activations: of 2 blocks kept on the device" in " ".join(second.stdout.split())
    assert set(json.loads((tmp_path / "out" / "plan.json").read_text())["activations"].values()) == {"keep"}


def test_epochs_count_steps_over_the_training_samples(run: Run, tmp_path: Path, scripted: Callable[..., type[ScriptedSession]]) -> None:
    session = scripted(*[1.0] * 18)
    assert run("--epochs", 2, "--micro-batch", 4, "--held-out", 0.1).exit_code == 0  # 36 samples, 9 steps an epoch
    assert len(metrics(tmp_path)) == 18
    assert session.saved == [tmp_path / "out" / "model"]


def test_the_plan_is_made_for_the_longest_sample_there_is(run: Run, tmp_path: Path, scripted: Callable[..., type[ScriptedSession]]) -> None:
    scripted(1.0)
    result = run("--steps", 1, "--seq-len", 512)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["seq_len"] == 8
    assert "a reason" in result.output


def test_a_loss_that_is_not_finite_ends_with_4_and_its_step_on_file(
    run: Run, tmp_path: Path, scripted: Callable[..., type[ScriptedSession]]
) -> None:
    session = scripted(2.5, math.nan, 1.0)
    result = run("--steps", 3)
    assert result.exit_code == ExitCode.NOT_FINITE
    assert "the loss of step 2 is nan; nothing was saved" in result.stderr
    assert [(row["loss"], row["grad_norm"]) for row in metrics(tmp_path)] == [(2.5, 1.0), (None, None)]
    assert session.saved == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFiniteError("layers.3 gave a gradient that is not finite"), ExitCode.NOT_FINITE),
        (StorageError("short read of layers.3: wanted 4 B, got 0 B"), ExitCode.WORLD_FAILED),
        (OSError(5, "Input/output error"), ExitCode.WORLD_FAILED),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_in_a_step_is_one_line_and_its_code(
    run: Run, scripted: Callable[..., type[ScriptedSession]], error: BaseException, code: ExitCode
) -> None:
    session = scripted(1.0, error)
    result = run("--steps", 2)
    assert result.exit_code == code
    assert (str(error) or "interrupted") in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert session.saved == []


def test_debug_prints_the_traceback(run: Run, scripted: Callable[..., type[ScriptedSession]]) -> None:
    scripted(StorageError("short read"))
    result = run("--steps", 1, "--debug")
    assert result.exit_code == ExitCode.WORLD_FAILED
    assert "Traceback" in result.stderr


def test_a_defect_keeps_its_traceback(run: Run, scripted: Callable[..., type[ScriptedSession]]) -> None:
    scripted(RuntimeError("shapes do not match"))
    assert isinstance(run("--steps", 1).exception, RuntimeError)
    try:
        int("no number, but not our code either")
    except ValueError as error:
        error.__traceback__ = None
        assert exit_code_of(error) is ExitCode.DEFECT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", 1, "--epochs", 1], "--steps 1 and --epochs 1 both say how long to train; give one"),
        (["--parameters", "ssd"], "name a folder on a local drive with --ssd-dir"),
        (["--host-budget", "much"], "--host-budget: 'much' is not a size"),
        (["--seq-len", 4], "raise --seq-len, or cut them with --truncate"),
        (["--held-out", 40], "--held-out 40 of 40 samples"),
        (["--clip", 0], "--clip must be positive"),
        (["--clip", "inf"], "--clip must be positive and finite in fp32 (at most 3.4e+38), got inf"),
        (["--lr", 1e39], "lr must be finite and at least 0, and at most 3.4e+38"),
        (["--optimizer", "sgd", "--momentum", "nan"], "momentum must be finite"),
        (["--weight-decay", "inf"], "weight_decay must be finite"),
        (["--ssd-dir", ""], "Invalid value for '--ssd-dir': an empty name"),
        (["--out", ""], "Invalid value for '--out': an empty name"),
        (["--steps", 2, "--warmup-steps", 3], "warmup_steps must be between 0 and total_steps = 2"),
    ],
)
def test_wrong_flags_end_with_2_and_say_the_cure(run: Run, flags: list[object], message: str) -> None:
    result = run(*flags)
    assert result.exit_code == ExitCode.WRONG_INPUT
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_model_ends_with_2(run: Run, tmp_path: Path) -> None:
    result = run(model=tmp_path / "nothing")
    assert result.exit_code == ExitCode.WRONG_INPUT
    assert "no such model folder" in result.stderr


def test_missing_data_ends_with_2(run: Run, tmp_path: Path) -> None:
    result = run(data=tmp_path / "nothing.jsonl")
    assert result.exit_code == ExitCode.WRONG_INPUT
    assert "nothing.jsonl: No such file" in result.stderr


def test_a_model_without_tokenizer_ends_with_2(run: Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((model_folder / name).read_bytes())
    result = run(model=tmp_path / "bare")
    assert result.exit_code == ExitCode.WRONG_INPUT
    assert "has no tokenizer that can be loaded" in result.stderr


def test_an_output_folder_that_is_a_file_ends_with_3(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = run()
    assert result.exit_code == ExitCode.WORLD_FAILED
    assert "cannot create the folder" in result.stderr and "choose another --out" in result.stderr


def test_help_names_every_flag_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom overspill.cli import app\n"
        "result = CliRunner().invoke(app, ['finetune', '--help'], env={'COLUMNS': '200'})\n"
        "assert 'torch' not in sys.modules\nprint(result.output)\nsys.exit(result.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = (
        "steps epochs seq-len micro-batch accumulate lr warmup-steps lr-schedule weight-decay clip dtype seed parameters states boundaries"
    )
    flags += " state-format device-budget host-budget ssd-dir ssd-overwrite ssd-budget device held-out truncate out debug"
    flags += " serial trace trace-step config eval-every packing blocks split data-config fields stream shuffle-buffer"
    assert [flag for flag in flags.split() if f"--{flag} " not in done.stdout] == []


def test_a_foreign_file_where_the_model_goes_is_refused_before_training(
    run: Run, tmp_path: Path, scripted: Callable[..., type[ScriptedSession]]
) -> None:
    scripted()
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "notes.txt").write_text("mine")
    result = run("--steps", 3)
    assert result.exit_code == 2 and "notes.txt" in result.output


def test_skipped_fp16_steps_are_told_and_do_not_count(run: Run, tmp_path: Path) -> None:
    result = run("--steps", 4, "--micro-batch", 4, "--dtype", "float16")
    assert result.exit_code == 0, result.output
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows if not row.get("skipped")] == [1, 2, 3, 4]


def test_a_run_on_the_ssd_says_what_it_does_to_the_drive(run: Run, tmp_path: Path) -> None:
    flags = ["--states", "ssd", "--ssd-dir", tmp_path / "ssd", "--ssd-tbw", "600TB", "--ssd-years", "0", "--pinned-budget", "64MiB"]
    result = run("--steps", 3, *flags)
    assert result.exit_code == 0, result.output
    assert "3 steps write " in result.output and "of the drive's rated life" in result.output
    last = result.output[result.output.index("done: 3 steps") :]
    assert "host pool " in last and "written a step of" in last and " to the drive's rated end" in last
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan["pinned_budget_bytes"], plan["ssd_rated_bytes"], plan["ssd_min_years"]) == (64 << 20, 600 * 10**12, 0.0)
    assert json.loads((tmp_path / "ssd" / COUNTER_NAME).read_text())["written_bytes"] > 0


@pytest.mark.parametrize(("flag", "text"), [("--ssd-tbw", "plenty"), ("--pinned-budget", "all")])
def test_a_size_that_is_none_is_refused_with_its_flag(run: Run, flag: str, text: str) -> None:
    result = run("--steps", 1, flag, text)
    assert result.exit_code == ExitCode.WRONG_INPUT and f"{flag}: '{text}' is not a size" in " ".join(result.output.split())


@pytest.mark.filterwarnings("ignore:rates are those of:RuntimeWarning")
def test_a_machine_file_lets_a_run_say_how_long_a_step_is_predicted_to_take(run: Run, tmp_path: Path) -> None:
    identity = MachineIdentity(cpu_model="x", num_cpus=1, memory_class_bytes=1, device="cpu", torch="x", overspill="x")
    capacities = MachineCapacities(memory_total_bytes=1, memory_total_after_bytes=1, host_available_bytes=1)
    file = MachineFile(identity=identity, measured_at="2026-11-22T10:00:00+00:00", took_s=1.0, capacities=capacities, rates=MachineRates())
    (tmp_path / "machine.json").write_text(file.to_json())
    done = run("--steps", 1, "--machine", tmp_path / "machine.json")
    assert done.exit_code == 0, done.output
    assert "· predicted: " in done.stdout and "measured (machine.json, 2026-11-22); link, SSD, update, compute assumed" in done.stdout
    refused = run("--steps", 1, "--machine", tmp_path / "nowhere.json")
    assert refused.exit_code == ExitCode.WRONG_INPUT and "there is no machine file" in refused.stderr
    assumed = run("--steps", 1).stdout
    assert "· predicted" not in assumed and "step time" not in assumed, "assumed rates are no prediction of time"
    assert "Predicted and measured" in assumed and "host peak" in assumed, "bytes do not depend on rates"
