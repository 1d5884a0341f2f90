"""A session's gradients and weights are those of a plain PyTorch loop, bit for bit, wherever its bytes rest.

Held by every parameter's gradient in every step and by the weights and moments after five steps: losses hide errors.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from training_loop import PlainTrainer, make_batches
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import overspill

VOCAB, STEPS, SEED = 96, 5, 7
OPTIMIZER = overspill.AdamW(lr=1e-2, weight_decay=0.1)
CHUNK_ROWS = 5
CHUNK_BYTES = 128 * 1024


def make_gpt2(*, tied: bool, dropout: float) -> PreTrainedModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=3, n_head=2, tie_word_embeddings=tied,
        embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_llama(*, tied: bool) -> PreTrainedModel:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=tied
    )  # fmt: skip
    return LlamaForCausalLM(config)


def steps_of_batches(accumulate: int) -> list[list[dict[str, torch.Tensor]]]:
    return [make_batches(accumulate, vocab_size=VOCAB, seed=step) for step in range(STEPS)]


@cache
def plain_results(tied: bool, dropout: float, accumulate: int, clip: float | None) -> tuple[list, dict, dict]:
    """Per step (loss, norm, gradients); weights and states at the end."""
    model = make_gpt2(tied=tied, dropout=dropout)
    trainer = PlainTrainer(model, OPTIMIZER, clip=clip, seed=SEED, chunk_rows=CHUNK_ROWS)
    steps = [trainer.step(batches) for batches in steps_of_batches(accumulate)]
    return steps, {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}, trainer.states


def request(**fields: object) -> overspill.PlanRequest:
    defaults: dict[str, object] = {"dtype": "float32", "seq_len": 12, "micro_batch": 2, "device": "cpu"}
    return overspill.PlanRequest(**{**defaults, **fields})  # type: ignore[arg-type]


def open_session(model: PreTrainedModel, plan: overspill.PlanRequest, monkeypatch: pytest.MonkeyPatch) -> overspill.Session:
    monkeypatch.setattr("overspill.planning.place._loss_chunk_rows", lambda layout: CHUNK_ROWS)
    return overspill.Session(model, plan=plan, optimizer=OPTIMIZER, seed=SEED, chunk_bytes=CHUNK_BYTES)


CASES = list(itertools.product(["device", "host", "ssd"], ["device", "host", "ssd"]))
FIRST_UNITS_BYTES = 150_000
"""Optimizer states of the embedding and a block of the tiny GPT-2, and less than those of two blocks."""


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("parameters", "states"), CASES)
def test_gradients_weights_and_moments_equal_plain_pytorch_bitwise(
    parameters: str,
    states: str,
    accumulate: int,
    clip: float | None,
    tied: bool,
    dropout: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen_gradients: dict[str, torch.Tensor],
) -> None:
    expected, weights, moments = plain_results(tied, dropout, accumulate, clip)
    # Boundary tiers and group sizes are spread over the cases: all of them must give the same bits anyway.
    position = CASES.index((parameters, states)) + 3 * tied + (clip is not None)
    plan = request(
        parameters=parameters, states=states, boundaries=["device", "host", "ssd"][position % 3], accumulate=accumulate,
        clip=clip, ssd_dir=str(tmp_path), group_size=[4, 2, 3, 1][position % 4],
    )  # fmt: skip
    with open_session(make_gpt2(tied=tied, dropout=dropout), plan, monkeypatch) as session:
        for batches, (loss, norm, gradients) in zip(steps_of_batches(accumulate), expected, strict=True):
            prediction = session.predict(batches)
            report = session.step(batches)
            assert report.loss == loss and report.grad_norm == norm
            assert set(seen_gradients) == set(gradients)
            for name, gradient in gradients.items():
                assert torch.equal(seen_gradients[name], gradient), name
            difference = report - prediction
            assert set(difference.lane_bytes.values()) == {0} and difference.num_ops == 0
            assert difference.device_resident_peak_bytes == difference.host_resident_peak_bytes == 0
            assert difference.ssd_resident_peak_bytes == 0
        session.flush()
        for name, weight in weights.items():
            assert torch.equal(session.homes.read(name), weight), name
            for field in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(session.homes.read_state(name, field).flatten(), moments[name][field]), (name, field)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(("states", "group_size"), [("host", 4), ("ssd", 2)])
def test_states_of_the_first_units_on_the_device_change_no_bit(
    states: str, group_size: int, clip: float | None, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, weights, moments = plain_results(tied, 0.1, 4, clip)
    plan = request(
        parameters="host", states=states, boundaries="device", accumulate=4, clip=clip, ssd_dir=str(tmp_path), group_size=group_size,
        device_states_bytes=FIRST_UNITS_BYTES,
    )  # fmt: skip
    with open_session(make_gpt2(tied=tied, dropout=0.1), plan, monkeypatch) as session:
        assert len({placement.states for placement in session.plan.placements.values()}) == 2
        for batches, (loss, norm, _) in zip(steps_of_batches(4), expected, strict=True):
            report = session.step(batches)
            assert report.loss == loss and report.grad_norm == norm
        session.flush()
        for name, weight in weights.items():
            assert torch.equal(session.homes.read(name), weight), name
            for field in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(session.homes.read_state(name, field).flatten(), moments[name][field]), (name, field)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("boundaries", "group_size", "deferred"), [("device", 4, 1), ("host", 2, 2)])
def test_updates_that_are_put_off_to_the_steps_end_change_no_bit(
    boundaries: str, group_size: int, deferred: int, tied: bool, monkeypatch: pytest.MonkeyPatch, seen_gradients: dict[str, torch.Tensor]
) -> None:
    expected, weights, moments = plain_results(tied, 0.1, 4, None)
    plan = request(
        parameters="host", states="host", boundaries=boundaries, accumulate=4, group_size=group_size, deferred_updates=deferred
    )  # fmt: skip
    with open_session(make_gpt2(tied=tied, dropout=0.1), plan, monkeypatch) as session:
        assert len(session.plan.deferred) == deferred
        for batches, (loss, norm, gradients) in zip(steps_of_batches(4), expected, strict=True):
            report = session.step(batches)
            assert report.loss == loss and report.grad_norm == norm
            session.flush()
            for name, gradient in gradients.items():
                assert torch.equal(seen_gradients[name], gradient), name
        for name, weight in weights.items():
            assert torch.equal(session.homes.read(name), weight), name
            for field in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(session.homes.read_state(name, field).flatten(), moments[name][field]), (name, field)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_stay_within_1e6_of_the_models_own_loss_and_torch_adamw(tied: bool, tmp_path: Path) -> None:
    """Against nothing of overspill's: the model's own full logits and torch.optim.AdamW.

    Llama, because GPT-2's key bias has a gradient of pure rounding noise (softmax ignores it), which Adam scales up.
    """
    plain = make_llama(tied=tied).train()
    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    others = [p for p in plain.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    plan = request(parameters="ssd", states="ssd", boundaries="host", accumulate=3, ssd_dir=str(tmp_path))
    with overspill.Session(make_llama(tied=tied), plan=plan, optimizer=overspill.AdamW(lr=1e-4, weight_decay=0.1)) as session:
        for batches in steps_of_batches(3):
            report = session.step(batches)
            total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
            losses = []
            for batch in batches:
                logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                flat, labels = logits[:, :-1].reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1)
                loss = torch.nn.functional.cross_entropy(flat, labels, reduction="sum") / total
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            assert report.loss == pytest.approx(sum(losses), rel=1e-6)
        for name, parameter in plain.named_parameters():
            ours = session.homes.read(name)
            error = (ours - parameter.detach()).norm() / parameter.detach().norm().clamp_min(1e-6)
            assert error < 1e-6, (name, float(error))


def test_gradients_of_64_bf16_micro_batches_are_no_worse_than_one_fp32_accumulated_cast(
    tmp_path: Path, seen_gradients: dict[str, torch.Tensor]
) -> None:
    reference = make_llama(tied=False).to(torch.bfloat16)
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    batches = make_batches(64, vocab_size=VOCAB)
    batches = [{**batch, "labels": torch.where(batch["attention_mask"] == 0, -100, batch["input_ids"])} for batch in batches]
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    def gradients(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Per tensor: the sum in fp64 (or fp32 for bf16 graphs), and the plain bf16 `.grad` accumulation."""
        model = make_llama(tied=False).to(torch.bfloat16)
        model.load_state_dict(weights)
        model = model.to(dtype)
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            flat, labels = logits[:, :-1].reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1)
            loss = torch.nn.functional.cross_entropy(flat if dtype == torch.float64 else flat.float(), labels, reduction="sum") / total
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for (name, _), gradient in zip(model.named_parameters(), grads, strict=True):
                sums[name] = sums.get(name, 0) + gradient.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return sums, {name: value.to(torch.bfloat16) for name, value in sums.items()}

    exact, _ = gradients(torch.float64)
    _, accumulated = gradients(torch.bfloat16)
    plan = overspill.PlanRequest(
        parameters="host", states="host", dtype="bfloat16", seq_len=12, micro_batch=2, accumulate=64, device="cpu", ssd_dir=str(tmp_path)
    )
    with overspill.Session(reference, plan=plan, optimizer=OPTIMIZER) as session:
        session.step(batches)
    for name, truth in exact.items():
        ours = float((seen_gradients[name].double() - truth).norm() / truth.norm())
        best = float((accumulated[name].double() - truth).norm() / truth.norm())
        assert ours <= 1.05 * best, (name, ours, best)
