"""Claims about times on paper: tiny programs by hand, contention, what every program's times must add up to, and steps in a row."""

from __future__ import annotations

import dataclasses

import pytest
from matrices import PLACEMENTS, make_plan
from tiny_models import tiny_config

from overspill.huggingface.workload import describe_workload
from overspill.planning import build_costs, full_step, simulate
from overspill.planning.cost import UPDATE_IN_STEP, unit_work
from overspill.planning.dispatching import (
    BESIDE_UPDATES,
    EMBEDDING_OPERATIONS,
    REPLAY_OPERATIONS,
    RETAINED_LAUNCHES,
    STAND_IN_OPERATIONS,
    TAIL_OPERATIONS,
    TAIL_STAND_IN_OPERATIONS,
    VISIT_S,
    count_operations,
    find_operation_s,
)
from overspill.planning.timeline import Contention, Task, Threads, run_timeline
from overspill.scheduling import build_evaluation, build_train_step
from overspill.spec.hardware import HardwareSpec
from overspill.spec.launches import LAUNCH_BESIDE_LANES, LAUNCH_S
from overspill.spec.plan import Plan
from overspill.spec.schedule import Compute, Fetch, Lane, Phase, Piece, Role, Update
from overspill.spec.trace import Span
from overspill.spec.workload import TemplateTimes, Timing, UnitTimes

COMPUTE, H2D, D2H, READ, WRITE, UPDATE = Lane.COMPUTE, Lane.H2D, Lane.D2H, Lane.SSD_READ, Lane.SSD_WRITE, Lane.HOST_UPDATE
BALANCED = HardwareSpec(
    device_flops=2e8,
    h2d_bytes_per_s=1e8,
    d2h_bytes_per_s=1e8,
    ssd_read_bytes_per_s=1e8,
    ssd_write_bytes_per_s=1e8,
    host_update_parameters_per_s=1e8,
)
"""Every lane takes about as long as every other."""


def task(lane: Lane, work_s: float, *waits: int, host: float = 0.0, dispatch: float = 0.0, before: float = 0.0) -> Task:
    return Task(lane=lane, work_s=work_s, host_bytes_per_s=host, waits=waits, dispatch_s=dispatch, before_s=before)


def times(tasks: list[Task], *, streams: bool = False, **hardware: float) -> list[tuple[float, float]]:
    spans = spans_of(tasks, streams=streams, **hardware)
    return [(round(span.start_s, 9), round(span.end_s, 9)) for span in spans]


def spans_of(tasks: list[Task], *, streams: bool = False, **hardware: float) -> list[Span]:
    contention = Contention(HardwareSpec(**hardware))  # type: ignore[arg-type]
    spans, _ = run_timeline(tasks, [0], Threads(has_streams=streams), contention)
    return spans


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_lanes_run_beside_each_other_as_far_as_waits_allow() -> None:
    tasks = [task(H2D, 1), task(H2D, 1), task(COMPUTE, 3, 0), task(D2H, 2, 2), task(COMPUTE, 1, 1)]
    for streams in (False, True):
        assert times(tasks, streams=streams) == [(0, 1), (1, 2), (1, 4), (4, 6), (4, 5)]


def test_a_lane_is_in_order_also_when_the_op_behind_could_begin() -> None:
    tasks = [task(UPDATE, 5), task(D2H, 1, 0), task(D2H, 1)]
    assert times(tasks) == [(0, 5), (5, 6), (6, 7)]


def test_what_the_dispatching_thread_computes_holds_up_what_it_has_not_handed_out() -> None:
    tasks = [task(COMPUTE, 2), task(H2D, 1)]
    assert times(tasks, streams=False) == [(0, 2), (2, 3)]
    assert times(tasks, streams=True) == [(0, 2), (0, 1)]


def test_compute_on_a_stream_is_issued_when_the_copy_it_waits_for_is_and_that_waits_for_the_drive() -> None:
    """The copy's thread waits for the read, so the thread that dispatches is held up until then, and so is the last op."""
    tasks = [task(READ, 4), task(H2D, 1, 0), task(COMPUTE, 1, 1), task(D2H, 1)]
    assert times(tasks, streams=True) == [(0, 4), (4, 5), (5, 6), (4, 5)]


def test_transfers_of_a_drive_are_in_flight_together_and_served_in_order() -> None:
    tasks = [task(READ, 2), task(READ, 1), task(UPDATE, 1, 0), task(READ, 1, 2)]
    assert times(tasks) == [(0, 2), (0, 3), (2, 3), (3, 4)]


def test_frees_hold_no_lane_and_have_no_span() -> None:
    free = Task(lane=COMPUTE, work_s=0.0, host_bytes_per_s=0.0, waits=(0,), is_free=True)
    spans = spans_of([task(COMPUTE, 1), free, task(H2D, 1, 1)], streams=True)
    assert [(span.op, span.end_s) for span in spans] == [(0, 1), (2, 1)]


def test_dispatching_takes_the_dispatching_threads_time_and_compute_ends_no_sooner_than_it_is_launched() -> None:
    tasks = [task(COMPUTE, 0.25, dispatch=1.5), task(COMPUTE, 4, dispatch=1.5), task(COMPUTE, 1, dispatch=1.5), task(H2D, 1, dispatch=0.5)]
    assert times(tasks, streams=True) == [(0, 1.5), (1.5, 5.5), (5.5, 6.5), (4.5, 5.5)], "the third was launched while the second ran"
    free = Task(lane=COMPUTE, work_s=0.0, host_bytes_per_s=0.0, waits=(), dispatch_s=0.5, is_free=True)
    assert [span.start_s for span in spans_of([free, task(COMPUTE, 1)], streams=True)] == [0.5]


def test_compute_advances_no_sooner_than_its_first_kernel_is_launched() -> None:
    """The first computes from 0.5 s on. The second is launched while it runs. The third's thread is held up by an update until 6 s, and its
    first kernel comes half a second later; the fetch that it waits for as well has ended by then."""
    tasks = [task(COMPUTE, 3, dispatch=1, before=0.5), task(COMPUTE, 1, dispatch=1, before=0.5), task(UPDATE, 6), task(H2D, 0.25, 2)]
    tasks += [task(COMPUTE, 1, 2, 3, dispatch=0.75, before=0.5)]
    assert times(tasks, streams=True) == [(0, 3.5), (3.5, 4.5), (2, 8), (8, 8.25), (8.25, 9.5)]
    assert times([task(COMPUTE, 1, dispatch=2, before=0.5)], streams=True) == [(0, 2)], "its last kernel is launched later still"


def test_a_step_ends_no_sooner_than_its_last_free_is_dispatched() -> None:
    free = Task(lane=COMPUTE, work_s=0.0, host_bytes_per_s=0.0, waits=(), dispatch_s=1.5, is_free=True)
    for streams, tasks, end_s in ((True, [task(COMPUTE, 1), free], 1.5), (True, [task(COMPUTE, 2), free], 2), (True, [free], 1.5)):
        assert run_timeline(tasks, [0], Threads(has_streams=streams), Contention(HardwareSpec()))[1] == [end_s]
    hardware = dataclasses.replace(BALANCED, source="measured (m)", launch_s=1e-3)
    plan = make_plan(parameters="host", states="host", boundaries="device", device="cuda:0")
    schedule = full_step(plan)
    least_s = sum(turn.seconds for turn in build_costs(plan, hardware).turns(schedule.ops))
    for overlap in (False, True):
        assert simulate(schedule, plan, dataclasses.replace(hardware, **dict.fromkeys(RATES, 1e15)), overlap=overlap).step_s >= least_s


def test_launching_is_not_slowed_down_by_copies() -> None:
    """A second to launch beside a copy, for work of a quarter that the copy makes half a second; and of 0.9, that it makes 1.8."""
    for work_s, end_s in ((0.25, 1), (0.9, 1.8)):
        found = times([task(H2D, 9), task(COMPUTE, work_s, dispatch=1)], streams=True, compute_beside_copies=0.0)
        assert found[1] == (0, end_s)


# -- contention --------------------------------------------------------------------------------------------------------


def test_both_directions_of_a_link_run_at_their_duplex_rates_while_both_run() -> None:
    """Each at half its rate: the shorter one ends after 2 s, the longer has 1 s of work left then."""
    link = {"h2d_bytes_per_s": 10.0, "h2d_duplex_bytes_per_s": 5.0, "d2h_bytes_per_s": 10.0, "d2h_duplex_bytes_per_s": 5.0}
    assert times([task(H2D, 1), task(D2H, 2)], **link) == [(0, 2), (0, 3)]
    drive = {
        "ssd_read_bytes_per_s": 4.0,
        "ssd_read_mixed_bytes_per_s": 1.0,
        "ssd_write_bytes_per_s": 2.0,
        "ssd_write_mixed_bytes_per_s": 1.0,
    }
    assert times([task(READ, 1), task(WRITE, 1)], **drive) == [(0, 2.5), (0, 2)]


def test_compute_loses_half_of_what_both_directions_cost_it_beside_one() -> None:
    shares = {"compute_beside_copies": 0.8, "copies_beside_compute": 0.5}
    assert times([task(H2D, 0.5), task(COMPUTE, 0.9)], streams=True, **shares) == [(0, 1), (0, 1)]
    assert times([task(H2D, 0.5), task(D2H, 0.5), task(COMPUTE, 0.8)], streams=True, **shares) == [(0, 1), (0, 1), (0, 1)]


def test_host_memory_slows_all_that_wants_more_than_it_has_in_proportion() -> None:
    """An update that wants all of it and a copy that wants half: each at 1 / 1.5, until the copy has ended."""
    tasks = [task(UPDATE, 2, host=100.0), task(H2D, 1, host=50.0), task(COMPUTE, 1.5)]
    assert times(tasks, streams=True, host_memory_bytes_per_s=100.0) == [(0, 2.5), (0, 1.5), (0, 1.5)]
    assert times(tasks[:2], streams=True, host_memory_bytes_per_s=150.0) == [(0, 2), (0, 1)]


# -- every program -----------------------------------------------------------------------------------------------------


def plans(device: str = "cuda:0") -> list[Plan]:
    return [
        make_plan(device=device, clip=clip, parameters=parameters, states=states, boundaries=boundaries, group_size=group)
        for parameters, states, boundaries in PLACEMENTS
        for clip, group in ((None, 4), (1.0, 2))
    ]


def test_times_of_every_placement_add_up_and_bytes_do_not_depend_on_them() -> None:
    for plan in plans():
        schedule = full_step(plan)
        serial, overlapped = simulate(schedule, plan, BALANCED), simulate(schedule, plan, BALANCED, overlap=True)
        busy = overlapped.lane_busy_s
        assert max(busy.values()) <= overlapped.step_s * (1 + 1e-9) and overlapped.step_s <= serial.step_s * (1 + 1e-9)
        assert busy["compute"] + sum(overlapped.exposed_s.values()) == pytest.approx(overlapped.alone_s)
        assert serial.lane_bytes == overlapped.lane_bytes and serial.phase_peak_bytes == overlapped.phase_peak_bytes
        moved = dict.fromkeys(overlapped.lane_bytes, 0)
        for item in schedule.ops:
            if item.lane.value in moved and hasattr(item.op, "source"):
                moved[item.lane.value] += item.op.num_bytes
        assert moved == overlapped.lane_bytes
        assert max(peaks["device"] for peaks in overlapped.phase_peak_bytes.values()) == overlapped.device_resident_peak_bytes
        assert max(peaks["host"] for peaks in overlapped.phase_peak_bytes.values()) == overlapped.host_resident_peak_bytes


def test_ops_of_a_lane_start_in_the_order_of_the_program_and_after_all_they_wait_for() -> None:
    for plan in plans()[::5]:
        schedule = full_step(plan)
        spans = {span.op: span for span in simulate(schedule, plan, BALANCED, overlap=True).spans}
        for lane in Lane:
            starts = [span.start_s for span in spans.values() if span.lane is lane]
            assert starts == sorted(starts)
        for span in spans.values():
            named = [wait for wait in schedule.ops[span.op].waits if wait in spans]
            assert set(named) <= set(span.waits)
            assert all(spans[wait].end_s <= span.start_s + 1e-9 for wait in span.waits)


RATES = [
    "device_flops",
    "h2d_bytes_per_s",
    "d2h_bytes_per_s",
    "ssd_read_bytes_per_s",
    "ssd_write_bytes_per_s",
    "host_update_parameters_per_s",
]


@pytest.mark.parametrize("rate", RATES)
def test_a_faster_lane_makes_no_step_longer(rate: str) -> None:
    for parameters, states in (("host", "host"), ("ssd", "ssd"), ("host", "ssd")):
        plan = make_plan(parameters=parameters, states=states, boundaries="device", clip=1.0)
        schedule, taken = full_step(plan), []
        for factor in (0.25, 0.5, 1, 2, 4):
            faster = dataclasses.replace(BALANCED, **{rate: getattr(BALANCED, rate) * factor})
            taken.append(simulate(schedule, plan, faster, overlap=True).step_s)
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(taken, taken[1:], strict=False)), (rate, taken)
        assert taken[-1] < taken[0] or rate.startswith("ssd") and states == "host"


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("host", {"h2d_duplex_bytes_per_s": 0.1e8, "d2h_duplex_bytes_per_s": 0.1e8}),
        ("ssd", {"ssd_read_mixed_bytes_per_s": 0.5e8, "ssd_write_mixed_bytes_per_s": 0.5e8}),
        ("host", {"host_memory_bytes_per_s": 1e9}),
        ("host", {"compute_beside_copies": 0.5}),
    ],
)
def test_contention_makes_steps_longer(where: str, changes: dict[str, float]) -> None:
    plan = make_plan(parameters=where, states=where, boundaries="device")
    schedule, base = full_step(plan), dataclasses.replace(BALANCED, host_update_parameters_per_s=1e9, device_flops=1e11)
    free = simulate(schedule, plan, base, overlap=True).step_s
    assert simulate(schedule, plan, dataclasses.replace(base, **changes), overlap=True).step_s > free


# -- steps in a row ----------------------------------------------------------------------------------------------------


def test_a_row_of_steps_that_drain_takes_as_long_as_each_alone() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device")
    schedule = full_step(plan)
    alone = simulate(schedule, plan, BALANCED, overlap=True)
    assert simulate(schedule, plan, BALANCED, overlap=True, repeats=True).step_s == alone.step_s == alone.alone_s


@pytest.mark.parametrize("clip", [None, 1.0])
def test_steps_that_overlap_take_no_longer_than_alone_and_no_less_than_their_busiest_lane(clip: float | None) -> None:
    for parameters, states in (("host", "host"), ("ssd", "ssd")):
        plan = make_plan(parameters=parameters, states=states, boundaries="device", clip=clip)
        steady = simulate(full_step(plan), plan, BALANCED, overlap=True, repeats=True, overlaps_steps=True)
        assert steady.lane_busy_s["compute"] + sum(steady.exposed_s.values()) == pytest.approx(steady.step_s)
        assert steady.lane_busy_s["compute"] * (1 - 1e-9) <= steady.step_s <= steady.alone_s * (1 + 1e-9)
        if clip is None and states == "host":
            assert steady.step_s < steady.alone_s, "the last updates land under the next forward"


def test_the_next_step_waits_for_the_updates_of_what_it_reads() -> None:
    """One slow update at the end of a step: what it changed is fetched in the next step after it, not before."""
    plan = make_plan(parameters="host", states="host", boundaries="device")
    slow = dataclasses.replace(BALANCED, host_update_parameters_per_s=1e6)
    schedule = full_step(plan)
    steady = simulate(schedule, plan, slow, overlap=True, repeats=True, overlaps_steps=True)
    updates = sum(item.op.num_elements for item in schedule.ops if isinstance(item.op, Update)) / 1e6
    assert updates * 0.9 < steady.step_s <= steady.alone_s


def test_a_program_that_cannot_follow_itself_is_refused() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device", clip=1.0)
    first = build_train_step(plan, [16] * 4, starts_pending=False)
    with pytest.raises(ValueError, match="starts without pending updates and does not end so"):
        simulate(first, plan, BALANCED, overlap=True, repeats=True)


# -- costs -------------------------------------------------------------------------------------------------------------


def test_a_link_takes_its_bytes_over_its_rate_and_an_update_its_elements() -> None:
    plan = make_plan(parameters="ssd", states="ssd", boundaries="device")
    costs = build_costs(plan, BALANCED)
    for item in full_step(plan).ops:
        if isinstance(item.op, Fetch):
            passes = 2 if item.lane is READ else 1
            assert costs.seconds(item.op, item.lane) == item.op.num_bytes / 1e8
            assert costs.host_bytes(item.op, item.lane) == passes * item.op.num_bytes
        if isinstance(item.op, Update):
            assert costs.seconds(item.op, item.lane) == item.op.num_elements / 1e8
            record = plan.state_record_bytes(item.op.bundle, item.op.chunk)
            assert costs.host_bytes(item.op, item.lane) == 4 * item.op.num_elements * 3 + 2 * record


def test_beside_a_gpu_whose_machine_was_measured_an_update_is_slower_than_alone() -> None:
    hardware = dataclasses.replace(BALANCED, source="measured (m)")
    for device, known, share in (("cuda:0", hardware, UPDATE_IN_STEP), ("cuda:0", BALANCED, 1.0), ("cpu", hardware, 1.0)):
        plan = dataclasses.replace(make_plan(parameters="host", states="host", boundaries="device"), device=device)
        costs = build_costs(plan, known)
        update = next(item for item in full_step(plan).ops if isinstance(item.op, Update))
        assert costs.seconds(update.op, update.lane) == pytest.approx(update.op.num_elements / 1e8 / share)  # type: ignore[union-attr]


def test_launches_take_the_hosts_time_one_by_one_and_a_replay_few_of_them() -> None:
    """A kernel a millisecond to launch; everything else in no time."""
    workload = describe_workload(tiny_config("llama"), seq_len=16, micro_batch=2, dtype="bfloat16", device="cuda")
    names = [unit for item in workload.classes for unit in item.units]
    plan = dataclasses.replace(make_plan(parameters="host", states="host", boundaries="device"), dtype="bfloat16")
    units = {old.name: dataclasses.replace(old, name=name) for old, name in zip(plan.units, names, strict=False)}
    hardware = dataclasses.replace(BALANCED, source="measured (m)", launch_s=1e-3, matrix_flops=1e15, device_memory_bytes_per_s=1e15)
    plan = dataclasses.replace(plan, units=tuple(units.values()))
    costs = build_costs(plan, hardware, workload=workload)
    assert costs.operation_s == LAUNCH_BESIDE_LANES * 1e-3
    embedding, block = (Compute(unit=name, micro_batch=0, phase=Phase.FORWARD, produced=(), flops=1) for name in names[:2])
    forward = workload.classes[0].forward
    assert forward is not None
    num_blocks = len(plan.units) - 2
    model = EMBEDDING_OPERATIONS + STAND_IN_OPERATIONS * num_blocks
    assert costs.launched_s(embedding) == pytest.approx((forward.work.num_ops + model) * costs.operation_s)
    tail = Compute(unit=plan.units[-1].name, micro_batch=0, phase=Phase.BACKWARD, produced=(), flops=1)
    kernels = unit_work(workload.classes[-1], Phase.BACKWARD)
    assert kernels is not None
    model = TAIL_OPERATIONS + TAIL_STAND_IN_OPERATIONS * num_blocks
    assert costs.launched_s(tail) == pytest.approx((kernels.num_ops + model) * costs.operation_s), "nobody has timed it"
    backward = unit_work(workload.classes[0], Phase.BACKWARD)
    assert backward is not None
    returning = dataclasses.replace(embedding, phase=Phase.BACKWARD)
    assert costs.launched_s(returning) == pytest.approx(backward.num_ops * costs.operation_s), "the model's own code does not run again"
    assert costs.launched_s(block) == REPLAY_OPERATIONS * costs.operation_s, "it is replayed as a graph, for launches bind it"
    assert max(costs.seconds(op, COMPUTE) for op in (embedding, block)) < 1e-3, "the device's own time has no launches in it"
    launched = build_costs(plan, hardware, workload=workload, replayed=())
    work = workload.classes[1].forward
    assert work is not None and launched.launched_s(block) == pytest.approx(work.work.num_ops * costs.operation_s)
    kept = dataclasses.replace(block, produced=((Piece(role=Role.ACTIVATIONS, owner=names[1], index=0), 8),))
    assert costs.launched_s(kept) == pytest.approx(RETAINED_LAUNCHES * launched.launched_s(block)), "it is not replayed"


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_forward_beside_the_hosts_updates_is_dispatched_dearer_and_no_other(group_size: int) -> None:
    """Those of a second group come when all updates have ended."""
    hardware = dataclasses.replace(BALANCED, source="measured (m)", launch_s=LAUNCH_S)
    found = {}
    for clip in (None, 1.0):
        plan = dataclasses.replace(
            make_plan(parameters="host", states="host", boundaries="device", accumulate=2, group_size=group_size, clip=clip),
            device="cuda:0",
        )
        schedule = full_step(plan)
        turns = build_costs(plan, hardware).turns(schedule.ops)
        found[clip] = {item.op: turn for item, turn in zip(schedule.ops, turns, strict=True) if isinstance(item.op, Compute)}
    for op, alone in found[None].items():
        factor = BESIDE_UPDATES if op.phase is Phase.FORWARD and op.micro_batch < group_size else 1
        assert found[1.0][op] == pytest.approx((factor * alone.seconds, factor * alone.before_s)), op


def test_a_forward_under_updates_that_were_put_off_is_dispatched_dearer_and_a_backward_is_not() -> None:
    hardware = dataclasses.replace(BALANCED, source="measured (m)", launch_s=LAUNCH_S)
    plan = dataclasses.replace(make_plan(parameters="host", states="host", boundaries="device"), device="cuda:0")
    putting_off = dataclasses.replace(plan, deferred=plan.units[1].bundles)
    prompt, later = (
        {item.op: turn for item, turn in zip(ops, build_costs(item, hardware).turns(ops), strict=True) if isinstance(item.op, Compute)}
        for item in (plan, putting_off)
        for ops in [full_step(item).ops]
    )
    assert prompt.keys() == later.keys()
    for op, turn in prompt.items():
        assert later[op].seconds == pytest.approx((BESIDE_UPDATES if op.phase is Phase.FORWARD else 1) * turn.seconds), op
    evaluation = [build_evaluation(item, [8]).ops for item in (plan, putting_off)]
    assert build_costs(plan, hardware).turns(evaluation[0]) == build_costs(putting_off, hardware).turns(evaluation[1])


def test_a_visit_is_dispatched_dearer_at_its_first_micro_batch_and_nothing_takes_time_where_nobody_measured() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device")
    schedule = full_step(plan)
    hardware = dataclasses.replace(BALANCED, source="measured (m)", launch_s=LAUNCH_S)
    turns = build_costs(dataclasses.replace(plan, device="cuda:0"), hardware).turns(schedule.ops)
    found: dict[tuple[str, Phase], list[float]] = {}
    for item, turn in zip(schedule.ops, turns, strict=True):
        assert turn.seconds > 0 and (turn.before_s > 0) == isinstance(item.op, Compute) and turn.before_s <= turn.seconds
        if isinstance(item.op, Compute):
            found.setdefault((item.op.unit, item.op.phase), []).append(turn.seconds)
    for (_, phase), (first, *others) in found.items():
        assert others and all(first - other == pytest.approx(LAUNCH_BESIDE_LANES * VISIT_S[phase]) for other in others)
    assumed = (
        build_costs(dataclasses.replace(plan, device="cuda:0"), BALANCED),
        build_costs(dataclasses.replace(plan, device="cpu"), hardware),
    )
    for costs in assumed:
        assert {turn.seconds for turn in costs.turns(schedule.ops)} == {0.0}, "rates are assumed, or the host computes"


def test_templates_say_what_an_operation_takes_on_this_host() -> None:
    workload = describe_workload(tiny_config("llama"), seq_len=16, micro_batch=2, dtype="bfloat16", device="cuda")
    block = workload.classes[1]
    timing = Timing(median_s=1.0, spread_s=0.0, num_repetitions=3, issue_s=count_operations(block) * 1e-5)
    timed = UnitTimes(name=block.name, seq_len=16, micro_batch=2, forward=dataclasses.replace(timing, issue_s=0.0), backward=timing)
    on_a_gpu = TemplateTimes(model="m", dtype="bfloat16", device="d", seq_len=16, micro_batch=2, blocks=(timed,), tail=timed, elapsed_s=1.0)
    hardware = dataclasses.replace(BALANCED, launch_s=1.0)
    assert find_operation_s(hardware, workload, on_a_gpu) == pytest.approx(LAUNCH_BESIDE_LANES * 1e-5)
    on_a_cpu = dataclasses.replace(on_a_gpu, blocks=(dataclasses.replace(timed, backward=dataclasses.replace(timing, issue_s=0.0)),))
    assert find_operation_s(hardware, workload, on_a_cpu) == LAUNCH_BESIDE_LANES, "the host computed: the probe's"
    of_others = dataclasses.replace(on_a_gpu, blocks=(dataclasses.replace(timed, name="another"),))
    assert find_operation_s(hardware, workload, of_others) == LAUNCH_BESIDE_LANES, "no class of this model was timed"


def test_an_evaluation_is_simulated_too() -> None:
    plan = make_plan(parameters="ssd", states="ssd", boundaries="host")
    prediction = simulate(build_evaluation(plan, [16] * 4), plan, BALANCED, overlap=True)
    assert set(prediction.phase_peak_bytes) >= {"forward"} and prediction.step_s > 0
