"""Claims about the parts of a peak: on a GPU what the driver counts, on a CPU what the process holds; homes and slots once each."""

from __future__ import annotations

from matrices import make_plan
from tiny_models import tiny_config

from overspill.huggingface.workload import describe_workload
from overspill.planning import full_step, plan_arena, pool_events
from overspill.planning.memory import (
    CUDA_CONTEXT_BYTES,
    CUDA_PROCESS_GROWTH_BYTES,
    LIBRARY_WORKSPACE_BYTES,
    SESSION_CONTEXT_BYTES,
    device_terms,
    host_terms,
)
from overspill.spec.hardware import HardwareSpec


def test_the_parts_on_a_gpu_are_homes_slots_boundaries_and_one_unit_at_work() -> None:
    plan = make_plan(parameters="device", states="host", boundaries="device")
    schedule = full_step(plan)
    arena = plan_arena(pool_events(schedule, plan), plan)
    terms = {term.name: term for term in device_terms(schedule, plan, slot_bytes=arena.num_bytes)}
    assert terms["homes"].num_bytes == sum(bundle.parameter_bytes for bundle in plan.bundles.values())
    assert terms["slots"].num_bytes == arena.num_bytes
    entered = len(plan.units) - 1
    assert terms["boundaries"].num_bytes in {plan.boundary_bytes("tail") * number for number in range(1, 4 * (entered + 2))}
    assert terms["working memory of a unit"].num_bytes == plan.device_working_bytes and terms["working memory of a unit"].is_assumed
    assert terms["CUDA context"].num_bytes == CUDA_CONTEXT_BYTES and terms["library workspaces"].num_bytes == LIBRARY_WORKSPACE_BYTES
    assert "replayed graphs" not in terms, "nobody has described the workload"


def test_the_parts_of_the_process_are_homes_slots_and_itself_and_on_a_cpu_the_device_too() -> None:
    hardware = HardwareSpec(process_bytes=123)
    for device in ("cuda:0", "cpu"):
        plan = make_plan(parameters="host", states="host", boundaries="device", device=device)
        schedule = full_step(plan)
        on_device = device_terms(schedule, plan, slot_bytes=8192)
        terms = {term.name: term.num_bytes for term in host_terms(schedule, plan, hardware, slot_bytes=12288, device=on_device)}
        held = sum(bundle.parameter_bytes + plan.state_bytes(name) for name, bundle in plan.bundles.items())
        assert held <= terms["homes"] <= held + 4096 * 2 * len(plan.bundles)
        assert terms["slots"] == 12288
        assert terms["process"] == 123
        assert ("device slots" in terms) == (device == "cpu") and ("growth beside a GPU" in terms) == (device != "cpu")


def test_a_process_that_has_loaded_what_a_step_needs_is_as_measured_and_grows_by_no_constant() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device")
    schedule = full_step(plan)
    hardware = HardwareSpec(process_bytes=123, footprint_host_growth_bytes=500)
    before = host_terms(schedule, plan, hardware, slot_bytes=8192, device=())
    after = host_terms(schedule, plan, hardware, slot_bytes=8192, device=(), loaded_process_bytes=700)
    assert {term.name: term.num_bytes for term in before}.items() >= {"process": 123, "growth beside a GPU": 500}.items()
    assert {term.name: term.num_bytes for term in after if term.name not in ("homes", "slots")} == {"process": 700}


def test_routed_experts_bring_kernels_of_their_own_as_far_as_a_probe_has_seen_them() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device")
    schedule = full_step(plan)
    for name, hardware, expected in (
        ("mixtral", HardwareSpec(footprint_expert_host_growth_bytes=270), {270}),
        ("mixtral", HardwareSpec(), set()),
        ("llama", HardwareSpec(footprint_expert_host_growth_bytes=270), set()),
    ):
        workload = describe_workload(tiny_config(name), seq_len=12, micro_batch=2)
        terms = host_terms(schedule, plan, hardware, slot_bytes=8192, device=(), workload=workload)
        assert {term.num_bytes for term in terms if term.name == "experts' kernels"} == expected


def test_what_a_process_takes_beside_its_tensors_is_as_measured_if_it_was_and_else_a_constant() -> None:
    plan = make_plan(parameters="host", states="host", boundaries="device")
    schedule = full_step(plan)
    measured = HardwareSpec(footprint_context_bytes=700, footprint_library_bytes=64, footprint_host_growth_bytes=500)
    for hardware, expected in (
        (measured, (700, SESSION_CONTEXT_BYTES, 64, 500)),
        (HardwareSpec(), (CUDA_CONTEXT_BYTES, 0, LIBRARY_WORKSPACE_BYTES, CUDA_PROCESS_GROWTH_BYTES)),
    ):
        on_device = device_terms(schedule, plan, slot_bytes=8192, hardware=hardware)
        on_host = host_terms(schedule, plan, hardware, slot_bytes=8192, device=on_device)
        terms = {term.name: term for term in (*on_device, *on_host)}
        names = ("CUDA context", "session's part of the context", "library workspaces", "growth beside a GPU")
        assert tuple(terms[name].num_bytes if name in terms else 0 for name in names) == expected
        assert terms["CUDA context"].is_assumed == terms["growth beside a GPU"].is_assumed == (hardware is not measured)
