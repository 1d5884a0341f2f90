"""A tiny training run that can be stopped anywhere: the model, its batches, and what the run without a stop ends with."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tiny_models import tiny_model
from training_loop import make_batches

import overspill
from overspill.runtime.session import Session

VOCAB = 96
OPTIMIZER = overspill.AdamW(lr=1e-2)
SCHEDULE = overspill.LearningRate(kind="cosine", base=1e-2, warmup_steps=2, total_steps=8)
Weights = dict[str, torch.Tensor]


def request(ssd_dir: Path | None, **fields: object) -> overspill.PlanRequest:
    defaults: dict[str, object] = {"dtype": "float32", "seq_len": 12, "micro_batch": 2, "device": "cpu", "accumulate": 2}
    return overspill.PlanRequest(**{**defaults, "ssd_dir": str(ssd_dir) if ssd_dir else None, **fields})  # type: ignore[arg-type]


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    return make_batches(2, vocab_size=VOCAB, seed=step)


def open_run(directory: Path, *, keep: int = 1, settings: dict[str, object] | None = None, **fields: object) -> Session:
    """A fresh run with checkpoints in `directory`."""
    return Session(
        tiny_model("llama_tied"),
        plan=request(directory, **fields),
        optimizer=OPTIMIZER,
        learning_rate=SCHEDULE,
        seed=3,
        checkpoints=overspill.CheckpointPolicy(directory=str(directory), keep=keep),
        **(settings or {}),  # type: ignore[arg-type]
    )


def train(session: Session, until: int, *, every: int | None = 1) -> None:
    """Steps up to `until`, a checkpoint after every `every`."""
    while session.step_number < until:
        session.step(batches(session.step_number))
        if every is not None and session.step_number % every == 0:
            session.save_checkpoint({"next": session.step_number})


def content(session: Session) -> Weights:
    """Every parameter and every state field."""
    session.flush()
    result = {}
    for name in session.homes.names:
        result[name] = session.homes.read(name)
        bundle = next(bundle for bundle in session.plan.bundles.values() if any(slot.tensor.name == name for slot in bundle.slots))
        if bundle.trainable:
            for field in session.plan.state_layout(bundle.name).fields:
                result[f"{name}.{field.name}"] = session.homes.read_state(name, field.name)
    return result


@functools.cache
def uninterrupted(steps: int, **fields: object) -> Weights:
    """What a run in host memory, without checkpoints, ends with; made once, and only to be looked at."""
    placement = {"parameters": "host", "states": "host", **{k: v for k, v in fields.items() if k in ("dtype", "clip", "accumulate")}}
    with Session(tiny_model("llama_tied"), plan=request(None, **placement), optimizer=OPTIMIZER, learning_rate=SCHEDULE, seed=3) as session:
        train(session, steps, every=None)
        return content(session)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
