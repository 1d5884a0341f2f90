"""From completions to a trace: when each op of a schedule that has ended ran, and what it waited for.

While a step runs, an op costs it one clock reading and one list; the rest is done here when somebody asks for it (`LazyTrace`), or slice by
slice while the thread that dispatches the next step would only wait.

Rules:

1. What an op of lane `compute` waits for inside its job, it waits for before anything else there: its span begins after that.
2. An op waits for buffers too, and a buffer may have been used last by an earlier step. What the step before had left under way when
   this one began (`runtime/landing`) is in the trace, with numbers below zero; all that is older has ended, and is left out.
3. What this step has left under way has its spans here too, beyond the step's end: reading a trace waits for it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from overspill.runtime.landing import Landing
from overspill.runtime.lanes import Completion
from overspill.spec.schedule import Evict, Fetch, Free, Lane, Schedule
from overspill.spec.trace import Span, StepTrace

SLICE_OPS = 32
"""Looked at together. Chosen: half a millisecond on a slow host, for which nothing else is held up."""


class Recorder:
    """What the dispatching thread notes of each op, in program order.

    Args:
        base, base_s: the step's begin, by the device and by `time.perf_counter`.
        earlier: what the step before had left under way.
    """

    def __init__(self, base: torch.cuda.Event | None, base_s: float, earlier: Landing | None = None) -> None:
        self.base, self.base_s, self._earlier = base, base_s, earlier
        self.submitted_s: list[float] = []
        """By `time.perf_counter`."""
        self.waits: list[list[Completion]] = []
        """Completions that the op waits for; one that is found later is appended."""

    def slices(
        self, schedule: Schedule, completions: Sequence[Completion], step_s: float, lands_later: bool = False
    ) -> Generator[None, None, StepTrace]:
        """The trace, with a stop every `SLICE_OPS` ops. All completions have ended."""
        base, base_s = self.base, self.base_s
        numbers = {id(completion): index for index, completion in enumerate(completions)}
        ends_s = [0.0] * len(completions)
        earlier: list[Span] = []
        for span, completion in self._earlier.spans(base_s) if self._earlier is not None else ():
            earlier.append(span)
            numbers[id(completion)] = span.op
        earlier_ends_s = {span.op: span.end_s for span in earlier}
        spans: list[Span] = []
        compute = Lane.COMPUTE
        for index, item in enumerate(schedule.ops):
            op = item.op
            kind = type(op)
            if not index % SLICE_OPS:
                yield
            if kind is Free:
                continue
            begin_s, end_s = completions[index].span_s(base, base_s)
            submitted_s = ready_s = self.submitted_s[index] - base_s
            waits = []
            for completion in self.waits[index]:
                wait = numbers.get(id(completion))  # rule 2
                if wait is not None and wait < index:
                    waits.append(wait)
                    wait_end_s = ends_s[wait] if wait >= 0 else earlier_ends_s[wait]
                    if wait_end_s > ready_s:
                        ready_s = wait_end_s
            if item.lane is compute and ready_s > begin_s:  # rule 1
                begin_s = min(ready_s, end_s)
            ends_s[index] = end_s
            num_bytes = op.num_bytes if kind is Fetch or kind is Evict else 0  # type: ignore[union-attr]
            spans.append(Span(index, item.lane, begin_s, end_s, submitted_s, ready_s, num_bytes, tuple(waits)))
        return StepTrace(
            schedule=schedule,
            spans=tuple(spans),
            step_s=step_s,
            lands_later=lands_later,
            earlier=tuple(earlier),
            earlier_schedule=self._earlier.schedule if self._earlier is not None else None,
        )


class LazyTrace:
    """A trace that is put together when it is first asked for, or before that by `advance`.

    Args:
        landing: what the step has left under way (rule 3); None: it has waited for all.
    """

    def __init__(
        self,
        recorder: Recorder,
        schedule: Schedule,
        completions: Sequence[Completion],
        step_s: float,
        *,
        landing: Landing | None = None,
    ) -> None:
        self._source: tuple[Recorder, Schedule, Sequence[Completion], float, Landing | None] | None
        self._source = (recorder, schedule, completions, step_s, landing)
        self._slices: Generator[None, None, StepTrace] | None = None
        self._trace: StepTrace | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it has been put together."""
        return self._trace is not None

    def get(self) -> StepTrace:
        """Asks each op's events for their times, once; waits for those that are still under way, whose failure others tell."""
        while self._trace is None:
            self._advance()
        return self._trace

    def advance(self) -> bool:
        """Go on by one slice, if that needs no wait; whether there was one."""
        if self._trace is not None:
            return False
        assert self._source is not None
        landing = self._source[-1]
        if self._slices is None and landing is not None and not landing.is_over:
            return False
        self._advance()
        return True

    def _advance(self) -> None:
        assert self._source is not None
        recorder, schedule, completions, step_s, landing = self._source
        if self._slices is None:
            if landing is not None:
                landing.settle()
            self._slices = recorder.slices(schedule, completions, step_s, landing is not None)
        try:
            next(self._slices)
        except StopIteration as end:
            self._trace, self._source, self._slices = end.value, None, None
        except BaseException:  # Ctrl-C: what was begun is begun again
            self._slices = None
            raise
