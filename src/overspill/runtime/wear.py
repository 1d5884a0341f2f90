"""A session's watch over the life of its SSD: counts what is written, forecasts, and warns once if the drive would not last.

Over several drives the stripes are dealt out evenly, so each takes its share of the bytes; the one that would end first is told of.
The forecast takes all bytes that the session's stores wrote since the end of its first step (loading is left out, checkpoints are in)
and the time of the steps since. Evaluation and pauses are left out, so a real day writes less.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

from overspill.planning import predict_step
from overspill.report.lifetime import describe_forecast, describe_run, describe_wear, wear_warning
from overspill.spec.hardware import HardwareSpec
from overspill.spec.lifetime import DriveHealth, Wear, WearForecast, build_wear, forecast_wear
from overspill.spec.plan import Plan
from overspill.tiers import RecordStore
from overspill.tiers.block_device import is_block_device
from overspill.tiers.wear import WriteCounter, drive_shares, read_drive_health

FIRST_FORECAST_STEPS = 3
"""Steps after the first before the guard judges. Chosen: one slow step is no rate."""


class SsdWear:
    """Watches the stores of one session.

    Args:
        stores: whose writes count; all in the plan's SSD places.
        beside: where to count if all of these are raw devices: the directory of checkpoints; None: this session alone is counted.
        read_health, shares: tests give their own.
    """

    def __init__(
        self,
        plan: Plan,
        stores: Sequence[RecordStore],
        *,
        beside: str | None = None,
        read_health: Callable[[str], DriveHealth | None] = read_drive_health,
        shares: Callable[[Sequence[str]], Sequence[tuple[str, float]]] = drive_shares,
    ) -> None:
        places = plan.ssd_places
        self._plan, self._stores = plan, tuple(stores)
        self._counter = WriteCounter(next((place for place in places if not is_block_device(place)), beside))
        self._drives = tuple((share, read_health(place)) for place, share in shares(places))
        """Of each: the share of the stripes, and its health when the session opened."""
        self._num_steps = 0
        self._steps_s = 0.0
        self._first_bytes = 0
        """Of the session, when its first step ended."""
        self._has_warned = False
        self._besides_bytes = 0

    @property
    def state(self) -> Wear:
        """What is known now of the drive that would end first."""
        wears = []
        for share, health in self._drives:
            if health is not None:
                health = dataclasses.replace(health, written_bytes=health.written_bytes + round(share * self._session_bytes()))
            own_bytes, rated_bytes = self._counter.written_bytes, self._plan.ssd_rated_bytes
            wears.append(build_wear(own_bytes=own_bytes, rated_bytes=rated_bytes, health=health, share_fraction=share))
        return min(wears, key=lambda wear: math.inf if wear.remaining_bytes is None else wear.remaining_bytes / wear.share_fraction)

    def describe(self) -> str:
        """`describe_wear`, with where it was counted."""
        return describe_wear(self.state) if self._counter.path is not None else describe_wear(self.state, where="in this session")

    def after_step(self, step_s: float, *, land: Callable[[], None] = lambda: None) -> int:
        """Count; bytes written over the directory's life. The guard warns once.

        Args:
            land: waits for what the step has left under way; called after the first one, from whose end the forecast counts.
        """
        if not self._num_steps:
            land()
        now = self._session_bytes()
        self._counter.note(now)
        if self._num_steps:
            self._steps_s += step_s
        else:
            self._first_bytes = now
        self._num_steps += 1
        if not self._has_warned and self._num_steps > FIRST_FORECAST_STEPS:
            forecast = self.forecast()
            assert forecast is not None
            text = wear_warning(self.state, forecast, min_years=self._plan.ssd_min_years, description=self.describe())
            if text is not None:
                self._has_warned = True
                warnings.warn(text, RuntimeWarning, stacklevel=3)
        return self._counter.written_bytes

    def add(self, num_bytes: int) -> None:
        """Count bytes that were written in the directory besides the session's stores, and are no part of a step."""
        self._besides_bytes += num_bytes
        if self._num_steps:
            self._first_bytes += num_bytes

    def forecast(self) -> WearForecast | None:
        """At the measured rate; None before the second step has ended."""
        if self._num_steps < 2 or self._steps_s <= 0:
            return None
        steps = self._num_steps - 1
        written = self._session_bytes() - self._first_bytes
        return forecast_wear(self.state, bytes_per_step=written / steps, step_s=self._steps_s / steps)

    def announce(self, num_steps: int) -> tuple[str, ...]:
        """Sentences before the first step."""
        per_step = predict_step(self._plan, HardwareSpec()).ssd_written_bytes
        sentences = [describe_run(self.state, bytes_per_step=per_step, num_steps=num_steps), self.describe()]
        if not self._counter.is_complete:
            sentences.append(f"earlier writes were lost from {self._counter.path}: the count starts again")
        if any(health is not None and health.has_warning for _, health in self._drives):
            sentences.append("the drive reports a critical condition (SMART): look at it before you train")
        return tuple(sentences)

    def summarize(self) -> str:
        """One sentence after the last step."""
        forecast = self.forecast()
        return "; ".join([*([describe_forecast(forecast)] if forecast is not None else []), self.describe()])

    def save(self) -> None:
        """Make the count durable: at checkpoints and at the end."""
        self._counter.note(self._session_bytes())
        self._counter.save()

    def _session_bytes(self) -> int:
        return self._besides_bytes + sum(records.store.written_bytes for records in self._stores)


def watch_wear(plan: Plan, stores: Sequence[RecordStore], *, beside: str | None) -> SsdWear | None:
    """A watch over a session's stores; None if there is none, or they are in no place of the plan."""
    return SsdWear(plan, stores, beside=beside) if stores and plan.ssd_places else None
