"""The least time of a step, from the work in its program and the measured rates of the lanes.

Each formula is a bound that no overlap can beat:

1. A lane needs its work over its rate: bytes of each link (both directions share it, `spec/rates.py`), elements of the host's
   updates, and on `compute` the busy time that the step itself measured, for there is no other truth about a model's kernels.
2. The chain. Updates that the program puts before its first backward (clip, loss scaling: the gradients of the step before wait for
   their norm) must end before that backward's graph is complete, so the time up to it is the longer one of forward compute and these
   updates; then comes the remaining compute; then what depends on the last compute op (the embedding's gradient leaves, is updated and
   written back), whose lanes may work chunk by chunk beside each other, so the longest of them counts.

   chain = max(T_forward, T_updates) + T_backward + T_tail

   with T_forward and T_backward the compute before and after the first backward op; without clip T_updates is 0.

   Without clip the tail of a step ends in the time of the next one (`runtime/landing`): a single step can then be quicker than its chain.
   Steps in a row cannot where the next forward begins with what the tail updates, as it does with the embedding; where the embedding
   is updated on the device, the last compute op is that update and the tail is empty.

Where this differs from the design page: its tail is the sum of D2H, update and H2D. Chunks go through these side by side and the H2D
belongs to the next step, so a bound takes the longest. Host memory bandwidth, which all host lanes share, is not looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from overspill.spec.rates import Floor, LaneRates
from overspill.spec.schedule import Compute, Evict, Fetch, Lane, Op, Phase, Schedule, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """What of a floor follows from the program and the rates alone: the same for all runs of one program."""

    lane_s: Mapping[str, float]
    """Seconds that the work of each lane but `compute` takes at its rate."""
    updates_s: float
    """Of the updates before the first backward, their reads from the SSD included: their longest lane."""
    tail_s: float
    """Of what depends on the last compute op: its longest lane."""
    first_backward: int
    """Op; behind the last one if there is none."""
    unmeasured: tuple[str, ...]

    def floor(self, *, forward_s: float, backward_s: float) -> Floor:
        """Of a run whose compute lane was busy that long before its first backward op, and from it on."""
        return Floor(
            work_s={Lane.COMPUTE.value: forward_s + backward_s, **self.lane_s},
            chain_s=max(forward_s, self.updates_s) + backward_s + self.tail_s,
            unmeasured=self.unmeasured,
        )


def build_step_work(schedule: Schedule, rates: LaneRates) -> StepWork:
    """Add up a program's work."""
    ops = schedule.ops
    computes = [index for index, item in enumerate(ops) if item.lane is Lane.COMPUTE]
    backward = next((index for index in computes if _is_backward(ops[index].op)), len(ops))
    last = computes[-1] if computes else len(ops)
    everything, gating, tail = _Work(), _Work(), _Work()
    feeds_gating = _feeding_updates(schedule, backward)
    depends = {last}
    for index, item in enumerate(ops):
        everything.add(item.op, item.lane)
        if index in feeds_gating:
            gating.add(item.op, item.lane)
        if index > last and not depends.isdisjoint(item.waits):
            depends.add(index)
            tail.add(item.op, item.lane)
    seconds = everything.seconds(rates)
    return StepWork(
        lane_s={lane: value for lane, value in seconds.items() if value is not None},
        updates_s=gating.longest_s(rates),
        tail_s=tail.longest_s(rates),
        first_backward=backward,
        unmeasured=tuple(lane for lane, value in seconds.items() if value is None),
    )


def _is_backward(op: Op) -> bool:
    return isinstance(op, Compute) and op.phase is Phase.BACKWARD


def _feeding_updates(schedule: Schedule, backward: int) -> set[int]:
    """The updates on the host before the op `backward`, and the fetches from the SSD that they wait for."""
    chosen: set[int] = set()
    for index, item in enumerate(schedule.ops[:backward]):
        if isinstance(item.op, Update) and item.lane is Lane.HOST_UPDATE:
            chosen.add(index)
            chosen.update(wait for wait in item.waits if schedule.ops[wait].lane is Lane.SSD_READ)
    return chosen


class _Work:
    """A sum of ops, by lane."""

    def __init__(self) -> None:
        self.num_bytes: dict[Lane, int] = {}
        self.num_elements = 0

    def add(self, op: Op, lane: Lane) -> None:
        if isinstance(op, Fetch | Evict):
            self.num_bytes[lane] = self.num_bytes.get(lane, 0) + op.num_bytes
        elif isinstance(op, Update) and lane is Lane.HOST_UPDATE:
            self.num_elements += op.num_elements

    def seconds(self, rates: LaneRates) -> dict[str, float | None]:
        """Of each lane with work; None where there is no rate."""
        found: dict[str, float | None] = {}
        for up, down, link in ((Lane.H2D, Lane.D2H, rates.link), (Lane.SSD_READ, Lane.SSD_WRITE, rates.ssd)):
            sizes = self.num_bytes.get(up, 0), self.num_bytes.get(down, 0)
            for lane, size in zip((up, down), sizes, strict=True):
                if size:
                    found[lane.value] = link.work_s(*sizes) if link is not None else None
        if self.num_elements:
            rate = rates.update_parameters_per_s
            found[Lane.HOST_UPDATE.value] = self.num_elements / rate if rate is not None else None
        return found

    def longest_s(self, rates: LaneRates) -> float:
        return max((seconds for seconds in self.seconds(rates).values() if seconds is not None), default=0.0)
