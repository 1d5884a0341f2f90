"""The same claims where the lanes are CUDA streams: waits that are missing show as other bits when streams run late."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import overspill
from overspill.runtime.lanes import Lanes

pytestmark = pytest.mark.gpu

OPTIMIZER = overspill.AdamW(lr=1e-3)


def model() -> LlamaForCausalLM:
    """30 M parameters in 6 blocks: units of several megabytes, so that copies take as long as kernels."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, max_position_embeddings=512,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def batches(step: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(0, 2048, (2, 256), generator=generator) for _ in range(count)]
    return [{"input_ids": item, "labels": item} for item in ids]


def outcome(ssd_dir: Path | None, *, serial: bool, accumulate: int, num_steps: int = 4, **fields: object) -> list[object]:
    request = overspill.PlanRequest(
        dtype="bfloat16", seq_len=256, micro_batch=2, accumulate=accumulate, ssd_dir=str(ssd_dir) if ssd_dir else None, **fields
    )  # type: ignore[arg-type]
    with overspill.Session(model(), plan=request, optimizer=OPTIMIZER, serial=serial, chunk_bytes=4 * 2**20) as session:
        seen: list[object] = []
        for step in range(num_steps):
            report = session.step(batches(step, accumulate))
            seen.append((report.loss, report.grad_norm))
        session.flush()
        seen.append({name: session.homes.read(name) for name in session.homes.names})
        seen.append({name: session.homes.read_state(name, "exp_avg") for name in session.homes.names})
    return seen


def assert_same(found: list[object], expected: list[object]) -> None:
    assert found[:-2] == expected[:-2]
    for one, other in zip(found[-2:], expected[-2:], strict=True):
        for name, tensor in other.items():  # type: ignore[union-attr]
            assert torch.equal(one[name], tensor), name  # type: ignore[index]


CASES = [
    {"parameters": "host", "states": "host", "boundaries": "device", "accumulate": 1},
    {"parameters": "host", "states": "host", "boundaries": "device", "accumulate": 1, "clip": 1.0},
    {"parameters": "host", "states": "host", "boundaries": "host", "accumulate": 3, "clip": 1.0},
    {"parameters": "host", "states": "host", "boundaries": "host", "accumulate": 4, "group_size": 2},
    {"parameters": "ssd", "states": "ssd", "boundaries": "ssd", "accumulate": 2, "clip": 1.0},
    {"parameters": "ssd", "states": "ssd", "boundaries": "device", "accumulate": 1},
    {"parameters": "device", "states": "host", "boundaries": "device", "accumulate": 2},
    {"parameters": "host", "states": "host", "boundaries": "device", "accumulate": 2, "deferred_updates": 3},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_overlapped_streams_give_the_serial_bits_also_when_each_runs_late(
    case: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job sleeps on its stream, before or after its work, for up to 2 ms."""
    ssd_dir = tmp_path / "ssd" if "ssd" in case.values() else None
    expected = outcome(ssd_dir, serial=True, **case)  # type: ignore[arg-type]
    assert_same(outcome(ssd_dir, serial=False, **case), expected)  # type: ignore[arg-type]
    run = Lanes._run

    def late(self, completion, job, waits, stream):  # type: ignore[no-untyped-def]
        def slow_job():  # type: ignore[no-untyped-def]
            if stream is not None and delays.random() < 0.3:
                torch.cuda._sleep(int(delays.random() * 4_000_000))
            result = job()
            if stream is not None and delays.random() < 0.3:
                torch.cuda._sleep(int(delays.random() * 4_000_000))
            return result

        run(self, completion, slow_job, waits, stream)

    monkeypatch.setattr(Lanes, "_run", late)
    for number in range(3):
        delays = random.Random(number)
        assert_same(outcome(ssd_dir, serial=False, **case), expected)  # type: ignore[arg-type]
