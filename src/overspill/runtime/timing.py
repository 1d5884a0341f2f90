"""What a session says about the time of its steps: exposed lanes, the floor, and the trace of the last step.

Rule 1. Rates are measured when somebody first asks for a floor, between steps, once a session; from then on every report has its floor.
    Who is about to predict has them looked at again.
Rule 2. The trace is of the last training step, whatever was evaluated or flushed since.
Rule 3. Reading a step's times takes milliseconds, and waits until the step has landed (`runtime/landing`). It happens when somebody
    asks; else in slices, wherever the thread that dispatches the next step would only wait, and what is left when all its ops are under
    way. So a report that nobody looks at costs no step any time, as long as the host is ahead, and holds no events for long. Who asks at
    once gives away what would land under the next forward.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable

from overspill.planning.floor import StepWork, build_step_work
from overspill.runtime.trace import LazyTrace
from overspill.spec.rates import Floor, LaneRates
from overspill.spec.report import StepTimes
from overspill.spec.schedule import Lane, Schedule
from overspill.spec.trace import StepTrace, exposed_s, lane_busy_s


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
        self._lazy: LazyTrace | None = None
        self._previous: weakref.ref[LazyTimes] | None = None
        """Of the last step's report."""

    @property
    def trace(self) -> StepTrace | None:
        return self._lazy.get() if self._lazy is not None else None

    @property
    def has_rates(self) -> bool:
        return self._rates is not None

    @property
    def rates(self) -> LaneRates:
        """Of the session's lanes (rule 1)."""
        if self._rates is None:
            self._rates = self._measure()
        return self._rates

    def look_again(self, measure: Callable[[LaneRates], LaneRates]) -> None:
        """At rates that somebody has asked for; nothing if nobody has.

        Args:
            measure: the rates by both looks, from those that are known.
        """
        if self._rates is not None:
            self._rates, self._work = measure(self._rates), None

    def after_step(self, step: int, lazy: LazyTrace) -> LazyTimes:
        """The step's times, read when they are asked for."""
        self.step, self._lazy = step, lazy
        times = LazyTimes(self, lazy)
        self._previous = weakref.ref(times)
        return times

    def read_previous(self) -> None:
        """While the next step's work is under way: read the times of the step before, if anybody still has its report (rule 3)."""
        times = self._previous() if self._previous is not None else None
        if times is not None:
            times()

    def advance_previous(self) -> bool:
        """A slice of that, if it needs no wait; whether there was anything to do."""
        times = self._previous() if self._previous is not None else None
        return times is not None and times.advance()

    def read(self, lazy: LazyTrace) -> StepTimes:
        """The floor is among them if somebody has asked for the rates by then."""
        begun_s = time.perf_counter()
        trace = lazy.get()
        exposed = exposed_s(trace.idle())
        floor = self._floor_of(trace) if self._rates is not None else None
        busy = lane_busy_s(trace.spans)
        return StepTimes(lane_busy_s=busy, exposed_s=exposed, floor=floor, trace_s=time.perf_counter() - begun_s)

    def floor(self) -> Floor:
        """Of the last step; asks for the rates.

        Raises:
            ValueError: there was no step yet.
        """
        if self.trace is None:
            raise ValueError("there is no step yet whose floor could be told; make one first")
        return self._floor_of(self.trace)

    def _floor_of(self, trace: StepTrace) -> Floor:
        schedule = trace.schedule
        if self._work is None or self._work[0] is not schedule:
            self._work = (schedule, build_step_work(schedule, self.rates))
        work = self._work[1]
        forward_s = backward_s = 0.0
        for span in trace.spans:
            if span.lane is Lane.COMPUTE:
                if span.op < work.first_backward:
                    forward_s += span.end_s - span.start_s
                else:
                    backward_s += span.end_s - span.start_s
        return work.floor(forward_s=forward_s, backward_s=backward_s)


class LazyTimes:
    """Reads a step's times once; afterwards it holds no trace, which has an event or two of every op."""

    def __init__(self, timing: StepTiming, lazy: LazyTrace) -> None:
        self._timing = timing
        self._lazy: LazyTrace | None = lazy
        self._times: StepTimes | None = None
        self._spent_s = 0.0

    def advance(self) -> bool:
        """Go on with reading by a slice, if that needs no wait; whether there was one."""
        if self._lazy is None:
            return False
        begun_s = time.perf_counter()
        has_more = self._lazy.advance()
        self._spent_s += time.perf_counter() - begun_s
        if has_more:
            return True
        if not self._lazy.is_complete:
            return False
        self()
        return True

    def __call__(self) -> StepTimes:
        if self._times is None:
            assert self._lazy is not None
            times = self._timing.read(self._lazy)
            self._times = dataclasses.replace(times, trace_s=times.trace_s + self._spent_s)
            self._lazy = None
        return self._times
