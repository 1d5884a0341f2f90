"""Optimizer updates: `update` (one segment) and `update_chunk` (all segments of a chunk) pick the implementation by where the tensors are.

* CPU tensors, native core importable: `native` (one pass over memory, all CPUs of this process).
* CUDA tensors, Triton importable and working there (`backends`): `fused` (one pass over memory, on the device).
* Elsewhere, or without these: `reference` (plain torch operations). On CUDA one warning says why.

`start_update_chunk` starts the native one and returns.

All follow `spec.update_rule` and `spec.state_formats` and give the same bits, so the choice is one of speed;
`update_backend` names it. A native core that is there but does not load is an error, not a reason to be slow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from overspill.optim.backends import is_fused
from overspill.optim.gradient_checks import all_finite_reference, count_non_finite, global_norm, sum_of_squares, sums_of_squares
from overspill.optim.masters import merge_master, split_master
from overspill.optim.narrow import decode_moment
from overspill.optim.reference import update_reference
from overspill.optim.segment import NO_STATS, SEGMENT_DTYPE, GradientStats, Rounding, segment_table, validate_rounding, validate_segment
from overspill.spec.state_formats import StateFormat
from overspill.spec.update_rule import UpdateScalars

if TYPE_CHECKING:
    from overspill._native import StartedUpdate

__all__ = [
    "SEGMENT_DTYPE",
    "GradientStats",
    "Rounding",
    "UpdateBackend",
    "all_finite",
    "count_non_finite",
    "decode_moment",
    "global_norm",
    "let_helpers_give_way",
    "merge_master",
    "split_master",
    "start_update_chunk",
    "sum_of_squares",
    "sums_of_squares",
    "update",
    "update_backend",
    "update_chunk",
    "update_reference",
]

UpdateBackend = Literal["native", "fused", "reference"]

_HAS_NATIVE = importlib.util.find_spec("overspill._native") is not None


def update_backend(device: str = "cpu") -> UpdateBackend:
    """Which implementation `update` uses for tensors on `device` (`cpu`, `cuda`, `cuda:0`, ...)."""
    if device == "cpu":
        return "native" if _HAS_NATIVE else "reference"
    return "fused" if is_fused(device) else "reference"


def let_helpers_give_way() -> None:
    """For the rest of this process the threads that help with updates on the host run at a lower priority than all others (Linux, native
    core): a thread that feeds a GPU beside them is then not put aside for a time slice of theirs. Who calls `update` keeps his own."""
    if _HAS_NATIVE:
        from overspill import _native

        _native.let_helpers_give_way()


def update(
    scalars: UpdateScalars,
    *,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    state_format: str = "fp32",
    rounding: Rounding | None = None,
    with_stats: bool = True,
    num_threads: int = 0,
    isa: str = "",
) -> GradientStats:
    """One optimizer step of one segment, in place, by the implementation that `update_backend` names.

    Args:
        scalars: of this step, from the optimizer's `scalars`; they say which rule.
        parameter: bfloat16, float16 or float32, shape (n,). Overwritten.
        gradient: bfloat16, float16 or float32, shape (n,), on the same device. Only read.
        states: the fields of `spec.state_formats` for format, parameter dtype and optimizer. Overwritten.
        state_format: `fp32`, `bf16` or `int8`.
        rounding: where the random bits come from; needed for all formats but `fp32`.
        with_stats: look at the gradient in passing; on CUDA this waits for the device.
        num_threads: most threads of the native core, 0 for one a core (`overspill.cores`); torch's own setting rules the reference.
        isa: one of `_native.supported_isas()`; "" means the best. Has no effect on the result, nor on the reference; for tests and
            measurements.

    Raises:
        ValueError: the tensors do not fit together, or the native core is given two that overlap; nothing is written then.
    """
    resolved = validate_segment(parameter, gradient, states, format_name=state_format, optimizer=scalars.kind)
    validate_rounding(rounding, resolved)
    return update_chunk(
        [scalars],
        segment_table(parameter.numel(), rounding),
        state_format=resolved,
        parameter=parameter,
        gradient=gradient,
        states=states,
        with_stats=with_stats,
        num_threads=num_threads,
        isa=isa,
    )


def update_chunk(
    scalars: Sequence[UpdateScalars],
    segments: np.ndarray,
    *,
    state_format: StateFormat,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    with_stats: bool = True,
    num_threads: int = 0,
    isa: str = "",
    gates: Tensor | None = None,
) -> GradientStats:
    """One optimizer step of all segments of a chunk, in place; threads are woken, or a kernel is launched, once.

    Args:
        scalars: those that the rows of `segments` number: one set for each weight decay.
        segments: a table of `SEGMENT_DTYPE`, in element order. Elements in no segment are left alone.
        state_format: what `states` are in, resolved.
        num_threads, isa: as in `update`.
        gates: float64, shape (n,), on the parameter's device: unless all are finite nothing is changed. The fused kernel looks at them
            on the device, in the order of the stream; the others wait for them.

    Raises:
        ValueError: tensors or table do not fit together.
    """
    backend = update_backend(str(parameter.device))
    if backend == "fused":
        from overspill.optim.fused import update_chunk_fused

        return update_chunk_fused(
            scalars,
            segments,
            state_format=state_format,
            parameter=parameter,
            gradient=gradient,
            states=states,
            with_stats=with_stats,
            gates=gates,
        )
    if gates is not None and not bool(torch.isfinite(gates).all()):
        return NO_STATS
    if backend == "native":
        from overspill.optim.native import update_chunk_native

        return update_chunk_native(
            scalars,
            segments,
            state_format=state_format,
            parameter=parameter,
            gradient=gradient,
            states=states,
            with_stats=with_stats,
            num_threads=num_threads,
            isa=isa,
        )
    num_non_finite, squares = 0, 0.0
    for start, num_elements, key, first_element, index in segments.tolist():
        end = start + num_elements
        stats = update_reference(
            scalars[index],
            parameter=parameter[start:end],
            gradient=gradient[start:end],
            states={
                field.name: states[field.name][start // field.block_elements : -(-end // field.block_elements)]
                for field in state_format.fields
            },
            state_format=state_format.name,
            rounding=Rounding(key=key, first_element=first_element),
            with_stats=with_stats,
        )
        num_non_finite, squares = num_non_finite + stats.num_non_finite, squares + stats.sum_of_squares
    return GradientStats(num_non_finite=num_non_finite, sum_of_squares=squares)


def start_update_chunk(
    scalars: Sequence[UpdateScalars],
    segments: np.ndarray,
    *,
    state_format: StateFormat,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    num_threads: int = 0,
) -> StartedUpdate | None:
    """Begin the same on CPU tensors, without a look at the gradient: whoever begins the next update meanwhile loses no time between them.
    None: it is made (there is no native core). Tensors are the caller's again when it has ended; updates that are under way share none.

    Raises:
        ValueError: tensors or table do not fit together; nothing is written then. No failure comes later.
    """
    if update_backend(str(parameter.device)) != "native":
        update_chunk(scalars, segments, state_format=state_format, parameter=parameter, gradient=gradient, states=states, with_stats=False)
        return None
    from overspill.optim.native import start_update_chunk_native

    return start_update_chunk_native(
        scalars,
        segments,
        state_format=state_format,
        parameter=parameter,
        gradient=gradient,
        states=states,
        num_threads=num_threads,
    )


def all_finite(tensor: Tensor, *, num_threads: int = 0) -> bool:
    """Whether no element of `tensor` is infinite or NaN.

    Reads each element once and stops soon after the first that is; no temporaries on the CPU (a tensor that is not
    contiguous is looked at by plain torch, slice by slice). On CUDA this waits for the device.

    Raises:
        ValueError: not a dense tensor of bfloat16, float16 or float32 with values (one on the meta device has none).
    """
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta":
        what = f"a {tensor.layout} tensor on {tensor.device}" if isinstance(tensor, Tensor) else repr(type(tensor).__name__)
        raise ValueError(f"all_finite looks at a dense tensor with values, got {what}")
    if tensor.device.type == "cpu" and _HAS_NATIVE and tensor.is_contiguous():
        from overspill.optim.native import all_finite_native

        return all_finite_native(tensor, num_threads=num_threads)
    return all_finite_reference(tensor)
