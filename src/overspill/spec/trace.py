"""What ran when in a step, and what kept the compute lane waiting: pure functions from the spans of its ops.

Words:

* **span**: the time in which one op was under way on its lane.
* **busy** time of a lane: at least one of its ops was under way (transfers of one lane may overlap and count once).
* **exposed** time of a lane: the compute lane was idle, and what it waited for was under way on this lane. Work that runs under
  compute is not exposed; only exposed time makes a step longer.
* **dispatch**: the compute lane was idle, and nothing that it waited for was under way: the host's cost of ending ops, waking lanes
  and issuing the next ops.

How exposed time is found. The next compute op after an idle gap (at a step's end: the step's end, which waits for all ops unless the
step lands later) has waited for other ops. The gap is gone through backwards, from its end: time between the end of the op that ended
last and the start of what waited for it is dispatch; the time in which that op was under way belongs to its lane; before it, the same
is asked of what this op itself waited for. So a fetch from host to device that waited for the drive exposes the drive and not the link.

Rules:

1. An op waits for the ops that the schedule names, for those that still used the buffer it fills, and for the one before it on its lane.
2. Every moment of a step is the compute lane's busy time, dispatch, or exposed time of exactly one lane: together they are the step.
3. A transfer that was started while the one before it on its lane was under way, and waited for nothing else that long, is preceded by
   that one's start: both belong to the same lane.
4. What a step leaves under way when it ends (`StepTrace.lands_later`) has its spans beyond the step's end, is busy time of its own step,
   and is exposed in the next one, where somebody waits for it.

Limits: on a GPU a compute op is under way from its first kernel to its last, so launches that are slower than kernels count as busy.
Clocks of device and host agree to some 10 us.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from overspill.spec.schedule import Lane, Op, Schedule

DISPATCH = "dispatch"


class Span(NamedTuple):
    """One op's time on its lane, in seconds since the schedule began. A named tuple: a step makes one of every op."""

    op: int
    """Index in the schedule; below -1 for ops of the step before."""
    lane: Lane
    start_s: float
    """When it began: what it waited for was there, and its lane had come to it."""
    end_s: float
    submitted_s: float = 0.0
    """When the program had come to it."""
    ready_s: float = 0.0
    """When it was submitted and all that it waits for, its lane left out, had ended."""
    num_bytes: int = 0
    """Moved over a link."""
    waits: tuple[int, ...] = ()
    """Ops that it waited for (rule 1, its lane left out), in no order."""

    @property
    def blocked_s(self) -> float:
        """Submitted, and waiting for other ops."""
        return max(0.0, self.ready_s - self.submitted_s)

    @property
    def queued_s(self) -> float:
        """Ready, and waiting for its lane."""
        return max(0.0, self.start_s - self.ready_s)


class Idle(NamedTuple):
    """A part of the time in which the compute lane was idle."""

    start_s: float
    end_s: float
    cause: str
    """The lane that is exposed, or `DISPATCH`."""
    op: int
    """The op of that lane that was under way, below -1 one of the step before; -1 for dispatch."""
    waiting: int
    """The compute op that waited; -1: the end of the step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTrace:
    """All spans of one run of a schedule."""

    schedule: Schedule
    spans: tuple[Span, ...]
    """In program order; a `Free` has none."""
    step_s: float
    lands_later: bool = False
    """Whether the step ended with its compute, and other ops ended after it (rule 4)."""
    earlier: tuple[Span, ...] = ()
    """Ops of the step before that were under way when this one began, in its program's order, by this one's clock."""
    earlier_schedule: Schedule | None = None
    """Of the step before, if there are any."""

    def op(self, number: int) -> Op:
        """Of a span, this step's or the one's before."""
        if number >= 0:
            return self.schedule.ops[number].op
        assert self.earlier_schedule is not None
        return self.earlier_schedule.ops[number + len(self.earlier_schedule.ops) + 1].op

    def idle(self) -> list[Idle]:
        """`find_idle` of this step."""
        return find_idle([*self.earlier, *self.spans], self.step_s, lands_later=self.lands_later)


def busy_s(spans: Iterable[Span], *lanes: Lane) -> float:
    """Seconds in which at least one of `lanes` had an op under way."""
    return _covered_s((span.start_s, span.end_s) for span in spans if span.lane in lanes)


def overlap_s(spans: Iterable[Span], one: Lane, other: Lane) -> float:
    """Seconds in which both lanes had work."""
    chosen = [span for span in spans if span.lane in (one, other)]
    return busy_s(chosen, one) + busy_s(chosen, other) - busy_s(chosen, one, other)


def lane_busy_s(spans: Iterable[Span]) -> dict[str, float]:
    """`busy_s` of each lane."""
    times: dict[int, list[tuple[float, float]]] = {id(lane): [] for lane in Lane}  # hashing an enum costs more than all the rest
    for span in spans:
        times[id(span.lane)].append((span.start_s, span.end_s))
    return {lane.value: _covered_s(times[id(lane)]) for lane in Lane}


def exposed_s(idle: Iterable[Idle]) -> dict[str, float]:
    """Seconds of the step that each lane but `compute`, and dispatch, made it longer; with compute's busy time they sum to the step."""
    total = {**{lane.value: 0.0 for lane in Lane if lane is not Lane.COMPUTE}, DISPATCH: 0.0}
    for part in idle:
        total[part.cause] += part.end_s - part.start_s
    return total


def find_idle(spans: Sequence[Span], step_s: float, *, lands_later: bool = False) -> list[Idle]:
    """The gaps of the compute lane, each moment with its cause, in the order of time.

    Args:
        spans: in program order, after those of the step before.
        lands_later: the step's end has waited for compute alone.
    """
    found: list[Idle] = []
    reached = 0.0
    compute = Lane.COMPUTE
    for span in spans:
        if span.lane is compute:
            start_s = min(span.start_s, step_s)
            if start_s > reached:
                found += _explain(spans, reached, start_s, span.op, span.waits)
            reached = max(reached, min(span.end_s, step_s))
    if step_s > reached:
        found += _explain(spans, reached, step_s, -1, () if lands_later else [span.op for span in spans])
    return found


def _explain(spans: Sequence[Span], gap_start_s: float, gap_end_s: float, waiting: int, waits: Iterable[int]) -> list[Idle]:
    """One gap, backwards from its end."""
    parts: list[Idle] = []
    reached_s = gap_end_s
    previous: Span | None = None
    while reached_s > gap_start_s:
        blamed, until_s = _last_of(spans, gap_start_s, reached_s, waits, previous)
        if blamed is None:
            parts.append(Idle(gap_start_s, reached_s, DISPATCH, -1, waiting))
            break
        if until_s < reached_s:
            parts.append(Idle(until_s, reached_s, DISPATCH, -1, waiting))
        start_s = max(gap_start_s, min(blamed.start_s, until_s))
        if start_s < until_s:
            parts.append(Idle(start_s, until_s, blamed.lane.value, blamed.op, waiting))
        if start_s <= gap_start_s:
            break
        reached_s, waits, previous = start_s, blamed.waits, _before(spans, blamed)
    parts.reverse()
    return parts


def _last_of(
    spans: Sequence[Span], gap_start_s: float, reached_s: float, waits: Iterable[int], previous: Span | None
) -> tuple[Span | None, float]:
    """Of the ops waited for and the one before on the lane: which let go last, and when; None if all had before the gap."""
    blamed, until_s = None, gap_start_s
    for op in waits:
        span = _span_of(spans, op)
        if span is not None and span.end_s > until_s and span.lane is not Lane.COMPUTE:
            blamed, until_s = span, min(span.end_s, reached_s)
            if until_s == reached_s:
                break
    if previous is not None and previous.end_s > gap_start_s:
        if previous.end_s <= reached_s:
            if previous.end_s > until_s:
                return previous, previous.end_s
        elif previous.start_s > until_s or blamed is None:  # rule 3
            return previous, reached_s
    return blamed, until_s


def _span_of(spans: Sequence[Span], op: int) -> Span | None:
    """Spans are in program order, and compare by their op first."""
    index = bisect.bisect_left(spans, (op,))
    return spans[index] if index < len(spans) and spans[index].op == op else None


def _before(spans: Sequence[Span], span: Span) -> Span | None:
    """The op before this one on its lane."""
    for index in range(bisect.bisect_left(spans, (span.op,)) - 1, -1, -1):
        if spans[index].lane is span.lane:
            return spans[index]
    return None


def _covered_s(times: Iterable[tuple[float, float]]) -> float:
    total, reached = 0.0, 0.0
    for start, end in sorted(times):
        if end > reached:
            total += end - (start if start > reached else reached)
            reached = end
    return total
