"""From completions to a trace: when each op of a schedule that has ended ran, and what it waited for.

While a step runs, an op costs it one clock reading and one list; the rest is done here when somebody asks for it (`LazyTrace`), outside
of its time.

Rules:

1. What an op of lane `compute` waits for inside its job, it waits for before anything else there: its span begins after that.
2. An op waits for buffers too, and a buffer may have been used last by an earlier step; that has ended, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overspill.runtime.lanes import Completion
from overspill.spec.schedule import Evict, Fetch, Free, Lane, Schedule
from overspill.spec.trace import Span, StepTrace


class Recorder:
    """What the dispatching thread notes of each op, in program order."""

    def __init__(self, base: torch.cuda.Event | None, base_s: float) -> None:
        self._base, self._base_s = base, base_s
        self.submitted_s: list[float] = []
        """By `time.perf_counter`."""
        self.waits: list[list[Completion]] = []
        """Completions that the op waits for; one that is found later is appended."""

    def trace(self, schedule: Schedule, completions: Sequence[Completion], step_s: float) -> StepTrace:
        """All completions have ended well."""
        base, base_s = self._base, self._base_s
        numbers = {id(completion): index for index, completion in enumerate(completions)}
        ends_s = [0.0] * len(completions)
        spans: list[Span] = []
        compute = Lane.COMPUTE
        for index, item in enumerate(schedule.ops):
            op = item.op
            kind = type(op)
            if kind is Free:
                continue
            begin_s, end_s = completions[index].span_s(base, base_s)
            submitted_s = ready_s = self.submitted_s[index] - base_s
            waits = []
            for completion in self.waits[index]:
                wait = numbers.get(id(completion))  # rule 2
                if wait is not None and wait < index:
                    waits.append(wait)
                    if ends_s[wait] > ready_s:
                        ready_s = ends_s[wait]
            if item.lane is compute and ready_s > begin_s:  # rule 1
                begin_s = min(ready_s, end_s)
            ends_s[index] = end_s
            num_bytes = op.num_bytes if kind is Fetch or kind is Evict else 0  # type: ignore[union-attr]
            spans.append(Span(index, item.lane, begin_s, end_s, submitted_s, ready_s, num_bytes, tuple(waits)))
        return StepTrace(schedule=schedule, spans=tuple(spans), step_s=step_s)


class LazyTrace:
    """A trace that is put together when it is first asked for."""

    def __init__(self, recorder: Recorder, schedule: Schedule, completions: Sequence[Completion], step_s: float) -> None:
        self._source: tuple[Recorder, Schedule, Sequence[Completion], float] | None = (recorder, schedule, completions, step_s)
        self._trace: StepTrace | None = None

    def get(self) -> StepTrace:
        """Asks each op's events for their times, once."""
        if self._trace is None:
            assert self._source is not None
            recorder, schedule, completions, step_s = self._source
            self._trace = recorder.trace(schedule, completions, step_s)
            self._source = None
        return self._trace
