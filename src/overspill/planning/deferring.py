"""Decide which blocks' updates are put off to the end of the step, so that they run under the next one's forward (`Plan.deferred`).

As gradients arrive the host updates one block while the device computes another one's backward. Where the update takes longer, compute
soon waits for it, block for block, while under the forward the host has nothing to do. So some blocks are passed over in the backward
and updated when the last gradient has arrived, in the order in which the next forward reads them.

Which, of blocks whose parameters and states rest in host memory:

1. On a small clock (`_Clock`) a step's last backward and the next one's first forward run beside the host's updates. One block after the
   other is added that makes this the shortest, as long as one does.
2. It counts for several rates of the update at once (`RATES`): a host's differs from step to step by a third. Where no rates were measured
   it is as if updates took about as long as compute: too many cost memory that nothing else would have, and no time.
3. Only as many as host memory has room for: each leaves its gradient there.

Pure: no torch. Costs a schedule build of one micro-batch, one a trial of rule 3, and a pass over the blocks for every block and trial of
rule 1 (0.1 s for 32 blocks).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

from overspill.errors import BudgetError
from overspill.planning.cost import build_costs
from overspill.planning.space import is_host_memory
from overspill.scheduling import build_train_step
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.schedule import Compute, Phase
from overspill.spec.tensors import Tier
from overspill.spec.workload import WorkloadSpec

RATES = (0.9, 0.75, 0.6)
"""Of the update's rate alone, what it has in a step. Measured on H100 machines with 16 cores: 0.46 to 0.95, by how busy the host is."""
ASSUMED_SHARES = (0.7, 0.85, 1.0)
"""Of compute's time, what updates take where nobody has measured rates. Assumed."""
LEAST_GAIN = 0.002
"""Share of the time on the clock that a block must save. Chosen."""


def defer_updates(
    plan: Plan, hardware: HardwareSpec, workload: WorkloadSpec | None, *, number: int | None, missing: Callable[[Plan], Mapping[Tier, int]]
) -> Plan:
    """`plan`, placed, with the updates that it defers.

    Args:
        number: of blocks, as the user asked; None: as many as pay.
        missing: bytes by which a plan's step exceeds budgets, of those that it exceeds.

    Raises:
        BudgetError: fewer blocks than were asked for rest in host memory, or their gradients have no room.
    """
    blocks = _deferrable(plan)
    if plan.timing is not UpdateTiming.IMMEDIATE:
        return plan
    if number is not None:
        if number > len(blocks):
            raise BudgetError(
                f"--deferred-updates {number}: of {len(plan.units) - 2} blocks only {len(blocks)} have parameters and states in host "
                f"memory and share no weights; give at most {len(blocks)}"
            )
        found = _deferring(plan, _choose(plan, blocks, hardware, workload, number=number))
        if missing(found):
            raise BudgetError(
                f"the gradients of --deferred-updates {number} do not fit the host's budget; lower it, or raise --host-budget"
            )
        return found
    if is_host_memory(plan.device) or not plan.prefetch_units:  # the same cores compute; there is no room
        return plan
    chosen = _choose(plan, blocks, hardware, workload, number=None)
    while chosen:
        found = _deferring(plan, chosen)
        if not (over := missing(found)):
            return found
        gradients = sum(plan.bundles[name].parameter_bytes for name in found.deferred) // len(chosen)
        chosen = chosen[: len(chosen) - max(1, over.get(Tier.HOST, 0) // gradients)]
    return plan


def _deferrable(plan: Plan) -> list[str]:
    """Blocks that could be, in forward order."""
    found = []
    for unit in plan.blocks:
        trainable = [name for name in unit.bundles if plan.bundles[name].trainable]
        rest = {tier for name in trainable for tier in (plan.placements[name].parameters, plan.placements[name].states)}
        is_shared = any(name in other.bundles for other in plan.units if other is not unit for name in trainable)
        if rest == {Tier.HOST} and not is_shared:
            found.append(unit.name)
    return found


def _deferring(plan: Plan, chosen: Collection[str]) -> Plan:
    names = [name for unit in plan.units if unit.name in chosen for name in unit.bundles if plan.bundles[name].trainable]
    return dataclasses.replace(plan, deferred=tuple(names))


def _choose(plan: Plan, blocks: list[str], hardware: HardwareSpec, workload: WorkloadSpec | None, *, number: int | None) -> list[str]:
    """Rules 1 and 2: those that save most first.

    Args:
        number: so many, whether they pay or not.
    """
    clocks = _clocks(plan, hardware, workload) if blocks and number != 0 else []
    chosen: list[str] = []
    now = sum(clock.time_s(chosen) for clock in clocks)
    while clocks and len(chosen) < (len(blocks) if number is None else number):
        left = [name for name in reversed(blocks) if name not in chosen]  # of equals the one that is read last
        times = {name: sum(clock.time_s({*chosen, name}) for clock in clocks) for name in left}
        best = min(left, key=times.__getitem__)
        if number is None and times[best] > (1 - LEAST_GAIN) * now:
            break
        chosen.append(best)
        now = times[best]
    return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Clock:
    """A step's last backward and the next step's first forward beside the host's updates; seconds of units, in forward order."""

    names: tuple[str, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    update_s: tuple[float, ...]
    """Of the host; 0: updated on the device."""

    def time_s(self, deferred: Collection[str]) -> float:
        """From the first backward to the end of the forward. A gradient leaves the device when the update before it has given its room in
        host memory back, or at once where it has room of its own; of gradients on the device there is room for two units'."""
        clock = host = 0.0
        done_s, left_s = [0.0] * len(self.names), [0.0, 0.0]
        for index in reversed(range(len(self.names))):
            clock = max(clock, left_s[-2]) + self.backward_s[index]
            is_deferred = self.names[index] in deferred
            left_s.append(clock if is_deferred or not self.update_s[index] else max(clock, host))
            if self.update_s[index] and not is_deferred:
                host = done_s[index] = max(clock, host) + self.update_s[index]
        for index, name in enumerate(self.names):
            if name in deferred:
                host = done_s[index] = max(clock, host) + self.update_s[index]
        for done, forward_s in zip(done_s, self.forward_s, strict=True):
            clock = max(clock, done) + forward_s
        return clock


def _clocks(plan: Plan, hardware: HardwareSpec, workload: WorkloadSpec | None) -> list[_Clock]:
    """One for each rate of the update."""
    costs = build_costs(plan, hardware, workload=workload)
    names = tuple(unit.name for unit in plan.units)
    seconds = {(name, phase): 0.0 for name in names for phase in Phase}
    for item in build_train_step(plan, plan.longest_step[:1], starts_pending=False).ops:
        if isinstance(item.op, Compute):
            seconds[item.op.unit, item.op.phase] += costs.compute_s(item.op)
    first = min(plan.group_size, plan.accumulate)
    last = plan.accumulate - (plan.num_groups - 1) * plan.group_size
    forward_s = tuple(first * seconds[name, Phase.FORWARD] for name in names)
    backward_s = tuple(last * seconds[name, Phase.BACKWARD] for name in names)
    elements = tuple(_host_elements(plan, index) for index in range(len(names)))
    if hardware.is_measured:
        paces = [1 / (share * hardware.host_update_parameters_per_s) for share in RATES]
    else:
        paces = [share * (sum(forward_s) + sum(backward_s)) / max(1, sum(elements)) for share in ASSUMED_SHARES]
    return [
        _Clock(names=names, forward_s=forward_s, backward_s=backward_s, update_s=tuple(number * pace for number in elements))
        for pace in paces
    ]


def _host_elements(plan: Plan, index: int) -> int:
    """That the host updates when the gradients of a unit are complete: of bundles that no earlier unit reads."""
    earlier = {name for unit in plan.units[:index] for name in unit.bundles}
    own = [name for name in plan.units[index].bundles if name not in earlier and plan.bundles[name].trainable]
    return sum(plan.bundles[name].num_elements for name in own if plan.placements[name].update_tier is Tier.HOST)
