"""The form in which a record is stored: as it is, or in fewer bits.

A lossy form is applied on the device before the copy out and undone after the copy in, and a record that is forwarded goes through it as
well: what a gradient is does not depend on what was in time. Records of other dtypes, tensors with gaps between their elements, and what
has no gradient (a mask of 0 and -inf has a range that no 8 bits can hold) are stored as they are. So are those that stay on the device.

* `AsIs`: every bit.
* `Bf16`: fp32 in half its bytes. Error of a value: at most 2⁻⁸ of it.
* `CastFrom`: what a widening cast gave, in the dtype that it was cast from: every value (a NaN is a NaN). Records that stay have it too.
* `Int8Groups`: floating point in one byte, as Mesa stores activations (Pan et al., arXiv:2111.11124): groups of 256 consecutive elements,
  each with its least value and its range in fp32, 3 % of the group. Error of a value: at most 1/510 of its group's range. A group with a
  value that is not finite comes back as NaN.

`Bf16` and `Int8Groups` are not on unless asked for; what they do to a gradient is measured by `OffloadActivations.measure_gradient_error`.
`CastFrom` is the cache's own choice, where recomputation is allowed.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import torch

_LEVELS = 255.0


class Form(Protocol):
    """How values become bytes."""

    is_exact: ClassVar[bool]
    """Whether every value comes back as it was."""

    def applies(self, dtype: torch.dtype) -> bool:
        """Whether values of this dtype are stored in another way than as they are."""
        ...

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The stored bytes, uint8 [m], of values [n] on their device."""
        ...

    def decode(self, stored: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        """Values [n] from what `encode` gave."""
        ...


@dataclasses.dataclass(frozen=True)
class AsIs:
    """Every bit."""

    is_exact: ClassVar[bool] = True

    def applies(self, dtype: torch.dtype) -> bool:
        return False

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(torch.uint8)

    def decode(self, stored: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        return stored.view(dtype)


@dataclasses.dataclass(frozen=True)
class Bf16:
    """fp32 as bfloat16."""

    is_exact: ClassVar[bool] = False

    def applies(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.bfloat16).view(torch.uint8)

    def decode(self, stored: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        return stored.view(torch.bfloat16).to(dtype)


@dataclasses.dataclass(frozen=True)
class CastFrom:
    """The result of a widening cast as what it was cast from."""

    narrow: torch.dtype
    is_exact: ClassVar[bool] = True

    def applies(self, dtype: torch.dtype) -> bool:
        return dtype.itemsize > self.narrow.itemsize

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.narrow).view(torch.uint8)

    def decode(self, stored: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        return stored.view(self.narrow).to(dtype)


@dataclasses.dataclass(frozen=True)
class Int8Groups:
    """Floating point as 8-bit steps of each group's range."""

    is_exact: ClassVar[bool] = False
    group_elements: int = 256

    def applies(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.bfloat16, torch.float16)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        count = values.numel()
        rest = -count % self.group_elements
        padded = torch.cat([values, values[-1:].expand(rest)]) if rest else values
        groups = padded.view(-1, self.group_elements).float()
        least, most = groups.aminmax(dim=1, keepdim=True)
        step = (most - least) / _LEVELS
        codes = ((groups - least) / torch.where(step > 0, step, torch.ones_like(step))).round_().clamp_(0, _LEVELS).to(torch.uint8)
        return torch.cat([codes.view(-1), least.view(-1).view(torch.uint8), step.view(-1).view(torch.uint8)])

    def decode(self, stored: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        num_groups = -(-num_elements // self.group_elements)
        num_codes = num_groups * self.group_elements
        codes = stored[:num_codes].view(num_groups, self.group_elements).float()
        least, step = (
            stored[start : start + 4 * num_groups].clone().view(torch.float32).view(-1, 1)
            for start in (num_codes, num_codes + 4 * num_groups)
        )
        return (codes * step + least).to(dtype).view(-1)[:num_elements]


FORMS: dict[str, Form] = {"as_is": AsIs(), "bf16": Bf16(), "int8": Int8Groups()}
"""By the names that `offload_activations` takes."""
