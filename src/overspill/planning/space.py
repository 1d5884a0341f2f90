"""How much room a plan takes that its schedule does not count: preallocated in the SSD directory, rounded up in memory; and what counts
as host memory."""

from __future__ import annotations

from overspill.planning.pools import SLOT_BYTES
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.retention import ActivationMode
from overspill.spec.schedule import BUNDLE_ROLES, RegionKey, initial_copies, region_key
from overspill.spec.tensors import CHUNK_ALIGNMENT_ELEMENTS, Tier
from overspill.units import align_up


def store_bytes(plan: Plan) -> int:
    """Parameters and states that rest on the SSD."""
    homes = initial_copies(plan, pending=False)
    return sum(size for (_, tier), size in homes.items() if tier is Tier.SSD)


def scratch_bytes(plan: Plan) -> int:
    """Gradients, boundaries and activations that rest on the SSD during a step.

    A gradient waits only if updates do; a partial gradient (fp32) only between groups, or, of a tied weight, from the tail's
    backward to the embedding's.
    """
    total = 0
    for name, bundle in plan.bundles.items():
        if not bundle.trainable or plan.placements[name].gradients is not Tier.SSD:
            continue
        readers = sum(name in unit.bundles for unit in plan.units)
        resting = readers if plan.num_groups > 1 else readers - 1
        total += bundle.parameter_bytes if plan.timing is UpdateTiming.PENDING else 0
        total += resting * bundle.num_elements * 4
    if plan.boundaries is Tier.SSD:
        total += num_boundary_slots(plan) * boundary_slot_bytes(plan)
    moved = [unit for unit, mode in plan.activations.items() if mode is ActivationMode.SSD]
    return total + (len(moved) * plan.group_size * activation_slot_bytes(plan) if moved else 0)


def uses_ssd(plan: Plan) -> bool:
    """Whether anything rests on the SSD, between steps or within one."""
    return store_bytes(plan) + scratch_bytes(plan) > 0


def boundary_slot_bytes(plan: Plan) -> int:
    """One hidden state at its longest, on a direct-I/O boundary."""
    return align_up(max(plan.boundary_bytes(unit.name) for unit in plan.units[1:]), CHUNK_ALIGNMENT_ELEMENTS)


def activation_slot_bytes(plan: Plan) -> int:
    """What a micro-batch at its longest stores in a unit, at most, on a direct-I/O boundary."""
    return align_up(max(plan.stored_bytes.values()), CHUNK_ALIGNMENT_ELEMENTS)


def num_boundary_slots(plan: Plan) -> int:
    """Hidden states and their gradients that exist at one time in training: one a boundary, and one unit's gradients."""
    return len(plan.units) * plan.group_size


def rounding_bytes(plan: Plan) -> int:
    """Most by which memory of the device, or of the host, exceeds the pieces in it: homes and slots are rounded up to pages, which neither
    peaks nor budgets of a plan count. A page for every role of every bundle (all but its last chunk are whole pages) for every hidden
    state and its gradient, and for what a graph stores; some MiB of a model of 8B."""
    return SLOT_BYTES * (len(BUNDLE_ROLES) * len(plan.bundles) + (3 if plan.activations else 2) * num_boundary_slots(plan))


def region_bytes(plan: Plan, tier: Tier) -> list[int]:
    """Of each allocation of homes on a tier: all chunks of a role of a bundle lie in one."""
    sizes: dict[RegionKey, int] = {}
    for (piece, at), size in initial_copies(plan, pending=False).items():
        if at is tier:
            sizes[region_key(piece)] = sizes.get(region_key(piece), 0) + size
    return list(sizes.values())


def host_room_bytes(plan: Plan) -> int | None:
    """What the host budget leaves to slots, pages that all is rounded up to included; None: there is no budget."""
    if plan.host_budget_bytes is None:
        return None
    return plan.host_budget_bytes + rounding_bytes(plan) - sum(align_up(size, SLOT_BYTES) for size in region_bytes(plan, Tier.HOST))


def pinned_room_bytes(plan: Plan) -> int | None:
    """What the pinned budget leaves to slots beside parameters that rest in host memory; None: nothing bounds it, or nothing is pinned."""
    if plan.pinned_budget_bytes is None or is_host_memory(plan.device):
        return None
    homes = [bundle.parameter_bytes for name, bundle in plan.bundles.items() if plan.placements[name].parameters is Tier.HOST]
    return plan.pinned_budget_bytes - sum(align_up(size, SLOT_BYTES) for size in homes)


def is_host_memory(device: str) -> bool:
    """Whether what is on `device` takes host memory too, and so counts against both budgets."""
    return device == "cpu"
