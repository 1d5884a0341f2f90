"""What a step's timeline says, in a few figures: of runs and of predictions alike."""

from __future__ import annotations

import collections
import itertools
import statistics
from typing import Any


def op_kinds(plan: Any, schedule: Any) -> list[str]:
    """What each op of a program does."""
    from overspill.spec.schedule import Compute

    roles = {plan.units[0].name: "embedding", plan.units[-1].name: "tail"}
    ops = [item.op for item in schedule.ops]
    return [f"{roles.get(op.unit, 'blocks')} {op.phase.value}" if isinstance(op, Compute) else type(op).__name__.lower() for op in ops]


def compute_by_kind(kinds: list[str], spans: Any) -> dict[str, float]:
    """Seconds of lane `compute`, by what its ops do: where a prediction of compute is off."""
    found: collections.Counter[str] = collections.Counter()
    for span in spans:
        if span.lane.value == "compute" and 0 <= span.op < len(kinds):
            found[kinds[span.op]] += span.end_s - span.start_s
    return dict(found)


def host_by_kind(kinds: list[str], spans: Any) -> dict[str, float]:
    """Seconds of the dispatching thread, by op: from its turn to the next one's, waits and the `Free`s behind it included."""
    found: collections.Counter[str] = collections.Counter()
    ours = [span for span in spans if 0 <= span.op < len(kinds)]
    for span, following in itertools.pairwise(ours):
        found[kinds[span.op]] += following.submitted_s - span.submitted_s
    return dict(found)


def launched_by_kind(kinds: list[str], lazy: Any) -> dict[str, list[float]]:
    """[number, seconds] that the dispatching thread took to launch compute, waits left out, by what its ops do: what templates measure
    alone, and predictions multiply. Of a `LazyTrace` that nobody has read; empty of another."""
    found: dict[str, list[float]] = {}
    _, schedule, completions, *_ = lazy._source or (None, None, ())
    for kind, item, completion in zip(kinds, schedule.ops if completions else (), completions, strict=False):
        if item.lane.value == "compute" and type(item.op).__name__ != "Free":
            begin_s, end_s = completion.issue_span_s(0.0)
            number, seconds = found.get(kind, (0, 0.0))
            found[kind] = [number + 1, seconds + end_s - begin_s]
    return found


def leads(spans: Any) -> dict[str, float]:
    """How far the host was ahead of the device: from a compute op's turn to its begin."""
    leads = [span.start_s - span.submitted_s for span in spans if span.lane.value == "compute"]
    return {"median_s": statistics.median(leads), "share_below_1ms": sum(lead < 1e-3 for lead in leads) / len(leads)} if leads else {}


def compact(spans: Any) -> list[list[Any]]:
    """[op, lane, turn, ready, begin, end], in microseconds."""
    return [
        [span.op, span.lane.value, *(round(1e6 * time_s) for time_s in (span.submitted_s, span.ready_s, span.start_s, span.end_s))]
        for span in spans
    ]
