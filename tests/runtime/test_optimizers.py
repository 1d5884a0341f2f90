"""A session with any optimizer in any state format trains as a plain loop does, bit for bit, wherever its states rest."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from training_loop import PlainTrainer, make_batches

import overspill
from overspill.checkpoint import read_latest
from overspill.spec.documents import from_json
from overspill.spec.plan import Plan
from overspill.spec.tensors import Tier
from overspill.spec.update_rule import Optimizer

VOCAB, STEPS, SEED, CHUNK_BYTES = 96, 5, 7, 16 * 1024
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": overspill.AdamW(lr=1e-2, weight_decay=0.1),
    "sgd": overspill.SGD(lr=1e-1, weight_decay=0.01),
    "sgd_momentum": overspill.SGD(lr=1e-1, momentum=0.9, weight_decay=0.01),
    "sgd_nesterov": overspill.SGD(lr=1e-1, momentum=0.9, nesterov=True),
    "lion": overspill.Lion(lr=1e-3, weight_decay=0.1),
}
FORMATS = ["fp32", "bf16", "int8"]
PLACEMENTS = {
    "host": {"parameters": "host", "states": "host"},
    "ssd": {"parameters": "ssd", "states": "ssd"},
    "device": {"parameters": "device", "states": "device"},
}


def model(dtype: str = "float32", seed: int = 0):  # type: ignore[no-untyped-def]
    return tiny_model("llama", seed=seed).to(getattr(torch, dtype))


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    """One micro-batch: bf16 gradients of several would be added in fp32 by a session and in bf16 by the plain loop."""
    return make_batches(1, vocab_size=VOCAB, seed=step)


def request(tmp_path: Path, state_format: str, dtype: str, **fields: object) -> overspill.PlanRequest:
    return overspill.PlanRequest(
        state_format=state_format, dtype=dtype, seq_len=12, micro_batch=2, device="cpu", ssd_dir=str(tmp_path), **fields
    )  # type: ignore[arg-type]


@cache
def expected(kind: str, state_format: str, dtype: str, clip: float | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses; weights and states after the last step."""
    trainer = PlainTrainer(model(dtype), OPTIMIZERS[kind], clip=clip, seed=SEED, chunk_rows=64, state_format=state_format)
    losses = [trainer.step(batches(step))[0] for step in range(STEPS)]
    result = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    result |= {f"{name}.{field}": state for name, states in trainer.states.items() for field, state in states.items()}
    return losses, result


def assert_holds(session: overspill.Session, weights: dict[str, torch.Tensor]) -> None:
    session.flush()
    layout = next(session.plan.state_layout(name) for name in session.plan.bundles)
    for name in session.homes.names:
        assert torch.equal(session.homes.read(name), weights[name]), name
        for field in layout.fields:
            found = session.homes.read_state(name, field.name).flatten()
            assert torch.equal(found, weights[f"{name}.{field.name}"]), (name, field.name)


CASES = list(itertools.product(OPTIMIZERS, FORMATS, ["float32", "bfloat16"]))


@pytest.mark.parametrize(("kind", "state_format", "dtype"), CASES)
def test_five_steps_and_a_resume_after_the_third_equal_the_plain_loop_bitwise(
    kind: str, state_format: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Host and SSD, clipped and not, are spread over the cases: all of them must give the same bits anyway.
    monkeypatch.setattr("overspill.planning.place._loss_chunk_rows", lambda layout: 64)
    position = CASES.index((kind, state_format, dtype))
    clip, placement = (1.0 if position % 3 else None), ["host", "ssd"][position // 2 % 2]
    losses, weights = expected(kind, state_format, dtype, clip)
    policy = overspill.CheckpointPolicy(directory=str(tmp_path))
    plan = request(tmp_path, state_format, dtype, clip=clip, **PLACEMENTS[placement])
    found = []
    with overspill.Session(
        model(dtype), plan=plan, optimizer=OPTIMIZERS[kind], seed=SEED, checkpoints=policy, chunk_bytes=CHUNK_BYTES
    ) as session:
        assert max(len(bundle.chunks) for bundle in session.plan.bundles.values()) > 1
        while session.step_number < STEPS:
            found.append(session.step(batches(session.step_number)).loss)
            if session.step_number == 3:
                session.save_checkpoint()
        assert found == losses
        assert_holds(session, weights)
    other = {"host": "device", "ssd": "host"}[placement]
    plan = request(tmp_path, state_format, dtype, clip=clip, **PLACEMENTS[other])
    with overspill.resume(tmp_path, model=model(dtype, seed=9), plan=plan) as session:
        assert session.step_number == 3 and session.optimizer == OPTIMIZERS[kind]
        for step in (3, 4):
            assert session.step(batches(step)).loss == losses[step]
        assert_holds(session, weights)


def test_states_on_the_device_without_the_native_core_are_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA device runs: the plain form, segment by segment."""
    monkeypatch.setattr("overspill.planning.place._loss_chunk_rows", lambda layout: 64)
    monkeypatch.setattr("overspill.optim._HAS_NATIVE", False)
    losses, weights = expected("adamw", "int8", "bfloat16", None)
    plan = request(tmp_path, "int8", "bfloat16", **PLACEMENTS["device"])
    with overspill.Session(model("bfloat16"), plan=plan, optimizer=OPTIMIZERS["adamw"], seed=SEED, chunk_bytes=CHUNK_BYTES) as session:
        assert [session.step(batches(step)).loss for step in range(STEPS)] == losses
        assert_holds(session, weights)


def test_chunks_of_any_size_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overspill.planning.place._loss_chunk_rows", lambda layout: 64)
    _, weights = expected("adamw", "int8", "bfloat16", None)
    plan = request(tmp_path, "int8", "bfloat16", **PLACEMENTS["host"])
    for chunk_bytes in (1, 100_000, 32 * 2**20):
        with overspill.Session(model("bfloat16"), plan=plan, optimizer=OPTIMIZERS["adamw"], seed=SEED, chunk_bytes=chunk_bytes) as session:
            for step in range(STEPS):
                session.step(batches(step))
            assert_holds(session, weights)


@pytest.mark.parametrize(
    ("state_format", "dtype", "kind", "bytes_each"),
    [("fp32", "bfloat16", "adamw", 12), ("bf16", "bfloat16", "adamw", 6), ("int8", "bfloat16", "lion", 3), ("bf16", "float32", "adamw", 8)],
)
def test_the_placement_table_counts_the_bytes_of_the_format_table(
    state_format: str, dtype: str, kind: str, bytes_each: int, tmp_path: Path
) -> None:
    plan = request(tmp_path, state_format, dtype, **PLACEMENTS["host"])
    with overspill.Session(model(dtype), plan=plan, optimizer=OPTIMIZERS[kind]) as session:
        home = session.plan.home_bytes(Tier.HOST)
        elements = sum(bundle.num_elements for bundle in session.plan.bundles.values())
        pages = 4096 * sum(len(bundle.chunks) for bundle in session.plan.bundles.values())
        exact = home["parameters"] + home["states"]
        assert elements * bytes_each <= exact <= elements * bytes_each + (pages if state_format == "int8" else 0)
        assert from_json(Plan, session.plan.to_json()) == session.plan


def test_a_resume_with_another_optimizer_or_format_is_refused_with_both(tmp_path: Path) -> None:
    policy = overspill.CheckpointPolicy(directory=str(tmp_path))
    plan = request(tmp_path, "bf16", "bfloat16", **PLACEMENTS["ssd"])
    with overspill.Session(model("bfloat16"), plan=plan, optimizer=OPTIMIZERS["lion"], checkpoints=policy) as session:
        session.step(batches(0))
        session.save_checkpoint()
    assert read_latest(tmp_path).optimizer == OPTIMIZERS["lion"]
    with pytest.raises(ValueError, match="state_format was bf16, now int8"):
        overspill.resume(tmp_path, model=model("bfloat16"), plan=request(tmp_path, "int8", "bfloat16", **PLACEMENTS["ssd"]))
    with pytest.raises(ValueError, match="plan is for the states of adamw, the session's optimizer is lion"):
        overspill.resume(
            tmp_path, model=model("bfloat16"), plan=request(tmp_path, "bf16", "bfloat16", optimizer="adamw", **PLACEMENTS["ssd"])
        )


def test_narrow_states_of_float16_are_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state format 'int8' has no layout for parameters of float16"):
        request(tmp_path, "int8", "float16")
