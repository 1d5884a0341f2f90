"""Claims about what fits: a plan takes no more of a GPU than its budget, by prediction, and of what is left no block more would fit."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch
from transformers import LlamaConfig

from overspill.errors import BudgetError
from overspill.huggingface.workload import build_streamed
from overspill.planning import resident_peaks
from overspill.planning.activations import find_retention, retain
from overspill.planning.graphs import has_room
from overspill.planning.room import RESERVE_FRACTION, Room
from overspill.runtime.opening import _read_layout, describe_batch
from overspill.runtime.opening import make_plan as plan_model
from overspill.runtime.predictions import Predictions
from overspill.runtime.programs import Programs
from overspill.scheduling import build_evaluation, full_step, largest_steps, validate
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.report import Prediction
from overspill.spec.retention import ON_DEVICE, ActivationMode
from overspill.spec.tensors import CHUNK_BYTES, Tier
from overspill.spec.workload import WorkloadSpec
from overspill.units import GIB, MIB

H100 = HardwareSpec(
    source="measured", h2d_bytes_per_s=55e9, d2h_bytes_per_s=55e9, h2d_duplex_bytes_per_s=45.6e9, d2h_duplex_bytes_per_s=45.6e9,
    host_update_parameters_per_s=4e9, device_flops=400e12, host_memory_bytes_per_s=140e9, matrix_flops=600e12,
    device_memory_bytes_per_s=2.6e12, device_capacity_bytes=79 * GIB, host_capacity_bytes=120 * GIB, process_bytes=GIB,
    footprint_context_bytes=767 * MIB, footprint_library_bytes=64 * MIB,
)  # fmt: skip
CONFIGS = {
    "deep": LlamaConfig(hidden_size=512, num_hidden_layers=10, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=2,
                        vocab_size=8000, max_position_embeddings=4096),
    "wide tail": LlamaConfig(hidden_size=768, num_hidden_layers=5, intermediate_size=1024, num_attention_heads=12, num_key_value_heads=12,
                             vocab_size=50000, max_position_embeddings=4096),
    "tied": LlamaConfig(hidden_size=1024, num_hidden_layers=6, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4,
                        vocab_size=16000, max_position_embeddings=4096, tie_word_embeddings=True),
}  # fmt: skip


@functools.cache
def streamed(name: str):  # type: ignore[no-untyped-def]
    return build_streamed(CONFIGS[name], "bfloat16")


@functools.cache
def workload(name: str, seq_len: int, micro_batch: int, is_masked: bool) -> WorkloadSpec:
    request = PlanRequest(seq_len=seq_len, micro_batch=micro_batch, activations="auto", is_masked=is_masked)
    found = describe_batch(request, CONFIGS[name], torch.device("cuda:0"))
    assert found is not None
    return found


def draw_request(name: str, draw: random.Random) -> PlanRequest:
    """Any of what decides where memory goes, with a device budget from too little to enough for all."""
    seq_len, micro_batch, accumulate = draw.choice([512, 1024, 2048]), draw.choice([1, 4, 8]), draw.choice([1, 2, 4])
    placement = draw.choice(["auto", "host", "device", "ssd"])
    batch = workload(name, seq_len, micro_batch, draw.random() < 0.3)
    stored = sum(item.retention.of(ActivationMode.KEEP).stored_bytes * item.num_units for item in batch.classes if item.retention)
    working = max(part.peak_bytes for item in batch.classes for part in (item.recompute, item.backward) if part is not None)
    return PlanRequest(
        seq_len=seq_len,
        micro_batch=micro_batch,
        accumulate=accumulate,
        group_size=draw.choice([None, None, 1, accumulate]),
        clip=draw.choice([None, 1.0]),
        parameters=placement,
        states=draw.choice(["auto", "host"]) if placement != "ssd" else "ssd",
        device_states_bytes=draw.choice([None, 0, 200 * MIB]),
        ssd_dir="/nowhere" if placement == "ssd" else None,
        is_masked=batch.is_masked,
        activations=draw.choice(["auto", "auto", "auto", "recompute", "keep"]),
        optimizer="adamw",
        device_budget_bytes=int(1.2 * GIB + working + draw.uniform(0, 1.5) * (stored * accumulate + 0.3 * GIB)),
    )


def plan_for(name: str, request: PlanRequest, *, replays_graphs: bool = False) -> Plan:
    batch = workload(name, request.seq_len, request.micro_batch, request.is_masked)
    return plan_model(
        request, streamed(name), H100, device="cuda:0", chunk_bytes=CHUNK_BYTES, workload=batch, replays_graphs=replays_graphs
    )


def predict(name: str, plan: Plan, batch: WorkloadSpec, *, replays_graphs: bool = False) -> Prediction:
    programs = Programs(plan)
    predictions = Predictions(plan, CONFIGS[name], programs, H100, workload=batch, replays_graphs=replays_graphs)
    return predictions.predict(programs.whole_step(), is_masked=batch.is_masked)


def one_more_kept(plan: Plan, batch: WorkloadSpec) -> Plan | None:
    """`plan` with one block more at the end that is kept, and no budget; None: it moves some, or keeps all."""
    blocks = [unit.name for unit in plan.blocks]
    number = len(plan.activations)
    if number == len(blocks) or any(mode not in ON_DEVICE for mode in plan.activations.values()):
        return None
    modes = dict.fromkeys(blocks[len(blocks) - number - 1 :], ActivationMode.KEEP)
    return retain(dataclasses.replace(plan, device_budget_bytes=None), modes, find_retention(plan, batch))


@pytest.mark.parametrize("replays_graphs", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_plan_takes_more_of_a_gpu_than_its_budget_by_prediction_and_no_block_more_would_fit(name: str, replays_graphs: bool) -> None:
    draw, num_planned = random.Random(f"{name} {replays_graphs}"), 0
    for _ in range(8):
        request = draw_request(name, draw)
        batch = workload(name, request.seq_len, request.micro_batch, request.is_masked)
        try:
            plan = plan_for(name, request, replays_graphs=replays_graphs)
        except BudgetError as refused:
            assert "--device-budget" in str(refused) and "missing" in str(refused)
            continue
        budget = request.device_budget_bytes
        assert budget is not None
        num_planned += 1
        prediction = predict(name, plan, batch, replays_graphs=replays_graphs)
        assert prediction.device_peak_bytes <= budget, request
        for program in (*largest_steps(plan), build_evaluation(plan, plan.longest_step * 16)):
            validate(program, plan)
        if request.activations != "auto" or (more := one_more_kept(plan, batch)) is None or replays_graphs:
            continue
        longer = predict(name, more, batch)
        reserve = RESERVE_FRACTION * longer.device_peak_bytes
        is_slower = longer.step_s > 0.99 * prediction.step_s
        assert longer.device_peak_bytes + reserve > budget or is_slower, (request, plan.notes)
    assert num_planned >= 3


def room_for(name: str, request: PlanRequest) -> Room:
    batch = workload(name, request.seq_len, request.micro_batch, request.is_masked)
    layout = _read_layout(streamed(name), request, CHUNK_BYTES)
    return Room(request, layout, H100, batch, device="cuda:0", loss_chunk_rows=plan_for(name, request).loss_chunk_rows)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_activations_that_are_kept_are_counted_as_their_programs_would_have_them_without_building_these(clip: float | None) -> None:
    request = PlanRequest(
        seq_len=1024, micro_batch=4, accumulate=4, group_size=2, clip=clip, parameters="host", states="host", device_states_bytes=100 * MIB,
        activations="auto", optimizer="adamw", device_budget_bytes=20 * GIB,
    )  # fmt: skip
    room, batch = room_for("deep", request), workload("deep", 1024, 4, False)
    start = dataclasses.replace(plan_for("deep", dataclasses.replace(request, activations="recompute")), device_budget_bytes=None)
    known = find_retention(start, batch)
    blocks, found = list(known), list[int]()
    for number in (0, 1, 7, 10):
        for mode in ON_DEVICE:
            plan = retain(start, dict.fromkeys(blocks[len(blocks) - number :], mode), known)
            assert room.device_excess(plan, beside=start) == room.excess(plan)[Tier.DEVICE]
            assert room.device_excess(start, beside=plan) == room.excess(start)[Tier.DEVICE]
        found.append(room.excess(plan)[Tier.DEVICE])
    assert found == sorted(found)


@pytest.mark.parametrize("more_bytes", [-MIB, MIB, 400 * MIB])
def test_recordings_have_what_a_plan_leaves_of_the_budget(more_bytes: int) -> None:
    """The session asks by pieces alone; a prediction adds all that is there at the fullest op."""
    request = PlanRequest(
        seq_len=512, micro_batch=1, clip=None, parameters="host", states="host", activations="recompute", optimizer="adamw",
        device_states_bytes=0, device_budget_bytes=8 * GIB,
    )  # fmt: skip
    batch, plan = workload("deep", 512, 1, False), plan_for("deep", request)
    without = predict("deep", plan, batch)
    assert plan.recordings_bytes is not None
    needed = without.device_peak_bytes + plan.recordings_bytes
    tight = plan_for("deep", dataclasses.replace(request, device_budget_bytes=needed + more_bytes))
    assert has_room(tight, resident_peaks(full_step(tight), tight)[Tier.DEVICE]) == (more_bytes >= 0)
    with_them = predict("deep", tight, batch, replays_graphs=True)
    assert (with_them.num_replays > 0) == (more_bytes >= 0) and with_them.device_peak_bytes <= needed + more_bytes


@pytest.mark.parametrize("group_size", [1, 2])
def test_what_an_arena_takes_beyond_its_pieces_is_no_room_for_recordings(group_size: int) -> None:
    request = PlanRequest(
        seq_len=512, micro_batch=1, accumulate=2, group_size=group_size, clip=None, parameters="host", states="host", boundaries="host",
        activations="recompute", optimizer="adamw", device_states_bytes=0, device_budget_bytes=8 * GIB,
    )  # fmt: skip
    batch, plan = workload("deep", 512, 1, False), plan_for("deep", request)
    programs = Programs(plan)
    arena = programs.arena_plans(programs.whole_step())[Tier.DEVICE]
    assert arena.num_bytes > arena.least_bytes
    needed = predict("deep", plan, batch, replays_graphs=True).device_peak_bytes + MIB  # for the model's buffers
    for budget in (needed - MIB - (arena.num_bytes - arena.least_bytes) // 2, needed):
        tight = plan_for("deep", dataclasses.replace(request, device_budget_bytes=budget))
        found = predict("deep", tight, batch, replays_graphs=True)
        assert (found.num_replays > 0) == (budget == needed) and found.device_peak_bytes <= budget


@pytest.mark.parametrize("group_size", [2, 4])
def test_steps_of_fewer_micro_batches_take_no_more_of_a_gpu_than_a_plan_was_judged_by(group_size: int) -> None:
    """One or two hidden states alone stay on the device, of more all but one have left it when the tail computes."""
    request = PlanRequest(
        seq_len=2048, micro_batch=4, accumulate=4, group_size=group_size, parameters="host", states="host", boundaries="host",
        activations="recompute", optimizer="adamw", device_states_bytes=0, device_budget_bytes=8 * GIB,
    )  # fmt: skip
    batch, plan, room = workload("deep", 2048, 4, False), plan_for("deep", request), room_for("deep", request)
    programs = Programs(plan)
    predictions = Predictions(plan, CONFIGS["deep"], programs, H100, workload=batch, replays_graphs=False)
    judged = 8 * GIB + room.excess(plan)[Tier.DEVICE]
    for number in (1, 2, 3, 4):
        program = programs.train(plan.longest_step[:number], pending=False)
        assert predictions.predict(program).device_peak_bytes <= judged, number


def test_a_plan_whose_budget_is_exactly_its_predicted_peak_fits() -> None:
    request = PlanRequest(
        seq_len=2048, micro_batch=4, accumulate=2, clip=1.0, parameters="host", states="host", activations="recompute", optimizer="adamw",
        boundaries="device", device_states_bytes=100 * MIB, device_budget_bytes=20 * GIB,
    )  # fmt: skip
    batch, plan = workload("tied", 2048, 4, False), plan_for("tied", request)
    peak = predict("tied", plan, batch).device_peak_bytes
    exact = plan_for("tied", dataclasses.replace(request, device_budget_bytes=peak + MIB))  # for the model's buffers
    assert (exact.placements, exact.boundaries, exact.group_size) == (plan.placements, plan.boundaries, plan.group_size)
    assert predict("tied", exact, batch).device_peak_bytes == peak
