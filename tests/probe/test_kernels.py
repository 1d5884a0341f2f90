"""Claims about the kinds of kernels: counted as a workload counts them, each measured or left out, and each priced at its own rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from overspill.huggingface.op_trace import OpTrace
from overspill.planning.cost import KERNEL_S, _kinds_seconds
from overspill.probe import kernels
from overspill.probe.kernels import BLOCK, BlockSizes, measure_kernels
from overspill.probe.sampling import Sampling
from overspill.report.machine import machine_table
from overspill.spec.hardware import HardwareSpec
from overspill.spec.machine_file import KernelFigures, MachineFile, MeasuredRate, parse_machine_file
from overspill.spec.measured_hardware import hardware_from
from overspill.spec.workload import Work
from overspill.units import GIB, MIB

CPU = torch.device("cpu")
SMALL = BlockSizes(samples=2, tokens=32, num_heads=2, hidden_size=64, num_experts=4, expert_size=32, expert_hidden_size=64)


def rate(median: float, size: int = 10**12) -> MeasuredRate:
    return MeasuredRate(median_per_s=median, min_per_s=median, max_per_s=median, num_samples=1, size=size)


def traced(name: str) -> tuple[Work, int, int]:
    """What a workload's trace says of a kind, and what the probe counts."""
    with FakeTensorMode() as mode, OpTrace(is_cuda=True, most_values=0) as trace:
        run, flops, moved = getattr(kernels, f"_{name}")(CPU, SMALL)
        begin = len(trace.ops)
        run()
        work = sum((op.cost for op in trace.ops[begin:]), Work())
    del mode
    return work, flops, moved


def test_products_of_experts_and_sums_into_rows_are_counted_as_in_a_workload() -> None:
    work, flops, moved = traced("grouped")
    assert work.flops == work.grouped_flops == flops and work.moved_bytes - work.elementwise_bytes == pytest.approx(moved, rel=0.02)
    work, flops, moved = traced("scattered")
    assert flops == work.flops == 0 and work.scattered_bytes == work.elementwise_bytes == moved


def test_attention_and_elementwise_work_are_counted_as_in_a_workload() -> None:
    work, flops, moved = traced("attention")
    assert work.attention_flops == work.causal_flops == 2 * flops, "of which a causal kernel does half"
    assert work.moved_bytes - work.elementwise_bytes == pytest.approx(moved, rel=0.05), "beside its statistics"
    work, flops, moved = traced("elementwise")
    assert flops == work.flops == 0 and work.elementwise_bytes == pytest.approx(moved, rel=0.05), "beside one number a row"
    assert work.scattered_bytes == 0


def test_kinds_are_measured_and_one_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(least_s=0.0)
    found = measure_kernels(CPU, sampling, room_bytes=GIB, sizes=SMALL)
    assert found.attention is not None and found.grouped is not None and found.elementwise is not None and found.scattered is not None
    assert found.grouped.rate.size == 6 * 128 * 64 * 32
    monkeypatch.delattr(torch, "_grouped_mm")
    found = measure_kernels(CPU, sampling, room_bytes=GIB, sizes=SMALL)
    assert found.grouped is None and found.attention is not None and found.scattered is not None


def test_what_is_run_is_cut_down_to_the_room() -> None:
    assert BLOCK.within(8 * GIB) == BLOCK and BLOCK.num_bytes < 2 * GIB
    small = BLOCK.within(256 * MIB)
    assert small.num_bytes <= 256 * MIB and small.hidden_size == BLOCK.hidden_size and small.samples == 1 and small.tokens < BLOCK.tokens


def test_a_kinds_rate_beside_moving_its_bytes_is_what_the_arithmetic_takes() -> None:
    """A second of a TFLOP, of which a quarter moves 250 GB at 1 TB/s."""
    figures = KernelFigures(rate=rate(1e12), moved_bytes=250 * 10**9)
    assert figures.net_per_s(1e12) == pytest.approx(1e12 / 0.75)
    assert figures.net_per_s(1e9) == 2e12, "never more than twice"


def test_each_kind_is_priced_at_its_own_rate_and_what_was_not_measured_at_the_next_that_was() -> None:
    work = Work(
        flops=1000, attention_flops=400, causal_flops=200, grouped_flops=100, moved_bytes=900, elementwise_bytes=600, scattered_bytes=60,
        num_ops=3,
    )  # fmt: skip
    hardware = HardwareSpec(matrix_flops=9.0, device_memory_bytes_per_s=10.0, product_flops=5.0)
    coarse = 500 / 5 + 300 / 5 + 100 / 5 + (300 + 40) / 10 + 540 / 10 + 60 / 10 + 3 * KERNEL_S
    assert _kinds_seconds(work, hardware, summed_bytes=40) == pytest.approx(coarse)
    hardware = dataclasses.replace(hardware, attention_flops=3.0, grouped_flops=2.0, elementwise_bytes_per_s=8.0, scattered_bytes_per_s=1.0)
    fine = 500 / 5 + 300 / 3 + 100 / 2 + (300 + 40) / 10 + 540 / 8 + 60 / 1 + 3 * KERNEL_S
    assert _kinds_seconds(work, hardware, summed_bytes=40) == pytest.approx(fine)


def test_kinds_are_kept_in_the_file_and_become_the_rates_of_predictions(machine_file: MachineFile) -> None:
    assert machine_file.rates.compute is not None
    assert hardware_from(machine_file, HardwareSpec(), name="m").product_flops == 0.0, "a file of before"
    compute = dataclasses.replace(
        machine_file.rates.compute,
        alone=rate(600e12),
        device_memory=rate(3e12),
        moved_bytes=10**9,
        attention=KernelFigures(rate=rate(300e12), moved_bytes=10**9),
        grouped=KernelFigures(rate=rate(200e12), moved_bytes=10**9),
        elementwise=rate(2e12),
        scattered=rate(1e11),
    )
    file = dataclasses.replace(machine_file, rates=dataclasses.replace(machine_file.rates, compute=compute))
    assert parse_machine_file(file.to_json(), "here") == file
    hardware = hardware_from(file, HardwareSpec(), name="m")
    assert hardware.matrix_flops == 600e12 and 600e12 < hardware.product_flops < 1200e12
    assert 300e12 < hardware.attention_flops < hardware.product_flops and 200e12 < hardware.grouped_flops < hardware.attention_flops
    assert (hardware.elementwise_bytes_per_s, hardware.scattered_bytes_per_s) == (2e12, 1e11)
    rows = [str(cell) for column in machine_table(file).columns for cell in column.cells]
    assert sum("attention" in row or "experts" in row or "norms" in row or "indexed rows" in row for row in rows) == 4
    assert math.isfinite(hardware.device_flops)
