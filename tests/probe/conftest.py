"""A probe small enough for a test, and a machine file that nothing measured."""

from __future__ import annotations

import pytest

from overspill.probe import machine
from overspill.probe.compute import MatrixShape
from overspill.probe.drive import Passes
from overspill.probe.machine import ProbeSettings
from overspill.probe.sampling import Sampling
from overspill.spec.machine_file import (
    ComputeFigures,
    DriveFigures,
    LinkFigures,
    MachineCapacities,
    MachineFile,
    MachineIdentity,
    MachineRates,
    MeasuredRate,
)
from overspill.units import GIB, KIB, MIB

SMALL = ProbeSettings(
    most_s=6.0,
    share_s=0.5,
    sampling=Sampling(least_s=0.002, num_samples=3),
    link_units=(2 * MIB, MIB),
    host_set_bytes=8 * MIB,
    host_unit_bytes=MIB,
    block_on_gpu=MatrixShape(m=64, k=64, n=64, dtype="bfloat16"),
    block_on_cpu=MatrixShape(m=64, k=64, n=64, dtype="float32"),
    drive_units=(MIB, 256 * KIB),
    drive_bytes=8 * MIB,
    passes=Passes(most_s=0.02, most_bytes=8 * MIB, num_passes=2),
)


@pytest.fixture
def small() -> ProbeSettings:
    return SMALL


@pytest.fixture
def small_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SETTINGS", SMALL)


def rate(median: float) -> MeasuredRate:
    return MeasuredRate(median_per_s=median, min_per_s=0.9 * median, max_per_s=1.2 * median, num_samples=5, size=MIB)


@pytest.fixture
def machine_file() -> MachineFile:
    """An H100 as it might have been measured: 50 GB/s each way, 45 in duplex; a drive that shares 2 GB/s between both directions."""
    link = [LinkFigures(unit_bytes=unit * MIB, is_pinned=True, h2d=rate(50e9), d2h=rate(50e9), duplex=rate(45e9)) for unit in (128, 32)]
    drive = DriveFigures(
        unit_bytes=32 * MIB, in_flight=4, is_direct=True, read=rate(2e9), write=rate(2e9), mixed_read=rate(1e9), mixed_write=rate(1e9)
    )
    compute = ComputeFigures(
        what="[1, 2] @ [2, 3] in bfloat16",
        alone=rate(600e12),
        beside_copies=rate(500e12),
        copies_unit_bytes=32 * MIB,
        copies_alone=rate(45e9),
        copies_beside=rate(30e9),
    )
    return MachineFile(
        identity=MachineIdentity(
            cpu_model="A CPU x86_64",
            num_cpus=16,
            memory_class_bytes=128 * GIB,
            device="A GPU",
            device_uuid="1234",
            driver="570.1",
            torch="2.11",
            overspill="0.1.0",
            ssd=("ext4 12ab",),
        ),
        measured_at="2026-11-22T10:00:00+00:00",
        took_s=12.0,
        capacities=MachineCapacities(
            memory_total_bytes=126 * GIB, memory_total_after_bytes=126 * GIB, host_available_bytes=100 * GIB, ssd_free_bytes=GIB
        ),
        rates=MachineRates(
            link=tuple(link),
            host_copy=rate(89e9),
            host_in_place=rate(143e9),
            update={"fp32": rate(5e9), "bf16": rate(10e9)},
            compute=compute,
            ssd=(drive,),
        ),
        notes=("a note",),
    )
