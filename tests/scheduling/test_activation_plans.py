"""Claims about what becomes of activations: schedules keep their rules in every mode, and `auto` keeps what the budgets hold."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from matrices import make_plan
from transformers import LlamaConfig

from overspill.errors import BudgetError
from overspill.huggingface.workload import build_streamed
from overspill.planning import activations, build_costs
from overspill.planning.space import activation_slot_bytes, scratch_bytes
from overspill.runtime.opening import describe_batch, refuse_compiled
from overspill.runtime.opening import make_plan as plan_model
from overspill.runtime.predictions import Predictions
from overspill.runtime.programs import Programs
from overspill.scheduling import build_evaluation, build_train_step, validate
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import Plan, PlanRequest, UpdateTiming
from overspill.spec.report import Prediction
from overspill.spec.retention import ON_DEVICE, ActivationMode
from overspill.spec.schedule import Compute, Evict, Fetch, Lane, Phase, Role
from overspill.spec.tensors import Tier
from overspill.spec.workload import Retention, UnitWork, Work, WorkloadSpec
from overspill.units import GIB, MIB

BLOCKS = ("block.0", "block.1", "block.2")
STORED = 4096
H100 = HardwareSpec(
    source="measured", h2d_bytes_per_s=55e9, d2h_bytes_per_s=55e9, h2d_duplex_bytes_per_s=45.6e9, d2h_duplex_bytes_per_s=45.6e9,
    host_update_parameters_per_s=4e9, device_flops=400e12, host_memory_bytes_per_s=140e9, matrix_flops=600e12,
    device_memory_bytes_per_s=2.6e12, device_capacity_bytes=79 * GIB, host_capacity_bytes=120 * GIB, process_bytes=GIB,
)  # fmt: skip
"""Roughly the machine of the design page."""


def retained(plan: Plan, *modes: str) -> Plan:
    """`plan` with these modes, block by block; an empty one: recomputed."""
    chosen = {unit: ActivationMode(mode) for unit, mode in zip(BLOCKS, modes, strict=True) if mode}
    return dataclasses.replace(plan, activations=chosen, stored_bytes=dict.fromkeys(chosen, STORED))


@pytest.mark.parametrize("prefetch_units", [0, 1])
@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["immediate", "pending"])
def test_every_mix_of_modes_gives_schedules_that_keep_all_rules(clip: float | None, group_size: int, prefetch_units: int) -> None:
    mixes = list(itertools.product(["", "keep", "host", "ssd"], repeat=3))
    first = group_size + 2 * prefetch_units + (clip is not None)  # all of them in the twelve cases together, some in each
    for number, modes in enumerate(mixes[first % 5 :: 5]):
        boundaries = ["device", "host", "ssd"][number % 3]
        plan = make_plan(clip=clip, group_size=group_size, parameters="host", states="host", boundaries=boundaries)
        plan = retained(dataclasses.replace(plan, prefetch_units=prefetch_units), *modes)
        tokens = [16, 12, 16, 4]
        validate(build_train_step(plan, tokens, starts_pending=plan.timing is UpdateTiming.PENDING), plan)
        evaluation = build_evaluation(plan, tokens)
        validate(evaluation, plan)
        assert not any(isinstance(item.op, Compute) and item.op.is_retained for item in evaluation.ops)


def moved_bytes(plan: Plan, tokens: list[int], lane: Lane) -> int:
    ops = [item.op for item in build_train_step(plan, tokens, starts_pending=False).ops if item.lane is lane]
    return sum(op.num_bytes for op in ops if isinstance(op, Fetch | Evict) and op.piece.role is Role.ACTIVATIONS)


def test_activations_cross_a_link_once_each_way_and_the_last_ones_are_wanted_before_they_have_to_come_back() -> None:
    plan = retained(make_plan(accumulate=4, group_size=2, parameters="host", states="host"), "host", "keep", "ssd")
    tokens = [16, 8, 16, 4]
    each = sum(STORED * count // 16 for count in tokens)
    assert moved_bytes(plan, tokens, Lane.D2H) == 2 * each
    assert moved_bytes(plan, tokens, Lane.SSD_WRITE) == each
    first_of_each_group = (16 + 16) * STORED // 16  # of the last block: its backward is next
    assert moved_bytes(plan, tokens, Lane.H2D) == 2 * each - first_of_each_group
    assert moved_bytes(plan, tokens, Lane.SSD_READ) == each - first_of_each_group


def test_a_shorter_micro_batch_is_counted_in_proportion_on_an_alignment_of_512() -> None:
    plan = retained(make_plan(), "keep", "keep", "keep")
    assert plan.activation_bytes("block.0") == plan.activation_bytes("block.0", 16) == STORED
    assert plan.activation_bytes("block.0", 5) == 1536 >= STORED * 5 / 16


def test_scratch_has_a_record_for_each_micro_batch_of_a_group_and_block_on_the_ssd() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device", group_size=2)
    assert scratch_bytes(plan) == 0
    assert scratch_bytes(retained(plan, "ssd", "host", "ssd")) == 2 * 2 * activation_slot_bytes(retained(plan, "ssd", "", "")) == 4 * STORED


def test_a_forward_waits_for_the_copy_whose_memory_it_may_be_given() -> None:
    """Of three micro-batches of a block two may be on their way: the third forward waits until the first has left."""
    plan = retained(make_plan(accumulate=3, group_size=3, parameters="host", states="host"), "host", "", "")
    ops = build_train_step(plan, [16] * 3, starts_pending=False).ops
    leaving = [n for n, item in enumerate(ops) if isinstance(item.op, Evict) and item.op.piece.role is Role.ACTIVATIONS]
    forwards = [
        n for n, item in enumerate(ops) if isinstance(item.op, Compute) and item.op.unit == "block.0" and item.op.phase is Phase.FORWARD
    ]
    assert leaving[0] in ops[forwards[2]].waits and leaving[0] not in ops[forwards[1]].waits
    backward = next(item for item in ops if isinstance(item.op, Compute) and item.op.phase is Phase.BACKWARD)
    assert set(leaving) - {leaving[0]} <= set(backward.waits)


# -- a model of 1.10 billion parameters, on paper --------------------------------------------------------------------


CONFIG = LlamaConfig(
    hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
    max_position_embeddings=4096,
)  # fmt: skip


def request(**fields: object) -> PlanRequest:
    defaults: dict[str, object] = {
        "parameters": "host", "states": "host", "device_states_bytes": 11 * 10**8, "seq_len": 2048, "micro_batch": 8, "optimizer": "adamw",
        "device_budget_bytes": 24 * GIB, "activations": "auto",
    }  # fmt: skip
    return PlanRequest(**{**defaults, **fields})  # type: ignore[arg-type]


@functools.cache
def workload(micro_batch: int = 8) -> WorkloadSpec:
    found = describe_batch(request(micro_batch=micro_batch), CONFIG, torch.device("cuda:0"))
    assert found is not None
    return found


@functools.cache
def streamed():  # type: ignore[no-untyped-def]
    return build_streamed(CONFIG, "bfloat16")


def plan_for(hardware: HardwareSpec = H100, **fields: object) -> Plan:
    wanted = request(**fields)
    return plan_model(wanted, streamed(), hardware, device="cuda:0", chunk_bytes=None, workload=workload(wanted.micro_batch))


def predict(plan: Plan) -> Prediction:
    return Predictions(plan, CONFIG, Programs(plan), H100).predict_whole_step()


def test_a_llama_block_stores_what_is_on_paper() -> None:
    """q, k, v, the attention's result and the sum behind it, in units of the hidden states' 64 MiB: 1 + 1/4 + 1/4 + 1 + 1; the gate and the
    branch beside it, 4 each; log-sum-exp and the norms' factors in fp32; attention's random state."""
    tokens = 8 * 2048
    small = tokens * 32 * 4 + 2 * tokens * 4 + 2 * 512
    found = workload().classes[1].retention
    assert found is not None
    kept, costly, whole = (found.of(mode) for mode in (ActivationMode.KEEP, ActivationMode.KEEP_COSTLY, ActivationMode.KEEP_WHOLE))
    assert kept.stored_bytes == int(3.5 * 64 * MIB) + 2 * 256 * MIB + small
    assert found.of(ActivationMode.HOST) == kept
    widened, normalized, weighted = 64 + 128, 3 * 128 + 128 + 64, 3 * 64
    assert kept.rebuilt.elementwise_bytes == (2 * (widened + normalized + weighted) + 2 * 256 + 3 * 256) * MIB
    assert costly.stored_bytes == kept.stored_bytes + 2 * 64 * MIB, "the two norms' results before their weights"
    assert costly.rebuilt.elementwise_bytes == kept.rebuilt.elementwise_bytes - 2 * normalized * MIB
    assert whole.stored_bytes == kept.stored_bytes + (2 * (128 + 64 + 64) + 2 * 256 - 64) * MIB, (
        "nothing is stored as a half beside the whole"
    )
    assert whole.rebuilt == Work()


def test_all_blocks_are_kept_where_24_gib_hold_them_and_the_predicted_peak_is_within() -> None:
    plan = plan_for()
    blocks = [unit.name for unit in plan.blocks]
    assert list(plan.activations) == blocks and set(plan.activations.values()) <= set(ON_DEVICE)
    kept, recomputed = predict(plan), predict(plan_for(activations="recompute"))
    assert recomputed.device_peak_bytes < kept.device_peak_bytes < 24 * GIB
    assert kept.lane_busy_s["compute"] < recomputed.lane_busy_s["compute"] / 1.15
    assert kept.step_s < recomputed.step_s
    assert "blocks kept on the device" in plan.notes[-1] and "with all recomputed at" in plan.notes[-1]


QUICK_HOST = dataclasses.replace(H100, host_update_parameters_per_s=40e9, host_memory_bytes_per_s=0.0)


@pytest.mark.parametrize("hardware", [QUICK_HOST, H100, HardwareSpec()], ids=["compute-bound", "update-bound", "not-measured"])
def test_less_is_rebuilt_where_there_is_room_that_nothing_else_would_have_what_costs_most_first(hardware: HardwareSpec) -> None:
    plan = plan_for(hardware)
    modes = list(plan.activations.values())
    number = modes.count(ActivationMode.KEEP_WHOLE)
    assert 0 < number < 16 and modes == [ActivationMode.KEEP_COSTLY] * (16 - number) + [ActivationMode.KEEP_WHOLE] * number
    found = workload().classes[1].retention
    assert found is not None
    assert plan.home_bytes(Tier.DEVICE)["activations"] == sum(found.of(mode).stored_bytes for mode in modes)
    assert predict(plan).device_peak_bytes < 24 * GIB
    assert f"of {number} blocks kept on the device with nothing rebuilt" in plan.notes[-1]
    assert f"of {16 - number} blocks kept on the device with little rebuilt" in plan.notes[-1]


def test_where_room_is_short_the_last_blocks_have_it() -> None:
    plan = plan_for(QUICK_HOST, device_budget_bytes=17 * GIB)
    modes = list(plan.activations.values())
    number = modes.count(ActivationMode.KEEP_COSTLY)
    assert 0 < number < 16 and modes == [ActivationMode.KEEP] * (16 - number) + [ActivationMode.KEEP_COSTLY] * number
    assert predict(plan).device_peak_bytes < 17 * GIB


def with_two_classes(first: tuple[int, int, int], second: tuple[int, int, int]) -> WorkloadSpec:
    """Half of the blocks, and the others, store so many MiB in each mode that keeps them on the device."""
    found = workload()
    embedding, blocks, tail = found.classes

    def blocks_of(units: tuple[str, ...], sizes: tuple[int, int, int]) -> UnitWork:
        assert blocks.retention is not None
        stored = zip(ON_DEVICE, sizes, strict=True)
        kept = {mode: dataclasses.replace(blocks.retention.of(mode), stored_bytes=size * MIB) for mode, size in stored}
        return dataclasses.replace(blocks, name=units[0], units=units, retention=Retention(kept=kept))

    return dataclasses.replace(found, classes=(embedding, blocks_of(blocks.units[:8], first), blocks_of(blocks.units[8:], second), tail))


def plan_for_classes(found: WorkloadSpec, budget_gib: int) -> Plan:
    wanted = request(device_budget_bytes=budget_gib * GIB)
    plan = plan_model(wanted, streamed(), QUICK_HOST, device="cuda:0", chunk_bytes=None, workload=found)
    peak = Predictions(plan, CONFIG, Programs(plan), QUICK_HOST, workload=found).predict_whole_step().device_peak_bytes
    assert peak < budget_gib * GIB
    return plan


@pytest.mark.parametrize("sizes", [((700, 705, 1400), (300, 600, 1300)), ((300, 600, 1300), (700, 705, 1400))])
def test_less_is_rebuilt_by_what_each_class_of_blocks_stores_more(sizes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> None:
    """One class stores the most in every mode and gains little, the other the least and gains much: the difference of the largest says
    nothing of what both take."""
    found = with_two_classes(*sizes)
    modes = [list(plan_for_classes(found, budget_gib).activations.values()) for budget_gib in (18, 24)]
    counts = [16 - each.count(ActivationMode.KEEP) for each in modes]
    assert len(modes[0]) == 16 and 0 < counts[0] <= counts[1] == 16


def test_small_blocks_behind_large_ones_are_kept_by_their_own_bytes() -> None:
    """Dense layers before a mixture of experts, or such a mixture before others: were each as large as the largest, two would be kept."""
    plan = plan_for_classes(with_two_classes((1600, 1700, 2400), (300, 600, 1300)), 9)
    assert list(plan.activations) == [unit.name for unit in plan.units[9:-1]]
    assert set(plan.activations.values()) == {ActivationMode.KEEP}


@pytest.mark.parametrize("budget_gib", [8, 14])
def test_the_last_blocks_are_kept_where_the_device_holds_not_all(budget_gib: int) -> None:
    plan = plan_for(device_budget_bytes=budget_gib * GIB)
    blocks = [unit.name for unit in plan.blocks]
    kept = [unit for unit, mode in plan.activations.items() if mode is ActivationMode.KEEP]
    assert 0 < len(kept) < 16 and kept == blocks[-len(kept) :]
    assert predict(plan).device_peak_bytes < budget_gib * GIB


def test_what_a_link_carries_beside_compute_is_moved_and_more_is_not() -> None:
    """A block's activations take the link 14 ms and its forward 6 ms: most blocks cannot leave. Ten times the link carries nearly all."""
    fields: dict[str, object] = {"device_budget_bytes": 8 * GIB, "device_states_bytes": 2 * 10**9, "state_format": "bf16"}
    quick = dataclasses.replace(H100, host_update_parameters_per_s=40e9, host_memory_bytes_per_s=0.0)
    wide = dataclasses.replace(
        quick, h2d_bytes_per_s=550e9, d2h_bytes_per_s=550e9, h2d_duplex_bytes_per_s=456e9, d2h_duplex_bytes_per_s=456e9
    )
    plans = [plan_for(hardware, **fields) for hardware in (quick, wide, HardwareSpec())]
    moved = [sum(mode is ActivationMode.HOST for mode in plan.activations.values()) for plan in plans]
    assert 0 < moved[0] <= 6 and moved[1] >= 10, [plan.notes[-1] for plan in plans]
    assert moved[2] == 0 and plans[2].activations, "rates that nobody measured move nothing"


def test_blocks_whose_launches_bind_are_replayed_as_graphs_and_recomputed() -> None:
    plan = plan_for(micro_batch=1, accumulate=8)
    assert not plan.activations
    assert (
        plan.notes[-1] == "activations: all blocks are recomputed (auto: their launches bound them, and they are replayed as CUDA graphs)"
    )


@pytest.mark.parametrize("replays_graphs", [True, False])
def test_plans_of_a_session_without_graphs_are_compared_without_replays(replays_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, build = list[object](), activations.build_costs

    def build_and_note(*args: Any, replayed: Any = None, **fields: Any) -> Any:
        compared.append(replayed)
        return build(*args, replayed=replayed, **fields)

    monkeypatch.setattr(activations, "build_costs", build_and_note)
    wanted = request(micro_batch=8)
    plan_model(wanted, streamed(), H100, device="cuda:0", chunk_bytes=None, workload=workload(8), replays_graphs=replays_graphs)
    assert len(compared) > 1 and set(compared) == {None if replays_graphs else ()}


@pytest.mark.parametrize("mode", ["keep", "host"])
def test_a_mode_that_does_not_fit_is_refused_with_both_numbers_and_the_cure(mode: str) -> None:
    fields: dict[str, object] = {"device_budget_bytes": 9 * GIB} if mode == "keep" else {"host_budget_bytes": 20 * GIB}
    with pytest.raises(BudgetError) as refused:
        plan_for(activations=mode, **fields)
    text = str(refused.value)
    assert f"activations in mode {mode} needs" in text and "the budget leaves" in text and "are missing" in text
    assert "choose --activations auto or recompute" in text
    assert not plan_for(activations="recompute", **fields).activations


def test_wrong_input_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="--activations 'all' is not known; choose one of auto, recompute, keep, host, ssd"):
        request(activations="all")
    with pytest.raises(ValueError, match="--activations ssd needs a directory"):
        plan_for(activations="ssd")
    with pytest.raises(ValueError, match="cannot be had of compiled blocks"):
        refuse_compiled(request(activations="keep"))
    assert refuse_compiled(request()).activations == "recompute"
    blind = dataclasses.replace(workload(), classes=tuple(dataclasses.replace(item, retention=None) for item in workload().classes))
    with pytest.raises(
        ValueError, match="needs to know what each block stores, and of 16 blocks, model.layers.0 the first, it is not known"
    ):
        plan_model(request(activations="keep"), streamed(), H100, device="cuda:0", chunk_bytes=None, workload=blind)
    plan = plan_model(request(), streamed(), H100, device="cuda:0", chunk_bytes=None, workload=blind)
    assert not plan.activations and "all blocks are recomputed (auto:" in plan.notes[-1]


def test_a_kept_graph_costs_no_recomputation_and_what_is_rebuilt() -> None:
    plan = plan_for(activations="keep")
    costs = build_costs(plan, H100, workload=workload())
    ops = [item.op for item in build_train_step(plan, [16384], starts_pending=False).ops]
    backward = next(op for op in ops if isinstance(op, Compute) and op.unit == "model.layers.3" and op.phase is Phase.BACKWARD)
    again = dataclasses.replace(backward, consumed=())
    item = workload().class_of("model.layers.3")
    assert item.recompute is not None and item.retention is not None
    work = item.recompute.work
    recomputation = (work.flops - work.causal_flops / 2) / 600e12 + work.elementwise_bytes / 2.6e12
    saved = costs.seconds(again, Lane.COMPUTE) - costs.seconds(backward, Lane.COMPUTE)
    assert saved == pytest.approx(recomputation - item.retention.of(ActivationMode.KEEP).rebuilt.elementwise_bytes / 2.6e12, rel=0.05)
    assert plan.home_bytes(Tier.DEVICE)["activations"] == 16 * item.retention.of(ActivationMode.KEEP).stored_bytes
