"""The kinds of kernels of which a block is made, beside large matrix products, each at sizes of a real block: attention, elementwise work,
the products of routed experts, and sums into chosen rows.

They reach other rates than a large product and than x = x + 1: attention half of the product's, experts' small products less, and adding
up gradients of rows that were gathered some hundredths of the memory's. A prediction that knows how much of each a block has
(`spec.workload.Work`) needs their rates. FLOPs and bytes are counted as a workload's trace counts them (`huggingface.op_costs`).

Limits: one size of each, bf16, on a GPU; kernels of other libraries than torch's own are not looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from overspill.probe.sampling import Run, Sampling, measured_rate, sample_seconds
from overspill.spec.machine_file import KernelFigures, MeasuredRate

HEAD_SIZES = (64, 128)
"""Attention is measured with both, and has the rate of both together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Of what is run. Chosen: a block of a model of 1 to 8 B parameters over 8,192 tokens, in less than 2 GiB."""

    samples: int = 4
    tokens: int = 2048
    num_heads: int = 16
    hidden_size: int = 4096
    num_experts: int = 8
    expert_size: int = 1536
    expert_hidden_size: int = 1024
    dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        return self.samples * self.tokens

    @property
    def num_bytes(self) -> int:
        """Of the device, at most at a time."""
        return 40 * self.rows * max(self.hidden_size, max(HEAD_SIZES) * self.num_heads, 2 * self.expert_hidden_size)

    def within(self, room_bytes: int) -> BlockSizes:
        """The same with fewer samples and tokens, so that it fits."""
        found = self
        while found.num_bytes > room_bytes and found.tokens > 128:
            samples, tokens = (found.samples // 2, found.tokens) if found.samples > 1 else (1, found.tokens // 2)
            found = dataclasses.replace(found, samples=samples, tokens=tokens)
        return found


BLOCK = BlockSizes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRates:
    """What was measured; None: it could not be."""

    attention: KernelFigures | None = None
    grouped: KernelFigures | None = None
    elementwise: MeasuredRate | None = None
    scattered: MeasuredRate | None = None


def measure_kernels(
    device: torch.device, sampling: Sampling, *, room_bytes: int, until_s: float = math.inf, sizes: BlockSizes = BLOCK
) -> KernelRates:
    """All kinds, one after the other; a kind that this torch or device has not is left out.

    Args:
        room_bytes: of the device; sizes are cut down to it.
        until_s: of `time.perf_counter`, shared by all.
    """
    sizes = sizes.within(room_bytes)
    found: dict[str, KernelFigures | MeasuredRate] = {}
    for name, build in {"attention": _attention, "elementwise": _elementwise, "grouped": _grouped, "scattered": _scattered}.items():
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
            found[name] = _measure_one(build, device, sizes, sampling, until_s=until_s)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return KernelRates(**found)  # type: ignore[arg-type]


def _measure_one(
    build: Callable[[torch.device, BlockSizes], _Built], device: torch.device, sizes: BlockSizes, sampling: Sampling, *, until_s: float
) -> KernelFigures | MeasuredRate:
    """In a frame of its own, so that its tensors are gone when it returns or fails."""
    once, flops, moved_bytes = build(device, sizes)
    seconds = sample_seconds(_waiting(once, device), sampling, until_s=until_s)
    if flops:
        return KernelFigures(rate=measured_rate(seconds, flops), moved_bytes=moved_bytes)
    return measured_rate(seconds, moved_bytes)


def _waiting(once: Callable[[], object], device: torch.device) -> Run:
    def run(times: int) -> None:
        for _ in range(times):
            once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


_Built = tuple[Callable[[], object], int, int]
"""(what is run, its FLOPs, bytes that it moves); FLOPs 0: its rate is that of its bytes."""


def _randn(*shape: int, device: torch.device, sizes: BlockSizes) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=getattr(torch, sizes.dtype))


def _attention(device: torch.device, sizes: BlockSizes) -> _Built:
    """Causal, forward and backward: two products of T x T, and five; a kernel that is told does half of them. Both passes together, as a
    step needs them."""
    flops, moved, inputs = 0, 0, []
    for size in HEAD_SIZES:
        shape = (sizes.samples, sizes.num_heads, sizes.tokens, size)
        inputs.append([_randn(*shape, device=device, sizes=sizes).requires_grad_() for _ in range(4)])
        pairs = sizes.samples * sizes.num_heads * sizes.tokens**2
        flops += 7 * 2 * pairs * size // 2
        moved += (4 + 8) * math.prod(shape) * inputs[-1][0].itemsize

    def once() -> None:
        for query, key, value, gradient in inputs:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.autograd.grad(mixed, (query, key, value), gradient.detach())

    return once, flops, moved


def _elementwise(device: torch.device, sizes: BlockSizes) -> _Built:
    """A norm as models write it, a gate, and a residual sum, of N rows and D columns."""
    hidden_ND = _randn(sizes.rows, sizes.hidden_size, device=device, sizes=sizes)
    gain_D = torch.ones(sizes.hidden_size, device=device, dtype=hidden_ND.dtype)

    def once() -> None:
        wide_ND = hidden_ND.float()
        normed_ND = gain_D * (wide_ND * torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden_ND.dtype)
        torch.add(hidden_ND, F.silu(normed_ND) * normed_ND)

    narrow, wide = hidden_ND.itemsize, 4
    steps = (narrow + wide, 2 * wide, wide, 2 * wide, wide + narrow, 2 * narrow, 2 * narrow, 3 * narrow, 3 * narrow)
    return once, 0, sum(steps) * hidden_ND.numel()


def _grouped(device: torch.device, sizes: BlockSizes) -> _Built:
    """Rows of two experts each through one matrix an expert, forward and backward: three products."""
    pairs, size, width = 2 * sizes.rows, sizes.expert_hidden_size, sizes.expert_size
    rows_SD = _randn(pairs, size, device=device, sizes=sizes).requires_grad_()
    weight_EFD = _randn(sizes.num_experts, width, size, device=device, sizes=sizes).requires_grad_()
    gradient_SF = _randn(pairs, width, device=device, sizes=sizes)
    each = pairs // sizes.num_experts
    ends_E = torch.arange(1, sizes.num_experts + 1, device=device, dtype=torch.int32) * each

    def once() -> None:
        out_SF = torch._grouped_mm(rows_SD, weight_EFD.transpose(-2, -1), offs=ends_E)
        torch.autograd.grad(out_SF, (rows_SD, weight_EFD), gradient_SF)

    moved = 3 * (rows_SD.numel() + weight_EFD.numel() + gradient_SF.numel()) * rows_SD.itemsize
    return once, 3 * 2 * pairs * size * width, moved


def _scattered(device: torch.device, sizes: BlockSizes) -> _Built:
    """Gradients of rows that were gathered twice each are added up."""
    pairs, size = 2 * sizes.rows, sizes.expert_hidden_size
    sums_ND, rows_SD = (_randn(number, size, device=device, sizes=sizes) for number in (sizes.rows, pairs))
    order_S = torch.randperm(pairs, device=device) // 2

    def once() -> None:
        sums_ND.index_put_((order_S,), rows_SD, accumulate=True)

    return once, 0, (2 * sums_ND.numel() + rows_SD.numel()) * rows_SD.itemsize + order_S.numel() * order_S.itemsize
