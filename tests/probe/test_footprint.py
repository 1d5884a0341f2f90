"""Claims about what a process takes beside its tensors: measured on a GPU, kept in the machine file, of this machine only."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from overspill.errors import BudgetError
from overspill.probe import cache, footprint
from overspill.probe.identity import read_identity
from overspill.probe.machine import probe_machine
from overspill.spec.hardware import HardwareSpec
from overspill.spec.machine_file import MachineFile, ProcessFootprint, parse_machine_file
from overspill.spec.measured_hardware import hardware_from
from overspill.units import GIB, MIB

SMALL = footprint.StandIn(tokens=16, hidden_size=128, ffn_size=64, vocab_size=32, dtype="float32")
FOUND = ProcessFootprint(context_bytes=700 * MIB, library_bytes=64 * MIB, host_growth_bytes=500 * MIB, expert_host_growth_bytes=270 * MIB)


@pytest.mark.parametrize("head_size", footprint.HEAD_SIZES)
def test_the_block_that_stands_in_for_a_step_trains_on_any_device(head_size: int) -> None:
    norm = footprint.train_once(torch.device("cpu"), head_size, dataclasses.replace(SMALL, hidden_size=2 * head_size))
    assert 0 < norm < math.inf


def test_the_experts_that_stand_in_for_a_mixture_train_on_any_device() -> None:
    """Grouped products need bf16."""
    assert 0 < footprint.route_once(torch.device("cpu"), dataclasses.replace(SMALL, dtype="bfloat16")) < math.inf


def test_a_device_without_room_for_the_block_is_told_both_numbers() -> None:
    with pytest.raises(BudgetError, match=r"of the device, 1\.00 MiB may be taken"):
        footprint.measure_footprint(torch.device("cuda", 0), 1 * MIB)


def test_the_footprint_is_kept_in_the_file_and_predictions_take_it(machine_file: MachineFile) -> None:
    file = dataclasses.replace(machine_file, footprint=FOUND)
    again = parse_machine_file(file.to_json(), "here")
    assert again.footprint == FOUND
    hardware = hardware_from(again, HardwareSpec(), name="f")
    assert (hardware.footprint_context_bytes, hardware.footprint_library_bytes) == (700 * MIB, 64 * MIB)
    assert hardware.footprint_expert_host_growth_bytes == 270 * MIB
    assert hardware_from(machine_file, HardwareSpec(), name="f").footprint_context_bytes == 0, "a file of before has none"


def test_another_machines_footprint_is_not_this_ones(machine_file: MachineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = read_identity(torch.device("cpu"), [])
    for change, expected in (({}, 700 * MIB), ({"cpu_model": "another"}, 0)):
        file = dataclasses.replace(machine_file, footprint=FOUND, identity=dataclasses.replace(here, **change))
        path = tmp_path / "machine.json"
        path.write_text(file.to_json())
        monkeypatch.setattr(cache, "_warn", lambda text: None)
        assert cache.load_hardware(HardwareSpec(), torch.device("cpu"), [], machine=path).footprint_context_bytes == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpus_footprint_is_that_of_kernels_and_libraries() -> None:
    found = probe_machine(torch.device("cuda", 0), []).footprint
    assert found is not None
    print(found)
    assert 200 * MIB < found.context_bytes < 4 * GIB and found.library_bytes < 1 * GIB
