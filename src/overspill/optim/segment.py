"""What an update is given: the tensors of a chunk, the table of its segments, and what they must look like.

A segment is a part of one tensor, a range of elements of the chunk's arrays: the parameter, its gradient, and its state fields
(`spec.state_formats`), all with the same element numbers. Weight decay and random bits differ between tensors, so a chunk
comes with a table of its segments; one call updates them all. Both implementations of the update check the same things with
the same words, here.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from overspill.spec.state_formats import STATE_BLOCK_ELEMENTS, StateFormat, resolve_state_format
from overspill.spec.update_rule import UpdateScalars
from overspill.units import align_up

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""Dtypes that a parameter or a gradient may have, as `spec` names them."""

SEGMENT_DTYPE = np.dtype(
    [("start", "<i8"), ("num_elements", "<i8"), ("key", "<u8"), ("first_element", "<u4"), ("scalars", "<u4")], align=True
)
"""One row of a segment table, as the native core reads it: first element in the chunk, number of elements, `rng.rounding_key` of
tensor and step, first element in the tensor modulo 2**32, and which of the scalars given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding:
    """Where the random bits of a segment come from (`rng`); no effect in format `fp32`."""

    key: int
    """`rng.rounding_key` of the tensor and the step."""
    first_element: int = 0
    """Of the tensor, at the segment's start, modulo 2**32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientStats:
    """What an update saw of the gradient as it was given, before scaling."""

    num_non_finite: int
    """Elements that are infinite or NaN."""
    sum_of_squares: float
    """For reports: the native core is within 1e-6 of it (groups of 256 elements in fp32, csrc/src/squares.hpp), and those last
    bits depend on how tensors are cut into chunks. `gradient_checks` has the norm that clipping uses."""


SCALARS = (
    "gradient_scale",
    "decay",
    "beta1",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "step_size",
    "bias_correction2_factor",
    "eps",
    "momentum",
    "weight_decay",
)
"""The order of `UpdateScalars` in csrc/include/overspill/update.hpp and in `fused_kernels`."""


NO_STATS = GradientStats(num_non_finite=0, sum_of_squares=0.0)
"""Of an update that was told not to look."""


def segment_table(num_elements: int, rounding: Rounding | None = None) -> np.ndarray:
    """A table of one segment that is all of the arrays."""
    rounding = rounding or Rounding(key=0)
    return np.array([(0, num_elements, rounding.key, rounding.first_element, 0)], dtype=SEGMENT_DTYPE)


def pack_scalars(scalars: Sequence[UpdateScalars]) -> list[tuple[float, ...]]:
    """As the native core and the kernels take them."""
    return [_SCALARS_OF(item) for item in scalars]


_SCALARS_OF = operator.attrgetter(*SCALARS)


def validate_scalars(scalars: Sequence[UpdateScalars], state_format: StateFormat) -> None:
    """Check that the scalars are of the optimizer whose state is given.

    Raises:
        ValueError: they are of another.
    """
    for item in scalars:
        if item.kind != state_format.optimizer:
            raise ValueError(f"the scalars are of the optimizer {item.kind}, the state is of {state_format.optimizer}; use one optimizer")


def validate_rounding(rounding: Rounding | None, state_format: StateFormat) -> None:
    """Check that there are random bits where the format needs some.

    Raises:
        ValueError: there are none.
    """
    if rounding is None and state_format.is_rounded_stochastically:
        raise ValueError(f"state format {state_format.name} rounds stochastically; give rounding=Rounding(key=...), see overspill.rng")


def validate_table(segments: np.ndarray, *, num_elements: int, state_format: StateFormat, num_scalars: int) -> None:
    """Check a table of segments against the chunk it is of, as the native core does and in its words.

    Raises:
        ValueError: another dtype, segments out of order, overlapping or beyond the chunk, a start inside a block of format int8, or
            scalars that were not given.
    """
    if segments.dtype != SEGMENT_DTYPE or not segments.flags.c_contiguous:
        raise ValueError(f"a table of segments has dtype {SEGMENT_DTYPE} in one piece, got {segments.dtype}")
    end = 0
    for index, (start, number, _, _, scalars) in enumerate(segments.tolist()):
        where = f"range {index} (start {start}, {number} elements)"
        if number < 0 or start < end or start + number > num_elements:
            raise ValueError(f"{where} must start at or after {end} and end within the chunk's {num_elements} elements")
        if state_format.name == "int8" and start % STATE_BLOCK_ELEMENTS:
            raise ValueError(f"{where} must start at a multiple of {STATE_BLOCK_ELEMENTS} in format int8, whose blocks share an exponent")
        if scalars >= num_scalars:
            raise ValueError(f"{where} wants scalars {scalars}, only {num_scalars} were given")
        end = align_up(start + number, STATE_BLOCK_ELEMENTS) if state_format.name == "int8" else start + number


def validate_segment(
    parameter: Tensor, gradient: Tensor, states: Mapping[str, Tensor], *, format_name: str = "fp32", optimizer: str = "adamw"
) -> StateFormat:
    """Check the tensors of one update; the state format they fit.

    Raises:
        ValueError: a dtype without an update, a missing or unknown state field, or a tensor whose dtype, length, device or
            layout does not fit.
    """
    for name, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"a {name} of {tensor.dtype} has no update; use one of {', '.join(DTYPE_NAMES.values())}")
    state_format = resolve_state_format(format_name, DTYPE_NAMES[parameter.dtype], optimizer)
    expected = [field.name for field in state_format.fields]
    if set(states) != set(expected):
        raise ValueError(
            f"a {state_format.parameter_dtype} parameter under {optimizer} in format {format_name} needs the states "
            f"{', '.join(expected) or 'none'}, got {', '.join(states) or 'none'}"
        )
    lengths = {"parameter": parameter.numel(), "gradient": parameter.numel()}
    for field in state_format.fields:
        lengths[field.name] = field.num_values(parameter.numel())
        if states[field.name].dtype != getattr(torch, field.dtype):
            raise ValueError(
                f"{field.name} must be {field.dtype} beside a {state_format.parameter_dtype} parameter in format {format_name}, "
                f"got {states[field.name].dtype}"
            )
    for name, tensor in (("parameter", parameter), ("gradient", gradient), *states.items()):
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be 1-D and contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
        if tensor.numel() != lengths[name] or tensor.device != parameter.device:
            count = lengths[name]
            wanted = "" if count == parameter.numel() else f" ({count} values are needed)"
            raise ValueError(
                f"{name} has {tensor.numel()} elements on {tensor.device}, "
                f"the parameter {parameter.numel()} on {parameter.device}{wanted}; pass the same segment of each"
            )
    return state_format
