"""What the device and the process will hold at most, as the driver and the kernel count it: named terms that add up to the peak.

Device, in the terms of torch's caching allocator (Words and sizes of its documentation and of `c10/cuda/CUDACachingAllocator.cpp`):

* A request is rounded to 512 B. Up to 1 MiB it is cut from a segment of 2 MiB, up to 10 MiB from one of 20 MiB; a larger one has a
  segment of its own, rounded to 2 MiB. What the driver sees is segments.
* `homes`: parameters and states that rest there, a segment a region. `slots`: the arena. `boundaries`, `working memory of a unit`: hidden
  states that the device computed, and what the unit takes while it runs, at the op where both together are most. `kept activations`:
  what graphs store there at that op (`spec.retention`).
* `allocator rounding`: the segments' rounding of all these. `fragmentation`: what of the working memory the allocator could not use
  again, because pieces of other sizes lay in it.
* `library workspaces`, `CUDA context`: as `overspill probe` measured them (`probe/footprint.py`), else constants; the session's own part of
  the context is a constant in any case.
* `replayed graphs`: recordings have a pool of their own, with one block's working memory and the libraries' workspaces of another stream
  in it, where blocks are replayed (`planning/graphs.py`); and the driver keeps what they launch.

Host: `homes`, `slots` (the arena there), and the process beside them. Where a step's kernels and libraries have been loaded already
(templates were timed), that is measured; else it is the process as it was when the session opened and what they are known or assumed to
take, routed experts' apart. On the `cpu` device what is the device's is in host memory too.

Terms that are assumed say so. Where nobody has described the workload, the plan's own assumption of a unit's working memory is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from overspill.planning.graphs import choose_replayed, graph_bytes
from overspill.planning.pools import SLOT_BYTES
from overspill.planning.space import is_host_memory, region_bytes
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan
from overspill.spec.prediction import MemoryTerm, total_bytes
from overspill.spec.schedule import BUNDLE_ROLES, Compute, Free, Op, Phase, Piece, Role, Schedule
from overspill.spec.tensors import Tier
from overspill.spec.workload import WorkloadSpec
from overspill.units import MIB, align_up

SMALL_BYTES, MEDIUM_BYTES = 1 * MIB, 10 * MIB
SMALL_SEGMENT_BYTES, LARGE_GRANULE_BYTES, SMALL_GRANULE_BYTES = 2 * MIB, 2 * MIB, 512
"""Of torch's caching allocator: kSmallSize, kMinLargeAlloc; kSmallBuffer, kRoundLarge, kMinBlockSize."""
FRAGMENTATION_FRACTION = 0.08
"""Of a unit's working memory, where segments grow (`tiers/cuda.py`). Measured: 8 % (0.18 GiB) with 4.6 and 11.4 GiB allocated, 11 %
(0.17 GiB) with 20.3, of which 11.5 were kept activations; 1.10B on an H100, torch 2.11. In segments of fixed size it was 18 %."""
LIBRARY_WORKSPACE_BYTES = 32 * MIB
"""Of a matrix library on one stream of a recent GPU, from the allocator: torch's own choice for compute capability 9."""
CUDA_CONTEXT_BYTES = 1050 * MIB
"""Context, kernels and what the driver keeps for page-locked memory, in a run of overspill. Measured: 1,031 and 1,051 MiB on an H100 with
torch 2.11; 693 MiB when the session had just been opened."""
SESSION_CONTEXT_BYTES = 264 * MIB
"""What a session's streams, recordings and fused kernels add to the context of a plain training loop, which `overspill probe` measures.
Measured on an H100 with torch 2.11: 1,031 MiB beside 767, the same for 1.10B and (within 6) 3.02B."""
RECORDINGS_CONTEXT_BYTES = 20 * MIB
"""What recordings add to the context. Measured on an H100 with torch 2.11: 10 to 28 MiB, of 12 to 24 blocks."""
CUDA_PROCESS_GROWTH_BYTES = 620 * MIB
"""Host memory that kernels, libraries and compiled code take in the first steps on a GPU. Assumed: the process of a plain training loop
grew by 647 MiB between opening and its last step on an H100 machine."""


def device_terms(
    schedule: Schedule,
    plan: Plan,
    *,
    slot_bytes: int,
    hardware: HardwareSpec | None = None,
    workload: WorkloadSpec | None = None,
    replayed: Collection[str] | None = None,
) -> tuple[MemoryTerm, ...]:
    """The parts of the device's peak while `schedule` runs.

    Args:
        slot_bytes: of the arena that the session allocates, or of what it lends by size where there is no room for one.
        hardware: the footprint of a process there, if it was measured; None: constants.
        workload: of the plan's batch; what units take while they run.
        replayed: blocks that are replayed as CUDA graphs; None: as it is judged on paper.
    """
    homes, found = region_bytes(plan, Tier.DEVICE), hardware or HardwareSpec()
    if is_host_memory(plan.device):
        return _present(
            MemoryTerm(name="homes", num_bytes=sum(homes)), MemoryTerm(name="slots", num_bytes=align_up(slot_bytes, SLOT_BYTES))
        )
    if replayed is None:
        replayed = choose_replayed(plan, workload, hardware=found)
    busiest = _busiest(schedule, plan, workload)
    is_assumed = workload is None or not workload.is_complete
    rounding = sum(segment_bytes(size) - size for size in (*homes, slot_bytes, *busiest.boundaries))
    rounding += segment_bytes(busiest.working_bytes) - busiest.working_bytes + SMALL_SEGMENT_BYTES
    return _present(
        MemoryTerm(name="homes", num_bytes=sum(homes)),
        MemoryTerm(name="slots", num_bytes=slot_bytes),
        MemoryTerm(name="boundaries", num_bytes=sum(busiest.boundaries)),
        MemoryTerm(name="kept activations", num_bytes=busiest.stored_bytes),
        MemoryTerm(name="arguments and side outputs", num_bytes=_argument_bytes(plan, workload), is_assumed=is_assumed),
        MemoryTerm(name="working memory of a unit", num_bytes=busiest.working_bytes, is_assumed=is_assumed),
        MemoryTerm(name="replayed graphs", num_bytes=recordings_bytes(plan, workload, replayed, found), is_assumed=True),
        _workspace_term(found),
        MemoryTerm(name="allocator rounding", num_bytes=rounding),
        MemoryTerm(name="fragmentation", num_bytes=fragmentation_bytes(busiest.working_bytes), is_assumed=True),
        *_context_terms(found),
    )


def host_terms(
    schedule: Schedule,
    plan: Plan,
    hardware: HardwareSpec,
    *,
    slot_bytes: int,
    device: tuple[MemoryTerm, ...],
    workload: WorkloadSpec | None = None,
    loaded_process_bytes: int | None = None,
) -> tuple[MemoryTerm, ...]:
    """The parts of the process's peak in host memory while `schedule` runs.

    Args:
        slot_bytes: of the arena in host memory that the session allocates, or of what it lends by size where there is no room for one.
        device: the device's terms, which are in host memory on a CPU.
        loaded_process_bytes: what the process holds at most beside homes and slots, found when what a step needs had been loaded; None:
            nobody has looked.
    """
    terms = [
        MemoryTerm(name="homes", num_bytes=sum(align_up(size, SLOT_BYTES) for size in region_bytes(plan, Tier.HOST))),
        MemoryTerm(name="slots", num_bytes=align_up(slot_bytes, SLOT_BYTES)),
        MemoryTerm(name="process", num_bytes=hardware.process_bytes if loaded_process_bytes is None else loaded_process_bytes),
    ]
    if is_host_memory(plan.device):
        busiest = _busiest(schedule, plan, workload)
        terms += [dataclasses.replace(term, name=f"device {term.name}") for term in device]
        terms.append(MemoryTerm(name="boundaries", num_bytes=sum(busiest.boundaries)))
        terms.append(MemoryTerm(name="kept activations", num_bytes=busiest.stored_bytes))
        terms.append(MemoryTerm(name="working memory of a unit", num_bytes=busiest.working_bytes, is_assumed=workload is None))
    elif loaded_process_bytes is None:
        terms.append(_footprint_term("growth beside a GPU", hardware.footprint_host_growth_bytes, CUDA_PROCESS_GROWTH_BYTES))
        if workload is not None and any(item.routing for item in workload.classes):
            terms.append(MemoryTerm(name="experts' kernels", num_bytes=hardware.footprint_expert_host_growth_bytes))
    return _present(*terms)


def context_bytes(hardware: HardwareSpec) -> int:
    """What a session's process takes of a GPU beside what comes from torch's allocator."""
    return total_bytes(_context_terms(hardware))


def recordings_bytes(plan: Plan, workload: WorkloadSpec | None, replayed: Collection[str], hardware: HardwareSpec) -> int:
    """What recordings of blocks take of a GPU; 0 of none."""
    num_bytes = graph_bytes(plan, workload, replayed)
    return num_bytes + _workspace_term(hardware).num_bytes + RECORDINGS_CONTEXT_BYTES if num_bytes else 0


def unit_working_bytes(workload: WorkloadSpec, hardware: HardwareSpec) -> int | None:
    """Most that any unit takes of a GPU while it runs, with what the allocator loses beside it; None: not known of every unit."""
    embedding, *others = workload.classes
    if embedding.forward is None or any(item.backward is None for item in others):
        return None
    passes = (one for item in workload.classes for one in (item.forward, item.recompute, item.backward) if one is not None)
    most = max(one.peak_bytes for one in passes)
    return most + fragmentation_bytes(most) + _workspace_term(hardware).num_bytes


def fragmentation_bytes(num_bytes: int) -> int:
    """Assumed beside so many bytes of a unit's tensors."""
    return int(FRAGMENTATION_FRACTION * num_bytes)


def segment_bytes(num_bytes: int) -> int:
    """What one request reserves if nothing reserved has room for it and nothing else will use the rest; less than a mebibyte shares."""
    if num_bytes <= SMALL_BYTES:
        return align_up(num_bytes, SMALL_GRANULE_BYTES)
    if num_bytes < MEDIUM_BYTES:
        return align_up(num_bytes, SMALL_BYTES)  # of a segment of 20 MiB, which others share
    return align_up(num_bytes, LARGE_GRANULE_BYTES)


def _footprint_term(name: str, measured_bytes: int, assumed_bytes: int) -> MemoryTerm:
    return MemoryTerm(name=name, num_bytes=measured_bytes or assumed_bytes, is_assumed=not measured_bytes)


def _workspace_term(hardware: HardwareSpec) -> MemoryTerm:
    return _footprint_term("library workspaces", hardware.footprint_library_bytes, LIBRARY_WORKSPACE_BYTES)


def _context_terms(hardware: HardwareSpec) -> tuple[MemoryTerm, MemoryTerm]:
    """Of a training process, and of the session in it where that was measured without one."""
    session_bytes = SESSION_CONTEXT_BYTES if hardware.footprint_context_bytes else 0
    return (
        _footprint_term("CUDA context", hardware.footprint_context_bytes, CUDA_CONTEXT_BYTES),
        MemoryTerm(name="session's part of the context", num_bytes=session_bytes, is_assumed=True),
    )


def _present(*terms: MemoryTerm) -> tuple[MemoryTerm, ...]:
    return tuple(term for term in terms if term.num_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Busiest:
    """The op at which the device holds most that is no home and no slot."""

    boundaries: tuple[int, ...]
    """Of each hidden state that the device has computed and keeps while the op runs."""
    working_bytes: int
    """Of the unit; what the op leaves behind is part of it."""
    stored_bytes: int = 0
    """Of activations that graphs keep there while the op runs."""


def _busiest(schedule: Schedule, plan: Plan, workload: WorkloadSpec | None) -> _Busiest:
    alive: dict[Piece, int] = {}
    stored: dict[Piece, int] = {}
    held = 0
    best, best_bytes = _Busiest(boundaries=(), working_bytes=0), -1
    for item in schedule.ops:
        op = item.op
        if isinstance(op, Compute):
            working = _working_bytes(plan, workload, op)
            if held + working > best_bytes:
                best_bytes = held + working
                best = _Busiest(boundaries=tuple(alive.values()), working_bytes=working, stored_bytes=sum(stored.values()))
            for piece, size in op.produced:
                if piece.role not in BUNDLE_ROLES:
                    (stored if piece.role is Role.ACTIVATIONS else alive)[piece] = size
                    held += size
        for piece in _gone(op):
            held -= alive.pop(piece, 0) + stored.pop(piece, 0)
    return best


def _gone(op: Op) -> tuple[Piece, ...]:
    """Pieces that are on the device no more after an op."""
    if isinstance(op, Compute):
        return op.consumed
    return (op.piece,) if isinstance(op, Free) and op.tier is Tier.DEVICE else ()


def _working_bytes(plan: Plan, workload: WorkloadSpec | None, op: Compute) -> int:
    if workload is None:
        return plan.device_working_bytes
    item = workload.class_of(op.unit)
    if item.forward is None or item.recompute is None or item.backward is None:
        return plan.device_working_bytes
    if op.phase is Phase.FORWARD:
        stored = sum(size for piece, size in op.produced if piece.role is Role.ACTIVATIONS)
        return min(item.forward.peak_bytes + stored, item.recompute.peak_bytes) if stored else item.forward.peak_bytes
    working = max(item.recompute.peak_bytes, item.backward.peak_bytes)
    if op.consumed:  # what is stored is counted as such, or is a slot
        return max(item.boundary_bytes, working - plan.activation_bytes(op.unit))
    return working


def _argument_bytes(plan: Plan, workload: WorkloadSpec | None) -> int:
    """Masks and tables of the blocks' calls, equal ones once; router logits of every block and micro-batch of a group."""
    if workload is None:
        return 0
    masks = workload.argument_bytes * (plan.group_size if workload.is_masked else 1)
    side = sum((item.side_output_bytes + item.side_input_bytes) * item.num_units for item in workload.classes)
    return masks + side * plan.group_size
