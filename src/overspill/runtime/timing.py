"""What a session says about the time of its steps: exposed lanes, the floor, and the trace of the last step.

Rule 1. Rates are measured when somebody first asks for a floor, between steps, once a session; from then on every report has its floor.
Rule 2. The trace is of the last training step, whatever was evaluated or flushed since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from overspill.planning.floor import StepWork, build_step_work
from overspill.spec.rates import Floor, LaneRates
from overspill.spec.schedule import Lane, Schedule
from overspill.spec.trace import StepTrace, exposed_s, find_idle


class StepTiming:
    """Belongs to a session.

    Args:
        measure: the rates of its lanes; called at most once.
    """

    def __init__(self, measure: Callable[[], LaneRates]) -> None:
        self._measure = measure
        self._rates: LaneRates | None = None
        self._work: tuple[Schedule, StepWork] | None = None
        """Of the last step's program, which the next step most likely runs again."""
        self.step = 0
        """That `trace` is of."""
        self.trace: StepTrace | None = None

    @property
    def has_rates(self) -> bool:
        return self._rates is not None

    @property
    def rates(self) -> LaneRates:
        """Of the session's lanes (rule 1)."""
        if self._rates is None:
            self._rates = self._measure()
        return self._rates

    def after_step(self, step: int, trace: StepTrace) -> tuple[Mapping[str, float], Floor | None]:
        """Exposed seconds of each lane, and the floor if somebody has asked for one."""
        self.step, self.trace = step, trace
        return exposed_s(find_idle(trace.spans, trace.step_s)), self.floor() if self._rates is not None else None

    def floor(self) -> Floor:
        """Of the last step; asks for the rates.

        Raises:
            ValueError: there was no step yet.
        """
        if self.trace is None:
            raise ValueError("there is no step yet whose floor could be told; make one first")
        schedule = self.trace.schedule
        if self._work is None or self._work[0] is not schedule:
            self._work = (schedule, build_step_work(schedule, self.rates))
        work = self._work[1]
        forward_s = backward_s = 0.0
        for span in self.trace.spans:
            if span.lane is Lane.COMPUTE:
                if span.op < work.first_backward:
                    forward_s += span.end_s - span.start_s
                else:
                    backward_s += span.end_s - span.start_s
        return work.floor(forward_s=forward_s, backward_s=backward_s)
