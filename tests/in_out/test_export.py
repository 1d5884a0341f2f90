"""Claims about `huggingface.export`: what it writes is the model, and a failure leaves what was there."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from loaded_python import run_loaded
from safetensors import safe_open
from safetensors.torch import load_file

from overspill.errors import ModelFolderError, StorageError
from overspill.huggingface import export
from overspill.huggingface.export import OutgoingTensor, write_model_folder
from overspill.huggingface.weights import expected_tensors, open_checkpoint

BuildLlama = Callable[..., transformers.LlamaForCausalLM]


def outgoing(model: torch.nn.Module) -> list[OutgoingTensor]:
    return [
        (name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor.detach()) for name, tensor in expected_tensors(model).items()
    ]


def save(model: transformers.PreTrainedModel, folder: Path, **options: object) -> Path:
    return write_model_folder(folder, config=model.config, generation_config=model.generation_config, tensors=outgoing(model), **options)


def assert_same_weights(folder: Path, model: transformers.PreTrainedModel) -> None:
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [1 << 32, 20_000])
def test_what_is_written_loads_bitwise(
    tmp_path: Path, build_llama: BuildLlama, dtype: torch.dtype, tied: bool, max_shard_bytes: int
) -> None:
    model = build_llama(tie_word_embeddings=tied).to(dtype)
    save(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    assert_same_weights(tmp_path / "model", model)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert ((tmp_path / "model" / "model.safetensors.index.json").exists()) == (max_shard_bytes == 20_000)


def test_what_is_written_reads_back_here(tmp_path: Path, build_llama: BuildLlama) -> None:
    model = build_llama()
    save(model, tmp_path / "model", max_shard_bytes=20_000)
    checkpoint = open_checkpoint(tmp_path / "model")
    got = dict(checkpoint.read(expected_tensors(model), model=model))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected_tensors(model).items())


def test_a_tied_tensor_is_written_once(tmp_path: Path, build_llama: BuildLlama) -> None:
    save(build_llama(tie_word_embeddings=True), tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_merged_experts_load_bitwise(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=3,
    )
    model = transformers.MixtralForCausalLM(config)
    save(model, tmp_path / "model")
    assert_same_weights(tmp_path / "model", model)


def test_tensors_are_aligned_to_their_element_when_dtypes_mix(tmp_path: Path, build_llama: BuildLlama) -> None:
    tensors = [("odd", torch.ones(3, dtype=torch.uint8)), ("half", torch.ones(3, dtype=torch.bfloat16)), ("full", torch.ones(3))]
    write_model_folder(
        tmp_path / "model",
        config=build_llama().config,
        tensors=[(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors],
    )
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors)
    stored = open_checkpoint(tmp_path / "model").tensors
    assert all(entry.offset % (entry.num_bytes // 3) == 0 for entry in stored.values())


def test_tokenizer_files_travel_along(tmp_path: Path, build_llama: BuildLlama) -> None:
    source = tmp_path / "source"
    (source / "chat_templates").mkdir(parents=True)
    files = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "chat_templates/other.jinja": "x"}
    for name, text in files.items():
        (source / name).write_text(text)
    (source / "private.txt").write_text("not a tokenizer file")
    save(build_llama(), tmp_path / "model", tokenizer_source=source)
    assert {name: (tmp_path / "model" / name).read_text() for name in files} == files
    assert not (tmp_path / "model" / "private.txt").exists()


def test_only_one_tensor_is_held(tmp_path: Path, build_llama: BuildLlama) -> None:
    alive: list[int] = []
    most = 0

    def read(shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(shape)
        alive.append(1)
        weakref.finalize(tensor, alive.pop)
        most = max(most, len(alive))
        return tensor

    model = build_llama()
    tensors = [(name, tuple(t.shape), t.dtype, lambda t=t: read(tuple(t.shape))) for name, t in expected_tensors(model).items()]
    write_model_folder(tmp_path / "model", config=model.config, tensors=tensors)
    assert most == 1


def test_an_existing_model_is_replaced_as_a_whole(tmp_path: Path, build_llama: BuildLlama) -> None:
    save(build_llama(), tmp_path / "model", max_shard_bytes=20_000)
    model = build_llama(num_hidden_layers=1)
    save(model, tmp_path / "model")
    assert_same_weights(tmp_path / "model", model)
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_foreign_files_is_not_replaced(tmp_path: Path, build_llama: BuildLlama) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelFolderError, match=r"holds more than a model \(thesis\.tex\) and is not replaced"):
        save(build_llama(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def assert_old_model_is_whole(tmp_path: Path, model: transformers.PreTrainedModel) -> None:
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same_weights(tmp_path / "model", model)


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, build_llama: BuildLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build_llama(num_hidden_layers=1)
    save(old, tmp_path / "model")
    write, written = os.write, 0

    def write_until_full(descriptor: int, data: memoryview) -> int:
        nonlocal written
        if written > 30_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += len(data)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", write_until_full)
    with pytest.raises(StorageError, match=r"short write of .*No space left.*already in .*model was not touched"):
        save(build_llama(), tmp_path / "model")
    monkeypatch.undo()
    assert_old_model_is_whole(tmp_path, old)


def test_too_little_room_is_found_before_writing(tmp_path: Path, build_llama: BuildLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(1 << 40, 1 << 40, 1 << 10))
    with pytest.raises(StorageError, match=r"needs \d+\.\d+ KiB beside .* but 1.00 KiB are free.*nothing old was touched"):
        save(build_llama(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_byte_flipped_on_the_drive_is_found(tmp_path: Path, build_llama: BuildLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build_llama(num_hidden_layers=1)
    save(old, tmp_path / "model")
    write_metadata = export._write_metadata

    def flip_then_write_metadata(folder: Path, *args: object) -> None:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        write_metadata(folder, *args)

    monkeypatch.setattr(export, "_write_metadata", flip_then_write_metadata)
    with pytest.raises(StorageError, match="differs from what was written.*not touched"):
        save(build_llama(), tmp_path / "model")
    assert_old_model_is_whole(tmp_path, old)


def test_a_failed_rename_gives_the_old_model_its_name_back(
    tmp_path: Path, build_llama: BuildLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build_llama(num_hidden_layers=1)
    save(old, tmp_path / "model")
    rename = Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(StorageError, match="errno 5"):
        save(build_llama(), tmp_path / "model")
    monkeypatch.undo()
    assert_old_model_is_whole(tmp_path, old)


def test_a_kill_in_mid_write_leaves_the_old_model(tmp_path: Path, build_llama: BuildLlama) -> None:
    old = build_llama(num_hidden_layers=1)
    save(old, tmp_path / "model")
    code = (
        "import os, signal, sys, torch, transformers\n"
        "from overspill.huggingface.export import write_model_folder\n"
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1])\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tensors = [('a', (4,), torch.float32, lambda: torch.ones(4)), ('b', (4,), torch.float32, die)]\n"
        "write_model_folder(sys.argv[1], config=config, tensors=tensors)\n"
    )
    done = run_loaded("-c", code, tmp_path / "model")
    assert done.returncode == -9
    assert_same_weights(tmp_path / "model", old)
    assert len(list(tmp_path.iterdir())) == 2  # what the killed process had begun, which the next save removes
    save(old, tmp_path / "model")
    assert_old_model_is_whole(tmp_path, old)


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path, build_llama: BuildLlama) -> None:
    tensors = [("a", (4,), torch.float32, lambda: torch.ones(5))]
    with pytest.raises(ModelFolderError, match=r"a was announced as \(4,\) torch.float32 and came as \(5,\)"):
        write_model_folder(tmp_path / "model", config=build_llama().config, tensors=tensors)
    assert not list(tmp_path.iterdir())
