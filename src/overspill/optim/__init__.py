"""Optimizer updates: `update` is the one to call; it picks the implementation by where the tensors are.

* CPU tensors, native core importable: `native` (one pass over memory, all CPUs of this process).
* CUDA tensors, or an installation without the native core: `reference` (plain torch operations).

Both follow `spec.update_rule` and give the same bits, so the choice is one of speed; `update_backend` names it, and reports
print it. A native core that is there but does not load is an error, not a reason to be slow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from overspill.optim.gradient_checks import all_finite_reference, count_non_finite, global_norm, sum_of_squares
from overspill.optim.masters import merge_master, split_master
from overspill.optim.reference import update_reference
from overspill.spec.update_rule import AdamWScalars

__all__ = [
    "UpdateBackend",
    "all_finite",
    "count_non_finite",
    "global_norm",
    "merge_master",
    "split_master",
    "sum_of_squares",
    "update",
    "update_backend",
    "update_reference",
]

UpdateBackend = Literal["native", "reference"]

_HAS_NATIVE = importlib.util.find_spec("overspill._native") is not None


def update_backend(device: str = "cpu") -> UpdateBackend:
    """Which implementation `update` uses for tensors on `device` (`cpu`, `cuda`, ...)."""
    return "native" if _HAS_NATIVE and device == "cpu" else "reference"


def update(scalars: AdamWScalars, *, parameter: Tensor, gradient: Tensor, states: Mapping[str, Tensor], num_threads: int = 0) -> None:
    """One AdamW step of one segment, in place, by the implementation that `update_backend` names.

    Args:
        scalars: of this step, from `spec.update_rule.AdamW.scalars`.
        parameter: bfloat16, float16 or float32, shape (n,). Overwritten.
        gradient: bfloat16, float16 or float32, shape (n,), on the same device. Only read.
        states: the fields of `spec.state_formats` for the parameter's dtype, each of shape (n,). Overwritten.
        num_threads: most threads of the native core, 0 for every CPU of this process; torch's own setting rules the reference.

    Raises:
        ValueError: the tensors do not fit together; nothing is written then.
    """
    if update_backend(parameter.device.type) == "native":
        from overspill.optim.native import update_native

        update_native(scalars, parameter=parameter, gradient=gradient, states=states, num_threads=num_threads)
    else:
        update_reference(scalars, parameter=parameter, gradient=gradient, states=states)


def all_finite(tensor: Tensor, *, num_threads: int = 0) -> bool:
    """Whether no element of `tensor` is infinite or NaN; on CUDA this waits for the device."""
    if update_backend(tensor.device.type) == "native":
        from overspill.optim.native import all_finite_native

        return all_finite_native(tensor, num_threads=num_threads)
    return all_finite_reference(tensor)
