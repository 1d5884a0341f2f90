"""What a process that trains takes beside its tensors: the driver's context with kernels loaded, libraries' workspaces, host memory.

CUDA loads a kernel when it is first launched, and a library its code when it is first called; each costs device and host memory that no
allocator of torch's shows. So the operations of a training step are run once, small: one decoder block with its embedding and loss,
forward and backward, for both common sizes of heads, and what goes over gradients. What the driver and the kernel count afterwards is
what a run will meet, whatever its model's size: on an H100 the context of a session was 1,031 MiB at 1.10B and 1,037 at 3.02B.

Routed experts have kernels and libraries of their own (sorting, grouped products), which a dense model never loads; they are run after all
else has been measured, and what they add is told apart.

Words: **context** is what the driver counts as used less what torch's allocator has reserved.

Limits: other programs on the device are part of its context. Triton is imported where it is there, but compiles nothing here (it would take
ten seconds); a session's own streams and recordings come on top (`planning.memory.SESSION_CONTEXT_BYTES`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib

import psutil
import torch
import torch.nn.functional as F

from overspill.errors import BudgetError
from overspill.spec.machine_file import ProcessFootprint
from overspill.tiers.cuda import give_back_unused
from overspill.units import format_bytes

HEAD_SIZES = (64, 128)
"""Attention has kernels for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandIn:
    """Sizes of the block that is run. Chosen: as small as kernels of real sizes are chosen for."""

    samples: int = 1
    tokens: int = 1024
    hidden_size: int = 1024
    ffn_size: int = 4096
    vocab_size: int = 8192
    num_kv_shares: int = 2
    """Query heads for each head of keys and values."""
    dtype: str = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Of the device, at most: parameters in four forms, activations, logits in three."""
        parameters = self.vocab_size * self.hidden_size + 4 * self.hidden_size**2 + 3 * self.hidden_size * self.ffn_size
        rows = self.samples * self.tokens
        return 16 * parameters + rows * (64 * self.hidden_size + 24 * self.ffn_size + 16 * self.vocab_size)


STAND_IN = StandIn()


def measure_footprint(device: torch.device, room_bytes: int, sizes: StandIn = STAND_IN) -> ProcessFootprint:
    """Load what a training step needs, and see what that took. Before anything else ran on the device in this process.

    Args:
        device: a GPU.
        room_bytes: of it, that may be used meanwhile.

    Raises:
        BudgetError: the block is larger than the room.
    """
    if sizes.num_bytes > room_bytes:
        raise BudgetError(f"a small block needs {format_bytes(sizes.num_bytes)} of the device, {format_bytes(room_bytes)} may be taken")
    process = psutil.Process()
    torch.cuda.synchronize(device)
    resident_bytes, allocated_bytes = process.memory_info().rss, torch.cuda.memory_allocated(device)
    with contextlib.suppress(Exception):  # a broken one is as good as none
        importlib.import_module("triton")
    for head_size in HEAD_SIZES:
        train_once(device, head_size, sizes)
    gc.collect()
    torch.cuda.synchronize(device)
    library_bytes = torch.cuda.memory_allocated(device) - allocated_bytes
    free, total = torch.cuda.mem_get_info(device)
    context_bytes = total - free - torch.cuda.memory_reserved(device)
    loaded_bytes = process.memory_info().rss
    with contextlib.suppress(Exception):  # a GPU or a torch without grouped products
        route_once(device, sizes)
        torch.cuda.synchronize(device)
    expert_bytes = process.memory_info().rss - loaded_bytes
    give_back_unused()
    return ProcessFootprint(
        context_bytes=max(0, context_bytes),
        library_bytes=max(0, library_bytes),
        host_growth_bytes=max(0, loaded_bytes - resident_bytes),
        expert_host_growth_bytes=max(0, expert_bytes),
    )


def train_once(device: torch.device, head_size: int, sizes: StandIn) -> float:
    """Forward and backward of a block with embedding and loss, and what a step does with gradients; the gradient's norm.

    Shapes: B samples, T tokens, D hidden, H heads of size K, G groups of heads, F of the feed-forward part, V words.
    """
    dtype = getattr(torch, sizes.dtype)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device=device) * 0.02).to(dtype).requires_grad_()

    size, heads = sizes.hidden_size, sizes.hidden_size // head_size
    kv_size = size // sizes.num_kv_shares
    names = {"query": (size, size), "key": (kv_size, size), "value": (kv_size, size), "output": (size, size)}
    names |= {
        "gate": (sizes.ffn_size, size),
        "up": (sizes.ffn_size, size),
        "down": (size, sizes.ffn_size),
        "words": (sizes.vocab_size, size),
    }
    weights = {name: weight(*shape) for name, shape in names.items()}
    gain = torch.ones(size, device=device, dtype=dtype, requires_grad=True)
    ids_BT = torch.randint(0, sizes.vocab_size, (sizes.samples, sizes.tokens), device=device)
    positions = torch.arange(sizes.tokens, device=device)
    angles_TK = torch.outer(positions.float(), torch.arange(1, head_size // 2 + 1, device=device).reciprocal()).repeat(1, 2)
    hidden_BTD = F.embedding(ids_BT, weights["words"])
    normed_BTD = _norm(hidden_BTD, gain)

    def split(name: str, number: int) -> torch.Tensor:
        return F.linear(normed_BTD, weights[name]).view(sizes.samples, sizes.tokens, number, head_size).transpose(1, 2)

    groups = heads // sizes.num_kv_shares
    query_BHTK, key_BGTK, value_BGTK = (
        _rotate(split("query", heads), angles_TK), _rotate(split("key", groups), angles_TK), split("value", groups)
    )  # fmt: skip
    key_BHTK, value_BHTK = (tensor.repeat_interleave(sizes.num_kv_shares, dim=1) for tensor in (key_BGTK, value_BGTK))
    mixed_BHTK = F.scaled_dot_product_attention(query_BHTK, key_BHTK, value_BHTK, is_causal=True)
    hidden_BTD = hidden_BTD + F.linear(mixed_BHTK.transpose(1, 2).reshape(hidden_BTD.shape), weights["output"])
    normed_BTD = _norm(hidden_BTD, gain)
    wide_BTF = F.silu(F.linear(normed_BTD, weights["gate"])) * F.linear(normed_BTD, weights["up"])
    hidden_BTD = hidden_BTD + F.linear(wide_BTF, weights["down"])
    logits_BTV = F.linear(_norm(hidden_BTD, gain), weights["words"])
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT.flatten(), ignore_index=-100, reduction="sum")
    squares = torch.zeros((), device=device, dtype=torch.float64)
    for gradient in torch.autograd.grad(loss, [*weights.values(), gain]):
        whole = torch.zeros_like(gradient, dtype=torch.float32)
        whole.add_(gradient)
        squares += whole.to(dtype).double().square().sum()
        squares += torch.isfinite(whole).logical_not().any()
    return float(squares.sqrt())


def route_once(device: torch.device, sizes: StandIn) -> float:
    """Forward and backward of routed experts, each token to two of four; the norm of the gradient.

    Shapes: N tokens, D hidden, F of an expert, E experts, S pairs of a token and an expert.
    """
    dtype, size, num_experts = getattr(torch, sizes.dtype), sizes.hidden_size, 4
    width = max(16, sizes.ffn_size // 8)
    hidden_ND = torch.randn(sizes.samples * sizes.tokens, size, device=device).to(dtype).requires_grad_()
    router_ED = torch.randn(num_experts, size, device=device).to(dtype).requires_grad_()
    up_EFD = (torch.randn(num_experts, 2 * width, size, device=device) * 0.02).to(dtype).requires_grad_()
    down_EDF = (torch.randn(num_experts, size, width, device=device) * 0.02).to(dtype).requires_grad_()
    shares, chosen = torch.topk(F.softmax(F.linear(hidden_ND, router_ED), dim=-1, dtype=torch.float32), 2, dim=-1)
    experts_S, order_S = torch.sort(chosen.flatten())
    bins = experts_S.int() if device.type == "cuda" else experts_S.float()
    ends_E = torch.cumsum(torch.histc(bins, bins=num_experts, min=0, max=num_experts - 1), dim=0, dtype=torch.int32)
    rows_SD = hidden_ND[order_S // 2]
    gate_SF, wide_SF = torch._grouped_mm(rows_SD, up_EFD.transpose(-2, -1), offs=ends_E).chunk(2, dim=-1)
    out_SD = torch._grouped_mm(F.silu(gate_SF) * wide_SF, down_EDF.transpose(-2, -1), offs=ends_E)
    out_SD = (out_SD * shares.flatten()[order_S].unsqueeze(-1))[torch.argsort(order_S)]
    out_ND = out_SD.view(*hidden_ND.shape[:1], 2, size).sum(dim=1)
    gradients = torch.autograd.grad(out_ND.float().square().sum(), [hidden_ND, router_ED, up_EFD, down_EDF])
    return float(sum(gradient.double().square().sum() for gradient in gradients).sqrt())  # type: ignore[union-attr]


def _norm(hidden: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = hidden.float()
    return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


def _rotate(tensor: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return tensor * angles.cos().to(tensor.dtype) + torch.cat((-second, first), dim=-1) * angles.sin().to(tensor.dtype)
