"""Segments to update: parameters, gradients and states of every format, with ordinary and with extreme values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from overspill.optim import merge_master, split_master
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

    def clone(self) -> SegmentTensors:
        return SegmentTensors(self.parameter.clone(), self.gradient.clone(), {name: state.clone() for name, state in self.states.items()})

    def to(self, device: str) -> SegmentTensors:
        return SegmentTensors(
            self.parameter.to(device), self.gradient.to(device), {name: state.to(device) for name, state in self.states.items()}
        )

    def cut(self, start: int, end: int) -> SegmentTensors:
        return SegmentTensors(
            self.parameter[start:end], self.gradient[start:end], {name: state[start:end] for name, state in self.states.items()}
        )

    @property
    def arguments(self) -> dict:
        return {"parameter": self.parameter, "gradient": self.gradient, "states": self.states}

    @property
    def master(self) -> Tensor:
        """The fp32 master weights, a copy."""
        if self.parameter.dtype == torch.bfloat16:
            return merge_master(self.parameter, self.states["remainder"])
        return self.states.get("master", self.parameter).clone()

    def assert_same_bits(self, other: SegmentTensors) -> None:
        pairs = {"parameter": (self.parameter, other.parameter)} | {n: (self.states[n], other.states[n]) for n in self.states}
        for name, (ours, theirs) in pairs.items():
            integer = torch.int32 if ours.element_size() == 4 else torch.int16
            different = (ours.view(integer) != theirs.cpu().view(integer)).nonzero().flatten()
            assert different.numel() == 0, f"{name} differs at {different[:5].tolist()}: {ours[different[:5]]} and {theirs[different[:5]]}"


def _build(
    parameter_dtype: torch.dtype, gradient_dtype: torch.dtype, length: int, *, seed: int = 0, extreme: bool = False
) -> SegmentTensors:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        values = torch.randn(length, generator=generator) * scale
        if extreme:
            chosen = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), (length,), generator=generator)]
            values = torch.where(torch.rand(length, generator=generator) < 0.5, chosen, values)
        return values

    master, gradient, exp_avg, exp_avg_sq = draw(0.02), draw(1e-3), draw(1e-3), draw(1e-3).square()
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    parameter = master.to(parameter_dtype)
    if parameter_dtype == torch.bfloat16:
        parameter, states["remainder"] = split_master(master)
    elif parameter_dtype == torch.float16:
        states["master"] = master
    fields = resolve_state_format("fp32", str(parameter_dtype).removeprefix("torch.")).fields
    return SegmentTensors(parameter, gradient.to(gradient_dtype), {field.name: states[field.name] for field in fields})


@pytest.fixture
def build_segment() -> Callable[..., SegmentTensors]:
    """`build(parameter_dtype, gradient_dtype, length, seed=0, extreme=False)`."""
    return _build
