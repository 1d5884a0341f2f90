"""What a peak of memory is made of, and a prediction held against what was measured.

A peak is a sum of **terms**, each with a name, so that a prediction that misses can say which part of it may be wrong. `compare` puts a
`Prediction` and a `StepReport` side by side; relative errors are of the measured value, so 0.05 says that 5 % more was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from overspill.spec.report import Prediction

COMPARED = ("step_s", "device_peak_bytes", "host_peak_bytes", "ssd_read_bytes", "ssd_written_bytes")
"""What a row of the metrics file holds against each other."""


class MeasuredStep(Protocol):
    """What of a step is held against its prediction; `overspill.spec.report.StepReport` has it."""

    @property
    def step_s(self) -> float: ...
    @property
    def device_peak_bytes(self) -> int: ...
    @property
    def device_context_bytes(self) -> int: ...
    @property
    def host_peak_bytes(self) -> int: ...
    @property
    def ssd_read_bytes(self) -> int: ...
    @property
    def ssd_written_bytes(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryTerm:
    """A named part of a peak."""

    name: str
    num_bytes: int
    is_assumed: bool = False
    """False: it follows from the plan and its program, or was measured here."""


def total_bytes(terms: tuple[MemoryTerm, ...]) -> int:
    """The peak that the terms make."""
    return sum(term.num_bytes for term in terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One step beside its prediction."""

    predicted: Mapping[str, float | None]
    """By the names in `COMPARED`; None: nothing that can be held against a measurement (assumed rates, no terms)."""
    measured: Mapping[str, float]
    missed_by: Mapping[str, float | None]
    """Measured less predicted, over measured; None where nothing was predicted. 0 where both are 0."""

    @property
    def largest_miss(self) -> str | None:
        """The name of the figure that was missed by most; None if none was predicted."""
        known = {name: abs(value) for name, value in self.missed_by.items() if value is not None}
        return max(known, key=lambda name: known[name]) if known else None


def compare(prediction: Prediction, report: MeasuredStep) -> Comparison:
    """Hold one step against what was predicted of its program."""
    predicted = predicted_figures(prediction)
    measured: dict[str, float] = {
        "step_s": report.step_s,
        "device_peak_bytes": report.device_peak_bytes + report.device_context_bytes,
        "host_peak_bytes": report.host_peak_bytes,
        "ssd_read_bytes": report.ssd_read_bytes,
        "ssd_written_bytes": report.ssd_written_bytes,
    }
    missed = {name: _relative(predicted[name], measured[name]) for name in COMPARED}
    return Comparison(predicted=predicted, measured=measured, missed_by=missed)


def predicted_figures(prediction: Prediction) -> dict[str, float | None]:
    """What of a prediction can be held against a measurement, by the names in `COMPARED`."""
    return {
        "step_s": prediction.step_s if prediction.has_times else None,
        "device_peak_bytes": prediction.device_peak_bytes if prediction.device_terms else None,
        "host_peak_bytes": prediction.host_peak_bytes if prediction.host_terms else None,
        "ssd_read_bytes": prediction.ssd_read_bytes,
        "ssd_written_bytes": prediction.ssd_written_bytes,
    }


def _relative(predicted: float | None, measured: float) -> float | None:
    if predicted is None:
        return None
    if measured == 0:
        return 0.0 if predicted == 0 else None
    return (measured - predicted) / measured
