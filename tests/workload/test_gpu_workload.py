"""What is described for a GPU without one is what happens on one: saved bytes, kernels, peaks, times."""

from __future__ import annotations

import itertools

import pytest
import torch
from real_blocks import random_leaves, run_blocks
from tiny_models import SEQUENCE, tiny_batch, tiny_config
from torch.nn.attention import SDPBackend
from transformers import LlamaConfig, PreTrainedConfig

from overspill import describe_workload
from overspill.huggingface import StreamedModel, build_meta_model, device_kernels
from overspill.huggingface.device_kernels import choose_attention
from overspill.runtime.template_timing import time_templates

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STATE_BYTES = 64
"""Generator states and offsets, which kernels keep on the device or beside it: not compared."""
LLAMA = dict(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8)
CASES = [
    *(
        (name, "bfloat16", False)
        for name in ("llama", "gpt2", "gpt2_dropout", "gemma3", "falcon", "falcon_alibi", "bloom", "phi", "mistral")
    ),
    *((name, "bfloat16", False) for name in ("mixtral", "gpt_oss", "mamba2", "opt", "cohere2")),
    *((name, "float32", False) for name in ("llama", "gpt2", "opt", "mixtral")),
    *((name, "bfloat16", True) for name in ("llama", "gpt2")),
]


def config_of(name: str) -> PreTrainedConfig:
    dropout = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    return tiny_config("gpt2", **dropout) if name == "gpt2_dropout" else tiny_config(name)


@pytest.mark.parametrize(("name", "dtype", "is_masked"), CASES)
def test_saved_bytes_and_flops_are_those_of_the_block_on_the_gpu(name: str, dtype: str, is_masked: bool) -> None:
    spec = describe_workload(config_of(name), seq_len=SEQUENCE, micro_batch=2, dtype=dtype, is_masked=is_masked)
    assert spec.is_complete, [item.notes for item in spec.classes]
    streamed = StreamedModel(build_meta_model(config_of(name), dtype=getattr(torch, dtype))).train()
    batch = {"input_ids": tiny_batch(0)["input_ids"]}
    if is_masked:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, -1] = 0
    blocks = spec.classes[1:-1]
    real = run_blocks(streamed, tuple(item.name for item in blocks), batch, "cuda")
    for item in blocks:
        assert item.forward is not None and item.backward is not None
        kept = sorted(tensor.kept_bytes for tensor in item.saved if tensor.kept_bytes > STATE_BYTES)
        assert kept == [size for size in real[item.name].saved_bytes if size > STATE_BYTES], (item.name, spec.attention_kernels)
        assert item.forward.work.flops == real[item.name].forward_flops
        assert item.backward.work.flops == real[item.name].backward_flops


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "bloom"])
def test_a_description_made_without_the_device_keeps_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = describe_workload(tiny_config(name), seq_len=SEQUENCE, micro_batch=2)
    monkeypatch.setattr(device_kernels, "can_ask_device", lambda: False)
    elsewhere = describe_workload(tiny_config(name), seq_len=SEQUENCE, micro_batch=2)
    for found, assumed in zip(here.classes[1:-1], elsewhere.classes[1:-1], strict=True):
        kept, expected = (
            sorted(tensor.kept_bytes for tensor in item.saved if tensor.kept_bytes > STATE_BYTES) for item in (found, assumed)
        )
        if here.attention_kernels == elsewhere.attention_kernels:
            assert kept == expected
        else:  # cuDNN: log-sum-exp and masks may be padded otherwise
            assert abs(sum(kept) - sum(expected)) <= 0.02 * sum(expected)


def test_the_kernel_chosen_on_paper_is_torchs_choice() -> None:
    fused = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION}
    for dtype, size, has_mask, gqa, causal in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (8, 20, 64, 128, 256, 288), (False, True), (False, True), (False, True)
    ):
        if has_mask and causal:
            continue
        query, key = (torch.zeros(1, heads, 16, size, dtype=dtype, device="cuda", requires_grad=True) for heads in (4, 2 if gqa else 4))
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool, device="cuda") if has_mask else None
        chosen = choose_attention(query, key, key, mask, 0.0, causal, gqa)
        real = device_kernels._ask_device(query, key, key, mask, 0.0, causal, gqa)
        if gqa and chosen is SDPBackend.MATH:
            continue  # the doubt that the description notes
        assert chosen is real or (SDPBackend.CUDNN_ATTENTION is real and chosen in fused), (
            dtype,
            size,
            has_mask,
            gqa,
            causal,
            chosen,
            real,
        )


def test_the_peak_of_a_backward_is_what_the_allocator_sees() -> None:
    config = LlamaConfig(**LLAMA)
    spec = describe_workload(config, seq_len=2048, micro_batch=4)
    block = spec.class_of("model.layers.0")
    assert block.backward is not None and block.forward is not None
    streamed = StreamedModel(build_meta_model(config, dtype=torch.bfloat16)).train()
    streamed.to("cuda")
    with torch.no_grad(), streamed.bound("embedding", random_leaves(streamed, "embedding", "cuda")):
        embedded = streamed.embed({"input_ids": torch.zeros(4, 2048, dtype=torch.int64, device="cuda")})
    leaves = random_leaves(streamed, "model.layers.0", "cuda")
    source, above = torch.randn_like(embedded.hidden), torch.randn_like(embedded.hidden)

    def backward() -> None:
        hidden = source.detach().requires_grad_()
        output = streamed.run_block("model.layers.0", hidden, embedded.arguments).hidden
        torch.autograd.grad([output], [hidden, *leaves.values()], [above])

    def forward() -> None:
        with torch.no_grad():
            streamed.run_block("model.layers.0", source, embedded.arguments)

    with streamed.bound("model.layers.0", leaves):
        for run, expected in ((forward, block.forward.peak_bytes), (backward, block.backward.peak_bytes)):
            run()  # workspaces, once
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            measured = torch.cuda.max_memory_allocated() - before
            # Not counted: what kernels take inside (attention's gradient sums in fp32, the size of the queries twice).
            assert abs(measured - expected) <= 0.1 * expected + 64 * 2**20, (measured, expected)


def test_templates_of_a_real_shape_are_timed_within_five_seconds() -> None:
    config = LlamaConfig(**LLAMA | dict(num_hidden_layers=16))
    time_templates(config, device="cuda", seq_len=128, micro_batch=1)  # compiles the loss kernel
    before = torch.cuda.memory_allocated()
    times = time_templates(config, device="cuda", seq_len=2048, micro_batch=8)
    assert times.elapsed_s < 5.5
    (block,) = times.blocks
    assert block.note == times.tail.note == "" and (block.micro_batch, block.seq_len) == (8, 2048)
    assert block.forward is not None and block.backward is not None and times.tail.backward is not None
    assert block.forward.num_repetitions >= 3 and block.forward.spread_s < 0.5 * block.forward.median_s
    assert 2 < block.backward.median_s / block.forward.median_s < 6
    spec = describe_workload(config, seq_len=2048, micro_batch=8).class_of(block.name)
    assert spec.forward is not None
    assert 1e13 < spec.forward.work.flops / block.forward.median_s < 2e15
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_block_that_launches_bound_is_timed_as_a_replay_which_takes_less() -> None:
    config = LlamaConfig(**LLAMA | dict(num_hidden_layers=4))
    before = torch.cuda.memory_allocated()
    (block,) = time_templates(config, device="cuda", seq_len=256, micro_batch=1).blocks
    assert block.is_worth_replaying and block.is_replayable, block
    assert block.replayed_forward is not None and block.replayed_backward is not None, block
    replayed_s = block.replayed_forward.median_s + block.replayed_backward.median_s
    assert replayed_s < 0.8 * block.forward_backward_s, block
    assert block.replayed_backward.spread_s < 0.5 * block.replayed_backward.median_s
    assert torch.cuda.memory_allocated() <= before + 2**20, "recordings give their memory back"
    (large,) = time_templates(config, device="cuda", seq_len=4096, micro_batch=8).blocks
    assert not large.is_worth_replaying and large.replayed_backward is None and large.launch_s > 0


@pytest.mark.parametrize("name", ["mixtral", "gpt2_dropout"])
def test_a_block_that_cannot_be_recorded_is_timed_all_the_same(name: str) -> None:
    """A mixture of experts asks the device which tokens go where, or gives the loss its logits; a dropout draws."""
    times = time_templates(config_of(name), device="cuda", seq_len=SEQUENCE, micro_batch=2)
    for block in times.blocks:
        assert block.backward is not None and (block.is_replayable == (block.replayed_backward is not None)), block
    assert name != "gpt2_dropout" or not times.blocks[0].is_replayable


def test_what_does_not_fit_the_gpu_is_measured_smaller_and_said() -> None:
    times = time_templates(LlamaConfig(**LLAMA), device="cuda", seq_len=65536, micro_batch=64)
    assert times.blocks[0].backward is not None
    assert "measured at" in times.blocks[0].note
