"""What streaming could not reproduce exactly is refused when the model is taken apart, by name and with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from fake_models import fake_model
from tiny_models import tiny_batch, tiny_model

from overspill.errors import UnsupportedModelError
from overspill.huggingface import StreamedModel

REFUSED = {
    "computes between": r"computes between its blocks \(aten.mul.Tensor on the hidden states of block 0\)",
    "computes in place between": r"computes between its blocks \(aten.mul_.Tensor on the hidden states of block 0\)",
    "reads a parameter between": r"computes between its blocks \(aten.mul.Tensor on the parameter model.mix\)",
    "hidden states twice": "what model.layers.0 returns reaches 2 arguments of model.layers.1",
    "reads an inner block": "reads the output of block 0 after its last block",
    "adds the embedding": "its tail reads what was computed from model.embed_tokens.weight before the blocks",
    "side input of the tail": "its tail reads what was computed from model.side.weight before the blocks",
    "skips a block": "it called model.layers.2 where model.layers.1 was due",
    "list": "model.layers.0 gets extra, a list,",
    "dictionary": "model.layers.0 gets extra, a dict,",
    "object": "model.layers.0 gets extra, a object,",
    "cache": r"model.layers.0 gets a cache \(DynamicCache\) as extra",
    "shared parameter": "model.layers.2.linear.weight is shared by model.layers.0 and model.layers.2",
    "shared block": "is shared by model.layers.0 and model.layers.2",
    "two lists": r"exactly one list of blocks, found model.layers \(3 modules\), model.encoder_layers \(2 modules\)",
    "block writes to a buffer": "model.layers.0 writes to count",
    "block writes to its input": "model.layers.0 writes to the hidden states",
    "block writes to an argument": "model.layers.0 writes to argument",
    "block changes the shape": r"gets hidden states of shape \(1, 8, 16\) and returns hidden states of shape \(1, 7, 16\)",
    "reads the second output": "UnreadOutput",
    "sets an attribute": "it sets .seen on model.layers.0 while it runs",
    "layerdrop": "layerdrop=0.1 skips blocks at random",
}


@pytest.mark.parametrize("behaviour", REFUSED)
def test_a_model_is_refused_with_the_reason(behaviour: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[behaviour]) as caught:
        StreamedModel(fake_model(behaviour))
    assert "FakeForCausalLM cannot be streamed" in str(caught.value)


@pytest.mark.parametrize("behaviour", ["plain", "second output", "side input"])
def test_the_same_model_without_that_is_not_refused(behaviour: str) -> None:
    assert StreamedModel(fake_model(behaviour)).unit_names == ("embedding", *(f"model.layers.{i}" for i in range(3)), "tail")


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=32)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration cannot be streamed: it has an encoder and a decoder"):
        StreamedModel(transformers.T5ForConditionalGeneration(config))


def test_a_multi_modal_model_is_refused_with_the_names_of_its_lists() -> None:
    text = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    )
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    with pytest.raises(
        UnsupportedModelError, match=r"Gemma3ForConditionalGeneration .* found .*vision.*language_model.layers \(2 modules\)"
    ):
        StreamedModel(transformers.Gemma3ForConditionalGeneration(config))


def test_a_model_whose_blocks_are_streamed_does_not_run_as_a_whole() -> None:
    model = tiny_model("llama")
    StreamedModel(model)
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(**tiny_batch(1))


def test_bound_wants_exactly_the_units_tensors() -> None:
    model = tiny_model("llama")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    streamed = StreamedModel(model)
    unit = streamed.block_names[0]
    right = {name: weights[name] for name in streamed.unit_parameters[unit]}
    missing = dict(list(right.items())[1:])
    name = next(iter(right))
    for tensors, message in (
        (missing, f"missing \\['{name}'\\]"),
        (right | {"x": torch.zeros(1)}, "unknown \\['x'\\]"),
        (right | {name: torch.zeros(3)}, f"{name} is torch.float32 of shape"),
        (right | {name: right[name].half()}, f"{name} is torch.float32 of shape .* got torch.float16"),
    ):
        with pytest.raises(ValueError, match=message), streamed.bound(unit, tensors):
            pass


def test_outside_bound_every_parameter_is_a_placeholder_also_after_an_exception() -> None:
    model = tiny_model("llama")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    streamed = StreamedModel(model)
    for unit in streamed.unit_names:
        with pytest.raises(ZeroDivisionError), streamed.bound(unit, {name: weights[name] for name in streamed.unit_parameters[unit]}):
            raise ZeroDivisionError
    for slots in (streamed._outer_slots, *streamed._block_slots.values()):
        for places in slots.places.values():
            assert all(module._parameters[attribute].device.type == "meta" for module, attribute in places)
    with pytest.raises(RuntimeError, match='inside `with bound\\("embedding"'):
        streamed.embed(tiny_batch(1))


def test_a_router_loss_without_router_logits_is_refused() -> None:
    model = fake_model()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    with pytest.raises(UnsupportedModelError, match="none of its blocks has router logits"):
        StreamedModel(model)


def test_embedding_and_tail_are_not_bound_at_once() -> None:
    model = tiny_model("llama_tied")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    streamed = StreamedModel(model)
    embedding, tail = ({name: weights[name] for name in streamed.unit_parameters[unit]} for unit in ("embedding", "tail"))
    with streamed.bound("embedding", embedding), pytest.raises(AssertionError, match="cannot be bound"), streamed.bound("tail", tail):
        pass


@pytest.mark.parametrize("how", ["written", "replaced", "added"])
def test_a_block_that_changes_its_buffers_later_is_refused(how: str) -> None:
    model = fake_model("plain")
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    streamed = StreamedModel(model)
    unit = streamed.block_names[1]
    block = streamed.block(unit)
    tensors = {name: values[name] for name in streamed.unit_parameters[unit]}
    with streamed.bound(unit, tensors):
        assert [id(buffer) for buffer in streamed.block_buffers(unit)] == [id(block.count)]
    with pytest.raises(UnsupportedModelError, match=f"{unit} writes to a buffer"), streamed.bound(unit, tensors):
        if how == "written":
            block.count.add_(1)
        elif how == "replaced":
            block.count = torch.zeros(())
        else:
            block.linear.register_buffer("other", torch.zeros(()))
