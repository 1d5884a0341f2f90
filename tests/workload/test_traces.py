"""What is described without values is what happens with them."""

from __future__ import annotations

import functools

import pytest
import torch
from real_blocks import run_blocks
from tiny_models import NAMES, SEQUENCE, tiny_batch, tiny_config

from overspill import UnsupportedModelError, describe_workload
from overspill.huggingface import StreamedModel, build_meta_model
from overspill.spec.workload import Alias, WorkloadSpec

SAMPLES = 2


@functools.cache
def described(name: str, dtype: str, device: str = "cpu", is_masked: bool = False) -> WorkloadSpec:
    return describe_workload(
        tiny_config(name), seq_len=SEQUENCE, micro_batch=SAMPLES, dtype=dtype, device=device, is_masked=is_masked, loss_chunk_rows=5
    )


CASES = [(name, "float32", False) for name in NAMES] + [
    *((name, "bfloat16", False) for name in ("llama", "gpt2", "mixtral", "gemma3", "mamba2", "bloom")),
    *((name, "float32", True) for name in ("llama", "gpt2", "qwen3_moe")),
]


@pytest.mark.parametrize(("name", "dtype", "is_masked"), CASES)
def test_saved_bytes_and_flops_are_those_of_the_same_block_with_values(name: str, dtype: str, is_masked: bool) -> None:
    spec = described(name, dtype, is_masked=is_masked)
    assert spec.is_complete, [item.notes for item in spec.classes]
    streamed = StreamedModel(build_meta_model(tiny_config(name), dtype=getattr(torch, dtype))).train()
    batch = tiny_batch(0, num_sequences=SAMPLES, padding=1 if is_masked else 0)
    if is_masked:
        batch["attention_mask"][:, -1] = 0
    del batch["labels"]
    blocks = spec.classes[1:-1]
    real = run_blocks(streamed, tuple(item.name for item in blocks), batch)
    for item in blocks:
        assert item.forward is not None and item.recompute is not None and item.backward is not None
        kept = sorted(tensor.kept_bytes for tensor in item.saved if tensor.alias is Alias.OWN)
        assert tuple(kept) == real[item.name].saved_bytes
        assert item.saved_bytes == sum(real[item.name].saved_bytes)
        assert item.forward.work.flops == real[item.name].forward_flops
        assert item.recompute.work.flops == real[item.name].forward_flops
        assert item.backward.work.flops == real[item.name].backward_flops
