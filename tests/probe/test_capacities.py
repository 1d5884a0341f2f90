"""Claims about what the kernel is asked: memory, control groups of both versions, the machine's identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from overspill.probe.capacities import (
    LIMITS_S,
    AvailableBytes,
    cgroup_limit_bytes,
    host_available_bytes,
    host_total_bytes,
    look_again,
    place_room_bytes,
    read_capacities,
)
from overspill.probe.identity import cpu_model, driver_version, memory_class_bytes, place_identity, read_identity
from overspill.tiers.extent_file import FILE_NAME
from overspill.units import GIB, MIB

CPU = torch.device("cpu")


def make_root(folder: Path, *, total: int = 64 * GIB, available: int = 40 * GIB, cgroup: str = "") -> Path:
    (folder / "proc/self").mkdir(parents=True, exist_ok=True)
    (folder / "proc/meminfo").write_text(
        f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\nHugePages: 0\n"
    )
    (folder / "proc/self/cgroup").write_text(cgroup)
    return folder


def limit(root: Path, group: str, limit_bytes: int | str, usage: int, *, version: int = 2, inactive: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / ("" if version == 2 else "memory") / group
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit_bytes}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'' if version == 2 else 'total_'}inactive_file {inactive}\n")


def test_without_control_groups_what_is_available_is_memavailable(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    assert (host_available_bytes(root), host_total_bytes(root), cgroup_limit_bytes(root)) == (40 * GIB, 64 * GIB, None)
    (root / "proc/self/cgroup").unlink()
    assert host_available_bytes(root) == 40 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_of_either_version_bounds_memory_and_file_cache_is_free(tmp_path: Path, version: int) -> None:
    root = make_root(tmp_path, cgroup={1: "5:cpu:/x\n3:cpuset,memory:/a/b\n", 2: "0::/a/b\n"}[version])
    limit(root, "a/b", 30 * GIB, 10 * GIB, version=version, inactive=4 * GIB)
    limit(root, "a", 25 * GIB, 24 * GIB, version=version)
    limit(root, "", {1: 9223372036854771712, 2: "max"}[version], 50 * GIB, version=version)
    assert cgroup_limit_bytes(root) == 25 * GIB
    assert host_available_bytes(root) == GIB, "the parent leaves less"
    limit(root, "a", 25 * GIB, GIB, version=version)
    assert host_available_bytes(root) == 24 * GIB, "its own group: 30 - 10 + 4 of file cache; the parent: 25 - 1"


def test_in_a_container_the_limit_at_the_root_holds(tmp_path: Path) -> None:
    """The path in /proc/self/cgroup is the outer one and does not exist inside."""
    root = make_root(tmp_path, cgroup="0::/kubepods/pod7/c1\n")
    limit(root, "", 8 * GIB, 2 * GIB)
    assert (cgroup_limit_bytes(root), host_available_bytes(root)) == (8 * GIB, 6 * GIB)


def test_who_asks_often_is_told_the_same_below_enough_and_file_cache_is_summed_up_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(tmp_path, cgroup="0::/\n")
    limit(root, "", 8 * GIB, 2 * GIB, inactive=GIB)
    now = [0.0]
    monkeypatch.setattr("overspill.probe.capacities.time.monotonic", lambda: now[0])
    available = AvailableBytes(enough_bytes=4 * GIB, root=root)
    assert (host_available_bytes(root), available()) == (7 * GIB, 6 * GIB), "6 GiB are enough, whatever could be dropped"
    limit(root, "", 8 * GIB, 5 * GIB, inactive=GIB)
    assert available() == host_available_bytes(root) == 4 * GIB
    limit(root, "", 6 * GIB, 5 * GIB, inactive=GIB)
    assert (available(), host_available_bytes(root)) == (4 * GIB, 2 * GIB), "a limit is looked up once a second"
    now[0] = LIMITS_S
    assert available() == 2 * GIB


def test_too_little_is_never_said_by_a_limit_that_does_not_hold_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's run ends because its limit was raised a moment before it used more."""
    root = make_root(tmp_path, cgroup="0::/\n")
    limit(root, "", 8 * GIB, 2 * GIB)
    monkeypatch.setattr("overspill.probe.capacities.time.monotonic", lambda: 0.0)
    available = AvailableBytes(enough_bytes=GIB, root=root)
    assert available() == 6 * GIB
    limit(root, "", 16 * GIB, 9 * GIB)
    assert available() == 7 * GIB
    limit(root, "", 16 * GIB, 15 * GIB + 1)
    assert available() == GIB - 1


def test_a_group_that_is_over_its_limit_leaves_nothing_and_not_less(tmp_path: Path) -> None:
    root = make_root(tmp_path, cgroup="0::/\n")
    limit(root, "", GIB, 2 * GIB)
    assert host_available_bytes(root) == 0


def test_memory_that_grows_between_two_looks_is_not_steady(tmp_path: Path) -> None:
    found = read_capacities(CPU, [], root=make_root(tmp_path, total=8 * GIB, available=4 * GIB))
    assert (
        found.is_memory_steady and found.host_usable_bytes == 4 * GIB and found.ssd_free_bytes is None and found.device_free_bytes is None
    )
    assert look_again(found, tmp_path).is_memory_steady
    grown = look_again(found, make_root(tmp_path, total=9 * GIB))
    assert not grown.is_memory_steady and grown.host_usable_bytes is None
    told = read_capacities(CPU, [], host_budget_bytes=3 * GIB, root=tmp_path)
    assert told.host_usable_bytes == 3 * GIB


def test_the_room_of_a_directory_is_its_file_systems_and_a_data_file_in_it_counts_as_free(tmp_path: Path) -> None:
    empty = place_room_bytes(tmp_path / "not" / "there")
    with (tmp_path / FILE_NAME).open("wb") as file:
        file.write(b"\1" * MIB)
        file.flush()
        held = place_room_bytes(tmp_path) - place_room_bytes(tmp_path / "not")
    assert empty > 0 and MIB <= held < 2 * MIB


# -- identity --------------------------------------------------------------------------------------------------------


def test_the_cpu_is_named_as_the_kernel_does_with_or_without_a_model_name(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    (root / "proc/cpuinfo").write_text("processor : 0\nmodel name : Fast CPU @ 3 GHz\nprocessor : 1\nmodel name : Fast CPU @ 3 GHz\n")
    assert cpu_model(root).startswith("Fast CPU @ 3 GHz ")
    (root / "proc/cpuinfo").write_text("processor : 0\nCPU implementer : 0x41\nCPU part : 0xd4f\n")
    assert cpu_model(root).startswith("0x41 0xd4f ")
    (root / "proc/cpuinfo").unlink()
    assert cpu_model(root)


@pytest.mark.parametrize("size", [2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 126, 192, 256, 512, 768])
def test_some_memory_kept_by_the_kernel_does_not_change_the_class(size: int) -> None:
    classes = {memory_class_bytes(int(size * GIB * kept)) for kept in (0.955, 0.97, 0.985, 1.0)}
    assert len(classes) == 1 and classes.pop().bit_count() == 1


def test_the_driver_is_the_kernels_or_the_cuda_version_of_torch(tmp_path: Path) -> None:
    assert driver_version(tmp_path) == f"CUDA {torch.version.cuda}"
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan  3\nGCC version:  gcc version 12.2.0\n"
    )
    assert driver_version(tmp_path) == "570.86.15"


def test_a_directory_that_does_not_exist_yet_is_on_the_file_system_of_its_parent(tmp_path: Path) -> None:
    here = read_identity(CPU, [str(tmp_path), str(tmp_path / "a" / "b")])
    assert here.ssd == (place_identity(tmp_path),) * 2
    assert here.device == "cpu" and here.driver == "" and here.num_cpus >= 1 and here == read_identity(CPU, here_places(tmp_path))


def here_places(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "a"), str(tmp_path)]
