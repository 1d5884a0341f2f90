"""The fast update on CPU tensors: one pass over memory in the native core (csrc/), bit for bit equal to `reference`.

Measured figures belong to benchmarks; the cost in bytes is fixed: with bf16 parameters and gradients AdamW reads 14 and
writes 12 bytes an element in format fp32, 8 and 6 in bf16, 6 and 4 in int8. The core knows nothing of torch: this file turns
tensors into addresses.

* `update_chunk_native` returns when the update is made; it releases the GIL meanwhile.
* `start_update_chunk_native` returns when the core's threads have it: they make what was started in order, and go from one to the next
  without the interpreter. What is started holds its tensors until it has ended.

The caller leaves the tensors alone until then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

import overspill._native as _native
from overspill.cores import usable_cores
from overspill.optim.segment import DTYPE_NAMES, SEGMENT_DTYPE, GradientStats, pack_scalars, validate_scalars
from overspill.spec.state_formats import StateFormat, exponents_of
from overspill.spec.update_rule import UpdateScalars


def update_chunk_native(
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
) -> GradientStats:
    """One optimizer step of all segments of a chunk in one call, in place.

    Args:
        scalars: those that the table's rows number.
        segments: a table of `SEGMENT_DTYPE`, in element order.
        parameter, gradient, states: the chunk's arrays, of `state_format`; not checked again, the core checks addresses.
        num_threads: most threads to use; 0 means one a core (`usable_cores`). Has no effect on the result.
        isa: one of `_native.supported_isas()`; "" means the best. Has no effect on the result; for tests and measurements.

    Raises:
        ValueError: a tensor is not on the CPU, arrays overlap, or the table does not fit the chunk; nothing is written then.
    """
    call = _call(scalars, segments, state_format, parameter, gradient, states, num_threads)
    num_non_finite, squares = _native.update_ranges(**call, isa=isa, with_stats=with_stats)
    return GradientStats(num_non_finite=num_non_finite, sum_of_squares=squares)


def start_update_chunk_native(
    scalars: Sequence[UpdateScalars],
    segments: np.ndarray,
    *,
    state_format: StateFormat,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    num_threads: int = 0,
) -> _native.StartedUpdate:
    """The same without a look at the gradient, started: arguments and errors as there; nothing raises later. Table and scalars are the
    caller's again, and the tensors when it has ended."""
    call = _call(scalars, segments, state_format, parameter, gradient, states, num_threads)
    return _native.start_update_ranges((parameter, gradient, *states.values()), **call, with_stats=False)


def _call(
    scalars: Sequence[UpdateScalars],
    segments: np.ndarray,
    state_format: StateFormat,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    num_threads: int,
) -> dict[str, Any]:
    """As the core takes it."""
    _require_cpu(parameter)
    validate_scalars(scalars, state_format)
    if segments.dtype != SEGMENT_DTYPE or not segments.flags.c_contiguous:
        raise ValueError(f"a table of segments has dtype {SEGMENT_DTYPE} in one piece, got {segments.dtype}")
    master = next((states[name].data_ptr() for name in ("remainder", "master") if name in states), 0)
    moments = [states[name].data_ptr() for name in state_format.moments]
    exponents = [states[exponents_of(name)].data_ptr() if state_format.name == "int8" else 0 for name in state_format.moments]
    return {
        "rule": state_format.optimizer,
        "state_format": state_format.name,
        "parameter_dtype": state_format.parameter_dtype,
        "gradient_dtype": DTYPE_NAMES[gradient.dtype],
        "num_elements": parameter.numel(),
        "parameter": parameter.data_ptr(),
        "gradient": gradient.data_ptr(),
        "master": master,
        "moments": (*moments, 0, 0)[:2],
        "exponents": (*exponents, 0, 0)[:2],
        "ranges": segments.ctypes.data,
        "num_ranges": len(segments),
        "scalars": pack_scalars(scalars),
        "num_threads": num_threads or usable_cores(),
    }


def all_finite_native(tensor: Tensor, *, num_threads: int = 0, isa: str = "") -> bool:
    """Whether no element of `tensor` (CPU, contiguous; bfloat16, float16 or float32) is infinite or NaN; stops early."""
    _require_cpu(tensor)
    if tensor.dtype not in DTYPE_NAMES or not tensor.is_contiguous():
        raise ValueError(
            f"a contiguous tensor of {', '.join(DTYPE_NAMES.values())} is needed, got {tensor.dtype}, strides {tensor.stride()}"
        )
    return _native.all_finite(
        tensor.data_ptr(), dtype=DTYPE_NAMES[tensor.dtype], num_elements=tensor.numel(), num_threads=num_threads or usable_cores(), isa=isa
    )


def _require_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"the native update works on CPU memory, got a tensor on {tensor.device}; use update_reference there")
