"""Small models of every kind, one plain step of each, and what the tests of saved tensors ask of them."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

import overspill
from overspill.activations import OffloadActivations

VOCAB = 96
Step = Callable[[], torch.Tensor]


class SharedNet(nn.Module):
    """One matrix used four times: as it is, transposed, as a slice, and again in a second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(self.embedding(ids)))
        hidden = torch.tanh(hidden @ self.first.weight)
        hidden = torch.cat([hidden[..., :8] @ self.first.weight[:8, :8], hidden[..., 8:]], dim=-1)
        return self.second(hidden) @ self.embedding.weight.t()


class ConvNet(nn.Module):
    """Convolutions, norms with statistics, pooling with indices, dropout masks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.1),
            nn.Conv2d(8, 16, 3, stride=2), nn.GroupNorm(4, 16), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def build(name: str) -> tuple[nn.Module, Step]:
    """A model, and a step that gives its loss (without backward)."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (2, 16))
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    if name == "gpt2":
        model: nn.Module = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **sizes))
    elif name == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes)
        )
    elif name == "bert":
        model = BertForMaskedLM(BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **sizes))
    elif name == "t5":
        model = T5(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **sizes))
    elif name == "shared":
        model = SharedNet()
        return model, lambda: nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())
    else:
        model = ConvNet()
        images, classes = torch.randn(4, 3, 12, 12), torch.randint(0, 10, (4,))
        return model, lambda: nn.functional.cross_entropy(model(images).float(), classes)
    return model, lambda: model(input_ids=ids, labels=ids).loss


NAMES = ("gpt2", "llama", "bert", "t5", "conv", "shared")


def run_step(model: nn.Module, step: Step, *, is_autocast: bool = False, seed: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, drawn from the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16) if is_autocast else contextlib.nullcontext():
        loss = step()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def offload(model: nn.Module, **settings: Any) -> OffloadActivations:
    """`offload_activations` for small tensors on the CPU: nothing is too small, everything leaves, little may wait."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is on the CPU")
        return overspill.offload_activations(
            model, **{"host_budget": "16MiB", "min_bytes": 1, "window": 4096, "amount": "everything", **settings}
        )


def settings_of(tier: str, folder: Path, *, ssd_budget: str = "64MiB") -> dict[str, Any]:
    """For `offload`: host memory for everything, or for little, and an SSD for the rest."""
    return {} if tier == "host" else {"host_budget": "256KiB", "ssd_dir": folder / "ssd", "ssd_budget": ssd_budget}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


SIZE = 64 * 1024
"""Bytes of each layer's saved tensor below."""


class Chain(nn.Module):
    """Layers that save one tensor of `SIZE` bytes each: their output."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, depth))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs
        for scale in self.scale.unbind():
            hidden = torch.tanh(hidden + scale)
        return hidden.sum()


INPUTS = torch.linspace(-2, 2, SIZE // 4)


def chain_step(depth: int = 8) -> tuple[Chain, Callable[[], torch.Tensor]]:
    model = Chain(depth)
    return model, lambda: model(INPUTS)


def assert_nothing_left(active: OffloadActivations) -> None:
    gc.collect()
    report = active.report()
    assert (report.num_live, report.host_used_bytes, report.ssd_used_bytes, report.pinned_bytes) == (0, 0, 0, 0)
    assert active._tiers.memory.allocated_bytes == 0, "all host memory went back"
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not active._model._forward_pre_hooks
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("overspill-saved")] == []


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):  # type: ignore[no-untyped-def]
        return hidden * 1

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("in backward")


def train_and_fail(active: OffloadActivations, model: nn.Module, step: Step, where: str) -> None:
    """A step within `active`, then one that fails in its `forward`, in its `backward`, or `between`."""
    with active:
        run_step(model, step)
        loss = Broken.apply(step())
        if where == "forward":
            torch.ones(3) @ torch.ones(4)
        if where == "backward":
            loss.backward()
        raise ZeroDivisionError("between")
