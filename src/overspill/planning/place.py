"""Decide where everything rests: as high a tier as the budgets allow.

How it decides, in order:

1. What the user fixed is fixed. What is `auto` starts on the lowest tier there is (SSD if a directory is given, else host).
2. Boundaries and group size: the first that fits (`planning/room.py`) of (device, host, ssd) x (all micro-batches, half of them, ...
   one), since a large group saves the most traffic; of each, with prefetching before without.
3. What room is left is given away bundle by bundle: on the device to parameters and states together, in forward order (the
   embedding's gradient is the last to arrive, and the first units' updates have the least time before they are read again; at most
   `device_states_bytes` of states), in host memory first to parameters (they cross a link twice a step), then to states.
4. The result is simulated once more; if it does not fit after all, the room of step 3 is cut by the excess.
5. Some blocks' updates are put off to the end of the step, if host memory has room for their gradients (`planning/deferring.py`).

What becomes of activations is decided around these (`planning/activations.py`): a mode that the user fixed before them, `auto` by trying
several.

Pure: no torch, no measurement. Costs a few schedule builds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from overspill.errors import BudgetError
from overspill.planning.activations import choose_activations, describe, force_mode, note
from overspill.planning.deferring import defer_updates
from overspill.planning.memory import recordings_bytes
from overspill.planning.room import FLAGS, Room
from overspill.planning.simulate import simulate
from overspill.planning.space import is_host_memory
from overspill.scheduling import full_step
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import AUTO, Placement, Plan, PlanRequest, UpdateTiming
from overspill.spec.report import Prediction
from overspill.spec.tensors import Tier
from overspill.spec.workload import ModelLayout, WorkloadSpec, default_loss_chunk_rows
from overspill.units import format_bytes, format_bytes_up


def build_plan(
    request: PlanRequest,
    layout: ModelLayout,
    hardware: HardwareSpec,
    *,
    device: str,
    workload: WorkloadSpec | None = None,
    replays_graphs: bool = True,
) -> Plan:
    """The plan for `layout` under `request` on `hardware`.

    Args:
        device: what `request.device` resolved to: `cpu` or `cuda:0`.
        workload: of the request's batch, with what its blocks' graphs store; needed where activations are not all recomputed.
        replays_graphs: whether blocks whose launches bound them are replayed as CUDA graphs.

    Raises:
        BudgetError: it does not fit; with the missing bytes and the flag.
        ValueError: the SSD is asked for without a directory, or it is not known what blocks store.
    """
    fixed = [name for name in ("parameters", "states", "boundaries") if getattr(request, name) == Tier.SSD.value]
    if fixed and request.ssd_dir is None:
        raise ValueError(f"--{fixed[0]} ssd needs a directory: give --ssd-dir DIRECTORY on the drive that shall hold it")
    loss_chunk_rows = _loss_chunk_rows(layout)
    room = Room(request, layout, hardware, workload, device=device, loss_chunk_rows=loss_chunk_rows)
    base = _base_plan(request, layout, room, device=device, loss_chunk_rows=loss_chunk_rows)
    if workload is not None and not is_host_memory(device):
        base = dataclasses.replace(base, recordings_bytes=recordings_bytes(base, workload, {unit.name for unit in base.units}, hardware))

    def place(base: Plan, like: Plan | None = None) -> Plan:
        placed = _place(request, room, *_choose_group(request, room, base, like))
        number = request.deferred_updates
        return _with_notes(defer_updates(placed, hardware, workload, number=number, missing=room.missing), request)

    if request.activations == AUTO:
        plan = choose_activations(request, base, hardware, workload, place=place, room=room, replays_graphs=replays_graphs)
    else:
        plan = place(force_mode(request, base, workload))
        plan = note(plan, describe(plan, how="as asked")) if plan.activations else plan
    return room.settle(plan)


def _place(request: PlanRequest, room: Room, base: Plan, base_excess: dict[Tier, int]) -> Plan:
    """Steps 3 and 4.

    Args:
        base_excess: of `base`, which fits.
    """
    room_cut = dict.fromkeys(Tier, 0)
    for _ in range(8):
        plan = _give_away_room(request, base, base_excess, room_cut)
        if plan.placements == base.placements:
            return base
        excess = room.missing(plan)
        if not excess:
            return plan
        for tier, over in excess.items():
            room_cut[tier] += over
    return base


def predict_step(plan: Plan, hardware: HardwareSpec) -> Prediction:
    """A full step of the plan's batch at its longest, with pending updates if the plan has them."""
    return simulate(full_step(plan), plan, hardware)


def _lowest(request: PlanRequest, choice: str) -> Tier:
    if choice != AUTO:
        return Tier(choice)
    return Tier.SSD if request.ssd_dir is not None else Tier.HOST


def _base_plan(request: PlanRequest, layout: ModelLayout, room: Room, *, device: str, loss_chunk_rows: int) -> Plan:
    """Everything at its lowest."""
    states = _lowest(request, request.states)
    placement = Placement(parameters=_lowest(request, request.parameters), states=states, gradients=states)
    pending = request.clip is not None or request.dtype == "float16"
    return Plan(
        model=layout.model,
        device=device,
        dtype=request.dtype,
        state_format=request.state_format,
        optimizer=request.optimizer or "adamw",
        units=layout.units,
        bundles=layout.bundles,
        placements=dict.fromkeys(layout.bundles, placement),
        boundaries=_lowest(request, request.boundaries),
        group_size=1,
        prefetch_units=1,
        timing=UpdateTiming.PENDING if pending else UpdateTiming.IMMEDIATE,
        seq_len=request.seq_len,
        micro_batch=request.micro_batch,
        accumulate=request.accumulate,
        hidden_size=layout.hidden_size,
        hidden_dtypes=layout.hidden_dtypes,
        clip=request.clip,
        loss_chunk_rows=loss_chunk_rows,
        ssd_dir=next(iter(request.ssd_places), None),
        ssd_stripes=request.ssd_places[1:],
        device_budget_bytes=room.allowed[Tier.DEVICE],
        host_budget_bytes=room.allowed[Tier.HOST],
        ssd_budget_bytes=room.allowed[Tier.SSD],
        pinned_budget_bytes=request.pinned_budget_bytes,
        ssd_rated_bytes=request.ssd_rated_bytes,
        ssd_min_years=request.ssd_min_years,
        device_working_bytes=room.working_bytes,
        chunk_bytes=layout.chunk_bytes,
    )


def _loss_chunk_rows(layout: ModelLayout) -> int:
    return default_loss_chunk_rows(layout.vocab_size)


def _choose_group(request: PlanRequest, room: Room, base: Plan, like: Plan | None) -> tuple[Plan, dict[Tier, int]]:
    """The first of (boundary tier, group size) that fits, highest tier and largest group first; and its excess.

    Args:
        like: groups are as large as its, boundaries no lower, and no less is prefetched.
    """
    if request.boundaries == AUTO:
        tiers = [Tier.DEVICE, Tier.HOST] + ([Tier.SSD] if request.ssd_dir is not None else [])
    else:
        tiers = [Tier(request.boundaries)]
    sizes = [request.group_size] if request.group_size is not None else list(_halvings(request.accumulate))
    least_prefetch_units = 0
    if like is not None:
        tiers, sizes = tiers[: tiers.index(like.boundaries) + 1], [like.group_size]
        least_prefetch_units = like.prefetch_units
    missing: list[tuple[Tier, int]] = []
    for size, tier in ((size, tier) for size in sizes for tier in tiers):
        for prefetch_units in range(1, least_prefetch_units - 1, -1):
            plan = dataclasses.replace(base, boundaries=tier, group_size=min(size, request.accumulate), prefetch_units=prefetch_units)
            excess = room.excess(plan)
            if all(over <= 0 for over in excess.values()):
                return plan, excess
            missing.append(max(excess.items(), key=lambda item: item[1]))
    tier, over = min(missing, key=lambda item: item[1])  # of what came closest
    cures = [f"raise {FLAGS[tier]} by {format_bytes_up(over)}"]
    if tier is Tier.HOST and request.ssd_dir is None:
        cures.append("give --ssd-dir so that states can rest on an SSD")
    if tier is Tier.DEVICE:
        cures.append("lower --micro-batch or --seq-len")
    if base.activations:
        cures.append("choose --activations auto or recompute")
    if any(getattr(request, role) == tier.value for role in ("parameters", "states", "boundaries")):
        cures.append(f"let what is fixed to {tier.value} be auto")
    held = room.allowed[tier]
    assert held is not None
    kept = f", activations in mode {request.activations}" if base.activations else ""
    raise BudgetError(
        f"{base.model} with parameters on {_lowest(request, request.parameters)}, states on {_lowest(request, request.states)}{kept} needs "
        f"{format_bytes(held + over)} on {room.describe(tier)}, the budget leaves {format_bytes(held)}: {format_bytes(over)} are missing; "
        + ", or ".join(cures)
    )


def _halvings(count: int) -> Iterator[int]:
    while True:
        yield count
        if count == 1:
            return
        count = -(-count // 2)


def _give_away_room(request: PlanRequest, base: Plan, excess: dict[Tier, int], room_cut: dict[Tier, int]) -> Plan:
    """Lift bundles to higher tiers while the room lasts."""
    room: dict[Tier, float] = {tier: -excess[tier] - room_cut[tier] if tier in excess else float("inf") for tier in Tier}
    placements = dict(base.placements)
    order = list(dict.fromkeys(name for unit in base.units for name in unit.bundles))
    states_left: float = float("inf") if request.device_states_bytes is None else request.device_states_bytes

    def lift(name: str, change: Callable[[Placement], Placement]) -> None:
        nonlocal states_left
        candidate = change(placements[name])
        lifted_states = base.state_bytes(name) if candidate.states is Tier.DEVICE and base.has_state(name) else 0
        if lifted_states > states_left:
            return
        cost = {tier: _home(base, name, candidate, tier) - _home(base, name, placements[name], tier) for tier in Tier}
        if is_host_memory(base.device):
            cost[Tier.HOST] += cost[Tier.DEVICE]
        if all(cost[tier] <= max(room[tier], 0) for tier in Tier if cost[tier] > 0):
            placements[name] = candidate
            states_left -= lifted_states
            for tier in Tier:
                room[tier] -= cost[tier]

    free_parameters, free_states = request.parameters == AUTO, request.states == AUTO
    if request.device_states_bytes is not None:
        for name in order:
            if base.has_state(name):
                lift(name, lambda old: _lifted(old, Tier.DEVICE, parameters=True, states=True))
    if free_parameters or free_states:
        for name in order:
            if placements[name].states is not Tier.DEVICE:
                lift(name, lambda old: _lifted(old, Tier.DEVICE, parameters=free_parameters, states=free_states))
    if free_parameters:
        for name in order:
            lift(name, lambda old: _lifted(old, Tier.HOST, parameters=True, states=False))
    if free_states:
        for name in order:
            lift(name, lambda old: _lifted(old, Tier.HOST, parameters=False, states=True))
    return dataclasses.replace(base, placements=placements)


def _lifted(old: Placement, tier: Tier, *, parameters: bool, states: bool) -> Placement:
    """`old` with the named roles on `tier`, never lower than they were."""
    height = {Tier.SSD: 0, Tier.HOST: 1, Tier.DEVICE: 2}

    def higher(now: Tier) -> Tier:
        return tier if height[tier] > height[now] else now

    return Placement(
        parameters=higher(old.parameters) if parameters else old.parameters,
        states=higher(old.states) if states else old.states,
        gradients=higher(old.gradients) if states else old.gradients,
    )


def _home(plan: Plan, name: str, placement: Placement, tier: Tier) -> int:
    """Bytes of one bundle that rest on `tier` under `placement`."""
    bundle = plan.bundles[name]
    total = bundle.parameter_bytes if placement.parameters is tier else 0
    if bundle.trainable:
        total += plan.state_bytes(name) if placement.states is tier else 0
        total += bundle.parameter_bytes if placement.gradients is tier and plan.timing is UpdateTiming.PENDING else 0
    return total


def _with_notes(plan: Plan, request: PlanRequest) -> Plan:
    notes = []
    for role in ("parameters", "states"):
        tiers = {getattr(placement, role) for placement in plan.placements.values()}
        how = "as asked" if getattr(request, role) != AUTO else "as high as the budgets allow"
        notes.append(f"{role} on {', '.join(sorted(tiers))} ({how})")
    how = "as asked" if request.boundaries != AUTO else "as high as the budgets allow"
    notes.append(f"boundaries on {plan.boundaries} ({how}), {plan.group_size} of {plan.accumulate} micro-batches a group")
    notes.append(
        "the next unit's parameters are fetched ahead" if plan.prefetch_units else "no room to fetch a unit ahead: lanes take turns"
    )
    num_deferred = sum(any(name in plan.deferred for name in unit.bundles) for unit in plan.units)
    put_off = f", those of {num_deferred} blocks when all have, under the next step's forward" if num_deferred else ""
    notes.append(
        "updates wait for the gradient norm and run in the next step's forward"
        if plan.timing is UpdateTiming.PENDING
        else f"updates run as gradients arrive{put_off}; a non-finite gradient stops the run"
    )
    notes.append(f"working memory on the device is assumed to be {format_bytes(plan.device_working_bytes)}")
    return dataclasses.replace(plan, notes=tuple(notes))
