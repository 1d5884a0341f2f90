"""What is learnt about a model without running it for real: units, kinds of blocks, buffers, dtypes."""

from __future__ import annotations

import resource

import pytest
import torch
import transformers
from tiny_models import NAMES, tiny_config, tiny_model

from overspill.huggingface import StreamedModel, build_meta_model
from overspill.huggingface.templates import build_kind, lazy_zeros


@pytest.mark.parametrize("name", NAMES)
def test_meta_model_has_real_buffers_meta_parameters_and_the_same_ties(name: str) -> None:
    real, meta = tiny_model(name), build_meta_model(tiny_config(name), dtype=torch.float32)
    buffers = dict(meta.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    for key, buffer in real.named_buffers():
        assert buffers[key].device.type == "cpu"
        assert buffers[key].dtype == buffer.dtype
        assert torch.equal(buffers[key], buffer), key
    assert all(parameter.device.type == "meta" for parameter in meta.parameters())
    shapes = {key: (p.shape, p.dtype) for key, p in real.named_parameters(remove_duplicate=True)}
    assert {key: (p.shape, p.dtype) for key, p in meta.named_parameters(remove_duplicate=True)} == shapes
    assert meta.config.use_cache is False


def test_meta_model_keeps_in_fp32_what_the_model_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["layers.*.input_layernorm"])
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", ["model.norm"])
    for dtype, kept in ((torch.bfloat16, ("input_layernorm",)), (torch.float16, ("input_layernorm", "model.norm")), (torch.float32, ("",))):
        for name, parameter in build_meta_model(tiny_config("llama"), dtype=dtype).named_parameters():
            assert parameter.dtype == (torch.float32 if any(part in name for part in kept) else dtype), name


KINDS = {
    "llama": [0, 0, 0],
    "smollm3": [0, 1, 0, 1],
    "cohere2": [0, 1, 0, 1],
    "gemma2": [0, 1, 0, 1],
    "gemma3": [0, 1, 0, 1],
    "qwen2": [0, 1, 0, 1],
    "gpt_oss": [0, 1, 0, 1],
    "qwen3_moe": [0, 1, 0, 1],
    "mixtral": [0, 0, 0],
    "gpt2": [0, 0, 0],
    "mamba2": [0, 0, 0],
}


@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_one_kind_are_equal_in_more_than_shape(name: str) -> None:
    streamed = StreamedModel(build_meta_model(tiny_config(name), dtype=torch.bfloat16))
    assert [streamed.kinds[unit] for unit in streamed.block_names] == [streamed.block_names[index] for index in KINDS[name]]


def test_any_attribute_of_any_submodule_separates_kinds() -> None:
    first, second = tiny_model("llama").model.layers[:2]
    assert build_kind(first) == build_kind(second)
    changes = [
        (second.self_attn, "scaling", 0.5),
        (second.self_attn, "is_causal", False),
        (second.input_layernorm, "variance_epsilon", 1e-3),
        (second.mlp, "act_fn", torch.nn.SiLU(inplace=True)),
        (second.self_attn, "config", tiny_config("llama")),
        (second, "note", {"nested": [1, (2.0, "three")]}),
        (second, "function", torch.relu),
    ]
    for module, name, value in changes:
        missing = object()
        before = getattr(module, name, missing)
        setattr(module, name, value)
        assert build_kind(first) != build_kind(second), name
        delattr(module, name) if before is missing else setattr(module, name, before)
        assert build_kind(first) == build_kind(second), name


def test_units_cover_every_parameter_and_a_tied_one_belongs_to_both_ends() -> None:
    streamed = StreamedModel(build_meta_model(tiny_config("llama_tied"), dtype=torch.bfloat16))
    assert streamed.unit_names == ("embedding", "model.layers.0", "model.layers.1", "model.layers.2", "tail")
    assert streamed.unit_parameters["embedding"] == ("model.embed_tokens.weight",)
    assert streamed.unit_parameters["tail"] == ("model.embed_tokens.weight", "model.norm.weight")
    assert set(streamed.parameters) == {name for names in streamed.unit_parameters.values() for name in names}
    specs = streamed.parameters
    assert (specs["model.norm.weight"].dtype, specs["model.norm.weight"].decay) == ("bfloat16", False)
    assert specs["model.layers.0.mlp.up_proj.weight"].decay and specs["model.embed_tokens.weight"].decay
    gpt_oss = StreamedModel(build_meta_model(tiny_config("gpt_oss"), dtype=torch.bfloat16)).parameters
    assert not gpt_oss["model.layers.0.mlp.experts.down_proj_bias"].decay  # two dimensions, a bias all the same
    assert gpt_oss["model.layers.0.mlp.experts.down_proj"].decay


def test_the_embedding_is_what_is_read_before_the_blocks_wherever_it_is_registered() -> None:
    opt = StreamedModel(build_meta_model(tiny_config("opt"), dtype=torch.float32))
    base = "model.decoder"
    assert set(opt.unit_parameters["embedding"]) == {
        f"{base}.embed_tokens.weight",
        f"{base}.embed_positions.weight",
        f"{base}.project_in.weight",
    }
    assert set(opt.unit_parameters["tail"]) == {
        f"{base}.embed_tokens.weight",
        f"{base}.final_layer_norm.weight",
        f"{base}.final_layer_norm.bias",
        f"{base}.project_out.weight",
    }


def test_hidden_dtypes_are_those_that_blocks_return() -> None:
    mamba = StreamedModel(build_meta_model(tiny_config("mamba2"), dtype=torch.bfloat16))
    assert mamba.hidden_dtypes["embedding"] == torch.bfloat16
    assert {mamba.hidden_dtypes[unit] for unit in mamba.block_names} == {torch.float32}
    llama = StreamedModel(build_meta_model(tiny_config("llama"), dtype=torch.bfloat16))
    assert set(llama.hidden_dtypes.values()) == {torch.bfloat16}


def test_equal_buffers_of_blocks_are_moved_once() -> None:
    sizes = dict(hidden_size=16, num_layers=4, num_heads=2, vocab_size=32, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    config = transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 2]], window_size=4)
    model = build_meta_model(config, dtype=torch.float32)
    streamed = StreamedModel(model)
    # Four blocks hold two different boolean masks of 64 x 64.
    assert streamed.buffer_bytes == 2 * 64 * 64
    assert streamed.to("cpu") == streamed.buffer_bytes


def test_train_and_eval_reach_the_blocks_and_inspection_leaves_the_mode_alone() -> None:
    model = tiny_model("llama")
    blocks = list(model.model.layers)
    modes = [module.training for block in blocks for module in block.modules()]
    streamed = StreamedModel(model)
    assert [module.training for block in blocks for module in block.modules()] == modes
    for mode in (True, False):
        streamed.train(mode)
        assert all(module.training is mode for block in blocks for module in block.modules())
        assert model.training is mode


def test_persistent_buffers_can_be_loaded() -> None:
    class WithBuffer(transformers.LlamaForCausalLM):
        def __init__(self, config: transformers.LlamaConfig) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.register_buffer("correction", torch.zeros(3))

    streamed = StreamedModel(WithBuffer(tiny_config("llama")))
    assert list(streamed.persistent_buffers) == [f"model.layers.{index}.correction" for index in range(3)]
    streamed.load_buffers({"model.layers.1.correction": torch.arange(3.0)})
    values = [streamed._blocks[unit].correction.tolist() for unit in streamed.block_names]
    assert values == [[0, 0, 0], [0, 1, 2], [0, 0, 0]]
    with pytest.raises(ValueError, match="is no persistent buffer"):
        streamed.load_buffers({"correction": torch.zeros(3)})


def test_reading_lazy_zeros_takes_no_memory() -> None:
    num_bytes = 256 * 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    zeros = lazy_zeros(torch.empty(num_bytes // 2048, 1024, dtype=torch.bfloat16, device="meta"))
    assert zeros[::1000].float().abs().sum() == 0
    assert not (zeros.view(torch.int16) != 0).any(dim=1)[:1000].any()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < num_bytes, f"{grown} B resident for {num_bytes} B of zeros"
