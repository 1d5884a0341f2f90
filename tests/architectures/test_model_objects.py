"""What is given is looked at first, and what is the user's stays: refusals of objects, the configuration, buffers of a live model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from plain_loop import run_plain_step
from tiny_models import tiny_batch, tiny_config, tiny_model
from torch import nn
from unit_major import run_unit_major_step

from overspill.errors import UnsupportedModelError
from overspill.huggingface import StreamedModel, build_meta_model, swap_parameters_for_meta, validate_model_object

_SIZES = dict(vocab_size=96, num_layers=2, attention_heads=4, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
XGLM = transformers.XGLMConfig(**_SIZES, d_model=32, ffn_dim=48, max_position_embeddings=64, layerdrop=0.0)
MINIMAX = transformers.MiniMaxConfig(
    **_SIZES,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    layer_types=["linear_attention", "full_attention"],
    block_size=4,
)


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model


@pytest.mark.parametrize("wrong", [Wrapper(tiny_model("llama")), nn.Linear(2, 2), 3, None])
def test_what_is_no_model_of_transformers_is_refused_with_what_is_supported(wrong: object) -> None:
    for take in (validate_model_object, StreamedModel):
        with pytest.raises(
            UnsupportedModelError, match=rf"{type(wrong).__name__} .* is no model of transformers; give a .*, a model folder"
        ):
            take(wrong)
    if isinstance(wrong, nn.Module):
        with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
            validate_model_object(wrong)


def test_a_model_that_was_taken_is_refused_as_that() -> None:
    model = tiny_model("llama")
    validate_model_object(model)
    StreamedModel(model)
    for take in (validate_model_object, StreamedModel):
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot be streamed: .* already taken by a session.*load it"):
            take(model)


def test_a_model_without_values_is_refused_where_values_are_needed() -> None:
    model = tiny_model("llama")
    swap_parameters_for_meta(model)
    count = len(list(model.parameters()))
    with pytest.raises(UnsupportedModelError, match=f"{count} of its {count} parameters have no values"):
        validate_model_object(model)
    assert StreamedModel(model).block_names  # a structure is enough here


def test_buffers_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny_config("llama"))
    with pytest.raises(UnsupportedModelError, match="its buffer model.rotary_emb.inv_freq has no values"):
        StreamedModel(model)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("_hf_peft_config_loaded", True, "adapters are attached"), ("is_quantized", True, "its weights are quantized")],
)
def test_adapters_and_quantized_weights_are_refused(attribute: str, value: object, message: str) -> None:
    model = tiny_model("llama")
    setattr(model, attribute, value)
    with pytest.raises(UnsupportedModelError, match=message):
        validate_model_object(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt"])
def test_streaming_leaves_the_configuration_alone_and_it_is_saved_as_transformers_would(name: str, tmp_path: Path) -> None:
    config = tiny_config(name, attn_implementation="eager")
    config.use_cache = config.output_attentions = config.output_hidden_states = True
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    before = model.config.to_dict()
    streamed = StreamedModel(model)
    assert model.config.to_dict() == before
    streamed.saved_config.save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "ours"))
    assert ours == theirs
    assert (ours["use_cache"], ours["output_hidden_states"]) == (True, True)


def test_building_without_weights_leaves_use_cache_alone(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**tiny_config("llama").to_dict(), "use_cache": True, "architectures": None})
    streamed = StreamedModel(build_meta_model(config, dtype=torch.bfloat16))
    assert config.use_cache is True
    saved = streamed.saved_config
    assert (saved.use_cache, saved.dtype, saved.architectures) == (True, torch.bfloat16, ["LlamaForCausalLM"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba2", "bloom", "falcon", "opt"])
def test_caches_and_recordings_switched_on_in_the_configuration_change_no_number(name: str) -> None:
    batches = [tiny_batch(1, padding=3), tiny_batch(2)]
    model = tiny_model(name, attn_implementation="eager").train()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain = run_plain_step(model, batches, chunk_rows=7)
    model.config.use_cache = model.config.output_attentions = model.config.output_hidden_states = True
    streamed = run_unit_major_step(StreamedModel(model), weights, batches, chunk_rows=7)
    assert [key for key in weights if not torch.equal(streamed.gradients[key], plain.gradients[key])] == []


@pytest.mark.parametrize("config", [XGLM, MINIMAX], ids=["xglm", "minimax"])
def test_a_live_model_in_another_dtype_has_the_buffers_of_one_built_in_it(config: transformers.PreTrainedConfig) -> None:
    live = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    built = build_meta_model(copy.deepcopy(config), dtype=torch.bfloat16)
    swap_parameters_for_meta(live, dtype=torch.bfloat16)
    wanted = {name: buffer.dtype for name, buffer in built.named_buffers()}
    assert {name: buffer.dtype for name, buffer in live.named_buffers()} == wanted
    assert torch.bfloat16 in wanted.values()
    for name, buffer in built.named_buffers():
        assert torch.allclose(live.get_buffer(name).float(), buffer.float(), rtol=0.02, atol=0.02), name
    assert set(StreamedModel(live).hidden_dtypes.values()) == {torch.bfloat16}


def test_rotary_frequencies_of_a_live_model_stay_in_fp32() -> None:
    model = tiny_model("llama")
    before = model.model.rotary_emb.inv_freq
    swap_parameters_for_meta(model, dtype=torch.bfloat16)
    assert model.model.rotary_emb.inv_freq is before
    assert before.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_live_model_on_the_device_is_taken(name: str) -> None:
    model = tiny_model(name).cuda()
    streamed = StreamedModel(model)
    assert all(buffer.device.type == "cpu" for module in streamed._modules for buffer in module._buffers.values())
    assert streamed.to("cuda") == streamed.buffer_bytes
