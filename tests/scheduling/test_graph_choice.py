"""Claims about which blocks are replayed as CUDA graphs: decided before a run, by templates or on paper, once for memory and for time."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from transformers import LlamaConfig

from overspill.huggingface.workload import build_streamed
from overspill.planning import build_costs
from overspill.planning.dispatching import COMPUTE_S, EMBEDDING_OPERATIONS, STAND_IN_OPERATIONS, VISIT_S, find_operation_s
from overspill.planning.graphs import choose_replayed, find_bound, has_room, is_bound_by_launches, room_bytes
from overspill.planning.memory import device_terms, recordings_bytes
from overspill.runtime.opening import describe_batch, make_plan
from overspill.runtime.predictions import Predictions
from overspill.runtime.programs import Programs
from overspill.scheduling import full_step
from overspill.spec.hardware import HardwareSpec
from overspill.spec.launches import LAUNCH_BESIDE_LANES, LAUNCH_BOUND, LAUNCH_S, REPLAYED_FROM, do_launches_bind
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.schedule import Compute, Lane, Phase
from overspill.spec.workload import TemplateTimes, Timing, UnitTimes, WorkloadSpec
from overspill.units import GIB

CONFIG = LlamaConfig(
    hidden_size=1024, num_hidden_layers=4, intermediate_size=4608, num_attention_heads=16, num_key_value_heads=8, vocab_size=32000,
    max_position_embeddings=4096,
)  # fmt: skip
MEASURED = HardwareSpec(source="measured (m)", matrix_flops=600e12, device_memory_bytes_per_s=2.6e12, footprint_library_bytes=2**26)
BLOCKS = frozenset(f"model.layers.{index}" for index in range(4))


def request(**fields: object) -> PlanRequest:
    defaults: dict[str, object] = {
        "parameters": "host", "states": "host", "boundaries": "device", "seq_len": 2048, "micro_batch": 4, "accumulate": 2,
        "optimizer": "adamw", "activations": "recompute",
    }  # fmt: skip
    return PlanRequest(**{**defaults, **fields})  # type: ignore[arg-type]


@functools.cache
def workload(micro_batch: int = 4) -> WorkloadSpec:
    found = describe_batch(request(micro_batch=micro_batch), CONFIG, torch.device("cuda:0"))
    assert found is not None
    return found


def plan_for(**fields: object) -> Plan:
    wanted = request(**fields)
    streamed = build_streamed(CONFIG, "bfloat16")
    return make_plan(wanted, streamed, MEASURED, device="cuda:0", chunk_bytes=None, workload=workload(wanted.micro_batch))


def timing(seconds: float, issue_s: float = 0.0) -> Timing:
    return Timing(median_s=seconds, spread_s=0.0, num_repetitions=9, issue_s=issue_s)


def times_of(*, launch_share: float, replay_s: float | None = None, seq_len: int = 2048, **fields: object) -> TemplateTimes:
    """A block takes 2 ms forward and 6 ms backward, launching a share of it; replayed, forward takes `replay_s`, backward thrice that."""
    block = UnitTimes(
        name="model.layers.0",
        seq_len=seq_len,
        micro_batch=4,
        forward=timing(2e-3, launch_share * 2e-3),
        backward=timing(6e-3, launch_share * 6e-3),
        replayed_forward=timing(replay_s) if replay_s is not None else None,
        replayed_backward=timing(3 * replay_s) if replay_s is not None else None,
        **fields,  # type: ignore[arg-type]
    )
    tail = UnitTimes(name="tail", seq_len=seq_len, micro_batch=4, forward=None, backward=timing(8e-3, 1e-3))
    return TemplateTimes(
        model="M", dtype="bfloat16", device="a GPU", seq_len=2048, micro_batch=4, blocks=(block,), tail=tail, elapsed_s=1.0
    )


def predictions(plan: Plan, times: TemplateTimes | None, *, replays_graphs: bool = True, hardware: HardwareSpec = MEASURED) -> Predictions:
    found = Predictions(plan, CONFIG, Programs(plan), hardware, replays_graphs=replays_graphs, workload=workload(plan.micro_batch))
    found.times = times
    return found


def test_what_templates_say_comes_before_paper() -> None:
    plan = plan_for()
    large = plan_for(micro_batch=16)
    assert choose_replayed(large, workload(16), hardware=MEASURED) == frozenset(), "32,768 tokens take longer than launching on paper"
    assert choose_replayed(plan, workload(), hardware=MEASURED, times=times_of(launch_share=0.9)) == BLOCKS
    just_not = times_of(launch_share=REPLAYED_FROM / LAUNCH_BESIDE_LANES - 0.01)
    assert choose_replayed(plan, workload(), hardware=MEASURED, times=just_not) == frozenset()
    one = plan_for(micro_batch=1)
    assert choose_replayed(one, workload(1), hardware=MEASURED) == BLOCKS, "2,048 tokens do not"


def test_a_block_that_cannot_be_recorded_or_is_kept_is_not_replayed() -> None:
    plan, bound = plan_for(), times_of(launch_share=0.9)
    assert choose_replayed(plan, workload(), hardware=MEASURED, times=times_of(launch_share=0.9, is_replayable=False)) == frozenset()
    kept = dataclasses.replace(plan, activations={"model.layers.3": "keep"})
    assert choose_replayed(kept, workload(), hardware=MEASURED, times=bound) == BLOCKS - {"model.layers.3"}
    assert choose_replayed(dataclasses.replace(plan, device="cpu"), workload(), hardware=MEASURED, times=bound) == frozenset()
    assert choose_replayed(plan, None, hardware=MEASURED, times=None) == frozenset()
    for change in ({"side_output_bytes": 8}, {"side_input_bytes": 8}):
        item = dataclasses.replace(workload(1).classes[1], **change)
        assert is_bound_by_launches(workload(1).classes[1], MEASURED) and not is_bound_by_launches(item, MEASURED)
    saved = (dataclasses.replace(workload(1).classes[1].saved[0], is_random=True),)
    assert not is_bound_by_launches(dataclasses.replace(workload(1).classes[1], saved=saved), MEASURED)


@pytest.mark.parametrize("side", ["side_output_bytes", "side_input_bytes"])
def test_where_one_class_has_sides_the_others_are_not_replayed_either(side: str) -> None:
    """Dense layers of a mixture of experts: the executor records no block of such a model, so they are kept where there is room."""
    embedding, blocks, tail = workload(1).classes
    dense = dataclasses.replace(blocks, units=blocks.units[:2])
    experts = dataclasses.replace(blocks, name=blocks.units[2], units=blocks.units[2:])
    plain = dataclasses.replace(workload(1), classes=(embedding, dense, experts, tail))
    mixed = dataclasses.replace(plain, classes=(embedding, dense, dataclasses.replace(experts, **{side: 8}), tail))
    plan = plan_for(micro_batch=1)
    assert choose_replayed(plan, plain, hardware=MEASURED) == find_bound(plain, MEASURED) == BLOCKS
    assert choose_replayed(plan, mixed, hardware=MEASURED) == find_bound(mixed, MEASURED) == frozenset()
    assert choose_replayed(plan, mixed, hardware=MEASURED, times=times_of(launch_share=0.9)) == frozenset()


def test_a_template_timed_smaller_says_what_launching_takes_and_paper_what_the_device_does() -> None:
    for share, expected in ((0.9, BLOCKS), (0.2, frozenset())):  # of 6 ms, beside some 4 ms on paper
        times = times_of(launch_share=share, seq_len=512)
        assert choose_replayed(plan_for(), workload(), hardware=MEASURED, times=times) == expected


def test_the_machines_own_launch_time_is_taken_where_it_was_measured() -> None:
    item = workload().classes[1]
    assert not is_bound_by_launches(item, MEASURED)
    assert is_bound_by_launches(item, dataclasses.replace(MEASURED, launch_s=2 * LAUNCH_S))
    assert is_bound_by_launches(workload(1).classes[1], MEASURED)
    assert not is_bound_by_launches(workload(1).classes[1], dataclasses.replace(MEASURED, launch_s=LAUNCH_S / 10))
    assert do_launches_bind(launch_s=0.81, device_s=1.0) and not do_launches_bind(launch_s=0.8, device_s=1.0)


def test_a_block_is_replayed_before_launches_bound_it_and_kept_as_long_as_they_do_not() -> None:
    """Replays cost nothing but memory that is left; what is kept is computed once."""
    assert REPLAYED_FROM < LAUNCH_BOUND
    assert choose_replayed(plan_for(), workload(), hardware=MEASURED) == BLOCKS and not find_bound(workload(), MEASURED)


def test_the_memory_term_and_the_time_of_compute_follow_one_decision() -> None:
    plan = dataclasses.replace(plan_for(), deferred=())  # else forwards are dearer
    for launch_share, replays_graphs, is_replayed in ((0.9, True, True), (0.3, True, False), (0.9, False, False)):
        times = times_of(launch_share=launch_share, replay_s=1e-3)
        quick = dataclasses.replace(MEASURED, host_update_parameters_per_s=1e15)  # else the thread waits, and compute for what it does then
        found = predictions(plan, times, replays_graphs=replays_graphs, hardware=quick).predict_whole_step()
        terms = {term.name: term.num_bytes for term in found.device_terms}
        assert terms.get("replayed graphs", 0) == (recordings_bytes(plan, workload(), BLOCKS, MEASURED) if is_replayed else 0)
        assert found.replays_bytes == recordings_bytes(plan, workload(), BLOCKS, MEASURED) > 0
        backward = workload().classes[1].backward
        assert backward is not None and found.replays_bytes > backward.peak_bytes + MEASURED.footprint_library_bytes
        assert found.num_replays == (2 * 4 * 2 if is_replayed else 0), "forward and backward of each micro-batch and block"
        block_s = 4e-3 if is_replayed else max(8e-3, LAUNCH_BESIDE_LANES * launch_share * 8e-3)
        expected_s = 2 * (4 * block_s + 8e-3)
        operation_s = find_operation_s(MEASURED, workload(), times)
        visits_s = operation_s / LAUNCH_S * sum(2 * COMPUTE_S + visit_s for visit_s in VISIT_S.values())
        model_s = 2 * (EMBEDDING_OPERATIONS + STAND_IN_OPERATIONS * len(BLOCKS)) * operation_s
        compute_s = found.lane_busy_s["compute"]
        assert expected_s < compute_s - model_s < 1.16 * expected_s + visits_s, "launches of the embedding are in it, and its visits"


def test_a_replay_that_was_not_timed_is_estimated_and_that_is_said() -> None:
    plan = plan_for()
    ops = [item.op for item in full_step(plan).ops if isinstance(item.op, Compute)]
    backward = next(op for op in ops if op.unit == "model.layers.1" and op.phase is Phase.BACKWARD)
    costs = build_costs(plan, MEASURED, workload=workload(), times=times_of(launch_share=0.9))
    assert 1e-3 < costs.seconds(backward, Lane.COMPUTE) < 6e-3
    assert costs.source.endswith("blocks timed on a GPU, replayed ones from their FLOPs and bytes where that is less")
    timed = build_costs(plan, MEASURED, workload=workload(), times=times_of(launch_share=0.9, replay_s=1e-3))
    assert timed.seconds(backward, Lane.COMPUTE) == pytest.approx(3e-3) and timed.source.endswith("blocks timed on a GPU")
    launched = build_costs(plan, MEASURED, workload=workload(), times=times_of(launch_share=0.9, replay_s=1e-3), replayed=())
    assert launched.seconds(backward, Lane.COMPUTE) == pytest.approx(6e-3)


def test_a_device_without_room_for_recordings_has_none_and_the_executors_rule_is_the_same() -> None:
    plan = plan_for(device_budget_bytes=40 * GIB)
    peak = predictions(plan, None).predict_whole_step().device_resident_peak_bytes
    for spare, expected in ((0, BLOCKS), (-1, frozenset())):
        tight = dataclasses.replace(plan, device_budget_bytes=peak + room_bytes(plan) + spare)
        assert has_room(tight, peak) == bool(expected)
        found = predictions(tight, times_of(launch_share=0.9))
        assert found.replayed_blocks() == expected
        terms = {term.name for term in found.predict_whole_step().device_terms}
        assert ("replayed graphs" in terms) == bool(expected)


def test_terms_without_a_decision_are_judged_on_paper() -> None:
    plan = plan_for(micro_batch=1)
    schedule = full_step(plan)
    on_paper, none = (
        {term.name for term in device_terms(schedule, plan, slot_bytes=0, workload=workload(1), replayed=replayed)}
        for replayed in (None, ())
    )
    assert on_paper - none == {"replayed graphs"}
