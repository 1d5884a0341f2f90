"""What ran when: the spans of a schedule's ops, lane by lane."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from overspill.spec.schedule import Lane


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One op's time on its lane, in seconds since the schedule began."""

    op: int
    """Index in the schedule."""
    lane: Lane
    start_s: float
    """When what it waited for was there."""
    end_s: float


def busy_s(spans: Iterable[Span], *lanes: Lane) -> float:
    """Seconds in which at least one of `lanes` had an op under way; transfers of one lane may overlap."""
    total, reached = 0.0, 0.0
    for start, end in sorted((span.start_s, span.end_s) for span in spans if span.lane in lanes):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def overlap_s(spans: Iterable[Span], one: Lane, other: Lane) -> float:
    """Seconds in which both lanes had work."""
    chosen = [span for span in spans if span.lane in (one, other)]
    return busy_s(chosen, one) + busy_s(chosen, other) - busy_s(chosen, one, other)
