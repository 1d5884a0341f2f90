"""Claims about what a run says before its first step: blocks are timed once where that is worth it, and a failure there ends no run."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from overspill.cli import forecast
from overspill.cli.failures import ExitCode
from overspill.cli.finetune import FinetuneOptions
from overspill.runtime import predictions
from overspill.runtime.session import Session
from overspill.runtime.template_timing import LIMIT_S
from overspill.spec.hardware import HardwareSpec
from overspill.spec.machine_file import MachineCapacities, MachineFile, MachineIdentity, MachineRates
from overspill.spec.workload import TemplateTimes, Timing, UnitTimes

Run = Callable[..., Result]
pytestmark = pytest.mark.filterwarnings("ignore:rates are those of:RuntimeWarning")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    identity = MachineIdentity(cpu_model="x", num_cpus=1, memory_class_bytes=1, device="cpu", torch="x", overspill="x")
    capacities = MachineCapacities(memory_total_bytes=1, memory_total_after_bytes=1, host_available_bytes=1)
    file = MachineFile(identity=identity, measured_at="2026-11-22T10:00:00+00:00", took_s=1.0, capacities=capacities, rates=MachineRates())
    (tmp_path / "machine.json").write_text(file.to_json())
    return tmp_path / "machine.json"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run asks of its session, in order; its device is a GPU to whoever decides on timing, and timing takes no time there."""
    found: list[str] = []

    def watch(name: str) -> None:
        original = getattr(Session, name)

        def watched(self: Session, *args: object, **kwargs: object) -> object:
            found.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Session, name, watched)

    def stand_in(config: object, *, limit_s: float, seq_len: int, micro_batch: int, dtype: str, **kwargs: object) -> TemplateTimes:
        assert limit_s == LIMIT_S == 5.0
        part = Timing(median_s=1e-3, spread_s=0.0, num_repetitions=9)
        sizes = {"seq_len": seq_len, "micro_batch": micro_batch}
        block, tail = (UnitTimes(name=name, **sizes, forward=part, backward=part) for name in ("model.layers.0", "tail"))
        return TemplateTimes(model="M", dtype=dtype, device="a GPU", **sizes, blocks=(block,), tail=tail, elapsed_s=0.0)

    def as_on_a_gpu(session: Session, options: FinetuneOptions) -> bool:
        return decide(stand_in_session(device="cuda", source=session.hardware.source), options)

    decide = forecast.is_worth_timing
    for name in ("time_templates", "predict_plan", "evaluate", "step"):
        watch(name)
    monkeypatch.setattr(predictions, "time_templates", stand_in)
    monkeypatch.setattr(forecast, "is_worth_timing", as_on_a_gpu)
    return found


def stand_in_session(*, device: str = "cuda", source: str = "measured (m)") -> Session:
    return types.SimpleNamespace(device=torch.device(device), hardware=HardwareSpec(source=source))  # type: ignore[return-value]


def test_blocks_are_timed_on_a_measured_gpu_and_not_on_a_cpu_nor_compiled_nor_in_serial_runs() -> None:
    def is_worth(session: Session, **flags: bool) -> bool:
        return forecast.is_worth_timing(session, FinetuneOptions(model="m", data="d", out=Path("o"), **flags))

    assert is_worth(stand_in_session()) and is_worth(stand_in_session(), cuda_graphs=False)
    assert not is_worth(stand_in_session(device="cpu"))
    assert not is_worth(stand_in_session(source="assumed"))
    assert not is_worth(stand_in_session(), compile=True) and not is_worth(stand_in_session(), serial=True)


def test_blocks_are_timed_once_before_anything_runs_and_the_prediction_says_so(run: Run, machine: Path, calls: list[str]) -> None:
    done = run("--steps", 2, "--held-out", 8, "--machine", machine)
    assert done.exit_code == ExitCode.OK, done.output
    assert calls == ["time_templates", "predict_plan", "evaluate", "step", "step", "evaluate"]
    lines = done.stdout.splitlines()
    (timing,) = (index for index, line in enumerate(lines) if "· timing one block of each class and the tail, in about 5 s" in line)
    assert lines[timing + 1].startswith("· predicted: ") and "a step; measured (machine.json, 2026-11-22)" in lines[timing + 1]
    assert "blocks timed on a GPU" in " ".join(lines[timing + 1 : timing + 3])
    assert "could not be timed" not in done.stdout


def test_a_run_that_goes_on_times_them_again_before_its_first_step(run: Run, machine: Path, calls: list[str], tmp_path: Path) -> None:
    flags = ("--steps", 2, "--machine", machine, "--checkpoint-every", 1, "--states", "ssd", "--ssd-dir", tmp_path / "ssd")
    step = Session.step

    def stopping(self: Session, batches: object) -> object:
        if self.step_number == 1:
            raise KeyboardInterrupt
        return step(self, batches)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "step", stopping)
        assert run(*flags).exit_code == ExitCode.INTERRUPTED
    assert calls == ["time_templates", "predict_plan", "step"]
    calls.clear()
    done = run(*flags, "--resume")
    assert done.exit_code == ExitCode.OK, done.output
    assert calls == ["time_templates", "predict_plan", "step"] and "going on after step 1" in done.stdout


@pytest.mark.parametrize("flags", [(), ("--serial",)], ids=["no-machine-file", "serial"])
def test_a_run_whose_blocks_are_not_timed_says_nothing_of_it(run: Run, machine: Path, calls: list[str], flags: tuple[str, ...]) -> None:
    done = run("--steps", 1, *flags, *(("--machine", machine) if flags else ()))
    assert done.exit_code == ExitCode.OK, done.output
    assert "time_templates" not in calls and "step" in calls and "timing one block" not in done.stdout


def test_a_timing_that_fails_is_a_warning_and_the_run_goes_on(
    run: Run, machine: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(predictions, "time_templates", fail)
    done = run("--steps", 2, "--machine", machine)
    assert done.exit_code == ExitCode.OK, done.output
    warning = "blocks could not be timed, so predictions are coarser: RuntimeError: no kernel image is available"
    assert done.stdout.count(warning) == 1 and "· predicted: " in done.stdout and "blocks timed" not in done.stdout
    assert calls == ["time_templates", "predict_plan", "step", "step"]


def test_a_model_that_cannot_be_described_is_not_timed_and_trains(
    run: Run, machine: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions.Predictions, "workload", lambda self, **kwargs: None)
    done = run("--steps", 1, "--machine", machine)
    assert done.exit_code == ExitCode.OK, done.output
    assert "so predictions are coarser: the model cannot be described without its weights" in done.stdout and calls[-1] == "step"
