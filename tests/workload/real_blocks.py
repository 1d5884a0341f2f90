"""Blocks with values: what autograd saves of them for real, and the FLOPs that torch counts. The other side of every trace."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from overspill.huggingface import StreamedModel

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealBlock:
    """What one block did."""

    saved_bytes: tuple[int, ...]
    """Of every storage that only autograd keeps, ascending."""
    forward_flops: int
    backward_flops: int
    """Of the gradients, without the forward."""


class _Counter(TorchDispatchMode):
    """torch's formulas without its bookkeeping of modules, which `autograd.grad` by a leaf stops."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class _Packed:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def random_leaves(streamed: StreamedModel, unit: str, device: str = "cpu") -> dict[str, Tensor]:
    """Parameters of a unit with random values."""
    specs = {name: streamed.parameters[name] for name in streamed.unit_parameters[unit]}
    return {
        name: (torch.randn(spec.shape, device=device) / math.sqrt(spec.shape[-1]))
        .to(getattr(torch, spec.dtype))
        .requires_grad_(spec.trainable)
        for name, spec in specs.items()
    }


def run_blocks(streamed: StreamedModel, units: tuple[str, ...], batch: Mapping[str, Tensor], device: str = "cpu") -> dict[str, RealBlock]:
    """Each of `units`, run as the runtime runs it."""
    torch.manual_seed(0)
    streamed.to(device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad(), streamed.bound("embedding", random_leaves(streamed, "embedding", device)):
        embedded = streamed.embed(batch)
    found: dict[str, RealBlock] = {}
    hidden = embedded.hidden
    for unit in streamed.block_names:
        leaves = random_leaves(streamed, unit, device)
        with streamed.bound(unit, leaves):
            with torch.no_grad(), _counter() as counted:
                output = streamed.run_block(unit, hidden, embedded.arguments)
            if unit in units:
                found[unit] = dataclasses.replace(
                    _differentiate(streamed, unit, hidden, embedded.arguments, leaves), forward_flops=counted.get_total_flops()
                )
        hidden = output.hidden
    return found


def count_tail(streamed: StreamedModel, batch: Mapping[str, Tensor], *, chunk_rows: int, is_training: bool) -> int:
    """FLOPs of the tail over all targets of `batch`, forward and (in training) backward, as torch counts them."""
    samples, tokens = batch["input_ids"].shape
    dtype = streamed.hidden_dtypes[streamed.block_names[-1]]
    hidden = torch.randn(samples, tokens, streamed.config.get_text_config().hidden_size).to(dtype)
    leaves = random_leaves(streamed, "tail")
    experts = getattr(streamed.config, "num_experts", getattr(streamed.config, "num_local_experts", 0))
    sides = {
        unit: tuple(torch.randn(samples * tokens, experts).to(dtype) for _ in range(count))
        for unit, count in streamed.inspection.num_side_outputs.items()
    }
    with streamed.bound("tail", leaves), _Counter() as counted:
        streamed.run_tail(
            batch,
            hidden.requires_grad_(is_training),
            side_outputs=sides,
            parameters=leaves,
            num_targets=samples * (tokens - 1),
            chunk_rows=chunk_rows,
            accumulate=(lambda name, gradient: None) if is_training else None,
        )
    return counted.flops


def measure_peaks(streamed: StreamedModel, unit: str, batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """Most bytes that torch's allocator lends at a time: in the first block's forward, and in its recomputation and gradients."""
    with torch.no_grad(), streamed.bound("embedding", random_leaves(streamed, "embedding")):
        embedded = streamed.embed(batch)
    leaves = random_leaves(streamed, unit)
    source, above = embedded.hidden.clone(), torch.ones(embedded.hidden.shape, dtype=streamed.hidden_dtypes[unit])

    def forward() -> None:
        with torch.no_grad():
            streamed.run_block(unit, source, embedded.arguments)

    def backward() -> None:
        hidden = source.detach().requires_grad_()
        output = streamed.run_block(unit, hidden, embedded.arguments)
        outputs = [tensor for tensor in (output.hidden, *output.side_outputs) if tensor.requires_grad]
        ones = [above, *(torch.ones_like(tensor) for tensor in outputs[1:])]
        torch.autograd.grad(outputs, [hidden, *leaves.values()], ones, allow_unused=True)

    with streamed.bound(unit, leaves):
        return _peak(forward), _peak(backward)


def _peak(run: Callable[[], None]) -> int:
    run()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    live = peak = 0
    assert profiled.profiler is not None
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def _differentiate(streamed: StreamedModel, unit: str, hidden: Tensor, arguments: Any, leaves: Mapping[str, Tensor]) -> RealBlock:
    boundary = hidden.detach().requires_grad_()
    sides = [tensor.detach().requires_grad_() for tensor in arguments.side_inputs]
    living: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Packed:
        packed = _Packed(tensor)
        living.add(packed)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        output = streamed.run_block(unit, boundary, arguments, side_inputs=sides or None)
    buffers = [*streamed.block(unit).buffers(), *streamed.model.buffers()]
    given = [*leaves.values(), boundary, output.hidden, *arguments.tensors, *arguments.side_inputs, *buffers]
    theirs = {tensor.untyped_storage()._cdata for tensor in given}
    storages = {packed.tensor.untyped_storage()._cdata: packed.tensor.untyped_storage().nbytes() for packed in living}
    saved = tuple(sorted(size for address, size in storages.items() if address not in theirs))
    outputs = [tensor for tensor in (output.hidden, *output.side_outputs) if tensor.requires_grad]
    wanted = [boundary, *sides, *(leaf for leaf in leaves.values() if leaf.requires_grad)]
    with _counter() as counted:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(tensor) for tensor in outputs], allow_unused=True)
    return RealBlock(saved_bytes=saved, forward_flops=0, backward_flops=counted.get_total_flops())


def _counter() -> FlopCounterMode:
    """torch's own counter, told of what it does not know (`op_costs` lists it)."""
    pairs: dict[Any, Callable[..., int]] = {aten.convolution_backward: _convolution_backward}
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        pairs[getattr(aten, f"_scaled_dot_product_{kind}")] = _attention
        pairs[getattr(aten, f"_scaled_dot_product_{kind}_backward")] = _attention_backward
    if hasattr(aten, "_grouped_mm"):
        pairs[aten._grouped_mm] = _grouped
    return FlopCounterMode(display=False, custom_mapping=pairs)


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    samples, heads, rows, size = query
    return sum(2 * samples * heads * rows * key[2] * depth for depth in (size, value[3]))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    samples, heads, rows, size = query
    return sum(2 * samples * heads * rows * key[2] * depth for depth in (size, size, size, value[3], value[3]))


def _grouped(left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Rows of one expert are counted one expert after the other: S rows in all."""
    if len(left) == 2 and len(right) == 3:
        return 2 * left[0] * right[1] * right[2]
    assert len(left) == 2 and len(right) == 2, (left, right)
    return 2 * left[0] * left[1] * right[1]


def _convolution_backward(
    gradient: Any, inputs: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, more: Any,
    groups: int, mask: Any, *, out_shape: Any = None,
) -> int:  # fmt: skip
    """The gradient of the input and that of the weight cost a forward each."""
    assert not transposed
    return sum(2 * math.prod(gradient) * math.prod(weight[1:]) for wanted in mask[:2] if wanted)
