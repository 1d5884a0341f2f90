"""The plain update: `spec.update_rule` line by line in torch operations, on any device. Slow, and the judge of the fast one.

How it keeps rule 1 (one rounding per operation, the same bits on CPU and CUDA):

* no addcmul, addcdiv or lerp, which may fuse a multiply and an add;
* `add` and `sub` of two tensors are computed as a + alpha * b with alpha = 1 or -1, exact even when fused;
* `torch.sqrt` in fp32 is avoided: on the CPU it is MKL's, wrong in the last bit for 6 values in 1000 (measured, torch 2.13).
  The root is taken in float64 and rounded to fp32, which is the correctly rounded root even if the float64 one is off by
  an ulp: with 24-bit x and a 25-bit midpoint M, |x - M * M| is at least 2**-48, so sqrt(x) is at least 4 float64 ulps from
  M. (Figueroa, "When is double rounding innocuous?", 1995, for the exact case.)
* assumed, and tested where there is a GPU: torch's CUDA fp32 division of two tensors is correctly rounded, and denormals are
  kept (torch is built without fast-math). On the CPU `torch.set_flush_denormal` must be off, which is its default.

Cost: 20 passes over memory and more, and temporaries of a slice of 1 Mi elements (some 20 MiB; with stochastic rounding 60),
not of the segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from overspill.optim.gradient_checks import count_non_finite, sum_of_squares
from overspill.optim.masters import merge_master, split_master
from overspill.optim.narrow import decode_moment, encode_moment, round_to_bfloat16, rounding_words, second_words
from overspill.optim.segment import NO_STATS, GradientStats, Rounding, validate_rounding, validate_scalars, validate_segment
from overspill.spec.state_formats import STATE_BLOCK_ELEMENTS, StateFormat, exponents_of
from overspill.spec.update_rule import UpdateScalars

SLICE_ELEMENTS = 1024 * 1024
"""Elements updated at once (rounded up to whole blocks); bounds the temporaries. Chosen, not tuned. The result does not depend on it."""


@torch.no_grad()
def update_reference(
    scalars: UpdateScalars,
    *,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    state_format: str = "fp32",
    rounding: Rounding | None = None,
    with_stats: bool = True,
) -> GradientStats:
    """One optimizer step of one segment, in place.

    Args:
        scalars: of this step, from the optimizer's `scalars`; they say which rule.
        parameter: bfloat16, float16 or float32, shape (n,). Overwritten.
        gradient: bfloat16, float16 or float32, shape (n,), on the parameter's device. Only read.
        states: the fields of the state format for the parameter's dtype, one value per element or block. Overwritten.
        state_format: `fp32`, `bf16` or `int8`.
        rounding: where the random bits come from; needed for all formats but `fp32`.
        with_stats: look at the gradient; on CUDA this waits for the device.

    Raises:
        ValueError: the tensors do not fit together (`optim.segment`); nothing is written then.
    """
    resolved = validate_segment(parameter, gradient, states, format_name=state_format, optimizer=scalars.kind)
    validate_scalars([scalars], resolved)
    validate_rounding(rounding, resolved)
    step = -(-SLICE_ELEMENTS // STATE_BLOCK_ELEMENTS) * STATE_BLOCK_ELEMENTS
    for start in range(0, parameter.numel(), step):
        part = slice(start, min(start + step, parameter.numel()))
        fields = {field.name: states[field.name][_values(part, field.block_elements)] for field in resolved.fields}
        _update_slice(scalars, resolved, parameter[part], gradient[part], fields, rounding, start)
    if not with_stats:
        return NO_STATS
    return GradientStats(num_non_finite=count_non_finite(gradient), sum_of_squares=float(sum_of_squares(gradient)))


def _values(part: slice, block_elements: int) -> slice:
    """The values of a field that belong to the elements of `part`, which starts with a block."""
    return slice(part.start // block_elements, -(-part.stop // block_elements))


def _update_slice(
    s: UpdateScalars,
    state_format: StateFormat,
    parameter: Tensor,
    gradient: Tensor,
    states: Mapping[str, Tensor],
    rounding: Rounding | None,
    offset: int,
) -> None:
    p = _read_master(parameter, states)
    moments = [_read_moment(name, states, is_signed=index == 0) for index, name in enumerate(state_format.moments)]
    g = gradient.float() * s.gradient_scale  # 1, 2
    p, moments = _RULES[s.kind](s, p, g, moments)
    for values in (p, *moments):
        _store_quiet_nan(values)
    words = None
    if state_format.is_rounded_stochastically:
        assert rounding is not None
        words = rounding_words(rounding, offset, parameter.numel(), parameter.device)
    _write_master(p, parameter, states, words)
    for index, (name, values) in enumerate(zip(state_format.moments, moments, strict=True)):
        _write_moment(name, values, states, words, is_signed=index == 0)


# The numbers are those of the lists in spec/update_rule.py.


def _adamw(s: UpdateScalars, p: Tensor, g: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    m, v = moments
    p = p * s.decay  # 3
    m = m + (g - m) * s.one_minus_beta1  # 4, 5, 6
    v = (v * s.beta2) + (g * s.one_minus_beta2) * g  # 7, 8, 9, 10
    denom = torch.sqrt(v.double()).float()  # 11
    denom = denom * s.bias_correction2_factor + s.eps  # 12, 13
    return p - (m * s.step_size) / denom, [m, v]  # 14, 15, 16


def _sgd(s: UpdateScalars, p: Tensor, g: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    g = g + p * s.weight_decay  # 3, 4
    return p - g * s.step_size, moments  # 9, 10


def _sgd_momentum(s: UpdateScalars, p: Tensor, g: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    g = g + p * s.weight_decay  # 3, 4
    m = moments[0] * s.momentum + g  # 5, 6
    g = g + m * s.momentum if s.kind == "sgd_nesterov" else m  # 7, 8
    return p - g * s.step_size, [m]  # 9, 10


def _lion(s: UpdateScalars, p: Tensor, g: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    c = moments[0] * s.beta1 + g * s.one_minus_beta1  # 3, 4, 5
    u = torch.where(c > 0, s.step_size, torch.where(c < 0, -s.step_size, c))  # 6
    p = p * s.decay - u  # 7, 8
    return p, [moments[0] * s.beta2 + g * s.one_minus_beta2]  # 9, 10, 11


_RULES = {"adamw": _adamw, "sgd": _sgd, "sgd_momentum": _sgd_momentum, "sgd_nesterov": _sgd_momentum, "lion": _lion}


def _read_master(parameter: Tensor, states: Mapping[str, Tensor]) -> Tensor:
    if "remainder" in states:
        return merge_master(parameter, states["remainder"])
    return states["master"] if "master" in states else parameter.float()


def _write_master(p: Tensor, parameter: Tensor, states: Mapping[str, Tensor], words: Tensor | None) -> None:
    if "remainder" in states:
        high, remainder = split_master(p)
        parameter.copy_(high)
        states["remainder"].copy_(remainder)
    elif "master" in states:
        states["master"].copy_(p)
        parameter.copy_(p)
        _store_quiet_nan(parameter)
    elif parameter.dtype == torch.bfloat16:
        assert words is not None
        parameter.copy_(round_to_bfloat16(p, words & 0xFFFF))
    else:
        parameter.copy_(p)


def _read_moment(name: str, states: Mapping[str, Tensor], *, is_signed: bool) -> Tensor:
    moment = states[name]
    if moment.dtype == torch.uint8:
        return decode_moment(moment, states[exponents_of(name)], is_signed=is_signed)
    return moment.float()


def _write_moment(name: str, values: Tensor, states: Mapping[str, Tensor], words: Tensor | None, *, is_signed: bool) -> None:
    moment = states[name]
    if moment.dtype == torch.float32:
        moment.copy_(values)
        return
    assert words is not None
    random = words if is_signed else second_words(words)
    if moment.dtype == torch.bfloat16:
        moment.copy_(round_to_bfloat16(values, random >> 16))
        return
    codes, exponents = encode_moment(values, random >> 12, is_signed=is_signed)
    moment.copy_(codes)
    states[exponents_of(name)].copy_(exponents)


def _store_quiet_nan(values: Tensor) -> None:
    """Rule 2: whichever NaN is there, in place, becomes 0x7fc00000 (fp16: 0x7e00)."""
    values.masked_fill_(values.isnan(), math.nan)
