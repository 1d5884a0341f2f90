"""Claims about updates that are put off to the end of a step: which, how many, in what order, and what that takes and saves."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from matrices import make_layout, make_plan
from test_activation_plans import CONFIG, H100, plan_for

from overspill.errors import BudgetError
from overspill.planning import build_plan, deferring, place
from overspill.planning.deferring import _Clock, defer_updates
from overspill.planning.place import predict_step
from overspill.runtime.predictions import Predictions
from overspill.runtime.programs import Programs
from overspill.scheduling import build_train_step, validate
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.report import Prediction
from overspill.spec.schedule import Compress, Compute, Evict, Phase, Role, Update
from overspill.spec.tensors import Tier

ASSUMED = HardwareSpec()
IN_HOST = {"parameters": "host", "states": "host", "boundaries": "device", "device_states_bytes": 0, "ssd_dir": None}


def make_deep_plan(hardware: HardwareSpec = ASSUMED, *, device: str = "cuda:0", blocks: int = 8, **fields: object) -> Plan:
    request = PlanRequest(**{"dtype": "float32", "seq_len": 8, "micro_batch": 2, **IN_HOST, **fields})  # type: ignore[arg-type]
    return build_plan(request, make_layout(tied=False, blocks=blocks), hardware, device=device)


def deferred_blocks(plan: Plan) -> list[int]:
    return [index for index, unit in enumerate(plan.blocks) if set(unit.bundles) & set(plan.deferred)]


# -- the program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("boundaries", ["device", "host", "ssd"])
def test_deferred_bundles_are_updated_after_the_last_gradient_in_forward_order(boundaries: str, group_size: int) -> None:
    plan = make_deep_plan(deferred_updates=3, accumulate=4, group_size=group_size, boundaries=boundaries, ssd_dir="/nowhere")
    schedule = build_train_step(plan, [16] * 4, starts_pending=False)
    validate(schedule, plan)
    ops = [item.op for item in schedule.ops]
    last = max(index for index, op in enumerate(ops) if isinstance(op, Compress))
    updates = [(index, op.bundle) for index, op in enumerate(ops) if isinstance(op, Update)]
    late = [bundle for index, bundle in updates if index > last and bundle in plan.deferred]
    assert list(dict.fromkeys(late)) == list(plan.deferred) and len(plan.deferred) == 3
    assert not any(bundle in plan.deferred for index, bundle in updates if index < last)
    assert {bundle for _, bundle in updates} == set(plan.bundles), "each once"
    assert len(updates) == sum(len(bundle.chunks) for bundle in plan.bundles.values())
    for name in plan.deferred:  # the gradient leaves the device under the backward, as ever
        left = [index for index, op in enumerate(ops) if isinstance(op, Evict) and (op.piece.owner, op.piece.role) == (name, Role.GRADIENT)]
        assert left and max(left) < max(index for index, op in enumerate(ops) if isinstance(op, Compute))


def test_each_deferred_block_takes_its_gradient_of_host_memory_and_nothing_of_the_device() -> None:
    peaks = [predict_step(make_deep_plan(deferred_updates=number), ASSUMED) for number in (0, 1, 2, 3)]
    assert len({peak.device_resident_peak_bytes for peak in peaks}) == 1
    gradient = make_deep_plan().bundles["block.0"].parameter_bytes
    grown = [peak.host_resident_peak_bytes - peaks[0].host_resident_peak_bytes for peak in peaks]
    assert grown[0] == 0 and all(0 < more - less <= gradient for less, more in zip(grown, grown[1:], strict=False))
    assert grown[3] - grown[2] == gradient


def test_nothing_is_deferred_where_updates_wait_for_the_norm() -> None:
    assert make_deep_plan(clip=1.0, deferred_updates=3).deferred == ()
    assert make_deep_plan(dtype="float16").deferred == ()


# -- which and how many ----------------------------------------------------------------------------------------------


def clock(blocks: int, forward_s: float, backward_s: float, update_s: float, *, ends_s: float = 0.0) -> _Clock:
    """Equal blocks between an embedding, which computes in no time, and a tail; the updates of these take `ends_s` each."""
    return _Clock(
        names=("embedding", *map(str, range(blocks)), "tail"), forward_s=(0.0, *[forward_s] * blocks, 0.0),
        backward_s=(0.0, *[backward_s] * blocks, backward_s), update_s=(ends_s, *[update_s] * blocks, ends_s),
    )  # fmt: skip


def test_the_clock_by_hand() -> None:
    """Three blocks, 1 s forward and 1 back, 2 s for an update; the tail's backward is over at 1. At once: gradients come at 2, 3 and 4,
    updates end at 4, 6 and 8, and three forwards follow. Block 1 put off: those of 2 and 0 end at 4 and 6, its own at 8, and its forward
    is due at 7."""
    three = clock(3, 1.0, 1.0, 2.0)
    assert three.time_s(()) == pytest.approx(8 + 3)
    assert three.time_s({"1"}) == pytest.approx(8 + 2)
    assert clock(4, 1.0, 1.0, 0.0).time_s(()) == pytest.approx(5 + 4), "the device updates all"
    assert clock(4, 1.0, 1.0, 0.5, ends_s=1.0).time_s(()) == pytest.approx(5.5 + 1 + 4), "the embedding's is the last"


def test_on_the_clock_compute_waits_for_updates_that_fall_behind_by_more_than_there_is_room_for() -> None:
    """10 s for an update: the gradient behind has no room in host memory until it ends, and the device room for two units' gradients."""
    found = clock(4, 1.0, 1.0, 10.0)
    assert found.time_s(()) == pytest.approx(2 + 40 + 4)
    assert found.time_s({"2"}) < found.time_s(())


@pytest.mark.parametrize("update_s", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("backward_s", [2.0, 3.0])
def test_no_set_of_blocks_is_much_better_than_the_one_that_is_chosen(
    backward_s: float, update_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight = clock(8, 1.0, backward_s, update_s, ends_s=0.5)
    monkeypatch.setattr(deferring, "_clocks", lambda *arguments: [eight])
    blocks = [str(index) for index in range(8)]
    chosen = deferring._choose(make_deep_plan(), blocks, ASSUMED, None, number=None)
    best_s = min(eight.time_s(names) for count in range(9) for names in itertools.combinations(blocks, count))
    assert best_s <= eight.time_s(chosen) < 1.03 * best_s
    assert update_s > 1 or not chosen, "the backward has room for all"
    assert update_s < 3 or backward_s > 2 or eight.time_s(chosen) < 0.95 * eight.time_s(())


@pytest.mark.parametrize("number", range(14))
def test_as_many_are_deferred_as_were_asked_for(number: int) -> None:
    assert len(deferred_blocks(make_deep_plan(blocks=13, deferred_updates=number))) == number


def test_blocks_whose_states_are_elsewhere_or_whose_weights_are_shared_cannot_be() -> None:
    roomy = make_deep_plan()
    on_device = sum(roomy.state_bytes(name) for name in ("embedding", "block.0", "block.1"))
    some = make_deep_plan(device_states_bytes=on_device, deferred_updates=1)
    lifted = [name for name, placement in some.placements.items() if placement.states is Tier.DEVICE]
    assert "block.1" in lifted
    with pytest.raises(
        ValueError, match=r"--deferred-updates 7: of 8 blocks only 6 have parameters and states in host memory .* at most 6"
    ):
        make_deep_plan(device_states_bytes=on_device, deferred_updates=7)
    with pytest.raises(ValueError, match="only 0 have"):
        make_plan(parameters="host", states="ssd", boundaries="device", device_states_bytes=0, deferred_updates=1)
    with pytest.raises(ValueError, match="--deferred-updates cannot be negative, got -1"):
        make_deep_plan(deferred_updates=-1)
    with pytest.raises(ValueError, match="deferred_updates must be a whole number, got 1.5"):
        make_deep_plan(deferred_updates=1.5)


def test_a_number_that_can_be_deferred_with_all_recomputed_is_no_mistake_where_activations_may_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1.10B with parameters and states on auto, 30 GiB and 16 micro-batches: of 5 blocks with all recomputed 4 were left in a trial whose
    smaller groups gave the device room for one unit more, and the trial's error was the user's."""

    def refused_in_trials(plan: Plan, *args: Any, **named: Any) -> Plan:
        if plan.activations:
            raise BudgetError("only 4 have parameters and states in host memory")
        return defer_updates(plan, *args, **named)

    assert plan_for(deferred_updates=1).activations
    monkeypatch.setattr(place, "defer_updates", refused_in_trials)
    plan = plan_for(deferred_updates=1)
    assert len(deferred_blocks(plan)) == 1 and not plan.activations


def test_rates_decide_how_many_and_a_cpu_defers_none_of_itself() -> None:
    def number(rate: float, **fields: object) -> int:
        return len(deferred_blocks(make_deep_plan(dataclasses.replace(measured, host_update_parameters_per_s=rate), **fields)))

    measured = HardwareSpec(source="measured (m)", device_flops=1e12)
    plan = make_deep_plan(deferred_updates=0)
    forward_flops = sum(
        item.op.flops
        for item in build_train_step(plan, plan.longest_step, starts_pending=False).ops
        if isinstance(item.op, Compute) and item.op.phase is Phase.FORWARD and item.op.unit.startswith("block")
    )
    elements = sum(bundle.num_elements for name, bundle in plan.bundles.items() if name != "embedding")
    balanced = elements / (3 * forward_flops / 1e12)  # updates take as long as the backward, which is three forwards
    assert number(1e15) == number(4 * balanced) == 0
    assert 1 <= number(balanced) <= number(0.7 * balanced) <= 4
    assert number(balanced, device="cpu") == 0, "the same cores compute"
    assert 1 <= len(deferred_blocks(make_deep_plan())) <= 4, "rates are assumed"


def test_of_several_groups_only_the_last_backward_and_the_first_forward_have_updates_beside_them() -> None:
    def clocks(group_size: int, accumulate: int) -> list[_Clock]:
        return deferring._clocks(make_deep_plan(accumulate=accumulate, group_size=group_size), measured, None)

    measured = HardwareSpec(source="measured (m)", device_flops=1e12)
    for whole, one in zip(clocks(4, 4), clocks(1, 4), strict=True):
        assert whole.backward_s == pytest.approx([4 * seconds for seconds in one.backward_s])
        assert whole.forward_s == pytest.approx([4 * seconds for seconds in one.forward_s])
        assert whole.update_s == one.update_s
    for smaller, last in zip(clocks(3, 4), clocks(1, 1), strict=True):
        assert smaller.backward_s == pytest.approx(last.backward_s)
        assert smaller.forward_s == pytest.approx([3 * seconds for seconds in last.forward_s])


def test_only_host_memory_that_nothing_else_takes_is_used() -> None:
    needed = predict_step(make_deep_plan(deferred_updates=0), ASSUMED).host_resident_peak_bytes
    one = predict_step(make_deep_plan(deferred_updates=1), ASSUMED).host_resident_peak_bytes
    assert deferred_blocks(make_deep_plan(host_budget_bytes=needed)) == []
    assert len(deferred_blocks(make_deep_plan(host_budget_bytes=one))) == 1
    with pytest.raises(
        BudgetError, match=r"the gradients of --deferred-updates 2 do not fit the host.s budget; lower it, or raise --host-budget"
    ):
        make_deep_plan(host_budget_bytes=one, deferred_updates=2)


# -- what it saves, on paper -----------------------------------------------------------------------------------------


def predicted(hardware: HardwareSpec, **fields: object) -> tuple[Plan, Prediction]:
    plan = plan_for(hardware, **fields)
    return plan, Predictions(plan, CONFIG, Programs(plan), hardware).predict_whole_step()


def test_a_step_whose_updates_outlast_its_backward_is_shorter_where_some_are_put_off() -> None:
    """1.10B in 24 GiB, activations kept: the host updates 3.4 billion parameters a second, as in a step on a busy host."""
    busy = dataclasses.replace(H100, host_update_parameters_per_s=3.4e9)
    plan, chosen = predicted(busy)
    none, waiting = predicted(busy, deferred_updates=0)
    assert 3 <= len(deferred_blocks(plan)) <= 6 and none.deferred == ()
    assert chosen.step_s < 0.92 * waiting.step_s, (chosen.step_s, waiting.step_s)
    assert any("under the next step's forward" in note for note in plan.notes)


def test_a_host_that_updates_quickly_defers_nothing_and_would_lose_nothing() -> None:
    quick = dataclasses.replace(H100, host_update_parameters_per_s=2e10, host_memory_bytes_per_s=1e12)
    plan, chosen = predicted(quick)
    assert plan.deferred == ()
    _, some = predicted(quick, deferred_updates=4)
    assert some.step_s == pytest.approx(chosen.step_s, rel=0.01)
