"""All memory of one entering of `offload_activations`: opened together, closed when the last record is dead."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from overspill.activations.amounts import Room
from overspill.activations.arena import HostArena
from overspill.activations.cache import TensorCache
from overspill.activations.direct_lane import DirectLane
from overspill.activations.drive import DriveLane
from overspill.activations.identity import ParameterStorages
from overspill.activations.links import open_link
from overspill.activations.mover import Mover
from overspill.activations.rebuild import Rebuilder
from overspill.activations.rounds import Rounds
from overspill.activations.settings import Settings
from overspill.activations.ssd_lane import SsdLane
from overspill.tiers import HostMemory, SsdStore, Store
from overspill.tiers.gpudirect import DirectFile, open_kvikio
from overspill.tiers.mapped import node_of_device

HEADROOM_FRACTION = 0.8
"""Of the device memory that was free at the fullest moment, how much may be filled with saved tensors that stay. The rest is for the
allocator's fragments. Chosen."""


class OpenTiers:
    """All memory of one entering."""

    def __init__(self, model: nn.Module, device: torch.device, settings: Settings, before: OpenTiers | None) -> None:
        self.is_open = True
        self.memory = HostMemory(pin=device.type == "cuda", budget_bytes=settings.host_budget_bytes, numa_node=node_of_device(device))
        self.host = HostArena(self.memory, "saved-tensors", limit_bytes=settings.resting_bytes)
        self.staging: HostArena | None = None
        self.ssd: DriveLane | None = None
        if settings.is_direct:
            self.ssd = open_direct(settings, device)
        elif settings.ssd_budget_bytes:
            size = settings.staging_bytes
            self.staging = HostArena(self.memory, "saved-tensors-staging", limit_bytes=size, segment_bytes=size)
            self.ssd = SsdLane(open_store(settings), settings.ssd_budget_bytes // 4096 * 4096, self.staging)
        self.parameters = ParameterStorages()
        self.parameters.add_model(model)
        mover = Mover(device, open_link(device), self.host, self.ssd, window_bytes=settings.window_bytes)
        earlier = before.cache.rounds if before is not None else None
        rounds = Rounds(mover, settings.amount, DeviceSpace(device, settings, mover), settings.throughput, earlier)
        rebuilder = Rebuilder.of_model(model) if settings.is_rebuilding else None
        self.cache: TensorCache = TensorCache(
            mover, self.parameters, rounds, min_bytes=settings.min_bytes, form=settings.form, rebuilder=rebuilder
        )

    def shut(self) -> None:
        """Close once nothing is alive (`context.py`, rule 2).

        Raises:
            StorageError: a write failed, and no hook has said so yet.
        """
        if not self.is_open:
            return
        self.is_open = False
        self.cache.close_when_empty(self._close)
        if not self.cache.mover.has_told_failure:
            self.cache.mover.raise_failure()

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.memory.close)
            stack.callback(self.host.close)
            if self.staging is not None:
                stack.callback(self.staging.close)
            stack.callback(self.cache.mover.close)


class DeviceSpace:
    """The room of one entering. Meets the protocol `Space`."""

    def __init__(self, device: torch.device, settings: Settings, mover: Mover) -> None:
        self._device, self._settings, self._mover = device, settings, mover
        self._allocated_bytes = 0
        """On the device, at the last look, with nothing saved."""
        self._keep_bytes: int | None = None

    def look(self, kept_bytes: int, peak_bytes: int) -> Room:
        settings, window_bytes = self._settings, self._mover.usual_window_bytes
        keep_bytes = settings.device_budget_bytes
        most_bytes = keep_bytes + 2 * window_bytes if keep_bytes is not None else None
        if keep_bytes is None and self._device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(self._device)
            headroom = free_bytes + torch.cuda.memory_reserved(self._device) - torch.cuda.max_memory_allocated(self._device)
            keep_bytes, most_bytes = (before + int(HEADROOM_FRACTION * max(0, headroom)) for before in (kept_bytes, peak_bytes))
            self._allocated_bytes, self._keep_bytes = torch.cuda.memory_allocated(self._device), keep_bytes
        return Room(
            host_bytes=settings.resting_bytes,
            ssd_bytes=settings.ssd_budget_bytes,
            staging_bytes=max(window_bytes, self._mover.largest_bytes) if settings.is_direct else settings.staging_bytes,
            window_bytes=window_bytes,
            keep_bytes=keep_bytes,
            peak_bytes=most_bytes,
        )

    def has_shrunk(self) -> bool:
        """Such as when the optimizer made its states after the last look."""
        if self._keep_bytes is None:
            return False
        allocated_bytes = torch.cuda.memory_allocated(self._device)
        self._allocated_bytes = min(self._allocated_bytes, allocated_bytes)  # the look may have been where gradients were
        return allocated_bytes - self._allocated_bytes > self._keep_bytes // 16


def open_direct(settings: Settings, device: torch.device) -> DirectLane:
    num_bytes = settings.ssd_budget_bytes // 4096 * 4096
    kvikio = open_kvikio(device, settings.ssd_places)
    return DirectLane(DirectFile(kvikio, settings.ssd_places, capacity_bytes=num_bytes), num_bytes, device)


def open_store(settings: Settings) -> Store:
    num_bytes = settings.ssd_budget_bytes // 4096 * 4096
    if settings.open_store is not None:
        return settings.open_store(num_bytes)
    return SsdStore(list(settings.ssd_places), capacity_bytes=num_bytes, unlink=True)
