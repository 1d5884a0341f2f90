"""Claims about `huggingface.weights`: every layout of a folder gives the model's own tensors, and a wrong folder says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from loaded_python import run_loaded
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping, core_model_loading

from overspill.errors import ModelFolderError
from overspill.huggingface.weights import canonical_names, expected_tensors, open_checkpoint

BuildLlama = Callable[..., transformers.LlamaForCausalLM]


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder, allow_remote=False)
    skeleton = checkpoint.build_skeleton()
    return dict(checkpoint.read(expected_tensors(skeleton), model=skeleton))


def assert_reads(folder: Path, model: torch.nn.Module) -> None:
    """Every parameter and persistent buffer, once, under its canonical name, bit for bit."""
    got = read_all(folder)
    wanted = expected_tensors(model)
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_one_file_gives_every_tensor_bitwise(tmp_path: Path, build_llama: BuildLlama) -> None:
    model = build_llama()
    model.save_pretrained(tmp_path)
    assert_reads(tmp_path, model)


def test_shards_give_every_tensor_bitwise(tmp_path: Path, build_llama: BuildLlama) -> None:
    model = build_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_reads(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_on_file_is_kept(tmp_path: Path, build_llama: BuildLlama, dtype: torch.dtype) -> None:
    model = build_llama().to(dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read_all(tmp_path).values()} == {dtype}
    assert_reads(tmp_path, model)


def test_tensors_come_in_the_order_of_the_file(tmp_path: Path, build_llama: BuildLlama) -> None:
    build_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = open_checkpoint(tmp_path)
    offsets = [(checkpoint.tensors[name].path.name, checkpoint.tensors[name].offset) for name in read_all(tmp_path)]
    assert offsets == sorted(offsets)


def test_tied_tensor_is_read_once_under_its_canonical_name(tmp_path: Path, build_llama: BuildLlama) -> None:
    model = build_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert canonical_names(model)["lm_head.weight"] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_reads(tmp_path, model)


def test_tied_tensor_may_be_on_file_under_its_other_name_only(tmp_path: Path, build_llama: BuildLlama) -> None:
    model = build_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()})
    assert_reads(tmp_path, model)


def test_tied_tensor_may_be_on_file_twice_if_the_bytes_agree(tmp_path: Path, build_llama: BuildLlama) -> None:
    model = build_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert_reads(tmp_path, model)
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(ModelFolderError, match="tied by the config but differ on file.*tie_word_embeddings"):
        read_all(tmp_path)


def test_base_model_prefix_is_added(tmp_path: Path, build_llama: BuildLlama) -> None:
    model = build_llama(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_reads(tmp_path, model)


def test_per_expert_matrices_become_the_expert_tensors_of_mixtral(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # 12 experts: expert 10 comes before expert 2 in alphabetical order, and after it in the model.
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=12,
    )
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    names = open_checkpoint(tmp_path).tensors
    assert "model.layers.0.block_sparse_moe.experts.11.w1.weight" in names
    assert_reads(tmp_path, model)


def test_fused_projections_stay_one_tensor(tmp_path: Path) -> None:
    """Phi-3 stores query, key and value as one matrix and so has it in memory: no conversion is imagined."""
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, pad_token_id=0
        )
    )
    model.save_pretrained(tmp_path)
    assert_reads(tmp_path, model)


def test_one_stored_matrix_becomes_several_tensors(tmp_path: Path, build_llama: BuildLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter with several targets, as HRM-Text has for query, key and value; here given to a Llama."""
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    model = build_llama(num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(
        conversion_mapping,
        "get_model_conversion_mapping",
        lambda model: [core_model_loading.WeightConverter("self_attn.qkv_proj.weight", list(parts), [core_model_loading.Chunk(dim=0)])],
    )

    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for layer in range(2):
            prefix = f"model.layers.{layer}."
            tensors[prefix + "self_attn.qkv_proj.weight"] = torch.cat([tensors.pop(prefix + part) for part in parts])
        return tensors

    rewrite(tmp_path, fuse)
    assert_reads(tmp_path, model)


def test_keys_that_the_class_ignores_are_passed_over(llama_folder: Path, build_llama: BuildLlama) -> None:
    rewrite(llama_folder, lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_reads(llama_folder, build_llama())


def test_loading_peaks_at_two_tensors_and_not_at_the_model(tmp_path: Path) -> None:
    """Over 300 MB of weights: resident memory rises by at most the two largest tensors and 16 MB."""
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=6400, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=64
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    save_file({name: torch.zeros(tensor.shape) for name, tensor in expected_tensors(model).items()}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    code = (
        "import sys, json, torch\n"
        "from overspill.huggingface.weights import expected_tensors, open_checkpoint\n"
        "from overspill.report.memory import host_peak_bytes, host_resident_bytes\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "skeleton = checkpoint.build_skeleton()\n"
        "reader = checkpoint.read(expected_tensors(skeleton), model=skeleton)\n"
        "before = host_resident_bytes()\n"
        "peak = max((host_resident_bytes(), tensor.sum())[0] for _, tensor in reader)\n"
        "print(json.dumps([checkpoint.num_bytes, max(t.num_bytes for t in checkpoint.tensors.values()), peak - before]))\n"
    )
    done = run_loaded("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr
    total, largest, rise = json.loads(done.stdout.splitlines()[-1])
    assert total > 300e6
    assert rise <= 2 * largest + 16e6


def test_missing_and_left_over_tensors_are_named_and_counted(llama_folder: Path) -> None:
    rewrite(llama_folder, lambda tensors: {name.replace("o_proj", "out_proj"): tensor for name, tensor in tensors.items()})
    with pytest.raises(
        ModelFolderError, match=r"LlamaForCausalLM: 2 missing \(model\.layers\.0\.self_attn\.o_proj.*2 left over .*out_proj"
    ):
        read_all(llama_folder)


def test_a_long_list_of_names_is_cut(llama_folder: Path) -> None:
    rewrite(llama_folder, lambda tensors: {"lm_head.weight": tensors["lm_head.weight"]})
    with pytest.raises(ModelFolderError, match=r"20 missing \(.*, …\)"):
        read_all(llama_folder)


def test_a_parameter_not_asked_for_is_left_over(llama_folder: Path, build_llama: BuildLlama) -> None:
    model = build_llama()
    expected = expected_tensors(model)
    del expected["model.norm.weight"]
    with pytest.raises(ModelFolderError, match=r"1 left over \(model\.norm\.weight\)"):
        open_checkpoint(llama_folder).read(expected, model=model)


def test_shape_mismatch_names_both_shapes(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "vocab_size": 65}))
    with pytest.raises(ModelFolderError, match=r"has shape \(64, 32\) in .* expects \(65, 32\)"):
        read_all(llama_folder)


def test_an_expert_missing_from_the_file_is_refused(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=4,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "experts.3.w2" not in name})
    with pytest.raises(ModelFolderError, match=r"down_proj has shape \(3, 16, 24\).*expects \(4, 16, 24\)"):
        read_all(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such model folder"):
        open_checkpoint(tmp_path / "nothing")


def test_no_such_name_without_the_hub() -> None:
    with pytest.raises(ModelFolderError, match="no model folder some-one/no-model here, and none of that name in the hub's local cache"):
        open_checkpoint("some-one/no-model", allow_remote=False)


def test_a_hub_name_is_downloaded_without_pickles_or_code(
    llama_folder: Path, build_llama: BuildLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fake_download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        calls.append((name, allow_patterns, local_files_only))
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    assert open_checkpoint("some-one/llama").folder == llama_folder
    (call,) = calls
    assert call[0] == "some-one/llama" and not call[2]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in call[1])


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelFolderError, match="none of that name on the model hub: no route to the hub"):
        open_checkpoint("some-one/llama")


def test_a_folder_of_pickles_is_refused_with_the_cure(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").rename(llama_folder / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"only as pickle \(pytorch_model\.bin\).*save_pretrained.*writes safetensors"):
        open_checkpoint(llama_folder)


def test_a_folder_without_weights_is_refused(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").rename(llama_folder / "consolidated.safetensors")
    with pytest.raises(ModelFolderError, match=r"has no model\.safetensors and no .*found consolidated\.safetensors"):
        open_checkpoint(llama_folder)


def test_a_folder_without_config_is_refused(llama_folder: Path) -> None:
    (llama_folder / "config.json").rename(llama_folder / "adapter_config.json")
    with pytest.raises(ModelFolderError, match=r"no config\.json \(an adapter: name its base model instead\)"):
        open_checkpoint(llama_folder)


def test_an_unknown_architecture_is_refused(llama_folder: Path) -> None:
    (llama_folder / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelFolderError, match=r"config\.json.*no_such_model"):
        open_checkpoint(llama_folder)


def test_a_quantized_checkpoint_is_refused(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelFolderError, match="is quantized.*full-precision"):
        open_checkpoint(llama_folder)


def test_a_missing_shard_is_named(tmp_path: Path, build_llama: BuildLlama) -> None:
    build_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelFolderError, match=rf"lacks 1 of \d+ shards \({shard.name}\)"):
        open_checkpoint(tmp_path)


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path, build_llama: BuildLlama) -> None:
    build_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ModelFolderError, match="outside its folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [3, 20, -1], ids=["no length", "half a header", "one byte short"])
def test_a_truncated_file_is_found_before_reading(llama_folder: Path, keep: int) -> None:
    path = llama_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFolderError, match=r"is no complete safetensors file|is truncated: its header needs \d+ B, the file has \d+ B"):
        open_checkpoint(llama_folder)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "not json",
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"shape": [1]}}',
    ],
)
def test_a_damaged_header_is_refused(llama_folder: Path, header: str) -> None:
    (llama_folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(ModelFolderError, match="damaged"):
        open_checkpoint(llama_folder)
