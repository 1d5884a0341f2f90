"""Claims about schedules: every plan's programs keep the rules, bytes are what the formulas say, and broken programs are refused."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import pytest
from matrices import PLACEMENTS, make_layout, make_plan

from overspill.errors import BudgetError, ScheduleError
from overspill.planning import build_plan, predict_step, simulate
from overspill.planning.memory import context_bytes
from overspill.planning.simulate import resident_peaks
from overspill.planning.space import scratch_bytes, store_bytes
from overspill.scheduling import build_evaluation, build_flush, build_train_step, full_step, largest_steps, render_timeline, validate
from overspill.spec.documents import from_json
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Placement, Plan, PlanRequest, UpdateTiming
from overspill.spec.retention import ActivationMode
from overspill.spec.schedule import Compress, Compute, Evict, Fetch, Free, Lane, Phase, Role, Schedule, ScheduledOp, Update
from overspill.spec.tensors import Tier
from overspill.units import parse_bytes

CONTEXT = context_bytes(HardwareSpec())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4])
def test_every_placement_gives_schedules_that_keep_all_rules(tied: bool, clip: float | None, group_size: int) -> None:
    for parameters, states, boundaries in PLACEMENTS:
        plan = make_plan(tied=tied, clip=clip, group_size=group_size, parameters=parameters, states=states, boundaries=boundaries)
        tokens = [16, 12, 16, 4]
        validate(build_train_step(plan, tokens, starts_pending=False), plan)
        validate(build_evaluation(plan, tokens), plan)
        if plan.timing is UpdateTiming.PENDING:
            validate(build_train_step(plan, tokens, starts_pending=True), plan)
            validate(build_flush(plan), plan)


def link_bytes(plan: Plan, tokens: list[int], lane: str) -> int:
    return simulate(build_train_step(plan, tokens, starts_pending=False), plan, HardwareSpec()).lane_bytes[lane]


def test_fetched_bytes_do_not_depend_on_accumulation_within_one_group() -> None:
    one = make_plan(accumulate=1, parameters="host", states="host", boundaries="device")
    four = make_plan(accumulate=4, parameters="host", states="host", boundaries="device")
    assert link_bytes(one, [16], "h2d") == link_bytes(four, [16] * 4, "h2d") > 0
    assert link_bytes(one, [16], "d2h") == link_bytes(four, [16] * 4, "d2h")


def test_fetched_parameter_bytes_grow_by_the_number_of_groups() -> None:
    def parameter_fetches(plan: Plan) -> int:
        schedule = build_train_step(plan, [16] * 4, starts_pending=False)
        moved = (item.op for item in schedule.ops if isinstance(item.op, Fetch))
        return sum(op.num_bytes for op in moved if op.piece.role is Role.PARAMETER and op.target is Tier.DEVICE)

    def plan(group_size: int) -> Plan:
        return make_plan(group_size=group_size, parameters="host", states="host", boundaries="device")

    embedding = plan(4).bundles["embedding"].parameter_bytes  # its backward and the next group's forward are one stay
    assert parameter_fetches(plan(2)) == 2 * parameter_fetches(plan(4)) - embedding
    assert parameter_fetches(plan(1)) == 4 * parameter_fetches(plan(4)) - 3 * embedding


def test_ssd_bytes_of_a_step_are_the_formula() -> None:
    """fp32: fetched forward and backward 4 + 4 (the tail once), the update reads states 8, and the parameters if they were not kept
    in host memory since the backward, 4; it writes 4 + 8."""
    plan = make_plan(accumulate=1, parameters="ssd", states="ssd", boundaries="device")
    elements = {name: bundle.num_elements for name, bundle in plan.bundles.items()}
    fetches = sum(elements.values()) * 2 - elements["tail"]
    assert link_bytes(plan, [16], "ssd_read") == 4 * fetches + 8 * sum(elements.values())
    assert link_bytes(plan, [16], "ssd_write") == 12 * sum(elements.values())
    cramped = dataclasses.replace(plan, prefetch_units=0)
    assert link_bytes(cramped, [16], "ssd_read") == 4 * fetches + 12 * sum(elements.values())


def test_ssd_bytes_of_a_clipped_step_are_the_formula() -> None:
    """The gradient waits on the SSD, 4 + 4; the pending update reads 4 + 8, and the forward takes its parameters from host memory."""
    plan = make_plan(accumulate=1, parameters="ssd", states="ssd", boundaries="device", clip=1.0)
    elements = sum(bundle.num_elements for bundle in plan.bundles.values())
    blocks = elements - plan.bundles["tail"].num_elements
    moved = simulate(build_train_step(plan, [16], starts_pending=True), plan, HardwareSpec()).lane_bytes
    assert moved["ssd_read"] == 4 * blocks + (4 + 4 + 8) * elements
    assert moved["ssd_write"] == (4 + 4 + 8) * elements


def test_peaks_do_not_grow_with_depth_when_everything_rests_on_the_ssd() -> None:
    peaks = []
    for blocks in (2, 8):
        request = PlanRequest(
            parameters="ssd", states="ssd", boundaries="ssd", dtype="float32", seq_len=8, accumulate=2, clip=1.0, ssd_dir="/nowhere"
        )
        plan = build_plan(request, make_layout(tied=True, blocks=blocks), HardwareSpec(), device="cpu")
        peaks.append(predict_step(plan, HardwareSpec()).host_resident_peak_bytes)
    assert peaks[0] == peaks[1]


def test_auto_takes_the_highest_tier_that_the_budgets_allow() -> None:
    roomy = make_plan()
    assert {p.parameters for p in roomy.placements.values()} == {Tier.DEVICE}
    assert roomy.boundaries is Tier.DEVICE and roomy.group_size == 4
    cramped = make_plan(device_budget_bytes=CONTEXT + roomy.device_working_bytes + 400_000, host_budget_bytes=3_000_000)
    tiers = {(p.parameters, p.states) for p in cramped.placements.values()}
    assert (Tier.DEVICE, Tier.DEVICE) not in tiers
    assert Tier.HOST in {p.parameters for p in cramped.placements.values()}
    peaks = predict_step(cramped, HardwareSpec())
    assert cramped.device_budget_bytes is not None and peaks.device_resident_peak_bytes <= cramped.device_budget_bytes
    assert cramped.host_budget_bytes is not None and peaks.host_resident_peak_bytes <= cramped.host_budget_bytes


@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_states_on_the_device_go_to_the_first_units_within_their_limit(tied: bool, clip: float | None) -> None:
    none = make_plan(tied=tied, clip=clip, parameters="host", states="host", boundaries="device", device_states_bytes=0)
    order = list(dict.fromkeys(name for unit in none.units for name in unit.bundles))
    limit = none.state_bytes(order[0]) + none.state_bytes(order[1])
    some = make_plan(tied=tied, clip=clip, parameters="host", states="host", boundaries="device", device_states_bytes=limit)
    assert {name for name in order if none.placements[name].states is Tier.DEVICE} == set()
    lifted = {
        name for name in order if some.placements[name] == Placement(parameters=Tier.DEVICE, states=Tier.DEVICE, gradients=Tier.DEVICE)
    }
    assert lifted == set(order[:2])
    assert {some.placements[name].states for name in order[2:]} == {Tier.HOST}
    for starts_pending in (False, clip is not None):
        validate(build_train_step(some, [16] * 4, starts_pending=starts_pending), some)


def test_an_update_on_the_device_comes_after_the_next_visits_compute() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device", accumulate=1, device_states_bytes=1 << 30)
    ops = [item.op for item in build_train_step(plan, [16], starts_pending=False).ops]
    for block in (1, 2):
        compress = next(index for index, op in enumerate(ops) if isinstance(op, Compress) and op.bundle == f"block.{block}")
        update = next(index for index, op in enumerate(ops) if isinstance(op, Update) and op.bundle == f"block.{block}")
        between = [op.unit for op in ops[compress:update] if isinstance(op, Compute)]
        assert between == [f"block.{block - 1}"]


def test_a_budget_that_is_too_small_is_refused_with_missing_bytes_and_flag() -> None:
    with pytest.raises(BudgetError, match=r"missing; raise --host-budget"):
        make_plan(parameters="host", states="host", host_budget_bytes=100_000)
    with pytest.raises(BudgetError, match=r"--device-budget is .* are missing; raise --device-budget"):
        make_plan(device_budget_bytes=1000)
    with pytest.raises(BudgetError, match=r"on host, .*give --ssd-dir"):
        make_plan(host_budget_bytes=100_000, ssd_dir=None, device_budget_bytes=CONTEXT + 700_000)
    with pytest.raises(ValueError, match="--ssd-dir DIRECTORY"):
        make_plan(states="ssd", ssd_dir=None)


@pytest.mark.parametrize("budget", range(100_000, 140_000, 5_000))
def test_a_budget_that_is_raised_by_as_much_as_is_said_is_enough(budget: int) -> None:
    fixed: dict[str, Any] = {"parameters": "host", "states": "host", "boundaries": "host", "ssd_dir": None}
    with pytest.raises(BudgetError) as refused:
        make_plan(**fixed, host_budget_bytes=budget)
    told = re.search(r"raise --host-budget by ([0-9.]+ \w+)", str(refused.value))
    assert told is not None
    make_plan(**fixed, host_budget_bytes=budget + parse_bytes(told.group(1)))


def test_a_budget_of_nothing_is_enough_for_a_tier_that_nothing_rests_on() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="host", ssd_dir=None, ssd_budget_bytes=0)
    assert resident_peaks(full_step(plan), plan)[Tier.SSD] == 0
    with pytest.raises(BudgetError, match=r"needs .* on ssd, the budget leaves 0 B: .* raise --ssd-budget by"):
        make_plan(parameters="ssd", ssd_budget_bytes=0)


def test_on_the_cpu_device_both_tiers_together_stay_within_the_host_budget() -> None:
    """Its memory is host memory too."""
    budget = 2_000_000
    plan = make_plan(device="cpu", host_budget_bytes=budget)
    peaks = predict_step(plan, HardwareSpec())
    assert peaks.device_resident_peak_bytes + peaks.host_resident_peak_bytes + plan.device_working_bytes <= budget
    with pytest.raises(BudgetError, match="--host-budget"):
        make_plan(device="cpu", host_budget_bytes=400_000)


def test_the_ssd_budget_bounds_what_is_preallocated() -> None:
    plan = make_plan(parameters="ssd", states="ssd", boundaries="ssd", tied=True)
    needed = store_bytes(plan) + scratch_bytes(plan)
    make_plan(parameters="ssd", states="ssd", boundaries="ssd", tied=True, ssd_budget_bytes=needed)
    with pytest.raises(BudgetError, match="--ssd-budget"):
        make_plan(parameters="ssd", states="ssd", boundaries="ssd", tied=True, ssd_budget_bytes=needed - 1, group_size=4)


def test_an_evaluation_streams_the_model_once_for_many_micro_batches() -> None:
    plan = make_plan(accumulate=1, parameters="host", states="host")
    schedule = build_evaluation(plan, [16] * 3)  # as many as there are blocks
    assert plan.group_size == 1 and schedule.groups == ((0, 1, 2),)
    moved = simulate(schedule, plan, HardwareSpec()).lane_bytes["h2d"]
    assert moved == sum(bundle.parameter_bytes for bundle in plan.bundles.values())


def test_plans_survive_json() -> None:
    plan = make_plan(tied=True, clip=1.0)
    assert from_json(Plan, plan.to_json()) == plan
    with pytest.raises(ValueError, match="unknown field"):
        from_json(Plan, plan.to_json().replace('"group_size"', '"size_of_group"'))


def test_the_timeline_names_every_op_but_frees() -> None:
    plan = make_plan(accumulate=1, parameters="host", states="host")
    schedule = build_train_step(plan, [16], starts_pending=False)
    lines = render_timeline(schedule).splitlines()
    assert len(lines) == 2 + sum(not isinstance(item.op, Free) for item in schedule.ops)
    assert any("backward block.1 micro-batch 0" in line for line in lines)
    assert len(render_timeline(schedule, frees=True).splitlines()) == 2 + len(schedule.ops)


def test_overlapped_time_lies_between_the_busiest_lane_and_the_serial_time() -> None:
    plan = make_plan(accumulate=1, parameters="host", states="host")
    schedule = build_train_step(plan, [16], starts_pending=False)
    slow = HardwareSpec(device_flops=1e8, h2d_bytes_per_s=1e8, d2h_bytes_per_s=1e8, host_update_parameters_per_s=1e8)
    serial, overlapped = simulate(schedule, plan, slow), simulate(schedule, plan, slow, overlap=True)
    assert max(overlapped.lane_busy_s.values()) <= overlapped.step_s < serial.step_s
    assert serial.step_s == pytest.approx(sum(serial.lane_busy_s.values()))


def broken(schedule: Schedule, index: int, replacement: ScheduledOp | None) -> Schedule:
    ops = list(schedule.ops)
    ops[index : index + 1] = [] if replacement is None else [replacement]
    return dataclasses.replace(schedule, ops=tuple(ops))


def first(schedule: Schedule, kind: type, **fields: object) -> int:
    return next(
        index
        for index, item in enumerate(schedule.ops)
        if isinstance(item.op, kind) and all(getattr(item.op, name) == value for name, value in fields.items())
    )


def test_broken_schedules_are_refused_by_rule() -> None:
    plan = make_plan(accumulate=1, parameters="ssd", states="ssd", boundaries="host")
    schedule = build_train_step(plan, [16], starts_pending=False)
    fetch = first(schedule, Fetch, target=Tier.DEVICE)
    compute = first(schedule, Compute, phase=Phase.BACKWARD)
    with pytest.raises(ScheduleError, match="rule 2|rule 1"):
        validate(broken(schedule, fetch, None), plan)
    with pytest.raises(ScheduleError, match="does not wait for op .*rule 2"):
        validate(broken(schedule, compute, dataclasses.replace(schedule.ops[compute], waits=())), plan)
    with pytest.raises(ScheduleError, match="not earlier .*rule 2"):
        validate(broken(schedule, fetch, dataclasses.replace(schedule.ops[fetch], waits=(fetch + 1,))), plan)
    with pytest.raises(ScheduleError, match="lane .*rule 3"):
        validate(broken(schedule, fetch, dataclasses.replace(schedule.ops[fetch], lane=Lane.SSD_READ)), plan)
    with pytest.raises(ScheduleError, match="rule 4.*raise --host-budget"):
        validate(schedule, dataclasses.replace(plan, host_budget_bytes=4096))
    last_free = max(index for index, item in enumerate(schedule.ops) if isinstance(item.op, Free))
    with pytest.raises(ScheduleError, match="rule 6"):
        validate(broken(schedule, last_free, None), plan)
    home = dataclasses.replace(schedule.ops[last_free], op=Free(piece=schedule.ops[0].op.piece, tier=Tier.SSD, num_bytes=1))  # type: ignore[union-attr]
    with pytest.raises(ScheduleError, match="home .*rule 5"):
        validate(dataclasses.replace(schedule, ops=(*schedule.ops, home)), plan)


def test_a_stale_home_is_found() -> None:
    """Leaving out the write-back of an updated chunk must not pass."""
    plan = make_plan(accumulate=1, parameters="ssd", states="ssd", boundaries="device")
    schedule = build_train_step(plan, [16], starts_pending=False)
    index = max(i for i, item in enumerate(schedule.ops) if item.lane is Lane.SSD_WRITE and not isinstance(item.op, Free))
    kept = [item for i, item in enumerate(schedule.ops) if i != index]
    kept = [dataclasses.replace(item, waits=tuple(w for w in item.waits if w < index)) for item in kept]
    with pytest.raises(ScheduleError, match="stale at the end"):
        validate(dataclasses.replace(schedule, ops=tuple(kept)), plan)


def plan_with_device_states(num_bundles: int, **request: object) -> Plan:
    """Of eight blocks, clipped; the states of the first bundles are on the device, all else is where `request` says."""
    fields = {"parameters": "host", "states": "host", "boundaries": "device", "dtype": "float32", "seq_len": 8, "clip": 1.0, **request}
    layout = make_layout(tied=False, blocks=8)
    none = build_plan(PlanRequest(**fields, ssd_dir="/nowhere"), layout, HardwareSpec(), device="cuda:0")  # type: ignore[arg-type]
    limit = sum(none.state_bytes(name) for name in list(none.bundles)[:num_bundles])
    wanted = PlanRequest(**fields, ssd_dir="/nowhere", device_states_bytes=limit)  # type: ignore[arg-type]
    return build_plan(wanted, layout, HardwareSpec(), device="cuda:0")


def first_host_updates(plan: Plan) -> tuple[list[str], int]:
    """Bundles by their first pending update on the host, and how many visits have computed before the first of them."""
    ops = [item.op for item in build_train_step(plan, [16], starts_pending=True).ops]
    updates = [index for index, op in enumerate(ops) if isinstance(op, Update) and op.tier is Tier.HOST]
    bundles = list(dict.fromkeys(op.bundle for op in (ops[index] for index in updates) if isinstance(op, Update)))
    return bundles, sum(isinstance(op, Compute) for op in ops[: updates[0]])


def test_the_host_updates_from_the_first_visit_on_while_blocks_of_the_device_compute() -> None:
    plan = plan_with_device_states(6)
    bundles, visits_before = first_host_updates(plan)
    assert visits_before == 0
    assert bundles == list(plan.bundles)[6:], "in the order in which they are read"
    validate(build_train_step(plan, [16], starts_pending=True), plan)


def test_an_update_that_needs_buffers_is_not_begun_early() -> None:
    """Its chunks would take host memory while nobody waits for them; nor is any where there is no room to prefetch."""
    _, visits_before = first_host_updates(plan_with_device_states(6, states="ssd"))
    assert visits_before == 4
    cramped = dataclasses.replace(plan_with_device_states(6), prefetch_units=0)
    _, visits_before = first_host_updates(cramped)
    assert visits_before == 6


@pytest.mark.parametrize("boundaries", ["host", "ssd"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_hidden_states_that_leave_are_freed_one_compute_later_and_never_pile_up(boundaries: str, count: int) -> None:
    """The allocator's memory: the compute after the `Free` waits for whoever reads it, so the `Free` must not come at once."""
    plan = make_plan(accumulate=count, parameters="host", states="host", boundaries=boundaries)
    schedule = build_train_step(plan, [16] * count, starts_pending=False)
    made: dict[object, int] = {}
    computes = 0
    for index, item in enumerate(schedule.ops):
        if isinstance(item.op, Compute):
            computes += 1
            for piece, _ in item.op.produced:
                if piece.role in (Role.BOUNDARY, Role.BOUNDARY_GRADIENT):
                    made[piece] = computes
        elif isinstance(item.op, Evict) and item.op.source is Tier.DEVICE and item.op.piece in made:
            left = next(i for i in range(index + 1, len(schedule.ops)) if isinstance(schedule.ops[i].op, Compute | Free))
            is_freed_at_once = schedule.ops[left].op == Free(piece=item.op.piece, tier=Tier.DEVICE, num_bytes=item.op.num_bytes)
            assert not is_freed_at_once, item.op.piece
        elif isinstance(item.op, Free) and item.op.tier is Tier.DEVICE and made.get(item.op.piece):
            del made[item.op.piece]
        assert len(made) <= 4, "one leaves, one is made, one is read; in the backward also the gradient of the one that is read"


def test_no_hidden_state_waits_behind_all_parameters_of_the_next_block() -> None:
    """A link that needs three quarters of a visit for a block's parameters and little for a hidden state: compute waits for neither."""
    plan = make_plan(accumulate=4, micro_batch=2, parameters="host", states="host", boundaries="host", device_states_bytes=0)
    schedule = build_train_step(plan, [16] * 4, starts_pending=False)
    block = plan.bundles["block.1"]
    visit_s = 4 * 2.0 * block.num_parameters * 16 / 1e9
    hardware = HardwareSpec(
        device_flops=1e9, h2d_bytes_per_s=block.parameter_bytes / (0.75 * visit_s), d2h_bytes_per_s=1e12, host_update_parameters_per_s=1e12
    )
    found = simulate(schedule, plan, hardware)
    assert found.exposed_s.get("h2d", 0.0) < 0.1 * found.step_s
    for index, item in enumerate(schedule.ops):
        if not (isinstance(item.op, Compute) and item.op.unit == "block.1" and item.op.micro_batch == 0):
            continue
        since = next(i for i in range(index - 1, -1, -1) if isinstance(schedule.ops[i].op, Compute))
        coming = [op for op in (entry.op for entry in schedule.ops[since:index]) if isinstance(op, Fetch) and op.target is Tier.DEVICE]
        parameters = [number for number, op in enumerate(coming) if op.piece.role is Role.PARAMETER]
        states = [number for number, op in enumerate(coming) if op.piece.role in (Role.BOUNDARY, Role.BOUNDARY_GRADIENT)]
        assert not states or not parameters or max(states) < min(parameters)


def test_a_budget_that_is_a_byte_short_shows_both_numbers() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device")
    schedule = build_train_step(plan, [16] * 4, starts_pending=False)
    peak = simulate(schedule, plan, HardwareSpec()).host_resident_peak_bytes
    with pytest.raises(ScheduleError, match=rf"needs {peak:,} B on host, the plan allows {peak - 1:,} B .*by 1 B"):
        validate(schedule, dataclasses.replace(plan, host_budget_bytes=peak - 1))


@pytest.mark.parametrize("seed", range(6))
def test_no_shorter_step_holds_more_than_what_the_planner_looked_at(seed: int) -> None:
    """A last batch of fewer micro-batches may finish gradients beside a whole group's hidden states, where the whole step had one left."""
    choose = random.Random(seed)
    count = choose.randint(2, 4)
    tiers: dict[str, Any] = {name: choose.choice(["device", "host", "ssd"]) for name in ("parameters", "states", "boundaries")}
    plan = make_plan(
        accumulate=count, group_size=choose.randint(1, count), clip=choose.choice([None, 1.0]), tied=choose.random() < 0.5,
        seq_len=choose.choice([8, 512]), **tiers,
    )  # fmt: skip
    found = [resident_peaks(schedule, plan) for schedule in largest_steps(plan)]
    most = {tier: max(peaks[tier] for peaks in found) for tier in Tier}
    tokens = plan.longest_step[0]
    for number in range(1, count + 1):
        for starts_pending in {False, plan.timing is UpdateTiming.PENDING}:
            for shape in ([tokens] * number, [tokens] * (number - 1) + [tokens // 2], [tokens // 2] + [tokens] * (number - 1)):
                peaks = resident_peaks(build_train_step(plan, shape, starts_pending=starts_pending), plan)
                assert all(peaks[tier] <= most[tier] for tier in Tier), (plan.group_size, shape, starts_pending)


def test_a_group_that_ends_its_step_is_planned_for() -> None:
    """Of three micro-batches in groups of two the last group is one; a step of two holds more while its gradients are finished."""
    plan = make_plan(
        accumulate=3, group_size=2, parameters="ssd", states="ssd", boundaries="host", seq_len=2048, micro_batch=4, device_states_bytes=0
    )
    whole = resident_peaks(build_train_step(plan, plan.longest_step, starts_pending=False), plan)[Tier.HOST]
    two = resident_peaks(build_train_step(plan, plan.longest_step[:2], starts_pending=False), plan)[Tier.HOST]
    assert max(resident_peaks(schedule, plan)[Tier.HOST] for schedule in largest_steps(plan)) == max(whole, two)


def test_a_full_group_that_ends_its_step_after_another_one_is_planned_for() -> None:
    """Of five micro-batches in groups of two the last group is one; a step of four ends with a full one beside sums of the group before."""
    plan = make_plan(accumulate=5, group_size=2, parameters="ssd", states="host", boundaries="host")
    blocks = [unit.name for unit in plan.blocks]
    plan = dataclasses.replace(plan, activations=dict.fromkeys(blocks, ActivationMode.HOST), stored_bytes=dict.fromkeys(blocks, 100_000))
    four = resident_peaks(build_train_step(plan, plan.longest_step[:4], starts_pending=False), plan)[Tier.HOST]
    assert four <= max(resident_peaks(schedule, plan)[Tier.HOST] for schedule in largest_steps(plan))


@pytest.mark.parametrize("prefetch_units", [0, 1])
@pytest.mark.parametrize("group_size", [1, 2])
def test_an_evaluation_holds_no_more_than_what_the_planner_looked_at(group_size: int, prefetch_units: int) -> None:
    """Where states rest on the device, no update takes host memory in training, and hidden states decide."""
    plan = make_plan(tied=True, accumulate=4, group_size=group_size, parameters="ssd", states="device", boundaries="host", seq_len=64)
    plan = dataclasses.replace(plan, prefetch_units=prefetch_units)
    found = [resident_peaks(schedule, plan) for schedule in largest_steps(plan)]
    for number in (1, 5, 33):
        peaks = resident_peaks(build_evaluation(plan, plan.longest_step[:1] * number), plan)
        assert all(peaks[tier] <= max(one[tier] for one in found) for tier in Tier), number
