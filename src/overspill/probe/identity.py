"""Which machine this is: what must be the same for measured figures to hold (`spec.machine_file.MachineIdentity`)."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import overspill
from overspill.cores import usable_cores
from overspill.probe.capacities import ROOT, host_total_bytes
from overspill.spec.machine_file import MachineIdentity
from overspill.tiers.block_device import is_block_device
from overspill.tiers.extent_file import filesystem_of, nearest_existing


def read_identity(device: torch.device, ssd_places: Sequence[str], *, root: Path = ROOT) -> MachineIdentity:
    """This machine as it is now.

    Args:
        ssd_places: directories and block devices of the SSD tier; one that does not exist yet counts as its parent.
        root: of `/proc`; tests give their own.
    """
    name, uuid, driver = "cpu", "", ""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        name, uuid, driver = facts.name, str(getattr(facts, "uuid", "")), driver_version(root)
    return MachineIdentity(
        cpu_model=cpu_model(root),
        num_cpus=usable_cores(),
        memory_class_bytes=memory_class_bytes(host_total_bytes(root)),
        device=name,
        device_uuid=uuid,
        driver=driver,
        torch=str(torch.__version__),
        overspill=overspill.__version__,
        ssd=tuple(place_identity(Path(place)) for place in ssd_places),
    )


def cpu_model(root: Path = ROOT) -> str:
    """The CPU as the kernel names it, with its architecture; an ARM kernel gives numbers instead of a name."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    parts = [fields[name] for name in ("model name", "CPU implementer", "CPU part") if name in fields]
    return " ".join([*parts[:1], *parts[1:], platform.machine()])


def memory_class_bytes(total_bytes: int) -> int:
    """The nearest power of two, on a scale of ratios: a kernel that keeps some MiB more for itself is no other machine."""
    if total_bytes < 2:
        return total_bytes
    below = 1 << (total_bytes.bit_length() - 1)
    return below if total_bytes < 2**0.5 * below else 2 * below


def driver_version(root: Path = ROOT) -> str:
    """Of the NVIDIA kernel driver; the CUDA version that torch was built for where the kernel does not say."""
    with contextlib.suppress(OSError):
        match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", (root / "proc/driver/nvidia/version").read_text())
        if match:
            return match[1]
    return f"CUDA {torch.version.cuda}"


def place_identity(place: Path) -> str:
    """Type and id of a directory's file system, or a block device's name; the same after a restart where the file system has an id."""
    if is_block_device(place):
        return f"block device {place.resolve().name}"
    existing = nearest_existing(place)
    stats = os.statvfs(existing)
    return f"{filesystem_of(existing) or 'unknown'} {stats.f_fsid & 0xFFFFFFFFFFFFFFFF:x}"
