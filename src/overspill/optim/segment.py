"""What an update is given: the tensors of one segment, and what they must look like.

A segment is a part of one tensor, as 1-D views into the bundle's arrays: the parameter, its gradient, and its state fields
(`spec.state_formats`), all of the same length, device and element numbers. Both implementations of the update check the
same things with the same words, here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from overspill.spec.state_formats import StateFormat, resolve_state_format

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""Dtypes that a parameter or a gradient may have, as `spec` names them."""


def validate_segment(parameter: Tensor, gradient: Tensor, states: Mapping[str, Tensor], *, format_name: str = "fp32") -> StateFormat:
    """Check the tensors of one update; the state format they fit.

    Raises:
        ValueError: a dtype without an update, a missing or unknown state field, or a tensor whose dtype, length, device or
            layout does not fit.
    """
    for name, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"a {name} of {tensor.dtype} has no update; use one of {', '.join(DTYPE_NAMES.values())}")
    state_format = resolve_state_format(format_name, DTYPE_NAMES[parameter.dtype])
    expected = [field.name for field in state_format.fields]
    if set(states) != set(expected):
        raise ValueError(
            f"a {state_format.parameter_dtype} parameter needs the states {', '.join(expected)}, got {', '.join(states) or 'none'}"
        )
    for field in state_format.fields:
        if states[field.name].dtype != getattr(torch, field.dtype):
            raise ValueError(
                f"{field.name} must be {field.dtype} beside a {state_format.parameter_dtype} parameter, got {states[field.name].dtype}"
            )
    for name, tensor in (("parameter", parameter), ("gradient", gradient), *states.items()):
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be 1-D and contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
        if tensor.numel() != parameter.numel() or tensor.device != parameter.device:
            raise ValueError(
                f"{name} has {tensor.numel()} elements on {tensor.device}, the parameter {parameter.numel()} on {parameter.device}; "
                f"pass the same segment of each"
            )
    return state_format
