"""Each fault at every I/O call of a run of three steps: the right error or a clean continuation, never a wrong weight."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from loaded_python import StartedLoaded
from small_runs import OPTIMIZER, Weights, assert_equal, batches, content, open_run, request, train, uninterrupted
from tiny_models import tiny_model

import overspill
from overspill.checkpoint import find_manifests, read_latest
from overspill.errors import StorageError
from overspill.runtime.session import Session
from overspill.spec.schedule import Role
from overspill.tiers import FakeStore, Fault, FaultInjector, FaultKind
from overspill.tiers.calls import SpacePolicy
from overspill.tiers.extent_file import FILE_NAME

PLACEMENT = {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "clip": 1.0}
NUM_STEPS = 3
QUICK = SpacePolicy(poll_s=0.001, report=lambda text: None)


@pytest.fixture(scope="module")
def expected() -> Weights:
    return uninterrupted(NUM_STEPS, clip=1.0)


def run(directory: Path, calls: FaultInjector, *, serial: bool = True) -> Weights:
    """Three steps, a checkpoint after each, everything on the SSD; serial and with one I/O thread, calls have one order."""
    with open_run(directory, settings={"calls": calls, "space": QUICK, "num_threads": 1, "serial": serial}, **PLACEMENT) as session:
        train(session, NUM_STEPS)
        return content(session)


def open_files() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return {path for path in found if "overspill" in path}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The operation of every call of a clean run."""
    clean = FaultInjector()
    run(tmp_path_factory.mktemp("clean"), clean)
    return clean.log


KINDS = [kind for kind in FaultKind if kind not in (FaultKind.KILLED, FaultKind.DELAYED)]
"""Kills have their own campaign."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_fault_at_any_call_is_an_error_that_names_it_or_changes_nothing(
    kind: FaultKind, tmp_path: Path, expected: Weights, log: list[str]
) -> None:
    """At the first and last calls, where manifests are written, and at calls spread over the run."""
    break_calls(kind, tmp_path, expected, log, num_calls=24)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_fault_while_lanes_overlap_is_an_error_that_names_it_or_changes_nothing(
    kind: FaultKind, tmp_path: Path, expected: Weights, log: list[str]
) -> None:
    break_calls(kind, tmp_path, expected, log, num_calls=8, serial=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("serial", [True, False], ids=["serial", "overlapping"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_fault_at_every_call_is_an_error_that_names_it_or_changes_nothing(
    kind: FaultKind, serial: bool, tmp_path: Path, expected: Weights, log: list[str]
) -> None:
    break_calls(kind, tmp_path, expected, log, num_calls=None, serial=serial)


def break_calls(kind: FaultKind, tmp_path: Path, expected: Weights, log: list[str], *, num_calls: int | None, serial: bool = True) -> None:
    indices = list(range(len(log)))
    if num_calls is not None:
        manifests = [index for index, operation in enumerate(log) if operation in ("fsync", "replace", "unlink")]
        spread = indices[:: max(1, len(indices) // num_calls)]
        indices = sorted({*spread, *(index - 1 for index in manifests[-7:]), *manifests[-7:], indices[-1]})
    outcomes = {"error": 0, "clean": 0}
    threads = threading.active_count()
    for index in indices:
        directory = tmp_path / f"{index}"
        calls = FaultInjector(Fault(kind=kind, call_index=index))
        try:
            found = run(directory, calls, serial=serial)
        except StorageError as error:
            outcomes["error"] += 1
            assert kind in (FaultKind.EIO, FaultKind.TORN, FaultKind.FLIPPED), (index, log[index], error)
            assert str(directory) in str(error), (index, log[index], error)
            assert "offset" in str(error) or log[index] in ("fsync", "replace", "unlink") or ".json" in str(error), str(error)
        else:
            outcomes["clean"] += 1
            assert_equal(found, expected)
        assert threading.active_count() == threads and not open_files(), (index, log[index])
        # Whatever happened, the directory is free, and what is published in it is whole or found to be damaged.
        if find_manifests(directory):
            resume_or_refuse(directory, expected, may_be_damaged=kind in (FaultKind.TORN, FaultKind.FLIPPED))
        shutil.rmtree(directory)
    assert outcomes["clean" if kind in (FaultKind.SHORT, FaultKind.ENOSPC) else "error"] > 0
    if kind in (FaultKind.SHORT, FaultKind.ENOSPC):
        assert outcomes["error"] == 0


def resume_or_refuse(directory: Path, expected: Weights, *, may_be_damaged: bool) -> None:
    try:
        with overspill.resume(directory, model=tiny_model("llama_tied")) as session:
            train(session, NUM_STEPS)
            found = content(session)
    except StorageError as error:
        assert may_be_damaged and "damaged" in str(error), error
    else:
        assert_equal(found, expected)


def test_a_delayed_call_changes_nothing(tmp_path: Path, expected: Weights) -> None:
    faults = [Fault(kind=FaultKind.DELAYED, call_index=index, delay_s=0.01) for index in range(0, 600, 20)]
    assert_equal(run(tmp_path / "run", FaultInjector(*faults)), expected)


def test_a_full_disk_pauses_the_run_and_it_goes_on_with_the_same_weights(tmp_path: Path, expected: Weights, log: list[str]) -> None:
    said: list[str] = []
    space = SpacePolicy(poll_s=0.002, report=said.append)
    calls = FaultInjector(Fault(kind=FaultKind.ENOSPC, call_index=len(log) // 2, num_calls=7))
    with open_run(tmp_path / "run", settings={"calls": calls, "space": space, "num_threads": 1}, **PLACEMENT) as session:
        train(session, NUM_STEPS)
        assert_equal(content(session), expected)
    assert len(said) % 2 == 0 and said[0].startswith("paused: ") and "ENOSPC" in said[0] and said[1].startswith("going on: ")


def test_a_pause_for_space_can_be_interrupted_and_loses_nothing_older(tmp_path: Path, expected: Weights) -> None:
    with open_run(tmp_path / "run", **PLACEMENT) as session:
        train(session, 2)

    def interrupt(text: str) -> None:
        threading.Timer(0.05, lambda: os.kill(os.getpid(), 2)).start()

    space = SpacePolicy(poll_s=0.01, report=interrupt)
    threads = threading.active_count()
    calls = FaultInjector(Fault(kind=FaultKind.ENOSPC, call_index=60, num_calls=1 << 30))
    with (
        pytest.raises(KeyboardInterrupt),
        overspill.resume(tmp_path / "run", model=tiny_model("llama_tied"), calls=calls, space=space) as session,
    ):
        train(session, NUM_STEPS)
    assert threading.active_count() <= threads + 1 and not open_files()
    resume_or_refuse(tmp_path / "run", expected, may_be_damaged=False)


@pytest.mark.parametrize("is_resumed", [False, True], ids=["fresh", "resumed"])
def test_a_load_that_is_paused_for_space_ends_with_ctrl_c_as_such(is_resumed: bool, tmp_path: Path) -> None:
    """The write that Ctrl-C stopped waiting for fails when the store closes: a note, and not what is told."""
    calls = FaultInjector(Fault(kind=FaultKind.ENOSPC, call_index=6, num_calls=1 << 30))
    timers: list[threading.Timer] = []

    def interrupt(text: str) -> None:
        timers.append(threading.Timer(0.05, lambda: os.kill(os.getpid(), 2)))
        timers[-1].start()

    space = SpacePolicy(poll_s=0.01, report=interrupt)
    if is_resumed:
        with open_run(tmp_path / "run", parameters="host", states="host", clip=1.0) as session:
            train(session, 1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        if is_resumed:
            elsewhere = overspill.CheckpointPolicy(directory=str(tmp_path / "new"))
            plan = request(tmp_path / "new", **PLACEMENT)
            overspill.resume(tmp_path / "run", model=tiny_model("llama_tied"), plan=plan, checkpoints=elsewhere, calls=calls, space=space)
        else:
            open_run(tmp_path / "run", settings={"calls": calls, "space": space}, **PLACEMENT)
    assert len(timers) == 1 and "ENOSPC" in " ".join(stopped.value.__notes__)
    timers[0].join()
    assert not open_files()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x04]))


@pytest.mark.parametrize("placement", ["ssd", "host"])
@pytest.mark.parametrize("role", [Role.PARAMETER, Role.STATE])
def test_a_flipped_bit_in_a_record_is_found_before_use(role: Role, placement: str, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters=placement, states=placement) as session:
        train(session, 2)
    entry = next(item for item in read_latest(tmp_path / "run").records if f".{role.value}[" in item.name)
    flip(tmp_path / "run" / FILE_NAME, entry.positions[entry.slot] + entry.num_bytes // 2)
    with (
        pytest.raises(
            StorageError, match=rf"{entry.name.split('[')[0]}\[.* is damaged: bytes .* at offset \d+ of .*{FILE_NAME} have CRC-32C"
        ),
        overspill.resume(tmp_path / "run", model=tiny_model("llama_tied")) as session,
    ):
        train(session, 3, every=None)


def test_a_flipped_bit_in_scratch_is_found_before_use() -> None:
    """Gradients and hidden states on the SSD: the last bit of what a read gives is wrong, once for each read of a step."""
    made: list[FaultInjector] = []

    def build(fault: Fault | None) -> Session:
        def open_store(directory: str, capacity_bytes: int, is_scratch: bool) -> FakeStore:
            made.append(FaultInjector(*([fault] if fault is not None and is_scratch else [])))
            return FakeStore(capacity_bytes, calls=made[-1])

        plan = request(Path("fake"), **PLACEMENT)
        return Session(tiny_model("llama_tied"), plan=plan, optimizer=OPTIMIZER, open_store=open_store, serial=True)

    with build(None) as session:
        train(session, 2, every=None)
    log = made[1].log
    reads = [index for index, operation in enumerate(log) if operation == "read"]
    assert reads
    for index in reads[:: max(1, len(reads) // 25)]:
        with build(Fault(kind=FaultKind.FLIPPED, call_index=index)) as session, pytest.raises(StorageError, match="is damaged"):
            train(session, 2, every=None)


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters="host", states="host") as session:
        train(session, 1)
    (path,) = find_manifests(tmp_path / "run").values()
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    offsets = {0, 1, len(content) - 1, len(content) - 10, *torch.randint(0, len(content), (200,), generator=generator).tolist()}
    for offset in sorted(offsets):
        flip(path, offset)
        with pytest.raises(StorageError, match="is damaged: its bytes have SHA-256"):
            read_latest(tmp_path / "run")
        flip(path, offset)
    assert read_latest(tmp_path / "run").step == 1


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9])
def test_a_file_that_was_cut_is_found(cut: float, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters="ssd", states="ssd") as session:
        train(session, 1)
    (manifest,) = find_manifests(tmp_path / "run").values()
    for path, message in ((tmp_path / "run" / FILE_NAME, "the file was cut or moved"), (manifest, "is damaged")):
        content = path.read_bytes()
        os.truncate(path, int(len(content) * cut))
        with pytest.raises(StorageError, match=message):
            overspill.resume(tmp_path / "run", model=tiny_model("llama_tied"))
        path.write_bytes(content)


def test_nothing_of_the_text_is_in_the_directory_after_a_kill(tmp_path: Path) -> None:
    """A child trains with hidden states on the SSD and is killed: no file but state, and no token in any of them."""
    code = (
        "import sys; from pathlib import Path; from small_runs import open_run, train\n"
        f"with open_run(Path(sys.argv[1]), **{PLACEMENT!r}) as session:\n"
        "    train(session, 2); train(session, 3, every=None); print(flush=True); train(session, 100000, every=None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    reading, writing = os.pipe()
    with open(reading) as output, open(writing, "w") as told:
        child = StartedLoaded(["-c", code, tmp_path / "run"], told, told, env=environment)
        told.close()
        assert output.readline() == "\n"
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL

    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert [name for name in names if not name.startswith(("checkpoint-", "overspill."))] == []
    assert "overspill.extents" in names and not any("scratch" in name for name in names)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").iterdir())
    for step in range(3):
        for batch in batches(step):
            for row in batch["input_ids"]:
                for dtype in (torch.int64, torch.int32, torch.int16):
                    assert row[:6].to(dtype).numpy().tobytes() not in everything
