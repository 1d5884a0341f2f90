"""Recorded arguments: equal tensors are held once, and how long a sequence the prefix can take."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import tiny_batch, tiny_config, tiny_model

from overspill.errors import UnsupportedModelError
from overspill.huggingface import HostReads, StreamedModel, build_meta_model, share_equal_tensors
from overspill.huggingface.stand_ins import BlockArguments, CallRecorder


def _arguments(*tensors: torch.Tensor) -> BlockArguments:
    return BlockArguments(tensors=tensors, side_inputs=(), calls={})


def test_micro_batches_of_one_shape_share_masks_and_tables() -> None:
    model = tiny_model("llama")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    streamed = StreamedModel(model)
    known: list[BlockArguments] = []
    with torch.no_grad(), streamed.bound("embedding", {name: weights[name] for name in streamed.unit_parameters["embedding"]}):
        for seed, padding, num_tokens in ((1, 3, 12), (2, 3, 12), (3, 5, 12), (4, 0, 9)):
            known.append(share_equal_tensors(streamed.embed(tiny_batch(seed, padding=padding, num_tokens=num_tokens)).arguments, known))
    first, second, other_mask, other_shape = known
    assert all(any(a is b for b in first.tensors) for a in second.tensors)
    shared = [any(a is b for b in first.tensors) for a in other_mask.tensors]
    assert True in shared and False in shared, "the rotary tables are shared, the mask is not"
    assert not any(a is b for a in other_shape.tensors for b in first.tensors)
    assert first.num_bytes == second.num_bytes


def test_only_tensors_equal_to_the_last_bit_are_shared() -> None:
    values = torch.tensor([[0.0, 1.0], [float("nan"), 2.0]])
    known = _arguments(values)
    for same in (values, values.clone(), values.clone().as_subclass(torch.Tensor)):
        assert share_equal_tensors(_arguments(same), [known]).tensors[0] is values
    different = [
        torch.tensor([[-0.0, 1.0], [float("nan"), 2.0]]),  # -0.0 == 0.0
        values.double(),
        values.flatten(),
        values.t().contiguous().t(),  # equal, but other strides: a kernel may choose another way
        values + 1,
    ]
    for tensor in different:
        assert share_equal_tensors(_arguments(tensor), [known]).tensors[0] is tensor
    for dtype in (torch.bool, torch.bfloat16, torch.int64, torch.complex64):
        tensor = torch.ones(3).to(dtype)
        assert share_equal_tensors(_arguments(tensor.clone(), tensor.clone()), [_arguments(tensor)]).tensors == (tensor, tensor)


def test_equal_tensors_of_one_micro_batch_are_held_once() -> None:
    one, two = torch.ones(4), torch.ones(4)
    shared = share_equal_tensors(_arguments(one, two), [])
    assert shared.tensors[0] is shared.tensors[1] is one
    assert (shared.num_bytes, _arguments(one, two).num_bytes) == (16, 32)


class Subclass(torch.Tensor):
    """Operations keep it."""


def test_arguments_of_a_subclass_of_tensor_stay_of_it() -> None:
    model = tiny_model("llama")
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: tuple(table.as_subclass(Subclass) for table in output))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    streamed = StreamedModel(model)
    with torch.no_grad(), streamed.bound("embedding", {name: weights[name] for name in streamed.unit_parameters["embedding"]}):
        arguments = streamed.embed(tiny_batch(1), reading=HostReads().noted()).arguments
    assert sum(isinstance(tensor, Subclass) for tensor in arguments.tensors) == 2


@pytest.mark.parametrize("change", ["data", "transposed"])
def test_an_argument_that_becomes_another_tensor_between_blocks_is_recorded_as_both(change: str) -> None:
    """One object all the while."""
    model = tiny_model("llama")
    streamed = StreamedModel(model)
    first, second, _ = streamed.block_names
    recorder = CallRecorder(model.model.layers[0]._stack)
    mask, hidden = torch.arange(16.0).view(4, 4), torch.zeros(1, 4, 32)
    recorder.record(0, (hidden,), {"attention_mask": mask})
    before = mask.clone()
    if change == "data":
        mask.data = torch.ones(4, 4)
    else:
        mask.t_()
    recorder.returned(hidden)
    recorder.record(1, (hidden,), {"attention_mask": mask})
    arguments = recorder.block_arguments()
    assert torch.equal(arguments.rebuilt(first, hidden)[1]["attention_mask"], before)
    assert torch.equal(arguments.rebuilt(second, hidden)[1]["attention_mask"], mask)


MAX_POSITIONS = {"gpt2": 32, "opt": 64, "llama": None, "bloom": None, "falcon_alibi": None, "mamba2": None, "gemma3": None}


@pytest.mark.parametrize("name", MAX_POSITIONS)
def test_tables_of_positions_bound_the_sequence(name: str) -> None:
    assert StreamedModel(build_meta_model(tiny_config(name), dtype=torch.bfloat16)).max_positions == MAX_POSITIONS[name]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_longest_sequence_runs_and_one_token_more_does_not(name: str) -> None:
    model = tiny_model(name).eval()
    longest = StreamedModel(build_meta_model(tiny_config(name), dtype=torch.float32)).max_positions
    assert longest is not None
    with torch.no_grad():
        model(input_ids=tiny_batch(1, num_tokens=longest)["input_ids"])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tiny_batch(1, num_tokens=longest + 1)["input_ids"])


def test_a_fixed_table_of_sinusoids_bounds_the_sequence_too() -> None:
    config = transformers.CTRLConfig(vocab_size=96, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=40)
    assert StreamedModel(build_meta_model(config, dtype=torch.float32)).max_positions == 40


def test_a_decoder_with_several_streams_is_refused() -> None:
    sizes = dict(vocab_size=96, hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
    config = transformers.ProphetNetConfig(
        **sizes, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4
    )
    with pytest.raises(UnsupportedModelError, match=r"ProphetNetForCausalLM cannot be streamed: .*hidden states of shape \(1, 24, 32\)"):
        StreamedModel(transformers.ProphetNetForCausalLM(config))
