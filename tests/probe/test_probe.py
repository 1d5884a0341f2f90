"""Claims about a probe: figures that fit each other, an end within its time, and nothing left, however it ends."""

from __future__ import annotations

import _thread
import dataclasses
import errno
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_capacities import make_root

from overspill.errors import BudgetError, StorageError
from overspill.probe import capacities, machine
from overspill.probe import sampling as sampling_module
from overspill.probe.compute import BLOCK_ON_GPU, measure_compute
from overspill.probe.drive import Passes, choose_depth, measure_trial
from overspill.probe.link import open_link
from overspill.probe.machine import SETTINGS, ProbeSettings, probe_machine
from overspill.probe.sampling import Sampling, measured_rate, sample_beside, sample_seconds
from overspill.report.memory import host_resident_bytes
from overspill.spec.machine_file import MachineFile, MeasuredRate, parse_machine_file
from overspill.tiers import Failure, FakeStore, SsdStore
from overspill.tiers.wear import COUNTER_NAME, WriteCounter
from overspill.units import GIB, KIB, MIB

CPU = torch.device("cpu")


def all_rates(file: MachineFile) -> list[MeasuredRate]:
    rates = file.rates
    found = [rates.host_copy, rates.host_in_place, *rates.update.values()]
    for link in rates.link:
        found += [link.h2d, link.d2h, link.duplex]
    for drive in rates.ssd:
        found += [drive.read, drive.write, drive.mixed_read, drive.mixed_write]
    if rates.compute is not None:
        found += [rates.compute.alone, rates.compute.beside_copies, rates.compute.copies_alone, rates.compute.copies_beside]
    assert None not in found
    return [rate for rate in found if rate is not None]


def not_measured(file: MachineFile) -> list[str]:
    """There may be other notes: some file systems refuse direct I/O."""
    return [note for note in file.notes if "was not measured" in note]


def without_drive(settings: ProbeSettings) -> ProbeSettings:
    return dataclasses.replace(settings, drive_units=())


@pytest.fixture
def only_the_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other measurements are left out: they have their own tests, and take time."""
    monkeypatch.setattr(machine._Probe, "_link", lambda *_: _none())
    monkeypatch.setattr(machine._Probe, "_compute", lambda *_: _none())
    monkeypatch.setattr(machine._Probe, "_working_set", lambda *_: _none())


def _none() -> None:
    raise ValueError("left out")


def notes_of_the_drive(file: MachineFile) -> list[str]:
    return [note for note in file.notes if "left out" not in note]


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.clock
def test_every_figure_is_there_with_its_spread_and_they_fit_each_other(small: ProbeSettings, tmp_path: Path) -> None:
    file = probe_machine(CPU, [str(tmp_path)], settings=small)
    assert not_measured(file) == [] and parse_machine_file(file.to_json(), "x") == file
    for rate in all_rates(file):
        assert 0 < rate.min_per_s <= rate.median_per_s <= rate.max_per_s and rate.num_samples >= 1 and rate.size > 0
    rates = file.rates
    assert [link.unit_bytes for link in rates.link] == [2 * MIB, MIB] and [drive.unit_bytes for drive in rates.ssd] == [MIB, 256 * KIB]
    assert set(rates.update) == {"fp32", "bf16", "int8"} and rates.update_parameter_dtype == "float32"
    for link in rates.link:
        assert not link.is_pinned
        # The best alone beside the worst together, since other programs come and go: neither is quicker for the other's company.
        assert 2 * link.duplex.min_per_s < 1.2 * (link.h2d.max_per_s + link.d2h.max_per_s)
    compute = rates.compute
    assert compute is not None and compute.beside_copies is not None and compute.beside_copies.min_per_s < 1.2 * compute.alone.max_per_s
    assert file.identity.ssd and file.capacities.ssd_free_bytes
    assert 0 < file.ssd_written_bytes <= small.most_written_bytes
    assert list(tmp_path.iterdir()) == []


def test_the_ordinary_probe_measures_in_the_sizes_of_chunks_and_writes_little_more_than_three_gib() -> None:
    assert SETTINGS.link_units == (128 * MIB, 32 * MIB) and SETTINGS.drive_units[0] == 32 * MIB
    assert SETTINGS.most_written_bytes < 3.1 * GIB and SETTINGS.most_s <= 25


@pytest.mark.clock
def test_a_drive_of_known_rate_is_measured_at_that_rate(small: ProbeSettings, only_the_drive: None) -> None:
    """Each direction of the fake drive moves 20 MB/s, one transfer at a time, beside the other or alone; never more."""
    settings = dataclasses.replace(small, passes=Passes(most_s=0.05, most_bytes=32 * MIB))
    file = probe_machine(CPU, [], settings=settings, open_store=lambda capacity: FakeStore(capacity, bytes_per_s=20e6))
    assert notes_of_the_drive(file) == [] and len(file.rates.ssd) == 2
    for drive in file.rates.ssd:
        for rate in (drive.read, drive.write, drive.mixed_read, drive.mixed_write):
            assert 7e6 < rate.median_per_s < 20.5e6, "a busy machine sleeps too long, but not three times as long"


@pytest.mark.clock
def test_a_sample_is_as_long_as_it_should_be_and_work_that_takes_no_time_is_not_repeated_for_ever() -> None:
    calls: list[int] = []

    def run(times: int) -> None:
        calls.append(times)
        time.sleep(0.001 * times)

    seconds = sample_seconds(run, Sampling(least_s=0.02, num_samples=3))
    assert calls[0] == 1 and len(set(calls[-3:])) == 1 and 10 <= calls[-1] <= 30 and len(seconds) == 3
    calls.clear()
    sample_seconds(calls.append, Sampling(least_s=1.0, num_samples=2, most_repeats=16))
    assert max(calls) == 16
    assert len(sample_seconds(calls.append, Sampling(least_s=9.0, num_samples=9), until_s=0.0)) == 1, "one sample even when time is over"
    rate = measured_rate([1.0, 2.0, 4.0], 8)
    assert (rate.min_per_s, rate.median_per_s, rate.max_per_s, rate.size) == (2, 4, 8, 8)


def test_samples_that_disagree_are_made_more_of_and_the_median_forgets_a_short_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(*took_s: float, least: int = 5, most: int = 9) -> list[float]:
        left = list(took_s)
        monkeypatch.setattr(sampling_module, "_timed", lambda run, times: times * left.pop(0))
        return sample_seconds(lambda times: None, Sampling(least_s=0.0, num_samples=least, most_samples=most))

    steady = [1.0, 1.02, 0.99, 1.01, 1.0]
    assert sampled(*steady) == steady and sampled(*[1.0, 1.0, 9.0, 1.0, 1.0]) == [1.0, 1.0, 9.0, 1.0, 1.0], "one of five"
    unsteady = [1.0, 2.0, 1.5, 1.25, 1.5]
    assert sampled(*unsteady, *[1.5] * 9) == [*unsteady, 1.5, 1.5], "until they agree"
    assert len(sampled(*unsteady, 1.0, 2.0, 1.0, 2.0, 1.0)) == 9, "but no more than that"
    assert len(sampled(*unsteady, most=0)) == 5 and len(sampled(1.0, least=1, most=1)) == 1
    assert measured_rate(sampled(1.0, 1.0, 9.0, 1.0, 1.0), 8).median_per_s == 8


def test_what_runs_in_the_background_runs_all_the_time_and_its_failure_is_told() -> None:
    running = threading.Event()

    def background(times: int) -> None:
        running.set()
        time.sleep(0.001)

    sample_beside(lambda times: running.wait(1) or pytest.fail("nothing ran beside it"), background, Sampling(least_s=0))
    with pytest.raises(ZeroDivisionError):
        sample_beside(lambda times: time.sleep(0.01), lambda times: 1 // 0, Sampling(least_s=0))


# -- its time --------------------------------------------------------------------------------------------------------


@pytest.mark.clock
@pytest.mark.parametrize(("bytes_per_s", "measured"), [(2e4, []), (1e6, []), (4e6, [256 * KIB])], ids=["floppy", "1 MB/s", "4 MB/s"])
def test_a_slow_drive_does_not_hold_the_probe_up(
    small: ProbeSettings, only_the_drive: None, bytes_per_s: float, measured: list[int]
) -> None:
    """Units of 4 MiB and 256 KiB in 3 s: what would not end in time is not begun, and the note has both times."""
    settings = dataclasses.replace(small, most_s=3.0, drive_units=(4 * MIB, 256 * KIB))
    begin_s = time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        if bytes_per_s < 1e5:
            patch.setattr("overspill.probe.drive.TRIALS_BYTES", (4 * KIB, 4 * MIB))
        file = probe_machine(CPU, [], settings=settings, open_store=lambda capacity: FakeStore(capacity, bytes_per_s=bytes_per_s))
    assert time.perf_counter() - begin_s < 4.0
    assert [drive.unit_bytes for drive in file.rates.ssd] == measured
    notes = notes_of_the_drive(file)
    assert len(notes) == 2 - len(measured) and all("would take" in note and "are left" in note for note in notes), notes


@pytest.mark.clock
def test_a_drive_that_becomes_slow_after_its_trial_is_given_up(small: ProbeSettings, only_the_drive: None) -> None:
    """The file is written at 1 GB/s, all later writes at 2 MB/s: the pass under way is waited for, and no other begins."""
    stores: list[FakeStore] = []

    def open_store(capacity: int) -> FakeStore:
        stores.append(FakeStore(capacity, bytes_per_s=1e9, failures=slow_down))
        return stores[-1]

    def slow_down(operation: str, index: int, name: str) -> None:
        if operation == "write" and index >= 16:
            stores[-1]._bytes_per_s = 2e6

    passes = Passes(most_s=0.3, most_bytes=8 * MIB, num_passes=2)
    settings = dataclasses.replace(small, most_s=2.2, drive_units=(MIB,), drive_bytes=16 * MIB, passes=passes)
    begin_s = time.perf_counter()
    file = probe_machine(CPU, [], settings=settings, open_store=open_store)
    assert time.perf_counter() - begin_s < 4.5 and file.rates.ssd == ()
    assert "the drive became slow: its time was over after" in notes_of_the_drive(file)[0], file.notes


def test_when_its_time_is_over_what_is_left_is_noted_and_not_measured(small: ProbeSettings) -> None:
    file = probe_machine(CPU, [], settings=dataclasses.replace(small, most_s=0.0))
    assert all_rates_missing(file) and all("the probe's 0 s are over" in note for note in file.notes[:-1])
    assert file.notes[-1] == "no --ssd-dir was given, so no drive was measured"


def all_rates_missing(file: MachineFile) -> bool:
    rates = file.rates
    return (rates.link, rates.host_copy, rates.host_in_place, rates.update, rates.compute, rates.ssd) == ((), None, None, {}, None, ())


def test_as_many_transfers_are_under_way_as_end_in_time_and_fit_in_memory() -> None:
    passes = Passes(most_s=0.2, most_bytes=256 * MIB)

    def depth(rate: float, left_s: float = 6.0, room: int = GIB) -> int:
        return choose_depth(32 * MIB, rate, passes, left_s=left_s, room_bytes=room)

    assert [depth(2e9), depth(100e6), depth(2e9, room=128 * MIB), depth(2e9, room=64 * MIB)] == [4, 2, 2, 1]
    with pytest.raises(StorageError, match=r"units of 32.00 MiB would take .* at the 10.0 MB/s of a trial .* 6.00 s and 1.00 GiB are left"):
        depth(10e6)
    with pytest.raises(StorageError, match=r"and 64.00 MiB of memory.* and 32.00 MiB are left"):
        depth(2e9, room=32 * MIB)


# -- nothing is left -------------------------------------------------------------------------------------------------


@pytest.fixture
def open_files() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_of_a_probe_in_memory_threads_files_or_directories(
    small: ProbeSettings, tmp_path: Path, open_files: Callable[[], int]
) -> None:
    probe_machine(CPU, [str(tmp_path)], settings=small)  # loads what it needs
    before = threading.active_count(), open_files()
    gc.collect()
    resident = host_resident_bytes()
    for _ in range(3):
        probe_machine(CPU, [str(tmp_path / "yet")], settings=small)
    assert (threading.active_count(), open_files()) == before
    assert host_resident_bytes() - resident < 8 * MIB, "one probe holds 16 MiB at times"
    assert list(tmp_path.iterdir()) == [], "a directory that does not exist is not made either"


def stop_in(seconds: float) -> None:
    threading.Timer(seconds, _thread.interrupt_main).start()


@pytest.mark.parametrize("where", ["the link", "the host's update in format bf16", "compute", "the SSD in units"])
def test_ctrl_c_in_the_middle_leaves_nothing(small: ProbeSettings, tmp_path: Path, where: str, open_files: Callable[[], int]) -> None:
    settings = dataclasses.replace(
        small,
        most_s=60.0,
        share_s=0.05,
        sampling=Sampling(least_s=0.08, num_samples=9, most_repeats=10**6),
        passes=Passes(most_s=9.0, most_bytes=GIB, num_passes=1),
    )
    before = threading.active_count(), open_files()

    told: list[str] = []

    def progress(what: str) -> None:
        if what.startswith(where) and not told:  # a second one would stop whoever runs this test
            told.append(what)
            stop_in(0.04)

    with pytest.raises(KeyboardInterrupt):
        probe_machine(CPU, [str(tmp_path)], settings=settings, progress=progress)
        time.sleep(5)
    assert wait_until(lambda: (threading.active_count(), open_files()) == before)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_told_also_when_the_drive_fails_behind_it(small: ProbeSettings, only_the_drive: None) -> None:
    """Of four writes under way two fail after the interruption; nobody waits for the last of them."""

    def fail(operation: str, index: int, name: str) -> int | None:
        return errno.EIO if index >= 2 and "rate" in name else None

    def open_store(capacity: int) -> FakeStore:
        return FakeStore(capacity, delay_s=0.05, failures=fail)

    told: list[str] = []

    def progress(what: str) -> None:
        if what.startswith("the SSD in units") and not told:
            told.append(what)
            stop_in(0.02)

    with pytest.raises(KeyboardInterrupt):
        probe_machine(CPU, [], settings=dataclasses.replace(small, most_s=60.0), open_store=open_store, progress=progress)
        time.sleep(5)


def wait_until(is_so: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + 2
    while not is_so() and time.monotonic() < end_s:
        time.sleep(0.01)
    return is_so()


KILLED = """
import sys, torch
from overspill.probe import machine
from overspill.probe.compute import BLOCK_ON_GPU, measure_compute
from overspill.probe.drive import Passes
machine._Probe._attempt = lambda self, what, measure, inner=machine._Probe._attempt: inner(self, what, measure) if "SSD" in what else None
settings = machine.ProbeSettings(passes=Passes(most_s=60.0, most_bytes=1 << 40, most_units=1 << 20))
machine.probe_machine(torch.device("cpu"), [sys.argv[1]], settings=settings, progress=lambda what: print(what, flush=True))
"""


def test_a_kill_in_the_middle_of_writing_leaves_nothing_on_the_drive(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("the SSD")
        assert process.stdout.readline().startswith("the SSD in units of 32.00 MiB")
        time.sleep(0.2)
        assert process.poll() is None, "it is still measuring"
        assert list(tmp_path.iterdir()) == [], "nor is there anything while it measures"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert list(tmp_path.iterdir()) == []
    assert free.f_fsid == os.statvfs(tmp_path).f_fsid


def test_bytes_are_counted_as_wear_where_overspill_counts_and_only_there(
    small: ProbeSettings, only_the_drive: None, tmp_path: Path
) -> None:
    WriteCounter(tmp_path).save()
    counter = WriteCounter(tmp_path)
    counter.note(1000)
    counter.save()
    file = probe_machine(CPU, [str(tmp_path)], settings=small)
    assert file.ssd_written_bytes > MIB and WriteCounter(tmp_path).written_bytes == 1000 + file.ssd_written_bytes
    assert [path.name for path in tmp_path.iterdir()] == [COUNTER_NAME]


# -- what cannot be measured -----------------------------------------------------------------------------------------


def test_without_a_directory_there_are_no_figures_of_a_drive_and_a_note(small: ProbeSettings, only_the_drive: None) -> None:
    file = probe_machine(CPU, [], settings=small)
    assert file.rates.ssd == () and notes_of_the_drive(file) == ["no --ssd-dir was given, so no drive was measured"]
    assert file.capacities.ssd_free_bytes is None and file.identity.ssd == ()


def test_a_drive_with_too_little_room_is_not_measured_and_the_note_has_both_numbers(
    small: ProbeSettings, only_the_drive: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "place_room_bytes", lambda place: 20 * MIB)
    file = probe_machine(CPU, [str(tmp_path)], settings=small)
    assert file.rates.ssd == () and len(notes_of_the_drive(file)) == 2
    assert all(f"{tmp_path} has 20.00 MiB free, and 32.00 MiB must be for a file of 8.00 MiB" in note for note in notes_of_the_drive(file))


def test_a_drive_that_fails_is_noted_with_its_error(small: ProbeSettings, only_the_drive: None) -> None:
    failing = Failure(operation="write", call_index=0, errno=errno.EIO)
    file = probe_machine(CPU, [], settings=small, open_store=lambda capacity: FakeStore(capacity, failures=failing))
    assert file.rates.ssd == () and "the SSD was not measured: write of trial failed" in notes_of_the_drive(file)[0]


def test_a_directory_that_cannot_be_meant_is_refused(small: ProbeSettings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file and not a directory"):
        probe_machine(CPU, [str(tmp_path / "file")], settings=small)
    with pytest.raises(ValueError, match=r"missing/ssd does not exist, nor does .*/missing; create it"):
        probe_machine(CPU, [str(tmp_path / "missing" / "ssd")], settings=small)


def test_a_directory_in_ram_is_measured_with_a_note(
    small: ProbeSettings, only_the_drive: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overspill.tiers.extent_file.filesystem_of", lambda folder: "tmpfs")
    file = probe_machine(CPU, [str(tmp_path)], settings=small)
    assert len(file.rates.ssd) == 2 and sum("is in RAM (tmpfs)" in note for note in file.notes) == 1


def test_a_block_device_is_never_written_to(
    small: ProbeSettings, only_the_drive: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "is_block_device", lambda place: True)
    file = probe_machine(CPU, [str(tmp_path)], settings=small)
    assert file.ssd_written_bytes == 0 and "is a block device: what is on it would be lost" in notes_of_the_drive(file)[0]


def test_a_small_share_of_memory_is_taken_and_what_does_not_fit_is_noted(small: ProbeSettings) -> None:
    """An eighth of a budget of 24 MiB holds neither two buffers of 2 MiB nor the drive's; smaller units are measured."""
    settings = without_drive(dataclasses.replace(small, host_set_bytes=64 * MIB))
    file = probe_machine(CPU, [], host_budget_bytes=24 * MIB, settings=settings)
    assert [link.unit_bytes for link in file.rates.link] == [MIB]
    assert any("in units of 2.00 MiB was not measured" in note and "3.00 MiB" in note for note in file.notes)
    assert file.rates.host_copy is not None and file.rates.host_copy.size <= 2 * 3 * MIB // 2 and file.rates.host_set_bytes <= 3 * MIB
    assert file.rates.compute is None, "half of 3 MiB holds no two buffers of 1 MiB"
    assert file.capacities.host_usable_bytes == 24 * MIB


def test_memory_that_grows_during_the_probe_is_unknown_unless_a_budget_is_given(
    small: ProbeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals: Iterator[int]
    monkeypatch.setattr(capacities, "host_total_bytes", lambda root: next(totals))
    settings = dataclasses.replace(without_drive(small), most_s=0.0)
    root = make_root(tmp_path, total=8 * GIB, available=6 * GIB)
    totals = iter([8 * GIB, 24 * GIB])
    file = probe_machine(CPU, [], settings=settings, root=root)
    assert file.capacities.host_usable_bytes is None
    assert any("went from 8.00 GiB to 24.00 GiB" in note and "say with --host-budget" in note for note in file.notes)
    totals = iter([8 * GIB, 24 * GIB])
    file = probe_machine(CPU, [], host_budget_bytes=5 * GIB, settings=settings, root=root)
    assert file.capacities.host_usable_bytes == 5 * GIB and any("--host-budget holds" in note for note in file.notes)


def test_a_link_without_room_leaves_nothing_behind() -> None:
    with pytest.raises(BudgetError, match="--host-budget"), open_link(CPU, MIB, room_bytes=MIB):
        pass
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="inside"), open_link(CPU, MIB, room_bytes=GIB, num_slots=3) as link:
        link.run((0, 1), 7)
        raise RuntimeError("inside")
    assert threading.active_count() == before


def test_a_product_has_fewer_tokens_where_the_device_is_small() -> None:
    assert BLOCK_ON_GPU.within(GIB) == BLOCK_ON_GPU
    smaller = BLOCK_ON_GPU.within(300 * MIB)
    assert smaller.m == 4096 and smaller.num_bytes <= 300 * MIB and (smaller.k, smaller.n) == (BLOCK_ON_GPU.k, BLOCK_ON_GPU.n)
    with pytest.raises(BudgetError, match=r"needs .* of the device, 1.00 MiB may be taken"):
        measure_compute(CPU, BLOCK_ON_GPU, None, Sampling(least_s=0), room_bytes=MIB)


def test_a_trial_of_a_real_drive_writes_little(tmp_path: Path) -> None:
    written = [0]
    rate = measure_trial(lambda capacity: SsdStore(tmp_path, capacity_bytes=capacity, unlink=True), written=written)
    assert rate > 0 and 512 * KIB <= written[0] <= 9 * MIB and list(tmp_path.iterdir()) == []
