"""Decide which blocks' updates are put off to the end of the step, so that they run under the next one's forward (`Plan.deferred`).

As gradients arrive the host updates one block while the device computes another one's backward. Where the update takes longer, compute
soon waits for it, block for block, while under the forward the host has nothing to do. So some blocks are passed over in the backward
and updated when the last gradient has arrived, in the order in which the next forward reads them.

How many, of blocks whose parameters and states rest in host memory:

1. As many as the updates exceed the backward by, at the rate that updates have beside copies and launches (`BESIDE`).
2. At most what divides the updates between backward and forward in proportion to their lengths. So many where rates are assumed: it costs
   memory that nothing else would have, and no time.
3. At most what host memory has room for: each leaves its gradient there.

They are spread evenly: the backward has something to update at every time, and the forward comes to the first one when it is updated.

Pure: no torch. Costs a schedule build of one micro-batch, and one a trial of rule 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from overspill.errors import BudgetError
from overspill.planning.cost import build_costs
from overspill.planning.space import is_host_memory
from overspill.scheduling import build_train_step
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.schedule import Compute, Phase
from overspill.spec.tensors import Tier
from overspill.spec.workload import WorkloadSpec

BESIDE = 0.65
"""Of the update's rate alone, what it has in a step. Measured on H100 machines with 16 cores: 0.69 to 0.95, by how busy the host is."""


def defer_updates(
    plan: Plan, hardware: HardwareSpec, workload: WorkloadSpec | None, *, number: int | None, missing: Callable[[Plan], Mapping[Tier, int]]
) -> Plan:
    """`plan`, placed, with the updates that it defers.

    Args:
        number: of blocks, as the user asked; None: as many as pay.
        missing: bytes by which a plan's step exceeds budgets, of those that it exceeds.

    Raises:
        ValueError: more blocks were asked for than can be deferred.
        BudgetError: the gradients of those asked for have no room.
    """
    blocks = _deferrable(plan)
    if plan.timing is not UpdateTiming.IMMEDIATE:
        return plan
    if number is not None:
        if number > len(blocks):
            raise ValueError(
                f"--deferred-updates {number}: of {len(plan.units) - 2} blocks only {len(blocks)} have parameters and states in host "
                f"memory and share no weights; give at most {len(blocks)}"
            )
        found = _deferring(plan, blocks, number)
        if missing(found):
            raise BudgetError(
                f"the gradients of --deferred-updates {number} do not fit the host's budget; lower it, or raise --host-budget"
            )
        return found
    if is_host_memory(plan.device) or not plan.prefetch_units:  # the same cores compute; there is no room
        return plan
    wanted = _count(plan, blocks, hardware, workload)
    while wanted > 0:
        found = _deferring(plan, blocks, wanted)
        if not (over := missing(found)):
            return found
        gradients = sum(plan.bundles[name].parameter_bytes for name in found.deferred) // wanted
        wanted -= max(1, over.get(Tier.HOST, 0) // gradients)
    return plan


def _deferrable(plan: Plan) -> list[str]:
    """Blocks that could be, in forward order."""
    found = []
    for unit in plan.units[1:-1]:
        trainable = [name for name in unit.bundles if plan.bundles[name].trainable]
        rest = {tier for name in trainable for tier in (plan.placements[name].parameters, plan.placements[name].states)}
        is_shared = any(name in other.bundles for other in plan.units if other is not unit for name in trainable)
        if rest == {Tier.HOST} and not is_shared:
            found.append(unit.name)
    return found


def _deferring(plan: Plan, blocks: list[str], number: int) -> Plan:
    """`plan` with `number` of the blocks deferred, evenly spread."""
    chosen = {blocks[min(len(blocks) - 1, math.ceil((index + 1) * len(blocks) / (number + 1)))] for index in range(number)}
    chosen |= set([name for name in reversed(blocks) if name not in chosen][: number - len(chosen)])
    names = [name for unit in plan.units if unit.name in chosen for name in unit.bundles if plan.bundles[name].trainable]
    return dataclasses.replace(plan, deferred=tuple(names))


def _count(plan: Plan, blocks: list[str], hardware: HardwareSpec, workload: WorkloadSpec | None) -> int:
    """Rules 1 and 2."""
    if not blocks:
        return 0
    costs = build_costs(plan, hardware, workload=workload)
    computed = dict.fromkeys(Phase, 0.0)
    names = {unit.name for unit in plan.units[1:-1]}
    for item in build_train_step(plan, plan.longest_step[:1], starts_pending=False).ops:
        if isinstance(item.op, Compute) and item.op.unit in names:
            computed[item.op.phase] += plan.accumulate * costs.compute_s(item.op)
    forward_s, backward_s = computed[Phase.FORWARD], computed[Phase.BACKWARD]
    if forward_s + backward_s <= 0:
        return 0
    most = int(len(blocks) * forward_s / (forward_s + backward_s))
    if not hardware.is_measured:
        return most
    rate = BESIDE * hardware.host_update_parameters_per_s
    own = [name for unit in plan.units if unit.name in blocks for name in unit.bundles]
    updated = {name for unit in plan.units[1:] for name in unit.bundles if plan.bundles[name].trainable}
    updates_s = sum(plan.bundles[name].num_elements for name in updated if plan.placements[name].update_tier is Tier.HOST) / rate
    block_s = sum(plan.bundles[name].num_elements for name in own) / rate / len(blocks)
    return min(most, max(0, math.ceil((updates_s - backward_s) / block_s)))
