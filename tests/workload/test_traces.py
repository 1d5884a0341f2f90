"""What is described without values is what happens with them."""

from __future__ import annotations

import functools

import pytest
import torch
from real_blocks import count_tail, measure_peaks, run_blocks
from tiny_models import NAMES, SEQUENCE, tiny_batch, tiny_config
from transformers import PreTrainedConfig

from overspill import describe_workload
from overspill.huggingface import StreamedModel, build_meta_model
from overspill.spec.workload import Alias, WorkloadSpec

SAMPLES = 2


DROPOUT = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)


def config_of(name: str) -> PreTrainedConfig:
    return tiny_config("gpt2", **DROPOUT) if name == "gpt2_dropout" else tiny_config(name)


@functools.cache
def described(name: str, dtype: str, device: str = "cpu", is_masked: bool = False) -> WorkloadSpec:
    return describe_workload(
        config_of(name), seq_len=SEQUENCE, micro_batch=SAMPLES, dtype=dtype, device=device, is_masked=is_masked, loss_chunk_rows=5
    )


CASES = [(name, "float32", False) for name in (*NAMES, "gpt2_dropout")] + [
    *((name, "bfloat16", False) for name in ("llama", "gpt2", "mixtral", "mamba2")),
    *((name, "float32", True) for name in ("llama", "gpt2")),
]


@pytest.mark.parametrize(("name", "dtype", "is_masked"), CASES)
def test_saved_bytes_and_flops_are_those_of_the_same_block_with_values(name: str, dtype: str, is_masked: bool) -> None:
    spec = described(name, dtype, is_masked=is_masked)
    assert spec.is_complete, [item.notes for item in spec.classes]
    streamed = StreamedModel(build_meta_model(config_of(name), dtype=getattr(torch, dtype))).train()
    batch = tiny_batch(0, num_sequences=SAMPLES, padding=1 if is_masked else 0)
    if is_masked:
        batch["attention_mask"][:, -1] = 0
    blocks = spec.classes[1:-1]
    real = run_blocks(streamed, tuple(item.name for item in blocks), {key: batch[key] for key in batch if key != "labels"})
    for item in blocks:
        assert item.forward is not None and item.recompute is not None and item.backward is not None
        kept = sorted(tensor.kept_bytes for tensor in item.saved if tensor.alias is Alias.OWN)
        assert tuple(kept) == real[item.name].saved_bytes
        assert item.saved_bytes == sum(real[item.name].saved_bytes)
        assert item.forward.work.flops == real[item.name].forward_flops
        assert item.recompute.work.flops == real[item.name].forward_flops
        assert item.backward.work.flops == real[item.name].backward_flops


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba2", "bloom"])
def test_peaks_are_those_of_torchs_allocator(name: str) -> None:
    spec = describe_workload(tiny_config(name), seq_len=32, micro_batch=4, dtype="float32", device="cpu")
    streamed = StreamedModel(build_meta_model(tiny_config(name), dtype=torch.float32)).train()
    block = spec.classes[1]
    assert block.forward is not None and block.backward is not None
    peaks = measure_peaks(streamed, block.name, {"input_ids": tiny_batch(0, num_sequences=4, num_tokens=32)["input_ids"]})
    for expected, measured in zip((block.forward.peak_bytes, block.backward.peak_bytes), peaks, strict=True):
        assert expected > 100_000
        assert expected <= measured <= expected + 4096, (
            expected,
            measured,
        )  # scalars, and small scratch inside operations (attention has more, but less than a feed-forward)


def test_dropout_on_a_gpu_keeps_a_byte_an_element_and_is_random() -> None:
    block = described("gpt2_dropout", "bfloat16", "cuda").class_of("transformer.h.0")
    masks = [tensor for tensor in block.saved if tensor.dtype == "bool" and tensor.kept_bytes]
    assert [tensor.kept_bytes for tensor in masks] == [SAMPLES * SEQUENCE * 32] * 2  # behind attention and behind the feed-forward
    assert all(tensor.is_random and tensor.op == "aten.native_dropout" for tensor in masks)
    attention = [tensor for tensor in block.saved if tensor.op == "aten._scaled_dot_product_flash_attention" and tensor.kept_bytes]
    assert attention and all(tensor.is_random for tensor in attention)
    assert not any(tensor.is_random for tensor in described("gpt2", "bfloat16", "cuda").class_of("transformer.h.0").saved)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3", "opt", "mixtral"])
def test_flops_of_the_tail_are_those_with_values(name: str) -> None:
    check_tail(name, described(name, "float32"), 5)


@pytest.mark.parametrize("chunk_rows", [11, 64])
def test_flops_of_the_tail_do_not_depend_on_how_it_is_cut(chunk_rows: int) -> None:
    """22 targets: two full chunks, less than one; above: a shorter last one."""
    sizes = dict(seq_len=SEQUENCE, micro_batch=SAMPLES, dtype="float32", device="cpu", loss_chunk_rows=chunk_rows)
    check_tail("llama", describe_workload(tiny_config("llama"), **sizes), chunk_rows)


def check_tail(name: str, spec: WorkloadSpec, chunk_rows: int) -> None:
    streamed = StreamedModel(build_meta_model(tiny_config(name), dtype=torch.float32)).train()
    batch = tiny_batch(0, num_sequences=SAMPLES)
    tail = spec.class_of("tail")
    assert tail.forward is not None and tail.recompute is not None and tail.backward is not None and spec.loss is not None
    assert spec.loss.num_targets == 22 and spec.loss.num_chunks == -(-22 // chunk_rows)
    assert tail.forward.work.flops == count_tail(streamed, batch, chunk_rows=chunk_rows, is_training=False)
    trained = tail.recompute.work.flops + tail.backward.work.flops
    assert trained == count_tail(streamed, batch, chunk_rows=chunk_rows, is_training=True)


def test_without_values_means_without_numbers_and_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as llama

    def clamped(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 0.5 if hidden.abs().max() > 1e4 else hidden  # what a block does depends on values

    monkeypatch.setattr(llama.LlamaMLP, "forward", clamped)
    spec = describe_workload(tiny_config("llama"), seq_len=SEQUENCE, micro_batch=SAMPLES, dtype="float32", device="cpu")
    assert not spec.is_complete
    block = spec.class_of("model.layers.1")
    assert (block.forward, block.recompute, block.backward, block.saved) == (None, None, None, ())
    assert "could not be traced without values" in block.notes[0]
    assert block.parameter_bytes > 0 and block.boundary_bytes == SAMPLES * SEQUENCE * 32 * 4
    assert spec.class_of("tail").backward is not None


def test_an_operation_of_unknown_cost_leaves_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as llama

    @torch.library.custom_op("overspill_tests::doubled", mutates_args=())
    def doubled(hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2

    doubled.register_fake(torch.empty_like)
    doubled.register_autograd(lambda ctx, gradient: gradient * 2)
    monkeypatch.setattr(llama.LlamaMLP, "forward", lambda self, hidden: torch.ops.overspill_tests.doubled(hidden))
    spec = describe_workload(tiny_config("llama"), seq_len=SEQUENCE, micro_batch=SAMPLES, dtype="float32", device="cpu")
    assert spec.class_of("model.layers.0").notes == ("the cost of overspill_tests.doubled.default is not known",)
    assert spec.class_of("model.layers.0").forward is None


def test_a_model_that_makes_other_arguments_without_values_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    from overspill.huggingface import valueless

    monkeypatch.setattr(valueless, "_IS_FAKE", "no such name")  # transformers sees fake tensors, and makes a mask that it else leaves out
    spec = describe_workload(tiny_config("llama"), seq_len=SEQUENCE, micro_batch=SAMPLES, dtype="float32", device="cpu")
    assert not spec.is_complete
    assert all("other arguments" in item.notes[0] for item in spec.classes)
