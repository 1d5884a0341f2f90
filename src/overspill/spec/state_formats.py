"""State formats: what an optimizer keeps beside a parameter, in which numbers, and where in a record it lies.

Words:

* **parameter**: what the model reads, in the dtype it computes in. It is stored by itself, not in the state.
* **master weights**: the fp32 values that the update acts on. The parameter is their rounding.
* **moment**: a running mean that the optimizer keeps: AdamW `exp_avg` and `exp_avg_sq`, Lion `exp_avg`, SGD with momentum
  `momentum_buffer`, plain SGD none.
* **state field**: one array with a value per element of a bundle, or one per block of elements: the moments, and what the
  master needs.
* **record**: the state of one chunk of a bundle as it rests on a tier.

Bytes per element with AdamW (Lion and SGD with momentum keep one moment instead of two, plain SGD none):

| format | parameter dtype | parameter | master        | moments       | state | with the parameter |
|--------|-----------------|-----------|---------------|---------------|-------|--------------------|
| `fp32` | bfloat16        | 2         | remainder 2   | 4 + 4         | 10    | 12                 |
| `fp32` | float16         | 2         | master 4      | 4 + 4         | 12    | 14                 |
| `fp32` | float32         | 4         | 0, its own    | 4 + 4         | 8     | 12                 |
| `bf16` | bfloat16        | 2         | none          | 2 + 2         | 4     | 6                  |
| `bf16` | float32         | 4         | 0, its own    | 2 + 2         | 4     | 8                  |
| `int8` | bfloat16        | 2         | none          | 1 + 1 + 2/256 | 2.01  | 4.01               |
| `int8` | float32         | 4         | 0, its own    | 1 + 1 + 2/256 | 2.01  | 6.01               |

A gradient that waits for the norm (clipping, loss scaling) adds its own 2 or 4 bytes; it is not state. float16 parameters
have only `fp32`: a 16-bit weight without a master loses small updates, and fp16 small weights as well.

Rules:

1. In format `fp32` a bf16 parameter is the high half of its master: high = (bits + 0x8000) >> 16 is the nearest bf16, ties
   away from zero; the state keeps the signed 16-bit remainder, and master bits = (high << 16) + remainder modulo 2**32.
   Nothing is kept twice and nothing is lost (`optim.masters`).
2. In the other formats whatever is stored in fewer bits than fp32 is rounded stochastically: up with the probability of
   what would be cut off, so that updates far below one unit of the last place still add up on average. Nearest rounding
   would lose them: with beta2 = 0.999 a moment changes by less than half a unit of bf16's last place in most steps.
   The random bits are those of `rng`: from 32 bits w for an element and step, the parameter takes the low 16, the first
   moment the high 16 (bf16) or 20 (int8), the second moment the high bits of w * 0x9e3779b1 modulo 2**32.
3. bf16, stochastically: (fp32 bits + 16 random bits) >> 16.
4. A record is chunk-major: a chunk of n elements is stored as its fields one after the other, in the order of `fields`,
   each itemsize bytes a value, without gaps, and the whole is filled up to `RECORD_ALIGNMENT_BYTES`. `record_bytes` is the
   one source of that size. Chunks are multiples of 4096 elements (`spec.tensors`), so fields of one value an element start on
   4096-byte boundaries.
5. Zero bytes are the state before the first step, in every format.

**The 8-bit codes.** 256 elements in a row of a tensor (blocks never span two tensors: `TENSOR_ALIGNMENT_ELEMENTS`) share one
byte, the block exponent E; an element is a floating-point number of 8 bits relative to it:

* first moments: 1 sign, 4 exponent, 3 mantissa bits; second moments: no sign, 5 exponent, 3 mantissa bits.
* With T = 15 or 31, the largest exponent field: a code with exponent field e > 0 and mantissa f is
  (1 + f/8) * 2**(E - 127 - T + e), with e = 0 it is (f/8) * 2**(E - 126 - T).
* E is the smallest that holds the block's largest magnitude, rounded up or not; at least T + 22, so that every code is a
  normal fp32 number and so is what encoding multiplies with. E = 255 says that the block holds a value that is not finite
  (or above 1.875 * 2**127): all of it reads NaN.
* A second moment that is not 0 is stored as at least the smallest code, because dividing by the root of 0 plus eps would
  blow the update up.

Range: from the block's largest magnitude down to 2**-14 of it (second moments 2**-30, which is 2**-15 of the gradients' size)
with steps of 1/8 to 1/16 of a value, then evenly down to 2**-17 (2**-33). Error of one rounding: at most 12.5 % of the value, 4 % in the
root mean square, 0 on average. Block exponents are powers of two on purpose: a value that is on the grid stays on it when
the block's exponent moves, so a slowly changing moment is only rounded by its change. Holding a second moment of constant
statistics for thousands of steps (beta2 = 0.999) costs a noise of about 20 % of it, 10 % of its root (tests/optim/test_formats.py).
"""

from __future__ import annotations

import dataclasses
import functools

from overspill.spec.tensors import DTYPE_BYTES, TENSOR_ALIGNMENT_ELEMENTS
from overspill.units import align_up

STATE_FORMATS = ("fp32", "bf16", "int8")
"""Formats that `resolve_state_format` knows."""

STATE_BLOCK_ELEMENTS = 256
"""Elements that share one exponent in format `int8`. The native core has the same number."""

RECORD_ALIGNMENT_BYTES = 4096
"""What direct I/O wants of a record's size."""

assert TENSOR_ALIGNMENT_ELEMENTS % STATE_BLOCK_ELEMENTS == 0, "a block would span two tensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateField:
    """One array of the state."""

    name: str
    dtype: str
    """A key of `spec.tensors.DTYPE_BYTES`."""
    block_elements: int = 1
    """Elements that share one value."""

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return DTYPE_BYTES[self.dtype]

    def num_values(self, num_elements: int) -> int:
        """Values for a tensor or chunk of `num_elements`; the last block may be short."""
        return -(-num_elements // self.block_elements)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateFormat:
    """A state format resolved for one parameter dtype and one optimizer: its fields, in the order of the record."""

    name: str
    parameter_dtype: str
    optimizer: str
    """An `OptimizerKind` of `spec.update_rule`."""
    fields: tuple[StateField, ...]

    @property
    def is_rounded_stochastically(self) -> bool:
        """Whether an update needs random bits."""
        return self.name != "fp32"

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the moments, first and second, without what belongs to the master."""
        return MOMENTS[self.optimizer]

    @property
    def bytes_per_element(self) -> float:
        """Bytes of all fields of one element, shares of blocks included; the parameter itself is not among them."""
        return sum(field.itemsize / field.block_elements for field in self.fields)

    @property
    def bytes_per_element_with_parameter(self) -> float:
        """Bytes of one element at rest: state and parameter."""
        return self.bytes_per_element + DTYPE_BYTES[self.parameter_dtype]

    def record_bytes(self, num_elements: int) -> int:
        """Bytes of the record of a chunk of `num_elements` (rule 4)."""
        return align_up(sum(field.num_values(num_elements) * field.itemsize for field in self.fields), RECORD_ALIGNMENT_BYTES)

    def field_ranges(self, num_elements: int) -> dict[str, tuple[int, int]]:
        """Each field's bytes [start, end) in the record of a chunk of `num_elements`, in the order of the record."""
        ranges = {}
        start = 0
        for field in self.fields:
            end = start + field.num_values(num_elements) * field.itemsize
            ranges[field.name] = (start, end)
            start = end
        return ranges


MOMENTS: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": (),
    "sgd_momentum": ("momentum_buffer",),
    "sgd_nesterov": ("momentum_buffer",),
}
"""Optimizer kind -> its moments; the second one is never negative."""

_MASTERS = {
    "bfloat16": (StateField(name="remainder", dtype="int16"),),
    "float16": (StateField(name="master", dtype="float32"),),
    "float32": (),
}
_MOMENT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "uint8"}


def exponents_of(moment: str) -> str:
    """Name of the field with the block exponents of a moment."""
    return f"{moment}_exponent"


@functools.lru_cache(maxsize=64)
def resolve_state_format(name: str, parameter_dtype: str, optimizer: str = "adamw") -> StateFormat:
    """The fields that format `name` keeps beside a parameter of `parameter_dtype` under `optimizer`.

    Raises:
        ValueError: the format or the optimizer is unknown, or there is no layout for this dtype; the message lists what there is.
    """
    if name not in STATE_FORMATS:
        raise ValueError(f"state format {name!r} is unknown; choose one of: {', '.join(STATE_FORMATS)}")
    if optimizer not in MOMENTS:
        raise ValueError(f"optimizer {optimizer!r} is unknown; choose one of: {', '.join(MOMENTS)}")
    if parameter_dtype not in _MASTERS:
        raise ValueError(
            f"state format {name!r} has no layout for parameters of {parameter_dtype}; load the model as one of: {', '.join(_MASTERS)}"
        )
    if name != "fp32" and parameter_dtype == "float16":
        raise ValueError(
            f"state format {name!r} has no layout for parameters of float16, which need fp32 master weights; "
            "use state format fp32, or compute in bfloat16 or float32"
        )
    fields = _MASTERS[parameter_dtype] if name == "fp32" else ()
    fields += tuple(StateField(name=moment, dtype=_MOMENT_DTYPES[name]) for moment in MOMENTS[optimizer])
    if name == "int8":
        fields += tuple(
            StateField(name=exponents_of(moment), dtype="uint8", block_elements=STATE_BLOCK_ELEMENTS) for moment in MOMENTS[optimizer]
        )
    return StateFormat(name=name, parameter_dtype=parameter_dtype, optimizer=optimizer, fields=fields)
