"""Segments to update: parameters, gradients and states of every format, with ordinary and with extreme values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from overspill.optim import Rounding, merge_master, split_master
from overspill.spec.state_formats import resolve_state_format

EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.2e-38, 6e-8, 5.9e-8, 6.1e-5, 65504.0, 65519.0, 65520.0, 3.4e38, -3.4e38, 1e19, -1e-20]
EXTREMES += [float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 1.00390625, 1.01171875]
"""Zeros, denormals, ties and limits of fp32, fp16 and bf16, infinities, NaN."""


@dataclasses.dataclass
class SegmentTensors:
    """The arguments of one update."""

    parameter: Tensor
    gradient: Tensor
    states: dict[str, Tensor]
    state_format: str = "fp32"
    rounding: Rounding | None = None

    def clone(self) -> SegmentTensors:
        states = {name: state.clone() for name, state in self.states.items()}
        return dataclasses.replace(self, parameter=self.parameter.clone(), gradient=self.gradient.clone(), states=states)

    def to(self, device: str) -> SegmentTensors:
        states = {name: state.to(device) for name, state in self.states.items()}
        return dataclasses.replace(self, parameter=self.parameter.to(device), gradient=self.gradient.to(device), states=states)

    def cut(self, start: int, end: int) -> SegmentTensors:
        """Elements [start, end); in format int8 `start` is a multiple of 256."""
        states = {
            name: state[start // 256 : -(-end // 256)] if name.endswith("_exponent") else state[start:end]
            for name, state in self.states.items()
        }
        rounding = self.rounding and Rounding(key=self.rounding.key, first_element=self.rounding.first_element + start)
        return dataclasses.replace(
            self, parameter=self.parameter[start:end], gradient=self.gradient[start:end], states=states, rounding=rounding
        )

    @property
    def arguments(self) -> dict:
        tensors = {"parameter": self.parameter, "gradient": self.gradient, "states": self.states}
        return tensors if self.state_format == "fp32" else tensors | {"state_format": self.state_format, "rounding": self.rounding}

    @property
    def master(self) -> Tensor:
        """The fp32 master weights, a copy."""
        if self.parameter.dtype == torch.bfloat16:
            return merge_master(self.parameter, self.states["remainder"])
        return self.states.get("master", self.parameter).clone()

    def assert_same_bits(self, other: SegmentTensors) -> None:
        pairs = {"parameter": (self.parameter, other.parameter)} | {n: (self.states[n], other.states[n]) for n in self.states}
        for name, (ours, theirs) in pairs.items():
            integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
            different = (ours.view(integer) != theirs.cpu().view(integer)).nonzero().flatten()
            assert different.numel() == 0, f"{name} differs at {different[:5].tolist()}: {ours[different[:5]]} and {theirs[different[:5]]}"


def _build(
    parameter_dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    length: int,
    *,
    seed: int = 0,
    extreme: bool = False,
    state_format: str = "fp32",
    optimizer: str = "adamw",
) -> SegmentTensors:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        values = torch.randn(length, generator=generator) * scale
        if extreme:
            chosen = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), (length,), generator=generator)]
            values = torch.where(torch.rand(length, generator=generator) < 0.5, chosen, values)
        return values

    master, gradient, exp_avg, exp_avg_sq = draw(0.02), draw(1e-3), draw(1e-3), draw(1e-3).square()
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "momentum_buffer": exp_avg}
    parameter = master.to(parameter_dtype)
    if parameter_dtype == torch.bfloat16 and state_format == "fp32":
        parameter, states["remainder"] = split_master(master)
    elif parameter_dtype == torch.float16:
        states["master"] = master
    for field in resolve_state_format(state_format, str(parameter_dtype).removeprefix("torch."), optimizer).fields:
        if field.dtype == "uint8":  # any byte is a code, any byte an exponent
            low, high = (0, 256) if extreme or field.block_elements == 1 else (100, 120)
            states[field.name] = torch.randint(low, high, (field.num_values(length),), generator=generator).to(torch.uint8)
        elif field.dtype == "bfloat16":
            states[field.name] = states[field.name].to(torch.bfloat16)
    fields = resolve_state_format(state_format, str(parameter_dtype).removeprefix("torch."), optimizer).fields
    return SegmentTensors(
        parameter,
        gradient.to(gradient_dtype),
        {field.name: states[field.name] for field in fields},
        state_format,
        Rounding(key=0x9F5E3A7C12D04B68 ^ seed, first_element=256 * seed),
    )


@pytest.fixture
def build_segment() -> Callable[..., SegmentTensors]:
    """`build(parameter_dtype, gradient_dtype, length, seed=0, extreme=False, state_format="fp32", optimizer="adamw")`."""
    return _build
