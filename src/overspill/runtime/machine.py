"""What this machine has free, and what this process uses, read from the kernel and the driver. Nothing is measured here."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from overspill.probe.cache import load_hardware
from overspill.probe.capacities import host_available_bytes, places_room_bytes
from overspill.report.memory import host_resident_bytes
from overspill.spec.hardware import HardwareSpec
from overspill.spec.plan import AUTO, Plan, PlanRequest
from overspill.tiers.cuda import let_segments_grow

PROCESS_GROWTH_BYTES = 96 * 1024 * 1024
"""Assumed: what the process itself grows by while it trains (threads, schedules, recordings); 50-60 MiB seen on two cores. Kernels that a
GPU's first step loads are not in it."""
MOST_HELD_CONTEXT_BYTES = 512 * 1024 * 1024
"""Most of the device that is taken for this process's own context when a session opens; what is there beyond it may be another program's.
Assumed: an H100's context alone takes somewhat more."""


def resolve_device(choice: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:1`.

    Raises:
        ValueError: CUDA is asked for and not there, or the name is no device.
    """
    if choice == AUTO:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(choice)
    except RuntimeError as error:
        raise ValueError(f"--device {choice!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {choice!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {choice} was asked for but torch {torch.__version__} sees no CUDA device; use --device cpu")
        count, index = torch.cuda.device_count(), device.index or 0
        if index >= count:
            raise ValueError(f"--device {choice} was asked for but there are {count} CUDA devices, numbered from 0")
        return torch.device("cuda", index if device.index is not None else torch.cuda.current_device())
    return device


def read_hardware(device: torch.device, ssd_places: Sequence[str]) -> HardwareSpec:
    """Capacities of this machine's tiers now; rates are the assumed ones.

    Args:
        ssd_places: directories and block devices; a data file that is in one is used again, or discarded, so its room counts as free.
    """
    host = host_available_bytes()
    if device.type == "cuda":
        held = _held_context_bytes(device) if torch.cuda.is_initialized() else 0
        device_capacity = torch.cuda.mem_get_info(device)[0]
    else:
        # Host memory too; the planner holds both together against the host's budget.
        device_capacity, held = host, 0
    return HardwareSpec(
        device_capacity_bytes=device_capacity,
        host_capacity_bytes=host,
        ssd_capacity_bytes=places_room_bytes(ssd_places),
        process_bytes=host_resident_bytes() + PROCESS_GROWTH_BYTES,
        device_context_held_bytes=held,
    )


def _held_context_bytes(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return min(MOST_HELD_CONTEXT_BYTES, max(0, total - free - torch.cuda.memory_reserved(device)))


def find_hardware(request: PlanRequest | Plan, device: torch.device, machine: str | Path | None) -> HardwareSpec:
    """Capacities now, and the rates of this machine's file if there is one.

    Args:
        machine: a machine file to use in place of the cached one.
    """
    capacities = read_hardware(device, request.ssd_places)
    return load_hardware(capacities, device, request.ssd_places, state_format=request.state_format, machine=machine)


MALLOC_MAP_BYTES = 128 * 1024
"""Requests of at least this get a mapping of their own: glibc's start value, kept from growing. With its growth (to 32 MiB), 24
more blocks of 12 MiB cost 300 MiB of heap that is free but not returned."""


def prepare_process(device: torch.device) -> None:
    """Make the allocators of this process, torch's and the C library's, suit a session on `device`."""
    if device.type == "cuda":
        let_segments_grow()
    return_freed_memory()


def return_freed_memory() -> bool:
    """Make malloc give large blocks back to the system when they are freed; whether this C library can (glibc).

    On the `cpu` device activations and gradients come from malloc, whose free lists would otherwise grow with the model's
    depth. Process-wide; mappings cost page faults, which the CPU's arithmetic outweighs.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MALLOC_MAP_BYTES))
    except AttributeError:
        return False


_M_MMAP_THRESHOLD = -3


@contextlib.contextmanager
def without_cycle_collection() -> Iterator[None]:
    """Python's cycle collector rests inside: with all of torch and transformers to look at, one pass takes tens of milliseconds.
    What is left is collected after it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
