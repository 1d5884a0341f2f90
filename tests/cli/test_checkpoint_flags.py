"""Claims about --checkpoint-every, --keep, --resume, signals, and kills of the command itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from loaded_python import StartedLoaded
from safetensors.torch import load_file
from typer.testing import Result

from overspill.checkpoint import find_manifests, read_latest
from overspill.cli.failures import ExitCode

Run = Callable[..., Result]
FLAGS = ("--steps", 6, "--micro-batch", 4, "--lr", 1e-2, "--held-out", 8)
ON_SSD = ("--parameters", "ssd", "--states", "ssd")


def saved(tmp_path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(tmp_path / "out" / "model" / "model.safetensors").items()}


@pytest.fixture
def expected(run: Run, tmp_path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The weights and metrics' steps of the run that nobody stops."""
    assert run(*FLAGS).exit_code == 0
    return saved(tmp_path), [line.split(",")[1] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def _arguments(model_folder: Path, data_file: Path, tmp_path: Path, *flags: object) -> list[str]:
    return ["finetune", str(model_folder), str(data_file), "--out", str(tmp_path / "out"), "--device", "cpu", *map(str, flags)]


COMMAND = "import sys; from overspill.cli import main; sys.argv[0] = 'overspill'; main()"


class Command:
    """The command line in processes of its own, one at a time."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors

    def start(self, arguments: list[str]) -> int:
        """The process."""
        with open(os.devnull, "w") as nothing, self.errors.open("w") as errors:
            self.started = StartedLoaded(["-c", COMMAND, *arguments], nothing, errors)
        return self.started.pid

    def end(self) -> tuple[int, str]:
        """Exit status of the process that was started, a signal's number negative; and its standard error."""
        return self.started.wait(), self.errors.read_text()


def wait_for_checkpoint(directory: Path, number: int, process: int) -> None:
    """Until checkpoint `number` or a later one is there, or the process ended."""
    for _ in range(6000):
        if not Path(f"/proc/{process}").exists() or max(find_manifests(directory), default=0) >= number:
            return
        time.sleep(0.01)
    raise AssertionError("the run makes no checkpoints")


def test_ssd_dir_may_be_repeated_and_the_run_goes_on_from_all_of_them(run: Run, tmp_path: Path) -> None:
    places = [tmp_path / "ssd-a", tmp_path / "ssd-b"]
    flags = (*FLAGS, "--checkpoint-every", 1, *ON_SSD, *(item for place in places for item in ("--ssd-dir", place)))
    result = run(*flags)
    assert result.exit_code == 0, result.output
    assert all((place / "overspill.extents").is_file() for place in places) and find_manifests(places[0])
    noted = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert noted["ssd-dir"] == [str(place) for place in places] and "ssd-overwrite" not in noted
    places[1].rename(tmp_path / "moved")
    result = run("--config", tmp_path / "out" / "run.yaml", "--resume")
    assert result.exit_code == 3 and "is missing, which is part 2 of 2" in result.output
    (tmp_path / "moved").rename(places[1])
    result = run("--config", tmp_path / "out" / "run.yaml", "--resume")
    assert result.exit_code == 0, result.output


def test_a_second_word_for_a_device_that_is_not_used_is_refused(run: Run, tmp_path: Path) -> None:
    result = run(*FLAGS, "--ssd-dir", tmp_path / "ssd", "--ssd-overwrite", "/dev/some-disk")
    assert result.exit_code == 2 and "--ssd-overwrite /dev/some-disk has no effect" in " ".join(result.output.split())


def test_three_kills_and_an_interrupt_and_the_run_still_ends_with_the_same_bits(
    run: Run, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    long = ("--steps", 200, "--micro-batch", 4, "--lr", 1e-2, "--held-out", 8)
    assert run(*long).exit_code == 0
    expected = saved(tmp_path), [line.split(",")[1] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    flags = (*long, "--checkpoint-every", 1, "--ssd-dir", tmp_path / "ssd", *ON_SSD)
    (tmp_path / "out" / "metrics.jsonl").unlink()
    done = 0
    command = Command(tmp_path / "errors")
    for attempt, number in enumerate((signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)):
        process = command.start(_arguments(model_folder, data_file, tmp_path, *flags, *(("--resume",) if attempt else ())))
        wait_for_checkpoint(tmp_path / "ssd", done + 3, process)
        with contextlib.suppress(ProcessLookupError):  # it failed: the status says so
            os.kill(process, number)
        status, errors = command.end()
        assert status in (-number, 130), errors
        if status == 130:
            assert "go on with: overspill finetune --config" in errors and "--resume" in errors
        done = read_latest(tmp_path / "ssd").step
    result = run(*flags, "--resume")
    assert result.exit_code == 0, result.output
    assert saved(tmp_path) == expected[0]
    assert [line.split(",")[1] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()] == expected[1]


def test_a_run_in_host_memory_goes_on_from_its_output_folder_with_the_same_bits_and_summary(
    run: Run, expected: tuple[dict[str, bytes], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overspill.runtime.session import Session

    step = Session.step

    def interrupting(self, batches):  # type: ignore[no-untyped-def]
        report = step(self, batches)
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    monkeypatch.setattr(Session, "step", interrupting)
    result = run(*FLAGS, "--checkpoint-every", 2)
    assert result.exit_code == ExitCode.INTERRUPTED
    assert "stopped after step 3 of 6; its checkpoint is saved; go on with: overspill finetune --config" in result.stderr
    monkeypatch.undo()
    result = run(*FLAGS, "--checkpoint-every", 2, "--resume", "--parameters", "ssd", "--ssd-dir", tmp_path / "ssd")
    assert result.exit_code == 0, result.output
    assert "going on after step 3" in result.output and "held-out loss before:" in result.output
    assert saved(tmp_path) == expected[0]
    assert read_latest(tmp_path / "ssd").step == 6


def test_an_interrupt_without_checkpoints_says_that_nothing_is_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from overspill.runtime.session import Session

    step = Session.step
    monkeypatch.setattr(Session, "step", lambda self, batches: (os.kill(os.getpid(), signal.SIGINT), step(self, batches))[1])
    result = run(*FLAGS)
    assert result.exit_code == ExitCode.INTERRUPTED and "nothing is saved, since no --checkpoint-every" in result.stderr


def test_a_second_interrupt_stops_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overspill.runtime.session import Session

    step, evaluate = Session.step, Session.evaluate

    def twice(self, batches):  # type: ignore[no-untyped-def]
        if self.step_number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Session, "step", twice)
    result = run(*FLAGS, "--checkpoint-every", 1)
    assert result.exit_code == ExitCode.INTERRUPTED and "stopped at once" in result.stderr
    assert read_latest(tmp_path / "out" / "checkpoints").step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and evaluate is Session.evaluate


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", 7], "--steps 6 there, 7 here"),
        (["--lr", 1e-3], "--lr 0.01 there, 0.001 here"),
        (["--micro-batch", 2], "--micro-batch 4 there, 2 here"),
        (["--held-out", 9], "--held-out 8.0 there, 9.0 here"),
    ],
)
def test_a_resume_with_other_flags_is_refused_with_both_values(run: Run, tmp_path: Path, flags: list[object], message: str) -> None:
    assert run(*FLAGS, "--checkpoint-every", 3).exit_code == 0
    result = run(*FLAGS, "--checkpoint-every", 3, "--resume", *flags)
    assert result.exit_code == ExitCode.WRONG_INPUT and message in result.stderr, result.stderr


def test_other_data_a_missing_checkpoint_and_a_fresh_start_over_checkpoints_are_refused(run: Run, data_file: Path) -> None:
    result = run(*FLAGS, "--resume")
    assert result.exit_code == ExitCode.WORLD_FAILED and "--resume: there is no checkpoint in" in result.stderr
    assert run(*FLAGS, "--checkpoint-every", 3).exit_code == 0
    result = run(*FLAGS, "--checkpoint-every", 3)
    assert result.exit_code == ExitCode.WORLD_FAILED and "--discard-checkpoints" in result.stderr
    assert run(*FLAGS, "--checkpoint-every", 3, "--discard-checkpoints").exit_code == 0
    data_file.write_text(data_file.read_text().replace("w7", "w8"))
    result = run(*FLAGS, "--resume")
    assert result.exit_code == ExitCode.WRONG_INPUT and "the data (fingerprint" in result.stderr


def test_checkpoints_can_be_verified_and_exported(run: Run, model_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from overspill.cli import app
    from overspill.tiers.extent_file import FILE_NAME

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})

    assert run(*FLAGS, "--checkpoint-every", 3, "--keep", 2).exit_code == 0
    directory = tmp_path / "out" / "checkpoints"
    result = call("verify", directory)
    assert result.exit_code == 0, result.output
    assert "checkpoint 1: step 3, " in result.output and "checkpoint 2: step 6, " in result.output and "damaged" not in result.output
    result = call("export", directory, tmp_path / "exported", "--model", model_folder)
    assert result.exit_code == 0, result.output
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert {name: tensor.numpy().tobytes() for name, tensor in exported.items()} == saved(tmp_path)
    assert (tmp_path / "exported" / "tokenizer.json").is_file()
    settings = [json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("exported", "out/model")]
    assert settings[0] == settings[1]
    entry = read_latest(directory).records[0]
    with (directory / FILE_NAME).open("r+b") as file:
        file.seek(entry.positions[entry.slot])
        file.write(b"\xff\xff\xff\xff")
    result = call("verify", directory)
    assert result.exit_code == ExitCode.WORLD_FAILED and f"{entry.name} is damaged" in result.output
