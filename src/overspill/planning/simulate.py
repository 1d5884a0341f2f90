"""The schedule's first interpreter: walk it on paper and say what it will cost.

Bytes and peaks are exact. Times are bytes over bandwidth and work over rate, no better than the rates in the
`HardwareSpec`; `Prediction.source` says whether they were measured. Contention between lanes is not modelled yet.
"""

from __future__ import annotations

from overspill.scheduling import Walk
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan
from overspill.spec.report import LINK_LANES, Prediction
from overspill.spec.schedule import Compute, Evict, Fetch, Lane, Op, Schedule, Update
from overspill.spec.tensors import Tier


def op_seconds(op: Op, lane: Lane, hardware: HardwareSpec) -> float:
    """Time that one op keeps its lane busy."""
    if isinstance(op, Fetch | Evict):
        rate = {
            Lane.H2D: hardware.h2d_bytes_per_s,
            Lane.D2H: hardware.d2h_bytes_per_s,
            Lane.SSD_READ: hardware.ssd_read_bytes_per_s,
            Lane.SSD_WRITE: hardware.ssd_write_bytes_per_s,
        }[lane]
        return op.num_bytes / rate
    if isinstance(op, Compute):
        return op.flops / hardware.device_flops
    if isinstance(op, Update):
        return op.num_elements / hardware.host_update_parameters_per_s
    return 0.0


def simulate(schedule: Schedule, plan: Plan, hardware: HardwareSpec, *, overlap: bool = False) -> Prediction:
    """What `schedule` will move, hold and take.

    Args:
        overlap: lanes run side by side as far as waits allow; otherwise one op after the other, as the serial executor does.

    Raises:
        ScheduleError: the schedule breaks a residency rule.
    """
    walk = Walk(plan, schedule)
    lane_bytes = dict.fromkeys(LINK_LANES, 0)
    busy = dict.fromkeys((lane.value for lane in Lane), 0.0)
    free_at = dict.fromkeys(Lane, 0.0)
    done: list[float] = []
    clock = 0.0
    for index, item in enumerate(schedule.ops):
        walk.apply(index, item)
        seconds = op_seconds(item.op, item.lane, hardware)
        start = max([free_at[item.lane], *(done[wait] for wait in item.waits)]) if overlap else clock
        done.append(start + seconds)
        free_at[item.lane] = done[-1]
        clock = max(clock, done[-1])
        busy[item.lane.value] += seconds
        if isinstance(item.op, Fetch | Evict):
            lane_bytes[item.lane.value] += item.op.num_bytes
    walk.finish()
    return Prediction(
        step_s=clock,
        lane_busy_s=busy,
        lane_bytes=lane_bytes,
        num_ops=len(schedule.ops),
        device_resident_peak_bytes=walk.peak_bytes[Tier.DEVICE],
        host_resident_peak_bytes=walk.peak_bytes[Tier.HOST],
        ssd_resident_peak_bytes=walk.peak_bytes[Tier.SSD],
        source=hardware.source,
    )
