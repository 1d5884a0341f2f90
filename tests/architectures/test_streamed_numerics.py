"""Streaming changes no number: every architecture, taken apart and run unit by unit, against itself as a whole.

Gradients are equal to the last bit, tied weights included: `plain_loop` adds a tied weight's two gradients the way a unit-major loop must.
Only the model's own loss (`model(input_ids, labels=...)`, one cross entropy over all rows at once) rounds in another order.
"""

from __future__ import annotations

import pytest
import torch
from fake_models import fake_model
from plain_loop import run_plain_step
from tiny_models import NAMES, tiny_batch, tiny_config, tiny_model
from unit_major import run_unit_major_step

from overspill.huggingface import StreamedModel, build_meta_model

CHUNK_ROWS = 7


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _batches() -> list[dict[str, torch.Tensor]]:
    """Unequal target counts; padding in one, none and no mask in the others."""
    return [tiny_batch(1, padding=3), tiny_batch(2, ignored=4), tiny_batch(3, num_sequences=1)]


def _streamed_logits(
    streamed: StreamedModel, weights: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], positions=None
) -> torch.Tensor:
    def of(unit: str) -> dict[str, torch.Tensor]:
        return {name: weights[name] for name in streamed.unit_parameters[unit]}

    with torch.no_grad():
        with streamed.bound("embedding", of("embedding")):
            embedded = streamed.embed(batch)
        hidden = embedded.hidden
        for unit in streamed.block_names:
            with streamed.bound(unit, of(unit)):
                hidden = streamed.run_block(unit, hidden, embedded.arguments).hidden
        with streamed.bound("tail", of("tail")):
            return streamed.logits(batch, hidden, positions)


@pytest.mark.parametrize("name", NAMES)
def test_streamed_logits_equal_the_models_bitwise(name: str) -> None:
    model = tiny_model(name).eval()
    weights = _weights(model)
    batches = [{k: v for k, v in tiny_batch(1, padding=padding).items() if k != "labels"} for padding in (0, 3)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    streamed = StreamedModel(build_meta_model(tiny_config(name), dtype=torch.float32)).eval()
    assert streamed.unused_parameters == ()
    for batch, logits in zip(batches, expected, strict=True):
        assert torch.equal(_streamed_logits(streamed, weights, batch), logits)


@pytest.mark.parametrize("name", NAMES)
def test_unit_major_step_equals_the_plain_loop_bitwise(name: str) -> None:
    model = tiny_model(name).train()
    weights = _weights(model)
    plain = run_plain_step(model, _batches(), chunk_rows=CHUNK_ROWS, loss_scale=8.0)
    streamed = run_unit_major_step(StreamedModel(model), weights, _batches(), chunk_rows=CHUNK_ROWS, loss_scale=8.0)
    assert streamed.gradients.keys() == plain.gradients.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(streamed.gradients[name], plain.gradients[name])] == []
    assert [torch.equal(a, b) for a, b in zip(streamed.losses, plain.losses, strict=True)] == [True] * 3


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "gpt2", "gpt_oss", "mamba2"])
def test_unit_major_step_in_bf16_equals_the_plain_loop_bitwise(name: str) -> None:
    model = tiny_model(name, dtype=torch.bfloat16).train()
    weights = _weights(model)
    plain = run_plain_step(model, _batches(), chunk_rows=CHUNK_ROWS)
    streamed_model = StreamedModel(build_meta_model(tiny_config(name), dtype=torch.bfloat16)).train()
    streamed = run_unit_major_step(streamed_model, weights, _batches(), chunk_rows=CHUNK_ROWS)
    assert [name for name in weights if not torch.equal(streamed.gradients[name], plain.gradients[name])] == []


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_models_own_loss(name: str) -> None:
    model = tiny_model(name).train()
    weights = _weights(model)
    batch = tiny_batch(1, padding=3, ignored=2)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    streamed = run_unit_major_step(StreamedModel(model), weights, [batch], chunk_rows=CHUNK_ROWS)
    assert abs(streamed.losses[0] - loss.detach()) <= 1e-6 * abs(loss.detach())
    largest = max(gradient.norm() for gradient in expected.values())
    for tensor, gradient in expected.items():
        # A key's bias changes no attention: its gradient is rounding, which differs with the CPU, and is measured against the largest one.
        is_rounding = gradient.norm() <= 1e-6 * largest
        allowed = torch.finfo(torch.float32).eps * largest if is_rounding else 1e-5 * gradient.norm()
        assert (streamed.gradients[tensor] - gradient).norm() <= allowed, tensor


@pytest.mark.parametrize("name", ["gpt2", "phi", "mixtral"])
def test_dropout_seeded_per_unit_is_the_same_in_forward_recompute_and_plain_loop(name: str) -> None:
    rates = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "phi": ("resid_pdrop", "embd_pdrop", "attention_dropout")}
    changes = dict.fromkeys(rates.get(name, ("attention_dropout",)), 0.2)
    model = tiny_model(name, **changes).train()
    weights = _weights(model)

    def seed(unit: str, micro_batch: int) -> None:
        torch.manual_seed(sum(unit.encode()) * 31 + micro_batch)

    plain = run_plain_step(model, _batches(), chunk_rows=CHUNK_ROWS, seed_unit=seed)
    without = run_plain_step(model.eval(), _batches(), chunk_rows=CHUNK_ROWS)
    streamed = run_unit_major_step(StreamedModel(model.train()), weights, _batches(), chunk_rows=CHUNK_ROWS, seed_unit=seed)
    assert not torch.equal(plain.losses[0], without.losses[0])
    assert [name for name in weights if not torch.equal(streamed.gradients[name], plain.gradients[name])] == []


def test_gradients_of_side_inputs_reach_the_embedding_bitwise() -> None:
    """The fake model gives each block a column of a second embedding (as Gemma 3n does)."""
    model = fake_model("side input").train()
    weights = _weights(model)
    batches = [{name: tensor % 32 for name, tensor in tiny_batch(seed).items()} for seed in (1, 2)]
    plain = run_plain_step(model, batches, chunk_rows=CHUNK_ROWS)
    streamed_model = StreamedModel(model)
    streamed = run_unit_major_step(streamed_model, weights, batches, chunk_rows=CHUNK_ROWS)
    assert set(streamed_model.unit_parameters["embedding"]) == {"model.embed_tokens.weight", "model.side.weight"}
    assert streamed_model.unused_parameters == ("model.mix",)
    assert plain.gradients["model.side.weight"].abs().sum() > 0
    for tensor, gradient in plain.gradients.items():
        assert torch.equal(streamed.gradients[tensor], gradient), tensor


def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    frozen = ("model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight")
    model = tiny_model("llama").train()
    weights = _weights(model)
    plain = run_plain_step(model, _batches(), chunk_rows=CHUNK_ROWS)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    streamed_model = StreamedModel(model)
    streamed = run_unit_major_step(streamed_model, weights, _batches(), chunk_rows=CHUNK_ROWS)
    assert set(weights) - set(streamed.gradients) == set(frozen)
    assert not any(streamed_model.parameters[name].trainable for name in frozen)
    for name, gradient in streamed.gradients.items():
        assert torch.equal(gradient, plain.gradients[name]), name


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "mixtral", "opt"])
def test_evaluation_gives_the_training_loss_without_gradients(name: str) -> None:
    model = tiny_model(name).eval()
    weights = _weights(model)
    plain = run_plain_step(model, [tiny_batch(1, padding=3)], chunk_rows=CHUNK_ROWS)
    streamed = StreamedModel(model)
    batch = tiny_batch(1, padding=3)
    tail = {name: weights[name] for name in streamed.unit_parameters["tail"]}
    with torch.no_grad():
        with streamed.bound("embedding", {name: weights[name] for name in streamed.unit_parameters["embedding"]}):
            embedded = streamed.embed(batch)
        hidden, side_outputs = embedded.hidden, {}
        for unit in streamed.block_names:
            with streamed.bound(unit, {name: weights[name] for name in streamed.unit_parameters[unit]}):
                output = streamed.run_block(unit, hidden, embedded.arguments)
                hidden, side_outputs[unit] = output.hidden, output.side_outputs
        with streamed.bound("tail", tail):
            result = streamed.run_tail(
                batch, hidden, side_outputs=side_outputs, parameters=tail, num_targets=19, chunk_rows=CHUNK_ROWS, accumulate=None
            )
    assert result.num_targets == 19
    assert result.hidden_gradient is None
    assert torch.equal(result.loss, plain.losses[0])


def test_logits_at_positions_are_rows_of_all_logits() -> None:
    model = tiny_model("cohere2").eval()
    weights = _weights(model)
    streamed = StreamedModel(model)
    batch = tiny_batch(1)
    positions = torch.tensor([3, 11])
    some = _streamed_logits(streamed, weights, batch, positions)
    all_BTV = _streamed_logits(streamed, weights, batch)
    assert torch.allclose(some, all_BTV[torch.arange(2), positions], rtol=1e-5, atol=1e-5)


def test_chunks_of_rows_bound_the_logits() -> None:
    """No call of the head sees more rows than `chunk_rows`, and positions without a target none at all."""
    model = tiny_model("llama").train()
    weights = _weights(model)
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    streamed = StreamedModel(model)
    rows.clear()
    run_unit_major_step(streamed, weights, [tiny_batch(1, padding=3)], chunk_rows=8)
    assert rows == [8, 8, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_unit_major_step_equals_the_plain_loop_on_the_device(name: str, dtype: torch.dtype) -> None:
    """Same kernels on the same shapes; only atomics (an embedding's backward) may add in another order."""
    model = tiny_model(name, dtype=dtype).cuda().train()
    weights = _weights(model)
    batches = [{key: value if key == "labels" else value.cuda() for key, value in batch.items()} for batch in _batches()]
    plain = run_plain_step(model, batches, chunk_rows=CHUNK_ROWS)
    streamed_model = StreamedModel(build_meta_model(tiny_config(name), dtype=dtype)).train()
    streamed_model.to("cuda")
    streamed = run_unit_major_step(streamed_model, weights, batches, chunk_rows=CHUNK_ROWS)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for tensor, gradient in plain.gradients.items():
        difference = (streamed.gradients[tensor] - gradient).float().norm()
        assert difference <= tolerance * gradient.float().norm().clamp_min(1e-6), f"{tensor}: {difference}"
