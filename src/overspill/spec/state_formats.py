"""State formats: what an optimizer keeps beside a parameter, and where in a record it lies.

Words:

* **parameter**: what the model reads, in the dtype it computes in. It is stored by itself, not in the state.
* **master weights**: the fp32 values that the update acts on. The parameter is their rounding.
* **state field**: one array with one value per element of a bundle: `exp_avg`, `exp_avg_sq`, and what the master needs.
* **record**: the state of one chunk of a bundle as it rests on a tier.

Bytes per element of format `fp32` (Adam in fp32 whatever the model computes in):

| parameter dtype | parameter | master                | exp_avg + exp_avg_sq | state | with the parameter |
|-----------------|-----------|-----------------------|----------------------|-------|--------------------|
| bfloat16        | 2         | remainder 2           | 4 + 4                | 10    | 12                 |
| float16         | 2         | master 4              | 4 + 4                | 12    | 14                 |
| float32         | 4         | 0, its own master     | 4 + 4                | 8     | 12                 |

A gradient that waits for the norm (clipping, loss scaling) adds its own 2 or 4 bytes; it is not state.

Rules:

1. A bf16 parameter is the high half of its master: high = (bits + 0x8000) >> 16 is the nearest bf16, ties away from zero;
   the state keeps the signed 16-bit remainder, and master bits = (high << 16) + remainder modulo 2**32. Nothing is kept
   twice and nothing is lost (`optim.masters`).
2. A record is chunk-major: a chunk of n elements is stored as its fields one after the other, in the order of `fields`,
   each n * itemsize bytes, without gaps. Chunks are multiples of 4096 elements (`spec.tensors`), so every field starts and
   ends on a 4096-byte boundary.

Formats that are named but not built yet: `bf16` (all states bf16, stochastic rounding) and `int8` (blockwise scales).
"""

from __future__ import annotations

import dataclasses

from overspill.spec.tensors import DTYPE_BYTES

STATE_FORMATS = ("fp32",)
"""Formats that `resolve_state_format` knows."""

PLANNED_STATE_FORMATS = ("bf16", "int8")
"""Formats that come later; asking for one says so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateField:
    """One array of the state: one value per element."""

    name: str
    dtype: str
    """A key of `spec.tensors.DTYPE_BYTES`."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateFormat:
    """A state format resolved for one parameter dtype: its fields, in the order of the record."""

    name: str
    parameter_dtype: str
    fields: tuple[StateField, ...]

    @property
    def bytes_per_element(self) -> int:
        """Bytes of all fields of one element; the parameter itself is not among them."""
        return sum(field.itemsize for field in self.fields)

    @property
    def bytes_per_element_with_parameter(self) -> int:
        """Bytes of one element at rest: state and parameter."""
        return self.bytes_per_element + DTYPE_BYTES[self.parameter_dtype]

    def record_bytes(self, num_elements: int) -> int:
        """Bytes of the record of a chunk of `num_elements`."""
        return num_elements * self.bytes_per_element

    def field_ranges(self, num_elements: int) -> dict[str, tuple[int, int]]:
        """Each field's bytes [start, end) in the record of a chunk of `num_elements`, in the order of the record."""
        ranges = {}
        start = 0
        for field in self.fields:
            end = start + num_elements * field.itemsize
            ranges[field.name] = (start, end)
            start = end
        return ranges


_MOMENTS = (StateField(name="exp_avg", dtype="float32"), StateField(name="exp_avg_sq", dtype="float32"))
_FP32_FIELDS = {
    "bfloat16": (StateField(name="remainder", dtype="int16"), *_MOMENTS),
    "float16": (StateField(name="master", dtype="float32"), *_MOMENTS),
    "float32": _MOMENTS,
}


def resolve_state_format(name: str, parameter_dtype: str) -> StateFormat:
    """The fields that format `name` keeps beside a parameter of `parameter_dtype`.

    Raises:
        ValueError: the format is unknown or not built yet, or has no layout for this dtype; the message lists what there is.
    """
    if name not in STATE_FORMATS:
        known, later = ", ".join(STATE_FORMATS), ", ".join(PLANNED_STATE_FORMATS)
        problem = "is not available yet" if name in PLANNED_STATE_FORMATS else "is unknown"
        raise ValueError(f"state format {name!r} {problem}; choose one of: {known} (coming later: {later})")
    if parameter_dtype not in _FP32_FIELDS:
        raise ValueError(
            f"state format {name!r} has no layout for parameters of {parameter_dtype}; load the model as one of: {', '.join(_FP32_FIELDS)}"
        )
    return StateFormat(name=name, parameter_dtype=parameter_dtype, fields=_FP32_FIELDS[parameter_dtype])
