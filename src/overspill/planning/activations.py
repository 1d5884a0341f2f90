"""Decide what becomes of what each block's forward saves: recompute it, or keep its graph, here or elsewhere (`spec.retention`).

A mode that the user fixed holds for every block; if that does not fit, the plan fails. `auto`:

1. Candidates are blocks whose graph can be kept and whose launches do not bound them: those are replayed as CUDA graphs, which a graph of
   autograd cannot be. All others are recomputed.
2. The last blocks are kept on the device, as many as its budget holds: what they store waits the shortest. All that fit beside the
   placement that recomputation would have; or all that fit at all, and parameters and states get what is left; or shares between.
3. Of the blocks before these, evenly spread so that the link has time between two, some go to host memory.
4. Each such plan is simulated, and the quickest one is taken; of equally quick ones that with the fewest retained blocks, and the one whose
   states and parameters lie highest. So windows, rates of links, and what else crosses them, are weighed as they are, and none of it is a
   rule of thumb.

Groups of micro-batches may be made smaller than recomputation's: what is kept is kept for a whole group.

Pure: no torch. Costs a schedule build a trial, and a simulation for each plan that fits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from overspill.errors import BudgetError
from overspill.planning.cost import build_costs
from overspill.planning.memory import fragmentation_bytes, is_bound_by_launches
from overspill.planning.simulate import simulate
from overspill.scheduling import build_train_step
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import AUTO, Plan, PlanRequest, UpdateTiming
from overspill.spec.retention import ActivationMode
from overspill.spec.workload import WorkloadSpec
from overspill.units import format_bytes, format_seconds

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of the blocks that could be kept, or moved: what is tried. Chosen: each costs a simulation."""
LEAST_GAIN = 0.01
"""Share of a step's time that a plan must save to be taken for one that retains less. Chosen: simulations are not as exact."""

Place = Callable[[Plan, int | None], Plan]
"""Where everything else goes beside the activations of a plan; with groups of so many micro-batches, or of as many as fit.

Raises BudgetError if it does not fit."""


def force_mode(request: PlanRequest, base: Plan, workload: WorkloadSpec | None) -> Plan:
    """`base` with the mode that was asked for in every block.

    Raises:
        ValueError: what a block stores is not known.
    """
    mode = ActivationMode(request.activations)
    if mode is ActivationMode.RECOMPUTE:
        return base
    stored = stored_bytes(base, workload)
    unknown = [unit.name for unit in base.units[1:-1] if unit.name not in stored]
    if unknown:
        raise ValueError(
            f"--activations {mode} needs to know what each block stores, and of {len(unknown)} blocks, {unknown[0]} the first, it is not "
            f"known: {_why_unknown(unknown[0], workload)}; choose --activations recompute, or auto"
        )
    if mode is ActivationMode.SSD and request.ssd_dir is None:
        raise ValueError("--activations ssd needs a directory: give --ssd-dir DIRECTORY on the drive that shall hold them")
    return retain(base, dict.fromkeys(stored, mode), stored)


def stored_bytes(plan: Plan, workload: WorkloadSpec | None) -> dict[str, int]:
    """Block -> what its graph stores of one micro-batch at its longest; blocks of which it is known."""
    if workload is None:
        return {}
    known = {unit: item.retention for item in workload.classes for unit in item.units}
    return {unit.name: found.stored_bytes for unit in plan.units[1:-1] if (found := known.get(unit.name)) is not None}


def retain(plan: Plan, modes: Mapping[str, ActivationMode], stored: Mapping[str, int]) -> Plan:
    """`plan` with these modes, in place of those it has."""
    return dataclasses.replace(plan, activations=dict(modes), stored_bytes={unit: stored[unit] for unit in modes})


def choose_activations(
    request: PlanRequest,
    base: Plan,
    hardware: HardwareSpec,
    workload: WorkloadSpec | None,
    *,
    place: Place,
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
    stored = stored_bytes(base, workload)
    replayed = set()
    if replays_graphs and not base.device.startswith("cpu") and workload is not None:
        replayed = {unit for item in workload.classes[1:-1] if is_bound_by_launches(item) for unit in item.units}
    blocks = [unit.name for unit in base.units[1:-1] if unit.name in stored and unit.name not in replayed]
    if not blocks or workload is None:
        first = base.units[1].name
        why = "their launches bound them, and they are replayed as CUDA graphs" if replayed else _why_unknown(first, workload)
        return note(recomputed, f"activations: all blocks are recomputed (auto: {why})")
    search = _Search(request, base, hardware, workload, blocks, stored, place)
    best, best_s = recomputed, search.step_s(recomputed)
    recomputed_s = best_s
    for plan in search.plans(recomputed):
        step_s = search.step_s(plan)
        if step_s < (1 - LEAST_GAIN) * best_s:
            best, best_s = plan, step_s
    return note(best, describe(best, saved=None if best is recomputed else (recomputed_s, best_s)))


class _Search:
    """The plans that are tried (rules 2 and 3), those that retain less before those that retain more."""

    def __init__(
        self,
        request: PlanRequest,
        base: Plan,
        hardware: HardwareSpec,
        workload: WorkloadSpec,
        blocks: Sequence[str],
        stored: Mapping[str, int],
        place: Place,
    ) -> None:
        self.request, self.base, self.hardware, self.workload = request, base, hardware, workload
        self.blocks, self.stored, self.place = blocks, stored, place

    def step_s(self, plan: Plan) -> float:
        """Of a step in a row of equal ones, on paper."""
        tokens = [plan.micro_batch * plan.seq_len] * plan.accumulate
        is_pending = plan.timing is UpdateTiming.PENDING
        schedule = build_train_step(plan, tokens, starts_pending=is_pending)
        costs = build_costs(plan, self.hardware, workload=self.workload)
        prediction = simulate(schedule, plan, self.hardware, overlap=True, repeats=True, overlaps_steps=not is_pending, costs=costs)
        return prediction.step_s

    def plans(self, recomputed: Plan) -> Iterator[Plan]:
        for size in self._group_sizes(recomputed):
            most = self._most_that_fit(functools.partial(self._keeping, size))
            numbers = [math.ceil(share * most) for share in reversed(SHARES)]
            if size == recomputed.group_size:
                numbers.append(self._most_that_fit(functools.partial(self._beside, recomputed)))
            for number in sorted(set(numbers)):
                if number and (plan := self.try_modes(self._modes(number, 0), size)) is not None:
                    yield plan
            yield from self._with_moved(most, size)

    def _keeping(self, size: int, num_kept: int) -> Plan | None:
        return self.try_modes(self._modes(num_kept, 0), size)

    def _beside(self, recomputed: Plan, num_kept: int) -> Plan | None:
        """The plan that keeps so many blocks and places everything else as recomputation would; None: there is none."""
        plan = self.try_modes(self._modes(num_kept, 0), recomputed.group_size)
        return plan if plan is not None and plan.placements == recomputed.placements else None

    def _with_moved(self, most_kept: int, size: int) -> Iterator[Plan]:
        """Some blocks kept, and some of those before them moved; room for what is under way is taken from what is kept."""
        for kept in dict.fromkeys((most_kept, max(0, most_kept - 2))):
            left = len(self.blocks) - kept
            for number in dict.fromkeys(math.ceil(share * left) for share in reversed(SHARES)):
                if number and (plan := self.try_modes(self._modes(kept, number), size)) is not None:
                    yield plan

    def _modes(self, num_kept: int, num_moved: int) -> dict[str, ActivationMode]:
        """The last blocks kept; of those before, `num_moved` evenly spread to host memory."""
        first_kept = len(self.blocks) - num_kept
        modes = {self.blocks[(2 * index + 1) * first_kept // (2 * num_moved)]: ActivationMode.HOST for index in range(num_moved)}
        return modes | dict.fromkeys(self.blocks[first_kept:], ActivationMode.KEEP)

    def try_modes(self, modes: Mapping[str, ActivationMode], size: int) -> Plan | None:
        """The plan with these modes; None: it does not fit."""
        kept = sum(self.stored[unit] for unit, mode in modes.items() if mode is ActivationMode.KEEP) * size
        base = self.base
        if base.device_budget_bytes is not None and not base.device.startswith("cpu"):
            reserve = fragmentation_bytes(kept)  # taken from the budget while it is placed
            base = dataclasses.replace(base, device_budget_bytes=max(0, base.device_budget_bytes - reserve))
        try:
            placed = self.place(retain(base, modes, self.stored), size)
        except BudgetError:
            return None
        return dataclasses.replace(placed, device_budget_bytes=self.base.device_budget_bytes)

    def _group_sizes(self, recomputed: Plan) -> Iterator[int]:
        """Recomputation's, and its halves unless the user fixed it."""
        size = recomputed.group_size
        yield size
        while size > 1 and self.request.group_size is None:
            size = -(-size // 2)
            yield size

    def _most_that_fit(self, build: Callable[[int], Plan | None]) -> int:
        """The largest number of blocks with a plan."""
        low, high = 0, len(self.blocks)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if build(middle) is not None else (low, middle - 1)
        return low


def note(plan: Plan, text: str) -> Plan:
    return dataclasses.replace(plan, notes=(*plan.notes, text))


def describe(plan: Plan, *, saved: tuple[float, float] | None = None, how: str = "auto") -> str:
    """One sentence on what becomes of activations.

    Args:
        saved: a step's predicted time if all were recomputed, and as it is.
    """
    blocks = [unit.name for unit in plan.units[1:-1]]
    parts = []
    for mode, words in (
        (ActivationMode.KEEP, "kept on the device"),
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


def is_automatic(request: PlanRequest) -> bool:
    return request.activations == AUTO
