"""Claims about where a run is gone on from, and what a full drive and a signal do to it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from overspill.checkpoint import find_manifests
from overspill.cli import app, stopping
from overspill.cli.continuation import find_checkpoint, fingerprint_weights
from overspill.cli.failures import ExitCode
from overspill.cli.finetune import FinetuneOptions
from overspill.errors import StorageError
from overspill.report import progress
from overspill.report.progress import MetricsFile
from overspill.runtime.session import Session
from overspill.spec.report import StepReport

Run = Callable[..., Result]
FLAGS = ("--micro-batch", 4, "--lr", 1e-2)


def report(step: int) -> StepReport:
    names = "device_peak_bytes host_peak_bytes pinned_bytes device_resident_peak_bytes host_resident_peak_bytes ssd_resident_peak_bytes"
    return StepReport(
        step=step, loss=1.0, grad_norm=1.0, lr=1e-3, num_tokens=30, num_targets=20, skipped=False, loss_scale=1.0, step_s=0.5,
        lane_bytes={}, num_ops=1, **dict.fromkeys(names.split(), 0),
    )  # fmt: skip


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, number: int, *, times: int = 1) -> None:
    """From now on, Ctrl-C comes `times` times when step `number` begins."""
    step = Session.step

    def interrupted(self: Session, batches: object) -> object:
        if self.step_number == number - 1:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "step", interrupted)


class HalfFull(io.FileIO):
    """Takes half of a write, and then has no room."""

    is_full = False

    def write(self, content, /):  # type: ignore[no-untyped-def]
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.is_full = True
        return super().write(content[: len(content) // 2])


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("finds_room", [True, False], ids=["room-later", "no-room"])
def test_a_row_that_finds_no_room_is_a_warning_leaves_whole_rows_and_is_written_when_there_is_room(
    finds_room: bool, tmp_path: Path
) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    with MetricsFile(path, warn=said.append) as metrics:
        metrics.write(report(1))
        metrics._file.close()
        metrics._file = HalfFull(path, "ab")
        for step in (2, 3):
            metrics.write(report(step))
        assert steps_in(path) == [1]
        assert len(said) == 1 and re.search(r"cannot write step 2 to .*metrics\.jsonl: No space left on device.*the run goes on", said[0])
        if finds_room:
            metrics._file.close()
            metrics._file = path.open("ab", buffering=0)
            metrics.write(report(4))
            metrics.write(report(5))
    assert len(said) == 2
    if finds_room:
        assert steps_in(path) == [1, 2, 3, 4, 5] and "3 rows that waited are in it" in said[1]
    else:
        assert steps_in(path) == [1] and re.search(r"cannot write step 2 .* 2 rows, to step 3, are lost", said[1])


def test_a_full_drive_under_the_metrics_ends_no_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, failed = progress._append, list[bytes]()

    def full_at_step_2(file: io.FileIO, content: bytes) -> None:
        if content.startswith(b'{"step": 2') and len(failed) < 2:
            failed.append(content)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, content)

    monkeypatch.setattr(progress, "_append", full_at_step_2)
    done = run(*FLAGS, "--steps", 4)
    assert done.exit_code == 0, done.output
    assert len(failed) == 2 and "cannot write step 2 to" in done.output and (tmp_path / "out" / "model").is_dir()
    assert steps_in(tmp_path / "out" / "metrics.jsonl") == [1, 2, 3, 4]


def test_a_file_that_fails_on_closing_is_named_and_hides_no_other_failure(tmp_path: Path) -> None:
    class Broken(io.FileIO):
        def close(self) -> None:
            super().close()
            raise OSError(errno.EIO, "Input/output error")

    for raised in (None, StorageError("the step failed")):
        said: list[str] = []
        outcome = contextlib.nullcontext() if raised is None else pytest.raises(StorageError, match="the step failed")
        with outcome, MetricsFile(tmp_path / "metrics.jsonl", warn=said.append) as metrics:
            metrics._file.close()
            metrics._file = Broken(tmp_path / "metrics.jsonl", "ab")
            if raised is not None:
                raise raised
        assert len(said) == 1 and re.search(r"cannot close .*metrics\.jsonl: Input/output error", said[0])


def test_rows_that_are_kept_survive_a_full_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="cannot create .*metrics.jsonl"):
        patch.setattr(progress.os, "fsync", full)
        MetricsFile(path, resume_after=1)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    with MetricsFile(path, resume_after=1) as metrics:
        metrics.write(report(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_the_noted_directory_wins_over_a_higher_step_elsewhere(run: Run, tmp_path: Path) -> None:
    assert run(*FLAGS, "--steps", 6, "--checkpoint-every", 3).exit_code == 0
    assert run(*FLAGS, "--steps", 4, "--checkpoint-every", 2, "--ssd-dir", tmp_path / "ssd").exit_code == 0
    options = FinetuneOptions(model="", data="", out=tmp_path / "out", resume=True)
    directory, manifest = find_checkpoint(options)
    assert (directory, manifest.step) == (tmp_path / "ssd", 4)
    (tmp_path / "out" / "checkpoints.json").unlink()
    assert find_checkpoint(options)[1].step == 6
    (tmp_path / "out" / "checkpoints.json").write_text(json.dumps({"directory": str(tmp_path / "gone")}))
    with pytest.raises(StorageError, match="says that they are in .*gone; mount it"):
        find_checkpoint(options)


def test_a_run_that_dies_before_its_first_checkpoint_in_a_new_place_still_goes_on_from_the_old_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*FLAGS, "--steps", 6, "--checkpoint-every", 2)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 3)
        assert run(*flags).exit_code == ExitCode.INTERRUPTED
    out, new = tmp_path / "out", ("--ssd-dir", tmp_path / "ssd", "--parameters", "ssd")
    before = [(out / name).read_bytes() for name in ("checkpoints.json", "run.yaml")]
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 4, times=2)
        result = run(*flags, "--resume", *new)
    assert result.exit_code == ExitCode.INTERRUPTED and not find_manifests(tmp_path / "ssd")
    assert [(out / name).read_bytes() for name in ("checkpoints.json", "run.yaml")] == before
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 5)
        result = run(*flags, "--resume", *new)
    assert result.exit_code == ExitCode.INTERRUPTED and "going on after step 3" in result.output
    assert json.loads((out / "checkpoints.json").read_text())["directory"] == str(tmp_path / "ssd")
    result = CliRunner().invoke(app, ["finetune", "--config", str(out / "run.yaml"), "--resume"])
    assert result.exit_code == 0 and "going on after step 5" in result.output, result.output


def test_the_first_signal_ends_a_pause_for_space(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, pwritev = Session.step, os.pwritev
    is_full = threading.Event()

    def filling(self: Session, batches: object) -> object:
        if self.step_number == 2:
            is_full.set()
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return step(self, batches)  # type: ignore[arg-type]

    def write(*arguments):  # type: ignore[no-untyped-def]
        if is_full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwritev(*arguments)

    monkeypatch.setattr(stopping, "SPACE_POLL_S", 0.05)
    monkeypatch.setattr(Session, "step", filling)
    monkeypatch.setattr(os, "pwritev", write)
    flags = (*FLAGS, "--steps", 4, "--checkpoint-every", 1, "--ssd-dir", tmp_path / "ssd", "--parameters", "ssd", "--states", "ssd")
    result = run(*flags)
    assert result.exit_code == ExitCode.INTERRUPTED, result.output
    assert "while paused for want of space; the checkpoint of step 2 is whole; make room, then go on with: overspill" in result.stderr
    monkeypatch.undo()
    assert run(*flags, "--resume").exit_code == 0


def test_the_command_to_go_on_works_from_any_directory(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["finetune", os.path.relpath(model_folder), data_file.name, "--out", "my out", "--ssd-dir", "ssd", "--device", "cpu"]
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2)
        result = CliRunner().invoke(app, [*arguments, *map(str, FLAGS), "--steps", "3", "--checkpoint-every", "2"])
    command = shlex.split(result.stderr.split("go on with: ")[1])
    assert command == ["overspill", "finetune", "--config", str(tmp_path / "my out" / "run.yaml"), "--resume"]
    noted = yaml.safe_load((tmp_path / "my out" / "run.yaml").read_text())
    assert all(Path(noted[name]).is_absolute() for name in ("model", "data", "out", "ssd-dir"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0 and "going on after step 2" in result.output, result.output


def test_another_models_weights_of_the_same_shapes_are_told_apart(model_folder: Path, tmp_path: Path) -> None:
    """What `--resume` compares, beside configuration and shapes."""
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    assert fingerprint_weights(str(other)) == fingerprint_weights(str(model_folder))
    fingerprint_weights.cache_clear()
    path = other / "model.safetensors"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 255 for byte in content[middle : middle + 8])
    path.write_bytes(bytes(content))
    assert fingerprint_weights(str(other)) != fingerprint_weights(str(model_folder))


def test_a_row_that_can_wait_is_written_with_the_next_one_before_a_checkpoint_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    with MetricsFile(path) as metrics:
        metrics.write(report(1), can_wait=True)
        assert steps() == []
        metrics.write(report(2), can_wait=True)
        assert steps() == [1]
        metrics.write_due()
        metrics.write_due()
        assert steps() == [1, 2]
        metrics.write(report(3), can_wait=True)
    assert steps() == [1, 2, 3]
