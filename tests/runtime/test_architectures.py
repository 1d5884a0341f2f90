"""Every architecture through a session with its bytes on the SSD: gradients and weights are the plain loop's, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import NAMES, tiny_batch, tiny_model
from training_loop import PlainTrainer

import overspill

STEPS, CHUNK_ROWS, SEED = 5, 7, 3
OPTIMIZER = overspill.AdamW(lr=3e-3, weight_decay=0.1)


def batches_of(step: int) -> list[dict[str, torch.Tensor]]:
    return [tiny_batch(10 * step, padding=3), tiny_batch(10 * step + 1, ignored=4), tiny_batch(10 * step + 2, num_sequences=1)]


@pytest.mark.parametrize("name", NAMES)
def test_five_steps_from_the_ssd_equal_plain_pytorch_bitwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen_gradients: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setattr("overspill.planning.place._loss_chunk_rows", lambda layout: CHUNK_ROWS)
    clip = 0.5 if NAMES.index(name) % 2 else None
    trainer = PlainTrainer(tiny_model(name), OPTIMIZER, clip=clip, seed=SEED, chunk_rows=CHUNK_ROWS)
    largest = max(batch["input_ids"].numel() for batch in batches_of(0))
    plan = overspill.PlanRequest(
        parameters="ssd", states="ssd", boundaries=("host", "ssd")[NAMES.index(name) % 2], dtype="float32", seq_len=largest,
        accumulate=3, group_size=2, clip=clip, ssd_dir=str(tmp_path), device="cpu",
    )  # fmt: skip
    with overspill.Session(tiny_model(name), plan=plan, optimizer=OPTIMIZER, seed=SEED, chunk_bytes=128 * 1024) as session:
        for step in range(STEPS):
            loss, norm, gradients = trainer.step(batches_of(step))
            report = session.step(batches_of(step))
            assert set(seen_gradients) == set(gradients)
            assert [tensor for tensor in gradients if not torch.equal(seen_gradients[tensor], gradients[tensor])] == []
            assert (report.loss, report.grad_norm) == (loss, norm)
        session.flush()
        different = [tensor for tensor, weight in trainer.parameters.items() if not torch.equal(session.homes.read(tensor), weight)]
        assert different == []
