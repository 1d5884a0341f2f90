"""The fast update on CPU tensors: one pass over memory in the native core (csrc/), bit for bit equal to `reference`.

Measured figures belong to benchmarks; the cost in bytes is fixed: with bf16 parameters and gradients each element is 14
bytes read and 12 written. The core knows nothing of torch: this file turns tensors into addresses. It releases the GIL, and
the caller must leave the tensors alone until it returns.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import overspill._native as _native
from overspill.optim.segment import DTYPE_NAMES, validate_segment
from overspill.spec.update_rule import AdamWScalars

MASTER_FIELDS = {"bfloat16": "remainder", "float16": "master", "float32": None}
"""Which state field completes a parameter to its master weights."""


def update_native(
    scalars: AdamWScalars,
    *,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    num_threads: int = 0,
    isa: str = "",
) -> None:
    """One AdamW step of one segment, in place; arguments and errors as `update_reference`, and

    Args:
        num_threads: most threads to use; 0 means every CPU this process may run on. Has no effect on the result.
        isa: one of `_native.supported_isas()`; "" means the best. Has no effect on the result; for tests and measurements.

    Raises:
        ValueError: also when a tensor is not on the CPU, or two of them overlap.
    """
    validate_segment(parameter, gradient, states)
    _require_cpu(parameter)
    dtype = DTYPE_NAMES[parameter.dtype]
    master = MASTER_FIELDS[dtype]
    _native.update_adamw(
        parameter_dtype=dtype,
        gradient_dtype=DTYPE_NAMES[gradient.dtype],
        num_elements=parameter.numel(),
        parameter=parameter.data_ptr(),
        gradient=gradient.data_ptr(),
        master=states[master].data_ptr() if master is not None else 0,
        exp_avg=states["exp_avg"].data_ptr(),
        exp_avg_sq=states["exp_avg_sq"].data_ptr(),
        gradient_scale=scalars.gradient_scale,
        decay=scalars.decay,
        one_minus_beta1=scalars.one_minus_beta1,
        beta2=scalars.beta2,
        one_minus_beta2=scalars.one_minus_beta2,
        step_size=scalars.step_size,
        bias_correction2_sqrt=scalars.bias_correction2_sqrt,
        eps=scalars.eps,
        num_threads=num_threads,
        isa=isa,
    )


def all_finite_native(tensor: Tensor, *, num_threads: int = 0, isa: str = "") -> bool:
    """Whether no element of `tensor` (CPU, contiguous; bfloat16, float16 or float32) is infinite or NaN; stops early."""
    _require_cpu(tensor)
    if tensor.dtype not in DTYPE_NAMES or not tensor.is_contiguous():
        raise ValueError(
            f"a contiguous tensor of {', '.join(DTYPE_NAMES.values())} is needed, got {tensor.dtype}, strides {tensor.stride()}"
        )
    return _native.all_finite(
        tensor.data_ptr(), dtype=DTYPE_NAMES[tensor.dtype], num_elements=tensor.numel(), num_threads=num_threads, isa=isa
    )


def _require_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"the native update works on CPU memory, got a tensor on {tensor.device}; use update_reference there")
