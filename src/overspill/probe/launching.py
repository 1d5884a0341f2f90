"""What the host needs to issue one small kernel from Python, through torch and its autograd.

A GPU that computes on tensors small enough waits for whoever hands it the next operation. So a stack of small blocks is run, of the kinds
of operations that a decoder block has (norms, linear layers, attention, a gated feed-forward part, residual sums), as modules, forward and
backward, with tensors so small that the kernels take less than their launches; how many kernels that are is counted once, by the
operations that make or write memory, as a workload's trace counts them (`huggingface.op_trace`: a view costs nothing).

Limits: a model's own Python (transformers' branches, caches and hooks) comes on top and differs from model to model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from overspill.probe.sampling import Sampling, measured_rate, sample_seconds
from overspill.spec.machine_file import MeasuredRate

NUM_BLOCKS, HIDDEN_SIZE, NUM_HEADS, TOKENS = 4, 64, 2, 32
"""Of the stack. Chosen: some 400 kernels that take 2 us each, in tens of milliseconds of launching."""


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN_SIZE))

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


class _Block(nn.Module):
    """A decoder block: B samples, T tokens, D hidden, H heads of size K."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = _Norm(), _Norm()
        self.query, self.key, self.value, self.output = (nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False) for _ in range(3))

    def forward(self, hidden_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        normed_BTD = self.first_norm(hidden_BTD)
        shape = (*normed_BTD.shape[:-1], NUM_HEADS, -1)
        query, key, value = (part(normed_BTD).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        query, key = (tensor * cos_TK + _half_turned(tensor) * sin_TK for tensor in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_BTD = hidden_BTD + self.output(mixed.transpose(1, 2).reshape(hidden_BTD.shape))
        normed_BTD = self.second_norm(hidden_BTD)
        return hidden_BTD + self.down(F.silu(self.gate(normed_BTD)) * self.up(normed_BTD))


def _half_turned(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class _Kernels(TorchDispatchMode):
    """Counts operations whose results have memory of their own, or that write to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(argument.alias_info is not None and not argument.alias_info.is_write for argument in func._schema.arguments)
        self.number += not is_view and not func._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::detach"))
        return out


def measure_launches(device: torch.device, sampling: Sampling, *, until_s: float = math.inf) -> MeasuredRate:
    """Kernels a second that the host issues, forward and backward together.

    Args:
        until_s: of `time.perf_counter`.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    blocks = nn.ModuleList(_Block() for _ in range(NUM_BLOCKS)).to(device=device, dtype=dtype)
    hidden = torch.randn(1, TOKENS, HIDDEN_SIZE, device=device, dtype=dtype, requires_grad=True)
    cos, sin = (torch.randn(TOKENS, HIDDEN_SIZE // NUM_HEADS, device=device, dtype=dtype) for _ in range(2))
    wanted = [hidden, *blocks.parameters()]

    def once() -> None:
        state = hidden
        for block in blocks:
            state = block(state, cos, sin)
        torch.autograd.grad(state, wanted, torch.ones_like(state))

    def run(times: int) -> None:
        for _ in range(times):
            once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once()  # loads what it needs
    with _Kernels() as kernels:
        once()
    return measured_rate(sample_seconds(run, sampling, until_s=until_s), kernels.number)
