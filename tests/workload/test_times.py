"""Times of templates: what is measured, within what, and what is said of the rest. On the CPU; `test_gpu_workload` has the GPU."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM

from overspill import describe_workload
from overspill.runtime import template_timing
from overspill.runtime.template_timing import MOST_REPETITIONS, build_sizes, time_templates
from overspill.spec.documents import from_json
from overspill.spec.workload import TemplateTimes

SIZES = dict(seq_len=24, micro_batch=2, dtype="float32")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mamba2"])
def test_every_class_of_blocks_and_the_tail_are_timed(name: str) -> None:
    spec = describe_workload(tiny_config(name), **SIZES, device="cpu")
    times = time_templates(tiny_config(name), **SIZES, device="cpu", limit_s=10.0, spec=spec)
    assert [item.name for item in times.blocks] == [item.name for item in spec.classes[1:-1]]
    for item in times.blocks:
        assert (item.micro_batch, item.seq_len, item.note) == (2, 24, "")
        assert item.forward is not None and item.backward is not None
        assert item.forward_backward_s == item.forward.median_s + item.backward.median_s > item.forward_s > 0
        assert 1 < item.forward.num_repetitions <= MOST_REPETITIONS and item.backward.spread_s >= 0
    assert times.tail.forward is None and times.tail.backward is not None
    assert times.elapsed_s < 10
    assert from_json(TemplateTimes, times.to_json()) == times


def test_what_does_not_fit_the_time_is_measured_smaller_and_said() -> None:
    config = LlamaConfig(vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8)
    times = time_templates(config, device="cpu", seq_len=8192, micro_batch=8, dtype="float32", limit_s=1.5)
    (block,) = times.blocks
    assert block.backward is not None and block.micro_batch * block.seq_len < 8 * 8192
    assert f"measured at {block.micro_batch} x {block.seq_len} tokens" in block.note and "were left" in block.note
    assert times.elapsed_s < 3.5, times  # a first run cannot be cut short


def test_what_cannot_even_begin_in_time_is_not_measured_and_said() -> None:
    config = LlamaConfig(vocab_size=2048, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32)
    times = time_templates(config, device="cpu", seq_len=64, micro_batch=1, limit_s=0.5)
    assert times.blocks[0].backward is None and times.blocks[0].forward is None
    assert "not measured: one run takes about" in times.blocks[0].note
    assert times.elapsed_s < 2.5


def test_no_size_is_begun_for_which_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SIZES | dict(seq_len=48)
    spec = describe_workload(tiny_config("llama"), **sizes, device="cpu")
    block = spec.classes[1]
    assert block.backward is not None
    enough_for_40 = 2 * block.parameter_bytes + 4 * block.num_parameters + block.backward.peak_bytes * 40 // 96

    class Memory:
        available = enough_for_40 / template_timing.ROOM_SHARE

    monkeypatch.setattr(template_timing.psutil, "virtual_memory", Memory)
    (found,) = time_templates(tiny_config("llama"), **sizes, device="cpu", spec=spec).blocks
    assert (found.micro_batch, found.seq_len) == (1, 32) and found.backward is not None
    assert "measured at 1 x 32 tokens: 1 x 48 takes about" in found.note and "are free on cpu" in found.note


def test_running_out_of_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from overspill.huggingface import StreamedModel

    run_block = StreamedModel.run_block

    def scarce(self: StreamedModel, unit: str, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        if hidden.numel() > 32 * 32:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand more")
        return run_block(self, unit, hidden, *args, **kwargs)

    sizes = SIZES | dict(seq_len=48)
    spec = describe_workload(tiny_config("llama"), **sizes, device="cpu")
    monkeypatch.setattr(StreamedModel, "run_block", scarce)
    (block,) = time_templates(tiny_config("llama"), **sizes, device="cpu", spec=spec).blocks
    assert (block.micro_batch, block.seq_len) == (1, 32) and block.backward is not None
    assert "1 x 48 ran out of memory (tried to allocate 3 GiB)" in block.note
    monkeypatch.setattr(template_timing, "SMALLEST_TOKENS", 64)
    (block,) = time_templates(tiny_config("llama"), **sizes, device="cpu", spec=spec).blocks
    assert block.backward is None and block.note == "out of memory: tried to allocate 3 GiB"


def test_timing_leaves_generators_and_the_model_alone() -> None:
    model = LlamaForCausalLM(tiny_config("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    time_templates(model, **SIZES, device="cpu", limit_s=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sizes_grow_to_what_was_asked_for() -> None:
    assert build_sizes((8, 2048)) == [(1, 32), (1, 128), (1, 512), (1, 2048), (4, 2048), (8, 2048)]
    assert build_sizes((1, 20)) == [(1, 20)]
    assert build_sizes((2, 20)) == [(1, 20), (2, 20)]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_s must be positive, got 0"):
        time_templates(tiny_config("llama"), **SIZES, device="cpu", limit_s=0)
    spec = describe_workload(tiny_config("llama"), seq_len=8, micro_batch=1, device="cpu")
    with pytest.raises(ValueError, match="the spec is of 1 x 8 tokens in bfloat16, asked for were 2 x 24 in float32"):
        time_templates(tiny_config("llama"), **SIZES, device="cpu", spec=spec)
