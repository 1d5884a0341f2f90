"""Checkpoints move nothing that is on the SSD already, and every resume goes on to the last bit."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from small_runs import OPTIMIZER, SCHEDULE, assert_equal, batches, content, open_run, request, train, uninterrupted
from tiny_models import tiny_model

import overspill
from overspill.checkpoint import find_manifests, read_latest
from overspill.errors import StorageError
from overspill.tiers.extent_file import FILE_NAME
from overspill.tiers.wear import COUNTER_NAME
from overspill.units import align_up

PLACEMENTS = {
    "ssd": {"parameters": "ssd", "states": "ssd"},
    "host": {"parameters": "host", "states": "host"},
    "device": {"parameters": "device", "states": "device"},
    "mixed": {"parameters": "host", "states": "ssd", "boundaries": "ssd"},
}


@pytest.mark.parametrize(("dtype", "clip"), [("float32", None), ("bfloat16", 1.0)], ids=["float32-unclipped", "bfloat16-clipped"])
@pytest.mark.parametrize("resumed", sorted(PLACEMENTS))
@pytest.mark.parametrize("saved", ["ssd", "host"])
def test_a_run_resumed_in_any_placement_ends_with_the_bits_of_the_uninterrupted_run(
    saved: str, resumed: str, dtype: str, clip: float | None, tmp_path: Path
) -> None:
    with open_run(tmp_path / "run", dtype=dtype, clip=clip, **PLACEMENTS[saved]) as session:
        train(session, 3, every=2)
    plan = request(tmp_path / "run", dtype=dtype, clip=clip, **PLACEMENTS[resumed])
    with overspill.resume(tmp_path / "run", model=tiny_model("llama_tied", seed=9), plan=plan) as session:
        assert session.step_number == 2 and session.data_position == {"next": 2}
        train(session, 5)
        found = content(session)
    assert_equal(found, uninterrupted(5, dtype=dtype, clip=clip))


def test_what_the_checkpoint_decides_may_be_said_again_and_not_otherwise(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", **PLACEMENTS["host"]) as session:
        train(session, 1)
    model, same = tiny_model("llama_tied"), {"optimizer": OPTIMIZER, "learning_rate": SCHEDULE, "seed": 3}
    for other, words in (
        ({"optimizer": overspill.AdamW(lr=2e-2)}, r"optimizer was AdamW\(lr=0\.01, .*, now AdamW\(lr=0\.02, "),
        ({"optimizer": overspill.SGD(lr=1e-2)}, r"optimizer was AdamW\(.*, now SGD\("),
        ({"learning_rate": overspill.LearningRate(kind="constant", base=1e-2, total_steps=8)}, "learning_rate was .*, now "),
        ({"seed": 4}, "seed was 3, now 4; leave out what the checkpoint decides, or begin a new run"),
        ({"chunk_bytes": 4096}, r"chunk_bytes was \d+, now 4096"),
    ):
        with pytest.raises(ValueError, match=words):
            overspill.resume(tmp_path / "run", model=model, **{**same, **other})  # type: ignore[arg-type]
    with overspill.resume(tmp_path / "run", model=model, **same) as session:  # type: ignore[arg-type]
        train(session, 2, every=None)
        found = content(session)
    assert_equal(found, uninterrupted(2))


def test_a_loss_scale_and_its_count_are_restored(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", dtype="float16", parameters="ssd", states="ssd") as session:
        train(session, 2)
        scale = session.loss_scale
    with overspill.resume(tmp_path / "run", model=tiny_model("llama_tied")) as session:
        assert session.loss_scale == scale
        train(session, 4)
        found = content(session)
    assert_equal(found, uninterrupted(4, dtype="float16"))


def test_a_checkpoint_moves_no_byte_of_state_that_is_on_the_ssd(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters="ssd", states="ssd") as session:
        train(session, 2, every=None)
        session.flush()  # the last step's updates are written by then
        assert session.residency.store is not None
        store = session.residency.store.store
        before = (store.read_bytes, store.written_bytes)
        session.save_checkpoint()
        assert (store.read_bytes, store.written_bytes) == before


def test_what_is_in_memory_is_written_once_and_only_that(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters="host", states="ssd") as session:
        train(session, 1, every=None)
        session.flush()
        assert session.residency.store is not None
        before = session.residency.store.store.written_bytes
        session.save_checkpoint()
        parameters = sum(bundle.parameter_bytes for bundle in session.plan.bundles.values())
        assert session.residency.store.store.written_bytes - before == parameters


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_space_is_one_more_than_the_checkpoints_that_are_kept(keep: int, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", keep=keep, parameters="ssd", states="ssd") as session:
        state = sum(bundle.parameter_bytes + session.plan.state_bytes(name) for name, bundle in session.plan.bundles.items())
        train(session, 5)
        status = (tmp_path / "run" / FILE_NAME).stat()
        assert status.st_size == (keep + 1) * state and status.st_blocks * 512 <= (keep + 1) * align_up(state, 4096) + 65536
        assert list(find_manifests(tmp_path / "run")) == list(range(6 - keep, 6))
    for generation in find_manifests(tmp_path / "run"):
        with overspill.resume(tmp_path / "run", model=tiny_model("llama_tied"), generation=generation) as session:
            assert session.step_number == generation
            assert_equal(content(session), uninterrupted(generation))
        break


def test_without_checkpoints_the_state_takes_its_size_and_only_the_count_of_writes_stays(tmp_path: Path) -> None:
    with overspill.Session(
        tiny_model("llama_tied"), plan=request(tmp_path / "run", parameters="ssd", states="ssd"), optimizer=OPTIMIZER
    ) as session:
        state = sum(bundle.parameter_bytes + session.plan.state_bytes(name) for name, bundle in session.plan.bundles.items())
        assert (tmp_path / "run" / FILE_NAME).stat().st_size == state
        with pytest.raises(ValueError, match="reserved no room for checkpoints"):
            session.save_checkpoint()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [COUNTER_NAME]


def test_a_session_that_made_no_checkpoint_leaves_only_the_count_of_writes(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters="ssd", states="ssd") as session:
        session.step(batches(0))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [COUNTER_NAME]


def test_more_or_fewer_checkpoints_can_be_kept_after_a_resume(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", keep=2, parameters="ssd", states="host") as session:
        train(session, 3)
    step = 3
    for keep in (3, 1, 2):
        policy = overspill.CheckpointPolicy(directory=str(tmp_path / "run"), keep=keep)
        with overspill.resume(tmp_path / "run", model=tiny_model("llama_tied"), checkpoints=policy) as session:
            step += 2
            train(session, step)
            assert len(find_manifests(tmp_path / "run")) == min(keep, len(find_manifests(tmp_path / "run"))) <= keep
            found = content(session)
    assert_equal(found, uninterrupted(step))


def test_a_run_can_go_on_in_another_directory_and_the_old_one_stays(tmp_path: Path) -> None:
    with open_run(tmp_path / "old", parameters="ssd", states="ssd") as session:
        train(session, 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    plan = request(tmp_path / "new", parameters="ssd", states="host")
    policy = overspill.CheckpointPolicy(directory=str(tmp_path / "new"))
    with overspill.resume(tmp_path / "old", model=tiny_model("llama_tied"), plan=plan, checkpoints=policy) as session:
        train(session, 4)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    with overspill.resume(tmp_path / "new", model=tiny_model("llama_tied")) as session:
        assert_equal(content(session), uninterrupted(4))


def test_a_fresh_run_does_not_take_the_place_of_checkpoints_unless_told_to(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters="ssd", states="ssd") as session:
        train(session, 1)
    with pytest.raises(StorageError, match="has 1 checkpoint of an earlier run.*--resume.*--discard-checkpoints"):
        open_run(tmp_path / "run", parameters="ssd", states="ssd")
    with pytest.raises(StorageError, match="has 1 checkpoint"):
        overspill.Session(tiny_model("llama_tied"), plan=request(tmp_path / "run", parameters="ssd", states="ssd"), optimizer=OPTIMIZER)
    assert read_latest(tmp_path / "run").step == 1
    policy = overspill.CheckpointPolicy(discard=True)
    plan = request(tmp_path / "run", parameters="ssd", states="ssd")
    with overspill.Session(tiny_model("llama_tied"), plan=plan, optimizer=OPTIMIZER, checkpoints=policy):
        assert not find_manifests(tmp_path / "run")


def test_another_model_dtype_or_batch_is_refused_with_both_values(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters="host", states="host") as session:
        train(session, 1)

    def refused(message: str, model: str = "llama_tied", changes: dict[str, object] | None = None, **fields: object) -> None:
        plan = request(tmp_path / "run", **{"parameters": "host", "states": "host", **fields})
        with pytest.raises(ValueError, match=message):
            overspill.resume(tmp_path / "run", model=tiny_model(model, **(changes or {})), plan=plan)

    refused("of a LlamaForCausalLM, this is a GPT2LMHeadModel", "gpt2")
    refused("lm_head.weight was not there, now float32", "llama")
    refused(r"embed_tokens.weight was float32\[96, 32\], now float32\[90, 32\]", changes={"vocab_size": 90})
    refused("rms_norm_eps was 1e-06, now 0.001", changes={"rms_norm_eps": 1e-3})
    refused("dtype was float32, now bfloat16", dtype="bfloat16")
    refused("clip was None, now 1.0", clip=1.0)
    refused("accumulate was 2, now 3", accumulate=3)
    assert read_latest(tmp_path / "run").step == 1


def test_two_runs_in_one_directory_the_second_is_refused_with_the_firsts_identity(tmp_path: Path) -> None:
    import os

    with open_run(tmp_path / "run", parameters="host", states="host") as session:
        train(session, 1)
        with pytest.raises(StorageError, match=rf"in use by another run \(pid {os.getpid()} on .*, since "):
            overspill.resume(tmp_path / "run", model=tiny_model("llama_tied"))
        train(session, 2)
    with overspill.resume(tmp_path / "run", model=tiny_model("llama_tied")) as session:
        assert session.step_number == 2


def test_frozen_weights_are_written_once(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    policy = overspill.CheckpointPolicy(directory=str(tmp_path / "run"))
    with overspill.Session(model, plan=request(None, parameters="host", states="host"), optimizer=OPTIMIZER, checkpoints=policy) as session:
        written = []
        assert session.residency.store is not None
        for step in range(3):
            session.step(batches(step))
            before = session.residency.store.store.written_bytes
            session.save_checkpoint()
            written.append(session.residency.store.store.written_bytes - before)
    frozen = sum(bundle.parameter_bytes for bundle in session.plan.bundles.values() if not bundle.trainable)
    assert frozen > 0 and written[1] == written[2] == written[0] - frozen


def test_a_manifest_is_json_that_reads_back_as_written(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", parameters="host", states="ssd") as session:
        train(session, 1)
        manifest = session.save_checkpoint({"any": ["json", 1, None]})
    assert dataclasses.replace(read_latest(tmp_path / "run"), config=None) == dataclasses.replace(manifest, config=None)
    assert torch.tensor([entry.num_bytes for entry in manifest.records]).sum() > 0


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_that_was_forked_before_the_first_checkpoint_and_ends_costs_none(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", **PLACEMENTS["ssd"]) as session:
        train(session, 1, every=None)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            session.close()  # as leaving the `with` block in the child does
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        train(session, 2)
    with overspill.resume(tmp_path / "run", model=tiny_model("llama_tied")) as session:
        assert session.step_number == 2
        found = content(session)
    assert_equal(found, uninterrupted(2))
