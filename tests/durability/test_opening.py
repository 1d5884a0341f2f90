"""Going on from a directory changes nothing in it until a checkpoint is saved, whatever happens in between."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from small_runs import assert_equal, content, open_run, train, uninterrupted
from tiny_models import tiny_model

import overspill
from overspill.checkpoint import find_manifests, read_latest
from overspill.checkpoint.export import verify_checkpoints
from overspill.errors import StorageError

ON_SSD = {"parameters": "ssd", "states": "ssd"}
IN_HOST_MEMORY = {"parameters": "host", "states": "host"}


def go_on(directory: Path, **settings: Any) -> overspill.Session:
    return overspill.resume(directory, model=tiny_model("llama_tied"), **settings)


class _Calls:
    """The system calls, with something done after the first read (which is of the manifest)."""

    def __init__(self, action: Any) -> None:
        self._action: Any = action

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        done = os.preadv(fd, buffers, offset)
        if self._action is not None:
            action, self._action = self._action, None
            action()
        return done


@pytest.mark.parametrize("placement", [ON_SSD, IN_HOST_MEMORY], ids=["ssd", "host"])
def test_a_run_that_ends_while_the_next_one_starts_loses_no_checkpoint(placement: dict[str, str], tmp_path: Path) -> None:
    first = open_run(tmp_path / "run", **placement)
    train(first, 2)

    def end() -> None:
        train(first, 4)
        first.close()

    with pytest.raises(StorageError, match="checkpoint 2 .* is gone: .* there are now 4; start again|there is now 4"):
        go_on(tmp_path / "run", calls=_Calls(end))
    with go_on(tmp_path / "run") as session:
        assert session.step_number == 4
        assert_equal(content(session), uninterrupted(4))


@pytest.mark.parametrize("placement", [ON_SSD, IN_HOST_MEMORY], ids=["ssd", "host"])
def test_a_damaged_newest_checkpoint_costs_no_older_one(placement: dict[str, str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with open_run(directory, keep=3, **placement) as session:
        train(session, 3)
    entry = read_latest(directory).records[0]
    with (directory / "overspill.extents").open("r+b") as file:
        file.seek(entry.positions[entry.slots.index(entry.slots[entry.slot])])
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StorageError, match="is damaged"), go_on(directory) as session:
        train(session, 4)
    assert list(find_manifests(directory)) == [1, 2, 3]
    with go_on(directory, generation=2) as session:
        train(session, 5)
        assert_equal(content(session), uninterrupted(5))
    assert len(find_manifests(directory)) == 3 and 3 not in find_manifests(directory)


def test_an_older_generation_with_fewer_slots_overwrites_no_newer_one(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with open_run(directory, keep=1, **ON_SSD) as session:
        train(session, 1)
    more = overspill.CheckpointPolicy(directory=str(directory), keep=3)
    with go_on(directory, checkpoints=more) as session:
        train(session, 3)
    with go_on(directory, checkpoints=more, generation=1) as session:
        assert session.step_number == 1
    assert [problems for _, problems in verify_checkpoints(directory)] == [[], [], []]


def test_verify_reads_a_directory_that_another_process_reads_too_and_changes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with open_run(directory, **ON_SSD) as session:
        train(session, 1)
        with pytest.raises(StorageError, match="in use"):
            read_only(directory)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    for path in directory.iterdir():
        path.chmod(0o400)
    with read_only(directory):
        assert [problems for _, problems in verify_checkpoints(directory)] == [[]]
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def read_only(directory: Path) -> Any:
    from overspill.tiers import SsdStore

    return SsdStore(directory, capacity_bytes=4096, existing=True, read_only=True)
