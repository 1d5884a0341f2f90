"""Claims about how host memory is measured: past the caches, chunk after chunk, with a session's threads, and what all lanes get of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from overspill import cores
from overspill.errors import BudgetError
from overspill.probe import host_memory
from overspill.probe.capacities import last_level_cache_bytes
from overspill.probe.host_memory import adamw_updates, choose_set_bytes, measure_copy, measure_in_place, open_working_set, time_updates
from overspill.probe.launching import measure_launches
from overspill.probe.link import open_link
from overspill.probe.machine import ProbeSettings, probe_machine
from overspill.probe.sampling import Sampling
from overspill.report.machine import machine_table
from overspill.report.memory import host_resident_bytes
from overspill.spec.hardware import HardwareSpec
from overspill.spec.launches import MODEL_LAUNCH
from overspill.spec.machine_file import MachineFile, MeasuredRate, parse_machine_file
from overspill.spec.measured_hardware import hardware_from
from overspill.spec.schedule import Role
from overspill.units import GIB, MIB

QUICK = Sampling(least_s=0.001, num_samples=2)
CPU = torch.device("cpu")


def rate(median: float) -> MeasuredRate:
    return MeasuredRate(median_per_s=median, min_per_s=median, max_per_s=median, num_samples=1, size=MIB)


def cache(root: Path, core: int, index: int, level: int, size: str, shared: str, kind: str = "Unified") -> None:
    folder = root / f"sys/devices/system/cpu/cpu{core}/cache/index{index}"
    folder.mkdir(parents=True)
    for name, text in {"level": str(level), "size": size, "shared_cpu_list": shared, "type": kind}.items():
        (folder / name).write_text(text + "\n")


def test_the_last_level_is_counted_once_however_many_cores_share_it_and_of_every_socket(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path) is None, "nobody says"
    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        cache(tmp_path, core, 0, 1, "48K", str(core), "Data")
        cache(tmp_path, core, 1, 1, "64K", str(core), "Instruction")
        cache(tmp_path, core, 3, 3, "327680K", shared)
    (tmp_path / "sys/devices/system/cpu/cpu3/cache/index9").mkdir()
    assert last_level_cache_bytes(tmp_path) == 2 * 320 * MIB


def test_the_working_set_is_several_times_the_caches_and_within_the_room() -> None:
    assert choose_set_bytes(640 * MIB, 100 * GIB) == 4 * 640 * MIB
    assert choose_set_bytes(None, 100 * GIB) == choose_set_bytes(16 * MIB, 100 * GIB) == 2 * GIB, "a virtual machine may be told too little"
    assert choose_set_bytes(8 * GIB, 100 * GIB) == 8 * GIB and choose_set_bytes(None, 300 * MIB + 5) == 300 * MIB


def test_a_working_set_is_resident_before_anything_is_measured_and_gone_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "TOUCHED_BYTES", 4 * MIB)
    before = host_resident_bytes()
    with open_working_set(48 * MIB, room_bytes=48 * MIB) as block:
        assert block.numel() == 48 * MIB and host_resident_bytes() - before > 40 * MIB
    assert host_resident_bytes() - before < 8 * MIB
    with open_working_set(48 * MIB, room_bytes=48 * MIB, until_s=time.perf_counter()) as block:
        assert block.numel() == 16 * MIB, "where touching it takes too long it is smaller"
    with pytest.raises(BudgetError, match=r"1\.00 MiB is needed at least, 4\.00 KiB may be taken"), open_working_set(4096, room_bytes=4096):
        pass


def test_every_portion_of_the_set_comes_before_one_comes_again() -> None:
    """What is left in the memory says how often each portion was gone over: x = x / 2 + 1 / 2, from 0, and 1 after two dozen times."""
    few = dataclasses.replace(QUICK, most_repeats=24)
    with open_working_set(8 * MIB, room_bytes=8 * MIB) as block:
        values = block.view(torch.float32).view(8, -1)
        found = measure_in_place(block, MIB, few)
        times = [round(-float(torch.log2(1 - row[0]))) for row in values]
        assert found.size == 2 * MIB and max(times) <= 20 and max(times) - min(times) <= 1, times
        assert all(bool((row == row[0]).all()) for row in values)
        assert measure_copy(block, 64 * MIB, QUICK).size == 2 * MIB, "no portion is larger than a quarter of a half"


@pytest.mark.parametrize("state_format", ["fp32", "bf16", "int8"])
def test_chunks_are_updated_in_turn_and_fill_the_set(state_format: str) -> None:
    with open_working_set(8 * MIB, room_bytes=8 * MIB) as block:
        block.fill_(1)
        updates = adamw_updates(block, state_format, parameter_dtype="bfloat16", chunk_bytes=MIB, num_threads=1)
        before = block.clone()
        updates.run(8)
        changed = (block != before).view(8, -1).any(dim=1)
        assert bool(changed.all()), "a chunk in every mebibyte was updated once"
        with open_link(CPU, MIB, room_bytes=4 * MIB) as link:
            beside, copies = updates.beside(link, QUICK)
        assert beside.size == updates.num_elements and copies.size == MIB


@pytest.mark.parametrize(("num_sets", "most"), [(1, 1), (2, 2), (5, 2)])
def test_a_look_at_updates_hands_the_next_one_over_while_one_is_under_way_and_no_chunk_twice(num_sets: int, most: int) -> None:
    under_way: list[object] = []
    reached, made = [0], [0]

    class Started:
        is_done = False

        def __init__(self, copies: Mapping[Role, torch.Tensor]) -> None:
            self.place = copies[Role.PARAMETER].data_ptr()
            assert all(other.place != self.place for other in under_way)  # type: ignore[attr-defined]
            under_way.append(self)
            reached[0] = max(reached[0], len(under_way))

        def wait(self) -> None:
            assert under_way.pop(0) is self
            made[0] += 1

    sizes = {Role.PARAMETER: 8192, Role.GRADIENT: 4096}
    seconds = time_updates(sizes, Started, QUICK, updated_bytes=num_sets * 6 * 4096, room_bytes=MIB)
    assert not under_way and reached == [most] and made[0] >= len(seconds)


def test_a_session_and_the_probe_update_with_the_same_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, beside, alone in ((16, 14, 0), (8, 6, 0), (7, 0, 0)):
        monkeypatch.setattr(cores, "usable_cores", lambda found=found: found)
        assert (cores.update_threads(is_beside_gpu=True), cores.update_threads(is_beside_gpu=False)) == (beside, alone)


def test_a_set_that_caches_may_hold_is_noted(small: ProbeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overspill.probe.machine.last_level_cache_bytes", lambda root: 64 * MIB)
    settings = dataclasses.replace(small, host_set_bytes=None, drive_units=(), link_units=())
    file = probe_machine(CPU, [], host_budget_bytes=128 * MIB, settings=settings)
    assert file.rates.host_set_bytes == 16 * MIB
    assert any("measured over 16.00 MiB, caches hold 64.00 MiB" in note for note in file.notes), file.notes
    assert parse_machine_file(file.to_json(), "here") == file


def test_launching_a_small_kernel_has_a_price_and_it_becomes_seconds(machine_file: MachineFile) -> None:
    found = measure_launches(CPU, QUICK)
    assert 200 < found.size < 800, "kernels of four small blocks, both ways"
    assert 1e2 < found.median_per_s < 1e7
    file = dataclasses.replace(machine_file, rates=dataclasses.replace(machine_file.rates, launches=rate(50e3)))
    assert hardware_from(file, HardwareSpec(), name="m").launch_s == pytest.approx(MODEL_LAUNCH * 20e-6)
    assert hardware_from(machine_file, HardwareSpec(), name="m").launch_s == 0.0, "a file of before"


@pytest.mark.parametrize(
    ("updated", "copies", "memory"),
    [(3e9, 40e9, 26 * 3e9 + 2 * 40e9), (5e9, 45e9, 26 * 5e9 + 2 * 45e9), (4.9e9, 45e9, 26 * 4.9e9 + 2 * 45e9)],
    ids=["they slow each other down", "they do not", "hardly"],
)
def test_lanes_share_what_they_reached_together(machine_file: MachineFile, updated: float, copies: float, memory: float) -> None:
    """The file's update alone is 5 G/s of 26 B, its link 45 GB/s each way at once: 220 GB/s apart. In place: 143 GB/s."""
    before = hardware_from(machine_file, HardwareSpec(), name="m").host_memory_bytes_per_s
    assert before == 143e9, "of a file that does not say: the most that was reached"
    rates = dataclasses.replace(machine_file.rates, update_beside_copies=rate(updated), copies_beside_update=rate(copies))
    file = dataclasses.replace(machine_file, rates=rates)
    assert hardware_from(file, HardwareSpec(), name="m").host_memory_bytes_per_s == pytest.approx(memory)
    rows = [str(cell) for column in machine_table(file).columns for cell in column.cells]
    assert any("beside copies" in row for row in rows)
