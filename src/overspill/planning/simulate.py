"""The schedule's first interpreter: walk it on paper and say what it will move, hold and take.

Bytes and peaks of pieces are exact. Times are as good as `Costs` (`planning/cost.py`): the program runs on the lanes as the executor
runs it (`planning/timeline.py`), with the buffers handed on as it hands them on (`planning/buffers.py`). What the device and the process
hold beside pieces is `planning/memory.py`'s to say.

A step in a row of equal steps (`repeats`): the program is run twice, and `step_s` is from the end of the first to the end of the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from overspill.planning.arena import ArenaPlan, plan_arenas
from overspill.planning.buffers import BufferWaits
from overspill.planning.cost import Costs, build_costs
from overspill.planning.pools import pool_events
from overspill.planning.timeline import Contention, Task, Threads, run_timeline
from overspill.scheduling import Walk
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan
from overspill.spec.prediction import MemoryTerm
from overspill.spec.report import LINK_LANES, Prediction
from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Free, Lane, Phase, Schedule, Update
from overspill.spec.tensors import Tier
from overspill.spec.trace import Span, exposed_s, find_idle, lane_busy_s


def simulate(
    schedule: Schedule,
    plan: Plan,
    hardware: HardwareSpec,
    *,
    overlap: bool = False,
    repeats: bool = False,
    overlaps_steps: bool = False,
    costs: Costs | None = None,
    arenas: Mapping[Tier, ArenaPlan] | None = None,
    device_terms: tuple[MemoryTerm, ...] = (),
    host_terms: tuple[MemoryTerm, ...] = (),
) -> Prediction:
    """What `schedule` will move, hold and take.

    Args:
        overlap: lanes run side by side as far as waits allow; otherwise one op after the other, as the serial executor does.
        repeats: the time of a step in a row of equal ones; needs `overlap`.
        overlaps_steps: with `repeats`: the next step begins when compute has ended, and what is left lands beside it.
        costs: None: from `hardware` alone.
        arenas: where slots lie, if it is known already.
        device_terms, host_terms: of `planning.memory`, for peaks as they are measured.

    Raises:
        ScheduleError: the schedule breaks a residency rule.
        ValueError: a program that cannot follow itself is to be repeated.
    """
    costs = costs or build_costs(plan, hardware)
    lane_bytes, peaks, phases = _walk(schedule, plan)
    if overlap:
        spans, earlier, step_s, alone_s = _overlapping(schedule, plan, costs, arenas, repeats=repeats, overlaps_steps=overlaps_steps)
    else:
        (spans, alone_s), earlier = _serial(schedule, costs), []
        step_s = alone_s
    lands_later = repeats and overlaps_steps
    return Prediction(
        step_s=step_s,
        alone_s=alone_s,
        lane_busy_s=lane_busy_s(spans),
        exposed_s=exposed_s(find_idle([*earlier, *spans], step_s, lands_later=lands_later)),
        spans=tuple(spans),
        lane_bytes=lane_bytes,
        num_ops=len(schedule.ops),
        device_resident_peak_bytes=peaks[Tier.DEVICE],
        host_resident_peak_bytes=peaks[Tier.HOST],
        ssd_resident_peak_bytes=peaks[Tier.SSD],
        phase_peak_bytes=phases,
        device_terms=device_terms,
        host_terms=host_terms,
        source=costs.source,
        has_times=costs.has_times,
    )


def resident_peaks(schedule: Schedule, plan: Plan) -> dict[Tier, int]:
    """Most bytes of pieces on each tier at one time: the part of a prediction that the planner asks for again and again.

    Raises:
        ScheduleError: the schedule breaks a residency rule.
    """
    return _walk(schedule, plan)[1]


def _walk(schedule: Schedule, plan: Plan) -> tuple[dict[str, int], dict[Tier, int], dict[str, dict[str, int]]]:
    """Bytes of the links; peaks; peaks by phase."""
    walk = Walk(plan, schedule)
    lane_bytes = dict.fromkeys(LINK_LANES, 0)
    total = dict(walk.peak_bytes)
    phases: dict[str, dict[Tier, int]] = {}
    last = max((index for index, item in enumerate(schedule.ops) if isinstance(item.op, Compute)), default=-1)
    phase = "forward"
    for index, item in enumerate(schedule.ops):
        op = item.op
        if isinstance(op, Compute):
            phase = "backward" if op.phase is Phase.BACKWARD else "forward"
        elif index > last:
            phase = "landing"
        if phase not in phases or index == last + 1:
            phases.setdefault(phase, dict(walk.resident_bytes))
        walk.peak_bytes = phases[phase]
        for tier, size in walk.resident_bytes.items():
            walk.peak_bytes[tier] = max(walk.peak_bytes[tier], size)
        walk.apply(index, item)
        if isinstance(op, Fetch | Evict):
            lane_bytes[item.lane.value] += op.num_bytes
    walk.finish()
    for peaks in phases.values():
        total = {tier: max(total[tier], peaks[tier]) for tier in Tier}
    return lane_bytes, total, {name: {tier.value: size for tier, size in peaks.items()} for name, peaks in phases.items()}


def _serial(schedule: Schedule, costs: Costs) -> tuple[list[Span], float]:
    """One op after the other; spans, and when the last one was done."""
    clock, spans = 0.0, list[Span]()
    for index, (item, (dispatch_s, before_s)) in enumerate(zip(schedule.ops, costs.turns(schedule.ops), strict=True)):
        if isinstance(item.op, Free):
            clock += dispatch_s
            continue
        is_launched = isinstance(item.op, Compute)  # the device computes meanwhile
        seconds = costs.seconds(item.op, item.lane)
        begin, clock = clock, clock + (max(dispatch_s, before_s + seconds) if is_launched else dispatch_s + seconds)
        num_bytes = item.op.num_bytes if isinstance(item.op, Fetch | Evict) else 0
        waits = tuple(wait for wait in item.waits if not isinstance(schedule.ops[wait].op, Free))
        start = begin if is_launched else begin + dispatch_s
        spans.append(Span(index, item.lane, start, clock, begin, start, num_bytes, waits))
    return spans, clock


def _overlapping(
    schedule: Schedule, plan: Plan, costs: Costs, arenas: Mapping[Tier, ArenaPlan] | None, *, repeats: bool, overlaps_steps: bool
) -> tuple[list[Span], list[Span], float, float]:
    """Spans of one step, those of the step before that land in it, its time in a row of steps, and its time alone."""
    if repeats and schedule.starts_pending != schedule.ends_pending:
        raise ValueError(f"{schedule.name} starts {'with' if schedule.starts_pending else 'without'} pending updates and does not end so")
    buffers = BufferWaits(plan, arenas or plan_arenas(pool_events(schedule, plan), plan))
    tasks = _tasks(schedule, costs, buffers.follow(schedule))
    contention = Contention(costs.hardware)
    threads = Threads(has_streams=costs.is_asynchronous, overlaps_steps=repeats and overlaps_steps)
    if not threads.overlaps_steps:  # every step begins with nothing under way
        spans, (alone_s,) = run_timeline(tasks, [0], threads, contention)
        return spans, [], alone_s, alone_s
    tasks += _tasks(schedule, costs, buffers.follow(schedule))
    both, (begin_s, *_) = run_timeline(tasks, [0, len(schedule.ops)], threads, contention)
    number = len(schedule.ops)
    alone_s = max((span.end_s for span in both if span.op < number), default=0.0)
    spans = [_shifted(span, number, begin_s) for span in both if span.op >= number]
    landing = [_shifted(span, number, begin_s) for span in both if span.op < number and span.end_s > begin_s]
    step_s = max((span.end_s for span in spans if span.lane is Lane.COMPUTE), default=0.0)
    return spans, landing, step_s, alone_s


def _shifted(span: Span, num_ops: int, begin_s: float) -> Span:
    """A span of two steps in a row by the second one's clock and numbers; the first one's are below -1 (`StepTrace.op`)."""
    return Span(
        span.op - num_ops if span.op >= num_ops else span.op - num_ops - 1,
        span.lane,
        span.start_s - begin_s,
        span.end_s - begin_s,
        span.submitted_s - begin_s,
        span.ready_s - begin_s,
        span.num_bytes,
        tuple([op - num_ops if op >= num_ops else op - num_ops - 1 for op in span.waits]),
    )


def _tasks(schedule: Schedule, costs: Costs, waits: Sequence[tuple[int, ...]]) -> list[Task]:
    tasks = []
    for item, after, (dispatch_s, before_s) in zip(schedule.ops, waits, costs.turns(schedule.ops), strict=True):
        op = item.op
        if isinstance(op, Free):
            tasks.append(Task(lane=item.lane, work_s=0.0, host_bytes_per_s=0.0, waits=after, dispatch_s=dispatch_s, is_free=True))
            continue
        seconds = costs.seconds(op, item.lane)
        rate = costs.host_bytes(op, item.lane) / seconds if seconds else 0.0
        num_bytes = op.num_bytes if isinstance(op, Fetch | Evict) else 0
        looks = isinstance(op, Compress | Update)
        tasks.append(
            Task(
                lane=item.lane,
                work_s=seconds,
                host_bytes_per_s=rate,
                waits=after,
                dispatch_s=dispatch_s,
                before_s=before_s,
                needs_step_before=looks,
                num_bytes=num_bytes,
            )
        )
    return tasks
