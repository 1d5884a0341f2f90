"""Which blocks a run replays as CUDA graphs, decided before it, and what their recordings take of the device.

The same answer goes to the executor (`runtime/graphs.BlockGraphs.choose`), to the memory terms and to the times of compute, so that a run
does what was predicted of it. Only where nobody has timed templates, or one could not be timed, the executor judges by its own first
steps, and may judge otherwise than paper; predictions of later steps go by its judgement.

Rules, for each class of blocks:

1. Replayed are blocks that launches bound, or nearly (`spec/launches.py`), by their timed template; without one, on paper: operations at
   `HardwareSpec.launch_s` beside what their FLOPs and bytes are assumed to take. Of a template that was timed smaller than asked for,
   launching is as measured, for it does not depend on tokens, and the device's time is on paper.
2. Never: blocks that draw random numbers, and those whose recording failed when they were timed; and no block of a model of which any has
   side inputs or outputs, also of its other classes (dense layers before a mixture of experts), because the executor records none there.
3. Blocks whose graphs autograd keeps (`Plan.activations`) are not recorded.
4. None at all where the device's budget has no room for what recordings hold (`has_room`).
"""

from __future__ import annotations

from collections.abc import Collection

from overspill.planning.dispatching import issue_s
from overspill.spec.hardware import HardwareSpec
from overspill.spec.launches import LAUNCH_BESIDE_LANES, LAUNCH_S, do_launches_bind, is_worth_replaying
from overspill.spec.plan import Plan
from overspill.spec.workload import TemplateTimes, UnitTimes, UnitWork, Work, WorkloadSpec

JUDGED_FLOPS, JUDGED_BYTES_PER_S = 500e12, 2.5e12
"""Of a GPU on which it is judged whether launches bound a block. Assumed; a slower GPU is less often bound by them."""
POOL_LOSS = 0.25
"""Of a block's working memory, what the recordings' pool holds beyond it: what a forward's recording leaves does not fit a backward's.
From 1.10B as 16 micro-batches of 1 x 2048 (0.27); no run that predictions are held against is of that shape and size."""


def choose_replayed(
    plan: Plan, workload: WorkloadSpec | None, *, hardware: HardwareSpec, times: TemplateTimes | None = None, device_peak_bytes: int = 0
) -> frozenset[str]:
    """Names of the blocks that are replayed.

    Args:
        workload: of the plan's batch; None: nothing is known, and none is.
        times: of its classes, timed on the plan's device.
        device_peak_bytes: most bytes of pieces on the device in a step (rule 4).
    """
    if workload is None or plan.device.startswith("cpu") or _has_sides(workload) or not has_room(plan, device_peak_bytes):
        return frozenset()
    timed = {item.name: item for item in times.blocks} if times is not None else {}
    chosen = [item for item in workload.classes[1:-1] if is_replayed(item, workload, hardware=hardware, timed=timed.get(item.name))]
    return frozenset(unit for item in chosen for unit in item.units if unit not in plan.activations)


def has_room(plan: Plan, device_peak_bytes: int) -> bool:
    """Whether the device can hold the activations of one block beside all else: recordings keep them while any unit runs."""
    budget = plan.device_budget_bytes
    return budget is None or device_peak_bytes + room_bytes(plan) <= budget


def room_bytes(plan: Plan) -> int:
    """What recordings are taken to need beside a step's most: of a model that nobody has traced, as much as its largest unit works with."""
    return _pool_bytes(plan.device_working_bytes) if plan.recordings_bytes is None else plan.recordings_bytes


def is_replayed(item: UnitWork, workload: WorkloadSpec, *, hardware: HardwareSpec, timed: UnitTimes | None) -> bool:
    """Whether the blocks of a class are, room and retention aside (rules 1 and 2)."""
    if not _is_recordable(item) or (timed is not None and not timed.is_replayable):
        return False
    if timed is not None and timed.launch_s and timed.seq_len * timed.micro_batch >= workload.num_tokens:
        return timed.is_worth_replaying
    device_s = _paper_device_s(item)
    if device_s is None:
        return False
    if timed is not None and timed.launch_s and timed.backward is not None:
        launch_s = issue_s(timed.backward)
    else:
        launch_s = _paper_launch_s(item, hardware)
    return is_worth_replaying(launch_s=launch_s, device_s=device_s)


def find_bound(workload: WorkloadSpec, hardware: HardwareSpec) -> frozenset[str]:
    """Names of the blocks whose launches bound them on paper, and which are replayed therefore and not kept, room aside."""
    if _has_sides(workload):
        return frozenset()
    return frozenset(unit for item in workload.classes[1:-1] if is_bound_by_launches(item, hardware) for unit in item.units)


def is_bound_by_launches(item: UnitWork, hardware: HardwareSpec) -> bool:
    """Whether launching a block's kernels takes longer than they do, on paper, and it can be recorded."""
    device_s = _paper_device_s(item)
    if device_s is None or not _is_recordable(item):
        return False
    return do_launches_bind(launch_s=_paper_launch_s(item, hardware), device_s=device_s)


def graph_bytes(plan: Plan, workload: WorkloadSpec | None, replayed: Collection[str]) -> int:
    """The recordings' own pool, and the static tensors that they read and write: of the largest class that is replayed."""
    found = 0
    for item in workload.classes[1:-1] if workload is not None else ():
        if any(unit in replayed and unit not in plan.activations for unit in item.units):
            peaks = [part.peak_bytes for part in (item.recompute, item.backward) if part is not None]
            found = max(found, _pool_bytes(max(peaks, default=plan.device_working_bytes)) + 3 * item.boundary_bytes)
    return found


def paper_s(work: Work) -> float:
    """Seconds of the device that FLOPs and bytes are assumed to take."""
    return (work.flops - work.causal_flops / 2) / JUDGED_FLOPS + work.elementwise_bytes / JUDGED_BYTES_PER_S


def _pool_bytes(working_bytes: int) -> int:
    """Of the recordings' pool, whose largest block works with so many."""
    return int((1 + POOL_LOSS) * working_bytes)


def _has_sides(workload: WorkloadSpec) -> bool:
    """Whether any block has side inputs or outputs (rule 2)."""
    return any(item.side_output_bytes or item.side_input_bytes for item in workload.classes[1:-1])


def _is_recordable(item: UnitWork) -> bool:
    """Rule 2, as far as it is known of a class on paper."""
    return not (item.side_output_bytes or item.side_input_bytes or any(tensor.is_random for tensor in item.saved))


def _paper_launch_s(item: UnitWork, hardware: HardwareSpec) -> float:
    """Of recomputation and gradients of a class that could be traced."""
    op_s = LAUNCH_BESIDE_LANES * hardware.launch_s or LAUNCH_S
    return op_s * sum(part.work.num_ops for part in (item.recompute, item.backward) if part is not None)


def _paper_device_s(item: UnitWork) -> float | None:
    """Of recomputation and gradients; None: the class could not be traced."""
    if item.backward is None or item.recompute is None:
        return None
    return paper_s(item.recompute.work + item.backward.work)
