"""Claims about the machine file: it says what it holds for, survives its JSON, and gives predictions its rates and no others."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from overspill.report.machine import describe_bound, machine_table
from overspill.spec.hardware import ASSUMED, HardwareSpec
from overspill.spec.machine_file import (
    FORMAT_VERSION,
    MachineFile,
    MachineRates,
    machine_differences,
    parse_machine_file,
    software_differences,
)
from overspill.spec.measured_hardware import BLOCK_FRACTION, hardware_from
from overspill.spec.rates import LinkRates
from overspill.units import GIB


def identity(file: MachineFile, **changes: Any) -> MachineFile:
    return dataclasses.replace(file, identity=dataclasses.replace(file.identity, **changes))


def capacities(file: MachineFile, **changes: Any) -> MachineFile:
    return dataclasses.replace(file, capacities=dataclasses.replace(file.capacities, **changes))


# -- the document ----------------------------------------------------------------------------------------------------


def test_a_machine_file_survives_its_json(machine_file: MachineFile) -> None:
    assert parse_machine_file(machine_file.to_json(), "there") == machine_file
    bare = dataclasses.replace(machine_file, rates=MachineRates())
    assert parse_machine_file(bare.to_json(), "there") == bare


def test_another_format_version_is_refused_with_both_numbers(machine_file: MachineFile) -> None:
    text = dataclasses.replace(machine_file, format_version=FORMAT_VERSION + 1).to_json()
    with pytest.raises(ValueError, match=rf"/x.json is a machine file of format version 2, .* reads version {FORMAT_VERSION}; .*--renew"):
        parse_machine_file(text, Path("/x.json"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "it is not JSON"),
        ("[]", "no format_version"),
        ('{"loss": 1}', "no format_version"),
        (json.dumps({"format_version": FORMAT_VERSION, "colour": "red"}), "unknown field.*colour"),
        (json.dumps({"format_version": FORMAT_VERSION}), "missing"),
        (json.dumps({"format_version": FORMAT_VERSION, "rates": 7}), "damaged"),
    ],
)
def test_what_is_no_machine_file_is_refused_with_the_reason_and_the_cure(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"there is.*{reason}.*overspill probe --renew"):
        parse_machine_file(text, "there")


def test_a_rate_that_cannot_have_been_measured_is_refused(machine_file: MachineFile) -> None:
    for wrong in ("0.0", "-1.0", "Infinity", "NaN", '"fast"'):
        text = machine_file.to_json().replace('"median_per_s": 89000000000.0', f'"median_per_s": {wrong}')
        with pytest.raises(ValueError, match="damaged machine file"):
            parse_machine_file(text, "there")


def test_reading_a_machine_file_needs_no_torch() -> None:
    code = "import sys; import overspill.spec.machine_file, overspill.report.machine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_spread_duplex_and_slowdowns_are_ratios_of_what_was_measured(machine_file: MachineFile) -> None:
    link, compute = machine_file.rates.link[0], machine_file.rates.compute
    assert link.h2d.spread_fraction == pytest.approx(0.3)
    assert link.duplex_factor == pytest.approx(0.9)
    assert compute is not None and compute.compute_slowdown == pytest.approx(1.2) and compute.copies_slowdown == pytest.approx(1.5)
    alone = dataclasses.replace(compute, beside_copies=None, copies_alone=None, copies_beside=None)
    assert alone.compute_slowdown is None and alone.copies_slowdown is None


# -- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("cpu_model", "B CPU", "the CPU was A CPU x86_64, is B CPU"),
        ("num_cpus", 2, "the number of cores was 16, is 2"),
        ("device", "cpu", "the device was A GPU, is cpu"),
        ("device_uuid", "", "the GPU's id was 1234, is none"),
        ("memory_class_bytes", 64 * GIB, "the memory class was 128.00 GiB, is 64.00 GiB"),
    ],
)
def test_another_machine_is_told_by_what_differs(machine_file: MachineFile, field: str, value: Any, text: str) -> None:
    here = identity(machine_file, **{field: value}).identity
    assert machine_differences(machine_file, here) == (text,) and software_differences(machine_file, here) == ()


@pytest.mark.parametrize("field", ["driver", "torch", "overspill"])
def test_other_software_is_the_same_machine_and_the_same_place_in_the_cache(machine_file: MachineFile, field: str) -> None:
    here = identity(machine_file, **{field: "9.9"}).identity
    assert machine_differences(machine_file, here) == () and len(software_differences(machine_file, here)) == 1
    assert here.key == machine_file.identity.key


def test_machines_and_their_devices_have_places_of_their_own(machine_file: MachineFile) -> None:
    variants = [{}, {"cpu_model": "B"}, {"num_cpus": 2}, {"device": "cpu"}, {"device_uuid": "99"}]
    assert len({identity(machine_file, **changes).identity.key for changes in variants}) == len(variants)


def test_memory_that_grows_makes_no_other_machine(machine_file: MachineFile) -> None:
    here = identity(machine_file, memory_class_bytes=GIB).identity
    assert machine_differences(machine_file, here)
    assert not machine_differences(capacities(machine_file, memory_total_after_bytes=1), here)


# -- what predictions take from it -----------------------------------------------------------------------------------

FREE = HardwareSpec(host_capacity_bytes=7 * GIB, device_capacity_bytes=5 * GIB, process_bytes=3)


CONTENTION = {
    "h2d_duplex_bytes_per_s": 45e9,
    "d2h_duplex_bytes_per_s": 45e9,
    "ssd_read_mixed_bytes_per_s": 1e9,
    "ssd_write_mixed_bytes_per_s": 1e9,
    "host_memory_bytes_per_s": 143e9,
    "matrix_flops": 600e12,
    "compute_beside_copies": 500 / 600,
    "copies_beside_compute": 30 / 45,
}
"""What lanes lose beside each other, as the file of `conftest.py` has it."""


def test_predictions_get_the_medians_and_what_is_free_now(machine_file: MachineFile) -> None:
    hardware = hardware_from(machine_file, FREE, name="m.json", state_format="bf16", ssd=("ext4 12ab",))
    assert hardware == HardwareSpec(
        source=f"measured (m.json, 2026-11-22); blocks assumed at {BLOCK_FRACTION} of a matrix product",
        h2d_bytes_per_s=50e9,
        d2h_bytes_per_s=50e9,
        ssd_read_bytes_per_s=2e9,
        ssd_write_bytes_per_s=2e9,
        host_update_parameters_per_s=10e9,
        device_flops=BLOCK_FRACTION * 600e12,
        **CONTENTION,
        host_capacity_bytes=7 * GIB,
        device_capacity_bytes=5 * GIB,
        process_bytes=3,
    )


def test_what_was_not_measured_stays_assumed_and_the_source_says_so(machine_file: MachineFile) -> None:
    other_drive = hardware_from(machine_file, FREE, name="m", state_format="int8", ssd=("xfs 1",))
    assert other_drive.source.endswith("; SSD, update assumed")
    assert other_drive.ssd_read_bytes_per_s == FREE.ssd_read_bytes_per_s
    assert other_drive.host_update_parameters_per_s == FREE.host_update_parameters_per_s
    nothing = hardware_from(dataclasses.replace(machine_file, rates=MachineRates()), FREE, name="m")
    assert nothing.source == "measured (m, 2026-11-22); link, SSD, update, compute assumed"
    assert dataclasses.replace(nothing, source=ASSUMED) == FREE


def test_host_memory_that_grows_is_unknown_and_a_budget_wins(machine_file: MachineFile) -> None:
    growing = capacities(machine_file, memory_total_after_bytes=200 * GIB)
    assert growing.capacities.host_usable_bytes is None
    assert hardware_from(growing, FREE, name="m").host_capacity_bytes == 0, "0 is unknown"
    for file in (growing, machine_file):
        told = capacities(file, host_budget_bytes=48 * GIB)
        assert told.capacities.host_usable_bytes == 48 * GIB
        assert hardware_from(told, FREE, name="m").host_capacity_bytes == 48 * GIB


# -- for people ------------------------------------------------------------------------------------------------------


def test_the_bound_of_a_step_follows_from_the_rates(machine_file: MachineFile) -> None:
    """bf16, format fp32: 4 bytes up and 2 down a parameter over the link, 14 read and 12 written on the SSD."""
    text = describe_bound(machine_file)
    link_ms = 1e3 * LinkRates(
        up_bytes_per_s=50, down_bytes_per_s=50, up_duplex_bytes_per_s=45, down_duplex_bytes_per_s=45
    ).work_s(4, 2)  # fmt: skip
    tokens = int(float(f"{(1 / 5e9) / (8 / (BLOCK_FRACTION * 600e12)):.1e}"))
    assert "\n" not in text
    assert f"bound by the host update with states in host memory: 200.0 ms a billion parameters (link {link_ms:.1f} ms)" in text
    assert f"up to {tokens:,} tokens a step; by the SSD with states on the SSD: 13.00 s a billion parameters" in text
    without = dataclasses.replace(machine_file, rates=dataclasses.replace(machine_file.rates, link=(), update={}))
    assert describe_bound(without) == "what bounds a step cannot be said: the link and host update has no rate"


def test_the_table_names_every_figure(machine_file: MachineFile) -> None:
    from rich.console import Console

    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(machine_table(capacities(machine_file, memory_total_after_bytes=1)))
    text = captured.get()
    words = ["A CPU x86_64, 16 cores", "driver 570.1", "unknown: it changes", "to the device, 128 MiB, pinned", "0.90 of sum"]
    words += ["AdamW on the host, bf16", "1.20 of time", "1.50 of time", "SSD read, 32 MiB, 4 at a time", "45.00 – 60.00"]
    assert [word for word in words if word not in text] == []
