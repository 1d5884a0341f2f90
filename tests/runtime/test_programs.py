"""Claims about arenas and budgets: where a budget has no room for an arena slots are lent by size, and the numbers say so beforehand."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_models import tiny_model

from overspill.huggingface import StreamedModel
from overspill.planning import resident_peaks
from overspill.planning.space import host_room_bytes
from overspill.runtime.opening import make_plan
from overspill.runtime.programs import Programs
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.tensors import Tier


@pytest.fixture(scope="module")
def plan() -> Plan:
    request = PlanRequest(
        parameters="host", states="ssd", boundaries="host", ssd_dir="ssd", seq_len=12, micro_batch=2, accumulate=2, clip=1.0
    )  # fmt: skip
    return make_plan(request, StreamedModel(tiny_model("llama")), HardwareSpec(), device="cuda:0", chunk_bytes=32 * 1024)


def test_a_pinned_budget_below_the_arena_means_slots_by_size_of_which_a_part_can_be_pinned(plan: Plan) -> None:
    programs = Programs(plan)
    whole = programs.whole_step()
    arena = programs.arena(whole, Tier.HOST)
    assert arena is not None and programs.slot_bytes(whole, Tier.HOST) == arena.num_bytes
    homes_bytes = sum(bundle.parameter_bytes for bundle in plan.bundles.values())
    for budget, has_arena in ((homes_bytes + arena.least_bytes // 2, False), (2 * homes_bytes + 2 * arena.num_bytes, True)):
        bounded = Programs(dataclasses.replace(plan, pinned_budget_bytes=budget))
        schedule = bounded.whole_step()
        assert (bounded.arena(schedule, Tier.HOST) is not None) == has_arena
        assert bounded.arena(schedule, Tier.DEVICE) is not None
        if not has_arena:
            assert bounded.slot_bytes(schedule, Tier.HOST) == bounded.limit_bytes(schedule, Tier.HOST) > arena.least_bytes, "each size"
    on_cpu = Programs(dataclasses.replace(plan, pinned_budget_bytes=0, device="cpu"))
    assert on_cpu.arena(on_cpu.whole_step(), Tier.HOST) is not None, "nothing is pinned there"


def test_a_host_budget_of_the_peak_is_kept_with_an_arena_or_without(plan: Plan) -> None:
    peak_bytes = resident_peaks(Programs(plan).whole_step(), plan)[Tier.HOST]
    bounded = Programs(dataclasses.replace(plan, host_budget_bytes=peak_bytes))
    room_bytes = host_room_bytes(bounded.plan)
    for write in (bounded.whole_step, lambda: bounded.evaluate((12, 12)), bounded.flush, lambda: bounded.train((12,), pending=False)):
        schedule = write()
        assert bounded.arena_plans(schedule)[Tier.HOST].least_bytes <= bounded.slot_bytes(schedule, Tier.HOST) <= room_bytes


def test_places_are_worked_out_when_a_program_is_to_run_and_not_when_it_is_written(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nobody has asked")

    monkeypatch.setattr("overspill.runtime.programs.plan_arenas", refuse)
    programs = Programs(plan)
    programs.whole_step(), programs.evaluate((12,))
    assert len(programs) == 2
