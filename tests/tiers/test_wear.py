"""The life of an SSD: formulas, the counter beside the data, and what a drive says of itself."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from overspill.report.lifetime import describe_forecast, describe_run, describe_wear, format_years, wear_warning
from overspill.runtime.wear import SsdWear
from overspill.spec.lifetime import DriveHealth, build_wear, forecast_wear
from overspill.tiers import wear as wear_module
from overspill.tiers.wear import COUNTER_NAME, WriteCounter, drive_shares, find_controller, find_drive, parse_smart_log, read_drive_health
from overspill.units import parse_bytes

TB = 10**12


def health(percentage: int, written_bytes: int) -> DriveHealth:
    return DriveHealth(
        percentage_used=percentage, written_bytes=written_bytes, spare_percentage=100, spare_threshold_percentage=10, has_warning=False
    )


# -- formulas --------------------------------------------------------------------------------------------------------


def test_years_are_what_is_left_of_the_rating_over_the_bytes_of_a_year() -> None:
    wear = build_wear(own_bytes=100 * TB, rated_bytes=600 * TB, health=None)
    forecast = forecast_wear(wear, bytes_per_step=10e9, step_s=20.0)
    assert forecast.bytes_per_day == 10e9 * 86400 / 20 == 43.2e12
    assert forecast.years_left == 500e12 / (43.2e12 * 365.25)
    assert wear.worn_fraction == 1 / 6 and wear.source == "given"


def test_the_drives_own_count_wins_and_a_worn_drive_has_nothing_left() -> None:
    wear = build_wear(own_bytes=1 * TB, rated_bytes=600 * TB, health=health(40, 700 * TB))
    assert wear.written_bytes == 700 * TB and wear.remaining_bytes == 0
    assert forecast_wear(wear, bytes_per_step=1, step_s=1).years_left == 0
    assert forecast_wear(wear, bytes_per_step=0, step_s=1).years_left == math.inf


def test_a_rating_is_estimated_from_smart_only_when_a_few_percent_are_used() -> None:
    assert build_wear(own_bytes=0, rated_bytes=None, health=health(2, 12 * TB)).rated_bytes is None
    estimated = build_wear(own_bytes=0, rated_bytes=None, health=health(5, 30 * TB))
    assert (estimated.rated_bytes, estimated.source) == (600 * TB, "estimated from SMART")
    assert build_wear(own_bytes=0, rated_bytes=100 * TB, health=health(5, 30 * TB)).source == "given"
    unknown = build_wear(own_bytes=5, rated_bytes=None, health=None)
    assert forecast_wear(unknown, bytes_per_step=1, step_s=1).years_left is None


def test_the_guard_warns_below_the_chosen_years_and_says_everything_that_leads_there() -> None:
    wear = build_wear(own_bytes=100 * TB, rated_bytes=600 * TB, health=None)
    forecast = forecast_wear(wear, bytes_per_step=10 * 2**30, step_s=20.0)
    text = wear_warning(wear, forecast, min_years=3.0)
    assert text is not None and text.startswith("the SSD would reach the end of its rated life after 11 days")
    for part in ("3 years of --ssd-years", "10.00 GiB written a step of 20.00 s", "46.39 TB a day", "16.7% of the rated 600.00 TB (given)"):
        assert part in text
    assert wear_warning(wear, forecast, min_years=0.02) is None
    unknown = build_wear(own_bytes=0, rated_bytes=None, health=None)
    assert wear_warning(unknown, forecast_wear(unknown, bytes_per_step=1e12, step_s=1), min_years=3.0) is None


def test_sentences_say_what_is_known_and_what_is_not() -> None:
    unknown = build_wear(own_bytes=3 * 10**9, rated_bytes=None, health=None)
    assert (
        describe_wear(unknown)
        == "overspill wrote 3.0 GB in this directory so far; its rated life is unknown: give --ssd-tbw from the drive's data sheet"
    )
    assert "to the drive's rated end" not in describe_forecast(forecast_wear(unknown, bytes_per_step=1, step_s=1))
    known = build_wear(own_bytes=0, rated_bytes=600 * TB, health=None)
    assert (
        describe_run(known, bytes_per_step=6e9, num_steps=1000)
        == "1000 steps write 6.00 TB to the SSD (5.59 GiB a step), 1.00% of the drive's rated life"
    )
    assert [format_years(years) for years in (2000, 4.21, 0.5, 0.001)] == ["more than 1000 years", "4.2 years", "183 days", "8.8 hours"]


def test_an_endurance_is_written_as_on_a_data_sheet() -> None:
    assert parse_bytes("600TB") == parse_bytes("600 TBW") == parse_bytes("0.6PBW") == 600 * TB


# -- the counter -----------------------------------------------------------------------------------------------------


def test_the_count_goes_on_over_sessions_and_stays_one_small_block(tmp_path: Path) -> None:
    first = WriteCounter(tmp_path)
    first.note(1000)
    assert not (tmp_path / COUNTER_NAME).exists()  # saved rarely
    first.save()
    first.note(1500)
    first.save()
    first.save()
    second = WriteCounter(tmp_path)
    assert second.written_bytes == 1500 and second.is_complete
    second.note(7)
    second.save(is_durable=False)
    assert WriteCounter(tmp_path).written_bytes == 1507 == second.written_bytes
    content = (tmp_path / COUNTER_NAME).read_bytes()
    assert len(content) == 512 and json.loads(content)["written_bytes"] == 1507
    assert (tmp_path / COUNTER_NAME).stat().st_mode & 0o777 == 0o600


def test_two_runs_in_one_directory_both_count(tmp_path: Path) -> None:
    one, two = WriteCounter(tmp_path), WriteCounter(tmp_path)
    for _ in range(3):
        one.note(one._session_bytes + 10)
        one.save(is_durable=False)
        two.note(two._session_bytes + 100)
        two.save(is_durable=False)
    assert WriteCounter(tmp_path).written_bytes == 330


def test_a_killed_run_forgets_at_most_what_came_after_the_last_save(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom overspill.tiers import wear\nwear.SAVE_INTERVAL_S = 0\ncounter = wear.WriteCounter(sys.argv[1])\n"
        "for n in range(1, 6):\n    counter.note(n * 100)\nwear.SAVE_INTERVAL_S = 1e9\ncounter.note(999)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert WriteCounter(tmp_path).written_bytes == 500


@pytest.mark.parametrize("content", [b"", b"{", b'{"written_bytes": -1}', b'{"written_bytes": true}', b"[]", b"\xff" * 512])
def test_a_counter_that_cannot_be_read_starts_again_and_says_so_for_ever(tmp_path: Path, content: bytes) -> None:
    (tmp_path / COUNTER_NAME).write_bytes(content)
    counter = WriteCounter(tmp_path)
    assert counter.written_bytes == 0 and not counter.is_complete
    counter.note(5)
    counter.save()
    again = WriteCounter(tmp_path)
    assert again.written_bytes == 5 and not again.is_complete


def test_a_counter_that_cannot_be_written_warns_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    counter = WriteCounter(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(RuntimeWarning, match=r"overspill.written.json.*No space left on device \(errno 28\); training goes on") as caught:
        for number in (5, 6, 7):
            counter.note(number)
            counter.save()
    assert len(caught) == 1 and counter.written_bytes == 7


# -- SMART -----------------------------------------------------------------------------------------------------------


def recorded_page() -> bytes:
    """The fields of a 1 TB consumer drive made up with drive-like values, in the layout of the NVMe base specification."""
    page = bytearray(512)
    page[0] = 0  # critical warning
    page[1:3] = (273 + 44).to_bytes(2, "little")  # composite temperature, kelvin
    page[3], page[4], page[5] = 100, 5, 7  # available spare, its threshold, percentage used
    page[32:48] = (61_803_398).to_bytes(16, "little")  # data units read
    page[48:64] = (85_449_218).to_bytes(16, "little")  # data units written
    page[128:144] = (9_131).to_bytes(16, "little")  # power-on hours
    return bytes(page)


def test_a_smart_page_is_read_as_the_specification_lays_it_out() -> None:
    found = parse_smart_log(recorded_page())
    assert found == DriveHealth(
        percentage_used=7, written_bytes=85_449_218 * 512_000, spare_percentage=100, spare_threshold_percentage=5, has_warning=False
    )
    assert build_wear(own_bytes=0, rated_bytes=None, health=found).rated_bytes == round(85_449_218 * 512_000 / 0.07)
    assert parse_smart_log(b"\x04" + recorded_page()[1:]).has_warning
    with pytest.raises(ValueError, match="a SMART log page has 512 B, got 511 B"):
        parse_smart_log(recorded_page()[1:])


def make_sysfs(root: Path) -> Path:
    """A partition of an NVMe drive (259:2), an encrypted volume on it (253:0), two drives joined (253:1), a virtual disk (252:1)."""
    devices = {
        "259:2": "devices/pci0000:00/0000:00:1d.0/nvme/nvme3/nvme3n1/nvme3n1p2",
        "259:9": "devices/virtual/nvme-subsystem/nvme-subsys0/nvme1n1",
        "253:0": "devices/virtual/block/dm-0",
        "253:1": "devices/virtual/block/dm-1",
        "252:1": "devices/pci0000:00/virtio2/block/vda/vda1",
    }
    (root / "dev/block").mkdir(parents=True)
    for number, path in devices.items():
        (root / path).mkdir(parents=True)
        (root / "dev/block" / number).symlink_to(root / path)
    for volume, below in {"253:0": ["259:2"], "253:1": ["259:2", "259:9"]}.items():
        (root / devices[volume] / "slaves").mkdir()
        for number in below:
            (root / devices[volume] / "slaves" / Path(devices[number]).name).symlink_to(root / devices[number])
    return root


def test_the_controller_is_found_through_partitions_and_encryption_and_never_guessed(tmp_path: Path) -> None:
    sysfs = make_sysfs(tmp_path)
    found = {
        number: find_controller(os.makedev(*number), sysfs=sysfs) for number in ((259, 2), (259, 9), (253, 0), (253, 1), (252, 1), (0, 45))
    }
    assert found == {(259, 2): "nvme3", (259, 9): "nvme1", (253, 0): "nvme3", (253, 1): None, (252, 1): None, (0, 45): None}


def test_partitions_of_one_drive_are_one_drive(tmp_path: Path) -> None:
    sysfs = make_sysfs(tmp_path)
    (sysfs / "devices/pci0000:00/virtio2/block/vda/vda1/partition").write_text("1")
    found = {number: find_drive(os.makedev(*number), sysfs=sysfs) for number in ((259, 2), (253, 0), (253, 1), (252, 1), (0, 45))}
    assert found == {(259, 2): "nvme3", (253, 0): "nvme3", (253, 1): "dm-1", (252, 1): "vda", (0, 45): "0:45"}


def test_health_is_asked_with_one_admin_command_and_unknown_where_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []

    def ioctl(fd: int, request: int, command: wear_module._AdminCommand) -> int:
        asked.append((request, command.opcode, command.nsid, command.cdw10))
        wear_module.ctypes.memmove(command.addr, recorded_page(), command.data_len)
        return 0

    controller = os.path.relpath(tmp_path / "nvme0", "/dev")
    monkeypatch.setattr(wear_module, "find_controller", lambda number: controller)
    assert read_drive_health(tmp_path) is None  # no such device
    (tmp_path / "nvme0").write_bytes(b"")
    assert read_drive_health(tmp_path) is None  # not an NVMe device: the kernel refuses
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    found = read_drive_health(tmp_path / "not" / "there" / "yet")
    assert found is not None and found.percentage_used == 7
    assert asked == [(0xC0484E41, 0x02, 0xFFFFFFFF, 0x007F0002)]


# -- a session's watch -----------------------------------------------------------------------------------------------


def watch(
    tmp_path: Path, *, rated_bytes: int | None, min_years: float = 3.0, drive: DriveHealth | None = None, places: tuple[str, ...] = ()
) -> tuple[SsdWear, types.SimpleNamespace]:
    store = types.SimpleNamespace(written_bytes=0)
    plan = types.SimpleNamespace(ssd_places=places or (str(tmp_path),), ssd_rated_bytes=rated_bytes, ssd_min_years=min_years)
    records = types.SimpleNamespace(store=store)
    return SsdWear(plan, [records], read_health=lambda directory: drive, shares=shares), store  # type: ignore[arg-type, list-item]


def shares(places: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """The drive of a place is the first letter of its name."""
    return drive_shares(places, find=lambda place: Path(place).name[0])


def test_the_watch_leaves_out_loading_and_the_first_step_and_warns_once(tmp_path: Path) -> None:
    wear, store = watch(tmp_path, rated_bytes=600 * TB)
    store.written_bytes = 50 * TB  # loading
    assert wear.forecast() is None
    assert wear.after_step(1000.0) == 50 * TB
    with pytest.warns(RuntimeWarning, match="of training without a pause, sooner than the 3 years") as caught:
        for _ in range(8):
            store.written_bytes += 10**10
            wear.after_step(20.0)
    assert len(caught) == 1
    forecast = wear.forecast()
    assert forecast is not None and (forecast.bytes_per_step, forecast.step_s) == (10**10, 20.0)
    assert wear.summarize().startswith("9.31 GiB written a step of 20.00 s: 43.20 TB a day")
    wear.save()
    assert WriteCounter(tmp_path).written_bytes == 50 * TB + 8 * 10**10


def test_the_watch_is_silent_where_the_drive_lasts_or_nothing_is_known(tmp_path: Path) -> None:
    for rated, years in ((600 * TB, 0.0), (None, 3.0), (10**9 * TB, 3.0)):
        wear, store = watch(tmp_path, rated_bytes=rated, min_years=years)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(6):
                store.written_bytes += 10**10
                wear.after_step(20.0)


def test_each_of_several_drives_takes_its_part_of_what_is_written(tmp_path: Path) -> None:
    places = tuple(str(tmp_path / name) for name in ("a0", "b0", "c0", "d0"))
    (tmp_path / "a0").mkdir()
    assert shares(places) == tuple((place, 0.25) for place in places)
    wear, store = watch(tmp_path, rated_bytes=600 * TB, drive=health(10, 60 * TB), places=places)
    alone, alone_store = watch(tmp_path, rated_bytes=600 * TB, drive=health(10, 60 * TB))
    for _ in range(3):
        store.written_bytes += 4 * 10**10
        alone_store.written_bytes += 10**10
        wear.after_step(20.0)
        alone.after_step(20.0)
    assert wear.state.drive_bytes == alone.state.drive_bytes == 60 * TB + 3 * 10**10
    several, one = wear.forecast(), alone.forecast()
    assert several is not None and one is not None and several.years_left == one.years_left
    assert several.bytes_per_day == 4 * one.bytes_per_day
    assert (
        "overspill wrote 120.0 GB in this directory so far, 25% of it to the drive that lasts shortest, the drive 60.03 TB"
        in wear.summarize()
    )


def test_two_places_on_one_drive_both_wear_it(tmp_path: Path) -> None:
    places = tuple(str(tmp_path / name) for name in ("a0", "a1", "b0"))
    (tmp_path / "a0").mkdir()
    wear, store = watch(tmp_path, rated_bytes=600 * TB, places=places)
    store.written_bytes = 6 * TB
    wear.after_step(1.0)
    assert wear.state.share_fraction == 2 / 3 and wear.state.written_bytes == 4 * TB


def test_raw_devices_are_counted_beside_the_checkpoints_or_for_the_session_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overspill.runtime.wear.is_block_device", lambda place: place.startswith("/dev/"))
    plan = types.SimpleNamespace(ssd_places=("/dev/a", "/dev/b"), ssd_rated_bytes=600 * TB, ssd_min_years=3.0)
    records = types.SimpleNamespace(store=types.SimpleNamespace(written_bytes=10**12))
    for beside, words in ((str(tmp_path), "in this directory so far"), (None, "in this session")):
        wear = SsdWear(plan, [records], beside=beside, read_health=lambda place: None, shares=shares)  # type: ignore[arg-type, list-item]
        wear.after_step(1.0)
        wear.save()
        assert f"overspill wrote 1.00 TB {words}, 50% of it" in wear.summarize()
    assert WriteCounter(tmp_path).written_bytes == 10**12


def test_the_drives_count_grows_with_the_session(tmp_path: Path) -> None:
    wear, store = watch(tmp_path, rated_bytes=None, drive=health(10, 60 * TB))
    store.written_bytes = 6 * TB
    assert wear.state.drive_bytes == 66 * TB
