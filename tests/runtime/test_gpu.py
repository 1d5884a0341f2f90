"""The exactness claims on a CUDA device: deterministic algorithms on, plain loop and session on the same GPU, bit for bit.

Limits: with `torch.use_deterministic_algorithms` SDPA's backward takes deterministic kernels; without it the flash backward
adds in varying order, and neither a plain loop nor a session repeats itself to the bit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from training_loop import PlainTrainer, make_batches
from transformers import LlamaConfig, LlamaForCausalLM

import overspill

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
VOCAB, STEPS, SEED = 96, 5, 7
OPTIMIZER = overspill.AdamW(lr=1e-2, weight_decay=0.1)
TIERS = ["device", "host", "ssd"]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def model(name: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    changes = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1} if name == "gpt2" else {}
    built = tiny_model(name, **changes).to(dtype)
    built.config.dtype = dtype
    return built


@pytest.mark.parametrize(("parameters", "states"), list(itertools.product(TIERS, TIERS)))
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_gradients_and_weights_on_cuda_equal_plain_pytorch_bitwise(
    name: str,
    dtype: str,
    clip: float | None,
    parameters: str,
    states: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen_gradients: dict[str, torch.Tensor],
) -> None:
    """bf16 with one micro-batch: plain `.grad` accumulation rounds to bf16 each time, ours does not."""
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    count = 3 if dtype == "float32" else 1
    chunk_rows = 5 if dtype == "float32" else 4096
    monkeypatch.setattr("overspill.planning.place._loss_chunk_rows", lambda layout: chunk_rows)
    torch_dtype = getattr(torch, dtype)
    trainer = PlainTrainer(model(name, torch_dtype), OPTIMIZER, clip=clip, seed=SEED, chunk_rows=chunk_rows, device="cuda")
    plan = overspill.PlanRequest(
        parameters=parameters, states=states, boundaries=TIERS[(TIERS.index(parameters) + TIERS.index(states)) % 3], dtype=dtype,
        seq_len=12, micro_batch=2, accumulate=count, clip=clip, ssd_dir=str(tmp_path), device="cuda", group_size=2,
    )  # fmt: skip
    with overspill.Session(model(name, torch_dtype), plan=plan, optimizer=OPTIMIZER, seed=SEED, chunk_bytes=128 * 1024) as session:
        for step in range(STEPS):
            batches = make_batches(count, vocab_size=VOCAB, seed=step)
            loss, norm, gradients = trainer.step(batches)
            prediction = session.predict(batches)
            report = session.step(batches)
            assert [n for n in gradients if not torch.equal(seen_gradients[n], gradients[n])] == []
            assert (report.loss, report.grad_norm) == (loss, norm)
            difference = report - prediction
            assert set(difference.lane_bytes.values()) == {0} and difference.device_resident_peak_bytes == 0
        session.flush()
        assert [n for n, w in trainer.parameters.items() if not torch.equal(session.homes.read(n), w.cpu())] == []
        if states == "host":
            assert report.pinned_bytes > 0


def test_host_and_device_updates_give_the_same_losses_over_20_steps() -> None:
    losses = []
    for states in ("host", "device"):
        plan = overspill.PlanRequest(
            parameters="host", states=states, dtype="bfloat16", seq_len=12, micro_batch=2, accumulate=2, device="cuda"
        )  # fmt: skip
        with overspill.Session(model("llama", torch.bfloat16), plan=plan, optimizer=OPTIMIZER, seed=SEED) as session:
            losses.append([session.step(make_batches(2, vocab_size=VOCAB, seed=step)).loss for step in range(20)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_the_last_product_of_a_block_is_left_out_of_its_recomputation(is_deterministic: bool) -> None:
    """Also where attention's backward never gives the same bits twice, and at the first step, when its gradients are mostly rounding."""
    torch.use_deterministic_algorithms(is_deterministic)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4
    )
    torch.manual_seed(SEED)
    plan = overspill.PlanRequest(parameters="host", states="host", dtype="bfloat16", seq_len=1024, micro_batch=4, device="cuda")
    with overspill.Session(LlamaForCausalLM(config).to(torch.bfloat16), plan=plan, optimizer=OPTIMIZER, seed=SEED) as session:
        tokens = torch.randint(0, VOCAB, (4, 1024), generator=torch.Generator().manual_seed(SEED))
        session.step([{"input_ids": tokens, "labels": tokens}])
        assert session.model.unneeded is not None
        assert session.model.unneeded.left_out == {"model.layers.0": ("mlp.down_proj",)}
