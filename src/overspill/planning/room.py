"""What the budgets of a request leave, and whether a plan's step fits.

Rules:

1. A step may take of a tier its budget, or `FREE_SHARE` of what is free, less what is taken whatever the plan is: of a device what a
   process has there beside torch's allocator, of host memory the process.
2. "Fits" is not a formula: the step's programs are built and their peaks are read off.
3. A GPU is judged by its fullest op, as a prediction will say (`planning/memory.py`): what rests there and the arena for slots, which are
   there whatever runs, and at one op what the device keeps then and what that op takes while it runs. So blocks at the end, whose kept
   activations are gone before those that are recomputed run, do not have to leave room for both. Recordings of blocks have what is left.
4. Where nobody knows what units take, and on the `cpu` device, it is as if the most that pieces take at any time came together with the
   most that a unit is assumed to take.
5. Beside activations that are kept because there is room (`auto`), some of a GPU is left free (`RESERVE_FRACTION`): predictions are not
   exact, and a budget is a promise.
6. On the `cpu` device all that the device holds is in host memory too.
7. A plan that fits says what pieces alone may take of the device (`Room.settle`): its budget less all else that is there when most is.
   Sessions hold pieces, arenas and recordings against that, so what fits here fits there.

Pure: no torch. Costs a schedule build, a walk and an arena for every program of `largest_steps`, and plan that is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from overspill.errors import BudgetError
from overspill.planning.arena import plan_arena
from overspill.planning.memory import context_bytes, device_terms, unit_working_bytes
from overspill.planning.pools import pool_events
from overspill.planning.simulate import resident_peaks
from overspill.planning.space import is_host_memory, scratch_bytes, store_bytes
from overspill.scheduling import largest_steps
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import AUTO, Plan, PlanRequest
from overspill.spec.prediction import total_bytes
from overspill.spec.retention import ON_DEVICE
from overspill.spec.schedule import Compute, Phase, Piece, Role, Schedule
from overspill.spec.tensors import DTYPE_BYTES, Tier
from overspill.spec.workload import ModelLayout, WorkloadSpec
from overspill.units import format_bytes

FREE_SHARE = 0.92
"""Share of what is free that is used when no budget is given. Chosen, not tuned."""
RESERVE_FRACTION = 0.02
"""Of what is predicted. Predictions of the device's peak were up to 2 % below what was measured: 28 runs on an H100."""
FLAGS = {Tier.DEVICE: "--device-budget", Tier.HOST: "--host-budget", Tier.SSD: "--ssd-budget"}


class Room:
    """The budgets of one request.

    Args:
        workload: of the request's batch; None: nobody has described it.
        device: as `Plan.device`.
        loss_chunk_rows: as `Plan.loss_chunk_rows`.

    Raises:
        BudgetError: a budget is used up before anything rests on its tier.
    """

    def __init__(
        self,
        request: PlanRequest,
        layout: ModelLayout,
        hardware: HardwareSpec,
        workload: WorkloadSpec | None,
        *,
        device: str,
        loss_chunk_rows: int,
    ) -> None:
        self._hardware, self._workload, self._buffer_bytes = hardware, workload, layout.buffer_bytes
        self._context_bytes = 0 if is_host_memory(device) else context_bytes(hardware)
        known = unit_working_bytes(workload, hardware) if workload is not None and not is_host_memory(device) else None
        self._has_reserve = request.activations == AUTO and known is not None
        self._is_known = known is not None
        """Rule 3 holds, not rule 4."""
        if known is None:
            self.working_bytes = _assumed_working_bytes(request, layout, loss_chunk_rows)
        else:
            self.working_bytes = known + layout.buffer_bytes
        self.allowed: dict[Tier, int | None] = {
            Tier.DEVICE: _allowance(
                request.device_budget_bytes,
                hardware.device_capacity_bytes,
                self._context_bytes + (0 if self._is_known else self.working_bytes),
                Tier.DEVICE,
                what="the process's context there takes" if self._is_known else "context and working memory of one unit take",
                held_bytes=hardware.device_context_held_bytes,
            ),
            Tier.HOST: _allowance(
                request.host_budget_bytes,
                hardware.host_capacity_bytes,
                hardware.process_bytes,
                Tier.HOST,
                what="the process itself takes",
                held_bytes=hardware.process_bytes,
            ),
            Tier.SSD: _allowance(request.ssd_budget_bytes, hardware.ssd_capacity_bytes, 0, Tier.SSD, what="all else takes"),
        }
        """What a step may take of each tier (rule 1), of a device with what units take there if it is known; None: as much as there is."""
        self._last: _Step | None = None

    def excess(self, plan: Plan) -> dict[Tier, int]:
        """Bytes by which any step exceeds each budget that there is (negative: room)."""
        if all(allowed is None for allowed in self.allowed.values()):
            return {}
        step = self._step(plan)
        needed = dict(step.peaks)
        needed[Tier.DEVICE] = self._with_reserve(plan, self._device_bytes(plan, step))
        if is_host_memory(plan.device):
            needed[Tier.HOST] += needed[Tier.DEVICE] + plan.device_working_bytes
        needed[Tier.SSD] = max(needed[Tier.SSD], store_bytes(plan) + scratch_bytes(plan))
        return {tier: needed[tier] - allowed for tier, allowed in self.allowed.items() if allowed is not None}

    def describe(self, tier: Tier) -> str:
        """What is counted on a tier, for a message with `allowed` in it."""
        return f"{tier}, units at work included" if tier is Tier.DEVICE and self._is_known else str(tier)

    def missing(self, plan: Plan) -> dict[Tier, int]:
        """Of the tiers on which bytes are missing, how many."""
        return {tier: over for tier, over in self.excess(plan).items() if over > 0}

    def device_excess(self, plan: Plan, *, beside: Plan) -> float:
        """Bytes by which a step of `plan` exceeds the device's budget, without building its programs.

        Args:
            beside: the same plan but for the activations that are kept on the device; none of either are moved.
        """
        allowed = self.allowed[Tier.DEVICE]
        if allowed is None:
            return -math.inf
        return self._with_reserve(plan, self._device_bytes(plan, self._step(beside))) - allowed

    def settle(self, plan: Plan) -> Plan:
        """`plan`, which fits, with what its pieces may take of the device (rule 7). Who asks for recordings counts pieces alone: what
        the arena takes beyond them is counted as recordings'."""
        allowed = self.allowed[Tier.DEVICE]
        if allowed is None or not self._is_known:
            return plan
        step = self._step(plan)
        beside = self._device_bytes(plan, step) - step.peaks[Tier.DEVICE] - step.slot_waste_bytes
        recordings_bytes = None if plan.recordings_bytes is None else plan.recordings_bytes + step.slot_waste_bytes
        return dataclasses.replace(plan, device_budget_bytes=max(0, allowed - beside), recordings_bytes=recordings_bytes)

    def _with_reserve(self, plan: Plan, num_bytes: int) -> int:
        """Rule 5."""
        return num_bytes + int(RESERVE_FRACTION * num_bytes) if self._has_reserve and _kept_bytes(plan) else num_bytes

    def _step(self, plan: Plan) -> _Step:
        """The programs of `plan`; of the plan that was asked for last they are there."""
        if self._last is None or self._last.plan is not plan:
            programs = largest_steps(plan)
            found = [resident_peaks(program, plan) for program in programs]
            peaks = {tier: max(one[tier] for one in found) for tier in Tier}
            arenas = [plan_arena(pool_events(program, plan), plan) for program in programs] if self._is_known else []
            slot_bytes, least_bytes = (max(sizes, default=0) for sizes in ([a.num_bytes for a in arenas], [a.least_bytes for a in arenas]))
            self._last = _Step(plan=plan, programs=programs, peaks=peaks, slot_bytes=slot_bytes, slot_waste_bytes=slot_bytes - least_bytes)
        return self._last

    def _device_bytes(self, plan: Plan, step: _Step) -> int:
        """What `plan` takes of the device (rules 3 and 4); `step` is its own, or that of a plan that keeps other activations there."""
        if not self._is_known:
            return step.peaks[Tier.DEVICE] + _kept_bytes(plan) - _kept_bytes(step.plan) + _argument_bytes(plan)
        most = max(self._program_bytes(program, plan, step.slot_bytes) for program in step.programs_of(plan))
        return most - self._context_bytes + self._buffer_bytes

    def _program_bytes(self, program: Schedule, plan: Plan, slot_bytes: int) -> int:
        """The device's peak, as it will be predicted without recordings."""
        terms = device_terms(program, plan, slot_bytes=slot_bytes, hardware=self._hardware, workload=self._workload, replayed=())
        return total_bytes(terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """What was found of the programs of a plan."""

    plan: Plan
    programs: tuple[Schedule, ...]
    peaks: Mapping[Tier, int]
    """Most bytes of pieces at one time, in any of them."""
    slot_bytes: int
    """Of the device's arena; 0 where it is not known what units take."""
    slot_waste_bytes: int
    """Of it, what the arena takes beyond the most that is lent at one time."""

    def programs_of(self, plan: Plan) -> tuple[Schedule, ...]:
        """The programs with the activations that `plan` keeps on the device in place of their own."""
        return self.programs if plan is self.plan else tuple(_with_kept(program, plan) for program in self.programs)


def _with_kept(program: Schedule, plan: Plan) -> Schedule:
    """A training program, which moves no activations, with those that `plan` keeps on the device: what its computes produce and consume."""
    ops = []
    for item in program.ops:
        op = item.op
        if isinstance(op, Compute) and (op.unit in plan.activations or op.is_retained):
            piece = Piece(role=Role.ACTIVATIONS, owner=op.unit, index=op.micro_batch)
            produced = tuple(made for made in op.produced if made[0] != piece)
            is_kept, is_forward = op.unit in plan.activations, op.phase is Phase.FORWARD
            if is_kept and is_forward:
                produced += ((piece, plan.activation_bytes(op.unit)),)
            op = dataclasses.replace(op, produced=produced, consumed=(piece,) if is_kept and not is_forward else ())
            item = dataclasses.replace(item, op=op)
        ops.append(item)
    return dataclasses.replace(program, ops=tuple(ops))


def _allowance(budget: int | None, capacity: int, taken: int, tier: Tier, *, what: str, held_bytes: int = 0) -> int | None:
    """What may be held of a budget (or of the free capacity) after what is taken before.

    Args:
        what: takes that, with its verb.
        held_bytes: of what is taken: what is taken already, and so is out of the free capacity.
    """
    if budget is None:
        if not capacity:
            return None
        return max(0, int(capacity * FREE_SHARE) - max(0, taken - held_bytes))
    if budget < taken:
        raise BudgetError(
            f"{FLAGS[tier]} is {format_bytes(budget)}, but {what} {format_bytes(taken)}: {format_bytes(taken - budget)} are missing; "
            f"raise {FLAGS[tier]}" + (" or lower --micro-batch or --seq-len" if tier is Tier.DEVICE else "")
        )
    return budget - taken


def _assumed_working_bytes(request: PlanRequest, layout: ModelLayout, loss_chunk_rows: int) -> int:
    """What a unit takes of the device while it runs, where nobody knows.

    What autograd keeps of one block for its backward, the block's gradients, and one chunk of logits. A block keeps about one activation
    for each row and column of its matrices (parameters / hidden of them) and some 16 hidden-sized ones, per token; logits exist in
    compute dtype, fp32, and as fp32 gradient.
    """
    per_block = max((sum(layout.bundles[name].num_parameters for name in unit.bundles) for unit in layout.blocks), default=0)
    bytes_each = DTYPE_BYTES[request.dtype]
    tokens = request.micro_batch * request.seq_len
    activations = tokens * bytes_each * (per_block // max(1, layout.hidden_size) + 16 * layout.hidden_size)
    logits = min(loss_chunk_rows, tokens) * layout.vocab_size * (8 + 2 * bytes_each)
    return max(activations + per_block * bytes_each, logits) + layout.buffer_bytes


def _argument_bytes(plan: Plan) -> int:
    """Assumed: every micro-batch of a group keeps an attention mask of its own, one byte a pair of positions."""
    return plan.group_size * plan.micro_batch * plan.seq_len**2


def _kept_bytes(plan: Plan) -> int:
    """What graphs store on the device between the forward and the backward of a group."""
    return plan.group_size * sum(plan.stored_bytes[unit] for unit, mode in plan.activations.items() if mode in ON_DEVICE)
