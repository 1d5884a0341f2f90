"""The plain update: `spec.update_rule` line by line in torch operations, on any device. Slow, and the judge of the fast one.

How it keeps rule 1 (one rounding per operation, the same bits on CPU and CUDA):

* no addcmul, addcdiv or lerp, which may fuse a multiply and an add;
* `add` and `sub` of two tensors are computed as a + alpha * b with alpha = 1 or -1, exact even when fused;
* `x / number` is avoided: on CUDA torch multiplies by the number's reciprocal. A 0-d tensor on the same device divides;
* `torch.sqrt` in fp32 is avoided: on the CPU it is MKL's, wrong in the last bit for 6 values in 1000 (measured, torch 2.13).
  The root is taken in float64 and rounded to fp32, which is the correctly rounded root even if the float64 one is off by
  an ulp: with 24-bit x and a 25-bit midpoint M, |x - M * M| is at least 2**-48, so sqrt(x) is at least 4 float64 ulps from
  M. (Figueroa, "When is double rounding innocuous?", 1995, for the exact case.)
* assumed, and tested where there is a GPU: torch's CUDA fp32 division is correctly rounded, and denormals are kept (torch is
  built without fast-math). On the CPU `torch.set_flush_denormal` must be off, which is its default.

Cost: about 20 passes over memory, and temporaries of a slice of 1 Mi elements (some 20 MiB), not of the segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from overspill.optim.masters import merge_master, split_master
from overspill.optim.segment import validate_segment
from overspill.spec.update_rule import AdamWScalars

SLICE_ELEMENTS = 1024 * 1024
"""Elements updated at once; bounds the temporaries. Chosen, not tuned. The result does not depend on it."""


@torch.no_grad()
def update_reference(scalars: AdamWScalars, *, parameter: Tensor, gradient: Tensor, states: Mapping[str, Tensor]) -> None:
    """One AdamW step of one segment, in place.

    Args:
        scalars: of this step, from `AdamW.scalars`.
        parameter: bfloat16, float16 or float32, shape (n,). Overwritten.
        gradient: bfloat16, float16 or float32, shape (n,), on the parameter's device. Only read.
        states: the fields of format `fp32` for the parameter's dtype, each of shape (n,). Overwritten.

    Raises:
        ValueError: the tensors do not fit together (`optim.segment`); nothing is written then.
    """
    validate_segment(parameter, gradient, states)
    for start in range(0, parameter.numel(), SLICE_ELEMENTS):
        part = slice(start, start + SLICE_ELEMENTS)
        _update_slice(scalars, parameter[part], gradient[part], {name: state[part] for name, state in states.items()})


def _update_slice(s: AdamWScalars, parameter: Tensor, gradient: Tensor, states: Mapping[str, Tensor]) -> None:
    p = _read_master(parameter, states)
    m, v = states["exp_avg"], states["exp_avg_sq"]
    # The numbers are those of the list in spec/update_rule.py.
    g = gradient.float() * s.gradient_scale  # 1, 2
    p = p * s.decay  # 3
    d = (g - m) * s.one_minus_beta1  # 4, 5
    m.add_(d)  # 6
    b = (g * s.one_minus_beta2) * g  # 8, 9
    v.mul_(s.beta2)  # 7
    v.add_(b)  # 10
    denom = torch.sqrt(v.double()).float()  # 11
    denom = denom / torch.full((), s.bias_correction2_sqrt, dtype=torch.float32, device=denom.device)  # 12
    denom = denom + s.eps  # 13
    u = (m * s.step_size) / denom  # 14, 15
    p = p - u  # 16
    for values in (p, m, v):
        _store_quiet_nan(values)
    _write_master(p, parameter, states)  # 17


def _read_master(parameter: Tensor, states: Mapping[str, Tensor]) -> Tensor:
    if parameter.dtype == torch.bfloat16:
        return merge_master(parameter, states["remainder"])
    return states["master"] if parameter.dtype == torch.float16 else parameter


def _write_master(p: Tensor, parameter: Tensor, states: Mapping[str, Tensor]) -> None:
    if parameter.dtype == torch.bfloat16:
        high, remainder = split_master(p)
        parameter.copy_(high)
        states["remainder"].copy_(remainder)
    elif parameter.dtype == torch.float16:
        states["master"].copy_(p)
        parameter.copy_(p)
        _store_quiet_nan(parameter)
    else:
        parameter.copy_(p)


def _store_quiet_nan(values: Tensor) -> None:
    """Rule 2: whichever NaN is there, in place, becomes 0x7fc00000 (fp16: 0x7e00)."""
    values.masked_fill_(values.isnan(), math.nan)
