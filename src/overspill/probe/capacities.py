"""What this machine has free and what limits this process, read from the kernel and the driver. Nothing is measured here.

A process's memory is bounded by the limit of its own control group and of each group above it (`control_groups.py`).
"""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from overspill.control_groups import group_folders
from overspill.spec.machine_file import MachineCapacities
from overspill.tiers.block_device import device_room_bytes, is_block_device
from overspill.tiers.extent_file import FILE_NAME, nearest_existing

ROOT = Path("/")
LIMITS_S = 1.0
"""How long a limit is taken to hold by who asks again and again. Chosen."""
_GroupLimit = tuple[int, Path, str]
"""(limit, folder of a control group, name of the file with its usage)."""
_V1_NO_LIMIT_BYTES = 1 << 62
"""Version 1 says "no limit" with the largest multiple of a page below 2**63."""


def host_available_bytes(root: Path = ROOT) -> int:
    """Host memory that this process may still take: MemAvailable, or what its control groups leave if that is less.

    Args:
        root: of `/proc` and `/sys`; tests give their own.
    """
    return _available_bytes(root, _cgroup_limits(root))


class AvailableBytes:
    """`host_available_bytes` for who asks many times a second.

    Which groups there are and what limits they have is read anew every `LIMITS_S`, and where less than enough is left. What a group could
    drop of file cache is added only where it would leave less than enough without: the kernel sums that up over all CPUs, which can take
    milliseconds on a large machine.

    Args:
        enough_bytes: an answer that is larger may be too small, but never below this.
        root: of `/proc` and `/sys`; tests give their own.
    """

    def __init__(self, *, enough_bytes: int, root: Path = ROOT) -> None:
        self._enough_bytes, self._root = enough_bytes, root
        self._limits: tuple[_GroupLimit, ...] = ()
        self._limits_until_s = 0.0

    def __call__(self) -> int:
        if time.monotonic() < self._limits_until_s and (left := self._left()) >= self._enough_bytes:
            return left
        self._limits, self._limits_until_s = tuple(_cgroup_limits(self._root)), time.monotonic() + LIMITS_S
        return self._left()

    def _left(self) -> int:
        return _available_bytes(self._root, self._limits, enough_bytes=self._enough_bytes)


def _available_bytes(root: Path, limits: Iterable[_GroupLimit], *, enough_bytes: int | None = None) -> int:
    available = _meminfo_bytes("MemAvailable", root)
    for limit, folder, usage_name in limits:
        try:
            left = limit - int((folder / usage_name).read_text())
        except (OSError, ValueError):
            continue
        if enough_bytes is None or left < enough_bytes:
            left += _reclaimable_bytes(folder)
        available = min(available, max(0, left))
    return available


def host_total_bytes(root: Path = ROOT) -> int:
    """MemTotal; in a virtual machine whose memory is lent by a balloon it changes."""
    return _meminfo_bytes("MemTotal", root)


def cgroup_limit_bytes(root: Path = ROOT) -> int | None:
    """The smallest memory limit of this process's control groups; None: no limit."""
    return min((limit for limit, _, _ in _cgroup_limits(root)), default=None)


def last_level_cache_bytes(root: Path = ROOT) -> int | None:
    """Of all last-level caches of the machine together, each once however many cores share it; None: the kernel does not say. A virtual
    machine is shown what its host chose to."""
    found: dict[tuple[int, str], int] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, kind = (_line(folder / name) for name in ("level", "size", "type"))
            if kind != "Instruction":
                found[int(level), _line(folder / "shared_cpu_list")] = _cache_size_bytes(size)
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def _line(path: Path) -> str:
    return path.read_text().strip()


def _cache_size_bytes(text: str) -> int:
    """Of `32768K`, as the kernel writes it."""
    return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)


def memlock_bytes() -> int | None:
    """Most bytes that this process may lock; None: no limit."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def place_room_bytes(place: Path) -> int:
    """Room for overspill's data in a directory, which may not exist yet, or on a block device. A data file that is there is used again, or
    discarded, so its room counts as free."""
    if is_block_device(place):
        return device_room_bytes(place)
    stats, kept = os.statvfs(nearest_existing(place)), place / FILE_NAME
    return stats.f_bavail * stats.f_frsize + (kept.stat().st_blocks * 512 if kept.is_file() else 0)


def places_room_bytes(places: Sequence[str]) -> int:
    """Room of all places together; stripes are equally long, so the fullest decides."""
    return min((place_room_bytes(Path(place)) for place in places), default=0) * len(places)


def read_capacities(
    device: torch.device, ssd_places: Sequence[str], *, host_budget_bytes: int | None = None, root: Path = ROOT
) -> MachineCapacities:
    """What there is now. Total memory counts as steady until `look_again` says otherwise."""
    total = host_total_bytes(root)
    free, whole = torch.cuda.mem_get_info(device) if device.type == "cuda" else (None, None)
    return MachineCapacities(
        memory_total_bytes=total,
        memory_total_after_bytes=total,
        host_available_bytes=host_available_bytes(root),
        host_budget_bytes=host_budget_bytes,
        cgroup_limit_bytes=cgroup_limit_bytes(root),
        memlock_bytes=memlock_bytes(),
        ssd_free_bytes=places_room_bytes(ssd_places) if ssd_places else None,
        device_total_bytes=whole,
        device_free_bytes=free,
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) if device.type == "cuda" else (),
    )


def look_again(capacities: MachineCapacities, root: Path = ROOT) -> MachineCapacities:
    """The same with the total memory of now beside that of then."""
    return dataclasses.replace(capacities, memory_total_after_bytes=host_total_bytes(root))


def _cgroup_limits(root: Path) -> Iterator[_GroupLimit]:
    """Of each limited control group of this process, versions 2 and 1."""
    for folder, is_version_2 in group_folders("memory", root):
        limit_name, usage_name = ("memory.max", "memory.current") if is_version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit = _read_limit(folder / limit_name)
        if limit is not None:
            yield limit, folder, usage_name


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _V1_NO_LIMIT_BYTES else None


def _reclaimable_bytes(folder: Path) -> int:
    """File cache that a control group counts as used, but that the kernel drops when somebody asks for memory."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _meminfo_bytes(field: str, root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        parts = rest.split()
        if name == field and parts and parts[0].isdigit():
            return int(parts[0]) * 1024
    return 0
