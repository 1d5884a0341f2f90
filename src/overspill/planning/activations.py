"""Decide what becomes of what each block's forward saves: recompute it, or keep its graph, here or elsewhere (`spec.retention`).

A mode that the user fixed holds for every block; if that does not fit, the plan fails. `auto`:

1. Candidates are blocks whose graph can be kept and whose launches do not bound them: those are replayed as CUDA graphs, which a graph of
   autograd cannot be. All others are recomputed.
2. The last blocks are kept on the device, as many as its budget holds (`planning/room.py`, rule 3): what they store waits the shortest,
   and is gone when the first block that is recomputed needs its memory. All that fit beside the placement that recomputation would have;
   or all that fit at all, and parameters and states get what is left; or half of these. Groups, and where hidden states rest, are as
   recomputation would have them.
3. Of the blocks before these, evenly spread so that the link has time between two, some go to host memory; where the rates of compute and
   links were measured, for else nobody knows what a link carries beside compute, and where host memory is another memory.
4. Each such plan is simulated, and the quickest one is taken. So windows, rates of links, and what else crosses them, are weighed as they
   are, and none of it is a rule of thumb. Of equally quick ones it is the one that retains the least; but blocks that are kept in memory
   which nothing else would have make compute shorter, whatever else bounds the step on paper, and are kept.
5. Where all blocks are kept on the device and there is still room that nothing else would have, they rebuild less, unless that is slower:
   first all of them what costs most for its bytes to rebuild (`ActivationMode.KEEP_COSTLY`), then the last ones nothing at all. What does
   not fit all blocks, the last ones have.

Groups of micro-batches are halved as long as that is quicker and not all blocks are retained: what is kept is kept for a whole group.

Pure: no torch. Costs a schedule build a trial, and a simulation for each plan that fits.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from overspill.errors import BudgetError
from overspill.planning.cost import build_costs
from overspill.planning.graphs import find_bound
from overspill.planning.room import Room
from overspill.planning.simulate import simulate
from overspill.planning.space import is_host_memory
from overspill.scheduling import full_step
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest, UpdateTiming
from overspill.spec.retention import ON_DEVICE, ActivationMode
from overspill.spec.workload import Retention, WorkloadSpec
from overspill.units import format_bytes, format_seconds

MOVED_SHARES = (0.25, 0.5, 1.0)
"""Of the blocks that are not kept: what is tried to move. Chosen: each costs a simulation."""
MOST_CORRECTED = 3
"""Blocks fewer than estimated that are tried. Chosen."""
LEAST_GAIN = 0.01
"""Share of a step's time that a plan must save to be taken for one that retains less. Chosen: simulations are not as exact."""
MOST_LOSS = 0.002
"""Share that it may lose if it only takes device memory that nothing else would have. Chosen."""

Place = Callable[[Plan, Plan | None], Plan]
"""Where everything else goes beside the activations of a plan; if there is another one, with groups of the same size, hidden states no
lower, and parameters fetched ahead as they are there.

Raises BudgetError if it does not fit."""


def force_mode(request: PlanRequest, base: Plan, workload: WorkloadSpec | None) -> Plan:
    """`base` with the mode that was asked for in every block.

    Raises:
        ValueError: what a block stores is not known.
    """
    mode = ActivationMode(request.activations)
    if mode is ActivationMode.RECOMPUTE:
        return base
    known = find_retention(base, workload)
    unknown = [unit.name for unit in base.blocks if unit.name not in known]
    if unknown:
        raise ValueError(
            f"--activations {mode} needs to know what each block stores, and of {len(unknown)} blocks, {unknown[0]} the first, it is not "
            f"known: {_why_unknown(unknown[0], workload)}; choose --activations recompute, or auto"
        )
    if mode is ActivationMode.SSD and request.ssd_dir is None:
        raise ValueError("--activations ssd needs a directory: give --ssd-dir DIRECTORY on the drive that shall hold them")
    return retain(base, dict.fromkeys(known, mode), known)


def find_retention(plan: Plan, workload: WorkloadSpec | None) -> dict[str, Retention]:
    """Block -> what keeping its graph takes; blocks of which it is known."""
    if workload is None:
        return {}
    known = {unit: item.retention for item in workload.classes for unit in item.units}
    return {unit.name: found for unit in plan.blocks if (found := known.get(unit.name)) is not None}


def retain(plan: Plan, modes: Mapping[str, ActivationMode], known: Mapping[str, Retention]) -> Plan:
    """`plan` with these modes, in place of those it has."""
    stored = {unit: known[unit].of(mode).stored_bytes for unit, mode in modes.items()}
    return dataclasses.replace(plan, activations=dict(modes), stored_bytes=stored)


def choose_activations(
    request: PlanRequest,
    base: Plan,
    hardware: HardwareSpec,
    workload: WorkloadSpec | None,
    *,
    place: Place,
    room: Room,
    replays_graphs: bool,
) -> Plan:
    """The quickest placed plan for `auto`.

    Args:
        base: nothing placed, all recomputed.
        replays_graphs: whether blocks whose launches bound them are replayed as CUDA graphs.

    Raises:
        BudgetError: not even recomputation fits.
    """
    recomputed = place(base, None)
    known = find_retention(base, workload)
    replayed: frozenset[str] = frozenset()
    if replays_graphs and not base.device.startswith("cpu") and workload is not None:
        replayed = find_bound(workload, hardware)
    blocks = [unit.name for unit in base.blocks if unit.name in known and unit.name not in replayed]
    if not blocks or workload is None:
        first = base.units[1].name
        why = "their launches bound them, and they are replayed as CUDA graphs" if replayed else _why_unknown(first, workload)
        return note(recomputed, f"activations: all blocks are recomputed (auto: {why})")
    search = _Search(
        base,
        hardware,
        workload,
        blocks,
        known,
        place,
        room,
        replays_graphs=replays_graphs,
    )
    recomputed_s = search.step_s(recomputed)
    best, best_s = recomputed, recomputed_s
    size = recomputed.group_size
    while True:
        before = best
        for plan in search.plans(dataclasses.replace(recomputed, group_size=size)):
            step_s = search.step_s(plan)
            if step_s < (1 - search.least_gain(plan, recomputed)) * best_s:
                best, best_s = plan, step_s
        is_all = len(best.activations) == len(blocks)
        if size == 1 or is_all or request.group_size is not None or (best is before and size < recomputed.group_size):
            break
        size = -(-size // 2)
    filled = search.fill_room(best)
    if filled is not None and (step_s := search.step_s(filled)) < (1 + MOST_LOSS) * best_s:
        best, best_s = filled, step_s
    return note(best, describe(best, saved=(recomputed_s, best_s) if best is not recomputed and hardware.is_measured else None))


class _Search:
    """The plans that are tried (rules 2 and 3), those that retain less before those that retain more."""

    def __init__(
        self,
        base: Plan,
        hardware: HardwareSpec,
        workload: WorkloadSpec,
        blocks: Sequence[str],
        known: Mapping[str, Retention],
        place: Place,
        room: Room,
        *,
        replays_graphs: bool,
    ) -> None:
        self.base, self.hardware, self.workload, self.replays_graphs = base, hardware, workload, replays_graphs
        self.blocks, self.known, self.place, self.room = blocks, known, place, room

    def step_s(self, plan: Plan) -> float:
        """Of a step in a row of equal ones, on paper."""
        costs = build_costs(plan, self.hardware, workload=self.workload, replayed=None if self.replays_graphs else ())
        overlaps_steps = plan.timing is UpdateTiming.IMMEDIATE
        prediction = simulate(full_step(plan), plan, self.hardware, overlap=True, repeats=True, overlaps_steps=overlaps_steps, costs=costs)
        return prediction.step_s

    def least_gain(self, plan: Plan, recomputed: Plan) -> float:
        """What it must save (rule 4)."""
        moves = any(mode not in ON_DEVICE for mode in plan.activations.values())
        places = (plan.placements, plan.boundaries, plan.group_size)
        is_beside = places == (recomputed.placements, recomputed.boundaries, recomputed.group_size)
        return -MOST_LOSS if is_beside and not moves else LEAST_GAIN

    def plans(self, recomputed: Plan) -> Iterator[Plan]:
        """Those with groups of the size that `recomputed`, which retains nothing, has."""
        kept: dict[int, Plan] = {}
        for start in (dataclasses.replace(recomputed, placements=self.base.placements, deferred=()), recomputed):
            most = self._count_fitting(start, lambda number: self._modes(number, 0))
            for number in range(most, max(most - MOST_CORRECTED, 0), -1):
                if number not in kept and (plan := self.try_modes(self._modes(number, 0), recomputed)) is not None:
                    kept[number] = plan
                if number in kept:
                    break
        most = max(kept, default=0)
        half = -(-most // 2)
        if half not in kept and half and (plan := self.try_modes(self._modes(half, 0), recomputed)) is not None:
            kept[half] = plan
        yield from (kept[number] for number in sorted(kept))
        left = len(self.blocks) - most if self.hardware.is_measured and not is_host_memory(self.base.device) else 0
        fewer = min(1, most)  # room for what is under way is taken from what is kept; more that are moved need no less
        for number in sorted({math.ceil(share * left) for share in MOVED_SHARES} - {0}):
            while fewer <= min(most, MOST_CORRECTED):
                if (plan := self.try_modes(self._modes(most - fewer, number), recomputed)) is not None:
                    yield plan
                    break
                fewer += 1

    def _count_fitting(self, start: Plan, modes: Callable[[int], Mapping[str, ActivationMode]]) -> int:
        """The largest number of blocks whose modes the device has room for beside what `start` has there."""

        def is_too_much(number: int) -> bool:
            return self.room.device_excess(retain(start, modes(number), self.known), beside=start) > 0

        return bisect.bisect_left(range(1, len(self.blocks) + 1), True, key=is_too_much)

    def fill_room(self, plan: Plan) -> Plan | None:
        """`plan` with less rebuilt, as far as there is room that nothing else has (rule 5); None: not all blocks are kept on the device, or
        there is no room."""
        if len(plan.activations) < len(self.blocks) or not all(mode in ON_DEVICE for mode in plan.activations.values()):
            return None
        num_costly = self._count_fitting(plan, lambda number: self._raised_modes(number, 0))
        num_whole = 0
        if num_costly == len(self.blocks):
            num_whole = self._count_fitting(plan, lambda number: self._raised_modes(num_costly, number))
        for fewer in range(MOST_CORRECTED):
            found = self._raised(plan, num_costly, num_whole - fewer) if num_whole else self._raised(plan, num_costly - fewer, 0)
            if found is not None and (found.placements, found.boundaries) == (plan.placements, plan.boundaries):
                return found
        return None

    def _raised(self, plan: Plan, num_costly: int, num_whole: int) -> Plan | None:
        """The last `num_costly` blocks rebuild nothing costly, the last `num_whole` of them nothing."""
        if num_costly <= 0 or num_whole < 0:
            return None
        return self.try_modes(self._raised_modes(num_costly, num_whole), plan)

    def _raised_modes(self, num_costly: int, num_whole: int) -> dict[str, ActivationMode]:
        modes = dict.fromkeys(self.blocks, ActivationMode.KEEP)
        modes |= dict.fromkeys(self.blocks[len(self.blocks) - num_costly :], ActivationMode.KEEP_COSTLY)
        return modes | dict.fromkeys(self.blocks[len(self.blocks) - num_whole :], ActivationMode.KEEP_WHOLE)

    def _modes(self, num_kept: int, num_moved: int) -> dict[str, ActivationMode]:
        """The last blocks kept; of those before, `num_moved` evenly spread to host memory."""
        first_kept = len(self.blocks) - num_kept
        num_moved = min(num_moved, first_kept)
        modes = {self.blocks[(2 * index + 1) * first_kept // (2 * num_moved)]: ActivationMode.HOST for index in range(num_moved)}
        return modes | dict.fromkeys(self.blocks[first_kept:], ActivationMode.KEEP)

    def try_modes(self, modes: Mapping[str, ActivationMode], like: Plan) -> Plan | None:
        """The plan with these modes and the groups of `like`; None: it does not fit, moves hidden states down, takes the room in which
        parameters are fetched ahead, or has more units on the device and so fewer blocks whose updates can be put off than the user asks
        for."""
        try:
            return self.place(retain(self.base, modes, self.known), like)
        except BudgetError:
            return None


def note(plan: Plan, text: str) -> Plan:
    return dataclasses.replace(plan, notes=(*plan.notes, text))


def describe(plan: Plan, *, saved: tuple[float, float] | None = None, how: str = "auto") -> str:
    """One sentence on what becomes of activations.

    Args:
        saved: a step's predicted time if all were recomputed, and as it is.
    """
    blocks = [unit.name for unit in plan.blocks]
    parts = []
    for mode, words in (
        (ActivationMode.KEEP, "kept on the device"),
        (ActivationMode.KEEP_COSTLY, "kept on the device with little rebuilt"),
        (ActivationMode.KEEP_WHOLE, "kept on the device with nothing rebuilt"),
        (ActivationMode.HOST, "moved to host memory"),
        (ActivationMode.SSD, "moved to the SSD"),
    ):
        units = [unit for unit in blocks if plan.activation_mode(unit) is mode]
        if units:
            stored = sum(plan.stored_bytes[unit] for unit in units) * plan.group_size
            parts.append(f"of {len(units)} blocks {words} ({format_bytes(stored)})")
    num_recomputed = sum(unit not in plan.activations for unit in blocks)
    if num_recomputed:
        parts.append(f"of {num_recomputed} blocks recomputed")
    gain = ""
    if saved is not None:
        gain = f"; a step is predicted at {format_seconds(saved[1])}, with all recomputed at {format_seconds(saved[0])}"
    return f"activations: {', '.join(parts)} ({how}{gain})"


def _why_unknown(unit: str, workload: WorkloadSpec | None) -> str:
    if workload is None:
        return "the model cannot be described without weights"
    notes = workload.class_of(unit).notes
    return "; ".join(notes) or "its graph cannot be told from the memory of its weights"
