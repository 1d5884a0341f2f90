"""Claims about arenas: slots that are lent together never share a byte, and an arena is hardly larger than what is lent at one time."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
from matrices import PLACEMENTS, make_plan

from overspill.planning import ArenaPlan, plan_arena, plan_arenas, pool_events
from overspill.planning.arena import waiting_offsets
from overspill.planning.pools import PoolEvent
from overspill.planning.space import rounding_bytes
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


def check(events: list[PoolEvent], arena: ArenaPlan, plan: Plan, tier: Tier = Tier.DEVICE) -> None:
    """Play the program: every slot at its place, beside all that is lent."""
    places, waiting = iter(arena.places), waiting_offsets(plan, tier)
    lent: dict[int, tuple[int, int, tuple[str, int | None]]] = {}
    for event in events:
        if event.tier is not tier:
            continue
        if not event.num_bytes:
            del lent[event.slot]
            continue
        offset, size = waiting[event.bundle, event.chunk] if event.is_waiting else next(places)
        assert size == align_up(event.num_bytes, 4096) and offset % 4096 == 0 and offset + size <= arena.num_bytes
        assert all(offset + size <= start or start + length <= offset for start, length, _ in lent.values()), "two slots share bytes"
        lent[event.slot] = (offset, size, (event.bundle, event.chunk))
    assert next(places, None) is None
    assert {(chunk, offset) for offset, _, chunk in lent.values()} <= {(chunk, offset) for chunk, (offset, _) in waiting.items()}, (
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
                for tier, arena in plan_arenas(events, plan).items():
                    check(events, arena, plan, tier)
                    fixed_bytes = sum(size for _, size in waiting_offsets(plan, tier).values())
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
    plan = make_plan(clip=1.0, parameters="host", states="host")
    places = list(waiting_offsets(plan, Tier.HOST))
    assert len(places) == sum(len(bundle.chunks) for bundle in plan.bundles.values()) and places[0][0] == "tail", "chunks, as backward goes"


def test_any_program_of_any_sizes_is_placed() -> None:
    plan, choose = make_plan(parameters="host", states="host"), random.Random(0)
    for tier in (Tier.DEVICE, Tier.HOST) * 20:
        events, alive = [], []
        for slot in range(choose.randint(1, 120)):
            events.append(PoolEvent(tier=tier, slot=slot, num_bytes=choose.choice([1, 5000, 8192, choose.randint(1, 10**6)])))
            alive.append(slot)
            while alive and choose.random() < 0.6:
                events.append(PoolEvent(tier=tier, slot=alive.pop(choose.randrange(len(alive))), num_bytes=0))
        events += [PoolEvent(tier=tier, slot=slot, num_bytes=0) for slot in alive]
        arena = plan_arena(events, plan, tier)
        check(events, arena, plan, tier)
        assert arena.least_bytes <= arena.num_bytes <= 1.35 * arena.least_bytes


def test_a_program_without_slots_needs_no_arena() -> None:
    plan = make_plan(parameters="device", states="device")
    assert plan_arena([], plan) == ArenaPlan(places=(), num_bytes=0, least_bytes=0)


def steps_of_chunks(*, chunks: int, sizes: tuple[int, ...] = (2, 10), depth: int = 4) -> list[PoolEvent]:
    """Chunk after chunk passes through host memory, `depth` at a time, each with a slot of every size; then all sizes at once."""
    events, number = [], 0
    alive: list[list[int]] = []
    for chunk in range(chunks):
        alive.append([number + index for index in range(len(sizes))])
        number += len(sizes)
        events += [PoolEvent(tier=Tier.HOST, slot=slot, num_bytes=size * 4096) for slot, size in zip(alive[-1], sizes, strict=True)]
        while len(alive) > (depth if chunk < chunks - depth else 2 * depth):
            events += [PoolEvent(tier=Tier.HOST, slot=slot, num_bytes=0) for slot in alive.pop(0)]
    return events + [PoolEvent(tier=Tier.HOST, slot=slot, num_bytes=0) for slots in alive for slot in slots]


def reuse_distances(events: list[PoolEvent], arena: ArenaPlan) -> list[int]:
    """For each slot, how many events before it the bytes it gets were given back; slots that get new bytes left out."""
    places, lent, given_back, found = iter(arena.places), {}, {}, []
    for clock, event in enumerate(events):
        if not event.num_bytes:
            offset, size = lent.pop(event.slot)
            given_back.update(dict.fromkeys(range(offset, offset + size, 4096), clock))
            continue
        offset, size = lent[event.slot] = next(places)
        before = [given_back[page] for page in range(offset, offset + size, 4096) if page in given_back]
        found += [clock - max(before)] if before else []
    return found


def test_bytes_in_host_memory_rest_before_they_are_lent_again_where_there_is_room() -> None:
    """Else a read from the SSD waits for the copy that has just got the bytes, and lanes that could overlap take turns."""
    plan = make_plan(parameters="ssd", states="ssd")
    events = steps_of_chunks(chunks=60)
    arena = plan_arena(events, plan, Tier.HOST)
    check(events, arena, plan, Tier.HOST)
    tight = plan_arena(events, plan, Tier.HOST, most_bytes=0)
    check(events, tight, plan, Tier.HOST)
    assert tight.num_bytes == tight.least_bytes == arena.least_bytes and arena.num_bytes <= arena.least_bytes / 0.96
    rested, quick = (sorted(reuse_distances(events, one)) for one in (arena, tight))
    assert rested[len(rested) // 2] >= 2 * quick[len(quick) // 2]


def test_an_arena_in_host_memory_rests_no_more_than_the_budget_has_room_for() -> None:
    events = steps_of_chunks(chunks=60)
    tight = plan_arena(events, make_plan(parameters="ssd", states="ssd", boundaries="device"), Tier.HOST, most_bytes=0)
    least = tight.least_bytes
    bounded = make_plan(parameters="ssd", states="ssd", boundaries="device", host_budget_bytes=4 * 2**20)
    bounded = dataclasses.replace(bounded, host_budget_bytes=least - rounding_bytes(bounded))
    assert plan_arena(events, bounded, Tier.HOST).num_bytes == least
    pinned = dataclasses.replace(bounded, host_budget_bytes=None, pinned_budget_bytes=least)
    assert plan_arena(events, pinned, Tier.HOST).num_bytes == least


@pytest.mark.clock
def test_thousands_of_hidden_states_are_placed_in_a_moment() -> None:
    plan = make_plan(parameters="host", states="host")
    number = 20_000
    events = [PoolEvent(tier=Tier.HOST, slot=slot, num_bytes=8192) for slot in range(number)]
    events += [PoolEvent(tier=Tier.HOST, slot=slot, num_bytes=0) for slot in sorted(range(number), key=lambda slot: slot * 7919 % number)]
    begun = time.perf_counter()
    arena = plan_arena(events, plan, Tier.HOST)
    assert arena.num_bytes == arena.least_bytes == number * 8192 and time.perf_counter() - begun < 5
