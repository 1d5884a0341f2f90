"""Runs whose state is striped over several directories: the same bits, checkpoints, resume, export; and a part that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import OPTIMIZER, SCHEDULE, assert_equal, batches, content, train, uninterrupted
from tiny_models import tiny_model

import overspill
from overspill.checkpoint import read_latest
from overspill.checkpoint.export import verify_checkpoints
from overspill.errors import StorageError
from overspill.runtime.session import Session
from overspill.tiers.extent_file import FILE_NAME

ON_SSD = {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "clip": 1.0}


def open_striped(places: list[Path], **policy: object) -> Session:
    return Session(
        tiny_model("llama_tied"),
        plan=overspill.PlanRequest(
            dtype="float32", seq_len=12, micro_batch=2, accumulate=2, device="cpu", ssd_dir=tuple(map(str, places)), **ON_SSD
        ),  # type: ignore[arg-type]
        optimizer=OPTIMIZER,
        learning_rate=SCHEDULE,
        seed=3,
        checkpoints=overspill.CheckpointPolicy(**policy),  # type: ignore[arg-type]
    )


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    return [tmp_path / name for name in ("first", "second", "third")]


def test_a_striped_run_goes_on_from_its_checkpoint_with_the_same_bits(places: list[Path]) -> None:
    with open_striped(places) as session:
        train(session, 2)
    manifest = read_latest(places[0])
    assert manifest.stripes is not None and list(manifest.stripes.places) == [str(place.resolve()) for place in places]
    assert manifest.plan.ssd_places == tuple(map(str, places))
    assert [problems for _, problems in verify_checkpoints(places[0])] == [[]]
    with overspill.resume(places[0], model=tiny_model("llama_tied")) as session:
        train(session, 4)
        assert_equal(content(session), uninterrupted(4, clip=1.0))
    assert [problems for _, problems in verify_checkpoints(places[0])] == [[]]


def test_a_striped_checkpoint_is_resumed_into_host_memory_and_into_another_directory(places: list[Path], tmp_path: Path) -> None:
    with open_striped(places) as session:
        train(session, 2)
    for where in ({"parameters": "host", "states": "host"}, {"parameters": "ssd", "states": "ssd", "ssd_dir": str(tmp_path / "one")}):
        plan = overspill.PlanRequest(dtype="float32", seq_len=12, micro_batch=2, accumulate=2, device="cpu", clip=1.0, **where)  # type: ignore[arg-type]
        directory = tmp_path / f"checkpoints-{where['states']}"
        policy = overspill.CheckpointPolicy(directory=where.get("ssd_dir", str(directory)))
        with overspill.resume(places[0], model=tiny_model("llama_tied"), plan=plan, checkpoints=policy) as session:
            train(session, 3)
            assert_equal(content(session), uninterrupted(3, clip=1.0))


def test_a_missing_part_is_named_and_nothing_is_changed(places: list[Path]) -> None:
    with open_striped(places) as session:
        train(session, 2)
    hidden = places[1].rename(places[1].with_name("hidden"))
    with pytest.raises(StorageError, match=rf"second/{FILE_NAME} is missing, which is part 2 of 3"):
        overspill.resume(places[0], model=tiny_model("llama_tied"))
    hidden.rename(places[1])
    with overspill.resume(places[0], model=tiny_model("llama_tied")) as session:
        session.step(batches(session.step_number))


def test_a_striped_run_without_a_checkpoint_leaves_nothing_behind(places: list[Path]) -> None:
    with open_striped(places) as session:
        session.step(batches(0))
    left = [path.name for place in places for path in place.iterdir()]
    assert left in ([], ["overspill.written.json"])  # the count of what was written to the drive stays


def test_checkpoints_of_an_earlier_run_are_not_lost_behind_its_back(places: list[Path]) -> None:
    with open_striped(places) as session:
        train(session, 1)
    with pytest.raises(StorageError, match="has 1 checkpoint of an earlier run"):
        open_striped(places)
    with pytest.raises(StorageError, match="second holds part 2 of 3 of the checkpoints in"):
        open_striped([places[0].with_name("new"), places[1]])
    with open_striped(places, discard=True) as session:
        train(session, 1)
    assert [problems for _, problems in verify_checkpoints(places[0])] == [[]]
