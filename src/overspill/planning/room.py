"""What the budgets of a request leave, and whether a plan's step fits.

Rules:

1. What a tier may hold is its budget, or `FREE_SHARE` of what is free, less what is taken whatever the plan is: of a device a process's
   context and the most that a unit takes while it runs, of host memory the process.
2. "Fits" is not a formula: the step's programs are built and their peaks are read off.
3. Beside activations that are kept because there is room (`auto`), some of it is left (`Room.reserve_bytes`).
4. On the `cpu` device all that the device holds is in host memory too.

Pure: no torch. Costs a schedule build and a walk for every program of `largest_steps`, and plan that is asked for.
"""

from __future__ import annotations

from overspill.errors import BudgetError
from overspill.planning.memory import context_bytes, fragmentation_bytes, unit_working_bytes
from overspill.planning.simulate import resident_peaks
from overspill.planning.space import is_host_memory, scratch_bytes, store_bytes
from overspill.scheduling import largest_steps
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import AUTO, Plan, PlanRequest
from overspill.spec.retention import ON_DEVICE
from overspill.spec.tensors import DTYPE_BYTES, Tier
from overspill.spec.workload import ModelLayout, WorkloadSpec
from overspill.units import format_bytes

FREE_SHARE = 0.92
"""Share of what is free that is used when no budget is given. Chosen, not tuned."""
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
        self._has_reserve = request.activations == AUTO and not is_host_memory(device)
        self.working_bytes = _working_bytes(request, layout, hardware, workload, device=device, loss_chunk_rows=loss_chunk_rows)
        context = 0 if is_host_memory(device) else context_bytes(hardware)
        self.allowed: dict[Tier, int | None] = {
            Tier.DEVICE: _allowance(
                request.device_budget_bytes,
                hardware.device_capacity_bytes,
                context + self.working_bytes,
                Tier.DEVICE,
                held_bytes=hardware.device_context_held_bytes,
            ),
            Tier.HOST: _allowance(
                request.host_budget_bytes,
                hardware.host_capacity_bytes,
                hardware.process_bytes,
                Tier.HOST,
                held_bytes=hardware.process_bytes,
            ),
            Tier.SSD: _allowance(request.ssd_budget_bytes, hardware.ssd_capacity_bytes, 0, Tier.SSD),
        }
        """What may be held of each tier (rule 1); None: as much as there is."""

    def excess(self, plan: Plan) -> dict[Tier, int]:
        """Bytes by which the peak of any step exceeds each budget that there is (negative: room)."""
        if all(allowed is None for allowed in self.allowed.values()):
            return {}
        found = [resident_peaks(schedule, plan) for schedule in largest_steps(plan)]
        needed = {tier: max(one[tier] for one in found) for tier in Tier}
        needed[Tier.DEVICE] += _argument_bytes(plan)
        if is_host_memory(plan.device):
            needed[Tier.HOST] += needed[Tier.DEVICE] + plan.device_working_bytes
        needed[Tier.DEVICE] += self.reserve_bytes(_kept_bytes(plan))
        needed[Tier.SSD] = max(needed[Tier.SSD], store_bytes(plan) + scratch_bytes(plan))
        return {tier: needed[tier] - allowed for tier, allowed in self.allowed.items() if allowed is not None}

    def reserve_bytes(self, kept_bytes: int) -> int:
        """What the device's allocator may lose to fragmentation beside so many kept bytes. None was seen where segments grow; they cannot
        on every platform, and a graph too many would be recomputed each time."""
        return fragmentation_bytes(kept_bytes) if self._has_reserve else 0

    def missing(self, plan: Plan) -> dict[Tier, int]:
        """Of the tiers on which bytes are missing, how many."""
        return {tier: over for tier, over in self.excess(plan).items() if over > 0}


def _allowance(budget: int | None, capacity: int, taken: int, tier: Tier, *, held_bytes: int = 0) -> int | None:
    """What may be held of a budget (or of the free capacity) after what is taken before.

    Args:
        held_bytes: of what is taken: what is taken already, and so is out of the free capacity.
    """
    if budget is None:
        if not capacity:
            return None
        return max(0, int(capacity * FREE_SHARE) - max(0, taken - held_bytes))
    if budget <= taken:
        what = "context and working memory of one unit take" if tier is Tier.DEVICE else "the process itself takes"
        raise BudgetError(
            f"{FLAGS[tier]} is {format_bytes(budget)}, but {what} {format_bytes(taken)}: {format_bytes(taken - budget)} are missing; "
            f"raise {FLAGS[tier]}" + (" or lower --micro-batch or --seq-len" if tier is Tier.DEVICE else "")
        )
    return budget - taken


def _working_bytes(
    request: PlanRequest,
    layout: ModelLayout,
    hardware: HardwareSpec,
    workload: WorkloadSpec | None,
    *,
    device: str,
    loss_chunk_rows: int,
) -> int:
    """What a unit takes of the device while it runs: of a GPU, what the workload says.

    Assumed where there is none: what autograd keeps of one block for its backward, the block's gradients, and one chunk of logits. A
    block keeps about one activation for each row and column of its matrices (parameters / hidden of them) and some 16 hidden-sized ones,
    per token; logits exist in compute dtype, fp32, and as fp32 gradient.
    """
    if workload is not None and not is_host_memory(device):
        known = unit_working_bytes(workload, hardware)
        if known is not None:
            return known + layout.buffer_bytes
    blocks = layout.units[1:-1]
    per_block = max((sum(layout.bundles[name].num_parameters for name in unit.bundles) for unit in blocks), default=0)
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
