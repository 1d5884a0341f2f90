"""Claims about arenas: slots that are lent together never share a byte, and an arena is hardly larger than what is lent at one time."""

from __future__ import annotations

import random

import pytest
from matrices import PLACEMENTS, make_plan

from overspill.planning import ArenaPlan, plan_arena, pool_events
from overspill.planning.arena import waiting_offsets
from overspill.planning.pools import PoolEvent
from overspill.scheduling import build_evaluation, build_flush, build_train_step
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.schedule import Schedule
from overspill.spec.tensors import Tier
from overspill.units import align_up


def programs(plan: Plan) -> list[Schedule]:
    tokens = [16, 12, 16, 4]
    found = [build_train_step(plan, tokens, starts_pending=False), build_evaluation(plan, tokens)]
    if plan.timing is UpdateTiming.PENDING:
        found += [build_train_step(plan, tokens, starts_pending=True), build_flush(plan)]
    return found


def check(events: list[PoolEvent], arena: ArenaPlan, plan: Plan) -> None:
    """Play the program: every slot at its place, beside all that is lent."""
    places, waiting = iter(arena.places), waiting_offsets(plan)
    lent: dict[int, tuple[int, int, str]] = {}
    for event in events:
        if event.tier is not Tier.DEVICE:
            continue
        if not event.num_bytes:
            del lent[event.slot]
            continue
        offset, size = waiting[event.bundle] if event.is_waiting else next(places)
        assert size == align_up(event.num_bytes, 4096) and offset % 4096 == 0 and offset + size <= arena.num_bytes
        assert all(offset + size <= start or start + length <= offset for start, length, _ in lent.values()), "two slots share bytes"
        lent[event.slot] = (offset, size, event.bundle)
    assert next(places, None) is None
    assert {(bundle, offset) for offset, _, bundle in lent.values()} <= {(bundle, offset) for bundle, (offset, _) in waiting.items()}, (
        "what outlives the program is not where the next one looks for it"
    )


@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_slots_lent_together_share_no_byte_in_any_program_of_any_placement(clip: float | None, tied: bool) -> None:
    for parameters, states, boundaries in PLACEMENTS:
        for group_size in (1, 4):
            plan = make_plan(tied=tied, clip=clip, group_size=group_size, parameters=parameters, states=states, boundaries=boundaries)
            for schedule in programs(plan):
                events = list(pool_events(schedule, plan))
                arena = plan_arena(events, plan)
                check(events, arena, plan)
                fixed_bytes = sum(size for _, size in waiting_offsets(plan).values())
                assert arena.num_bytes <= 1.3 * max(arena.least_bytes, fixed_bytes)


def test_an_arena_is_no_larger_than_what_is_lent_at_one_time_where_everything_streams() -> None:
    for clip in (None, 1.0):
        plan = make_plan(clip=clip, parameters="host", states="host", boundaries="device", accumulate=1)
        for schedule in programs(plan)[:1]:
            arena = plan_arena(pool_events(schedule, plan), plan)
            assert arena.num_bytes == arena.least_bytes > 0


def test_gradients_that_wait_have_the_same_place_in_all_programs_of_a_plan() -> None:
    plan = make_plan(clip=1.0, parameters="host", states="host", device_states_bytes=10**9)
    waiting = waiting_offsets(plan)
    assert len(waiting) > 3 and [offset for offset, _ in waiting.values()] == sorted(offset for offset, _ in waiting.values())
    first, flush = build_train_step(plan, [16], starts_pending=False), build_flush(plan)
    for schedule in (first, build_train_step(plan, [16], starts_pending=True), flush):
        events = list(pool_events(schedule, plan))
        check(events, plan_arena(events, plan), plan)


def test_any_program_of_any_sizes_is_placed() -> None:
    plan, choose = make_plan(parameters="host", states="host"), random.Random(0)
    for _ in range(40):
        events, alive = [], []
        for slot in range(choose.randint(1, 120)):
            events.append(PoolEvent(tier=Tier.DEVICE, slot=slot, num_bytes=choose.choice([1, 5000, 8192, choose.randint(1, 10**6)])))
            alive.append(slot)
            while alive and choose.random() < 0.6:
                events.append(PoolEvent(tier=Tier.DEVICE, slot=alive.pop(choose.randrange(len(alive))), num_bytes=0))
        events += [PoolEvent(tier=Tier.DEVICE, slot=slot, num_bytes=0) for slot in alive]
        arena = plan_arena(events, plan)
        check(events, arena, plan)
        assert arena.least_bytes <= arena.num_bytes <= 1.35 * arena.least_bytes


def test_a_program_without_slots_needs_no_arena() -> None:
    plan = make_plan(parameters="device", states="device")
    assert plan_arena([], plan) == ArenaPlan(places=(), num_bytes=0, least_bytes=0)
