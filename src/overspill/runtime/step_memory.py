"""What a step's report says about memory: of the device as its allocator and its driver count it, of the process, of the pools of slots."""

from __future__ import annotations

import dataclasses

import torch

from overspill.report.memory import host_peak_bytes
from overspill.runtime.residency import Residency

ALWAYS_ASKED_STEPS = 4
ASKED_EVERY_STEPS = 32
"""When the driver is asked: in the first steps, while code is loaded, and seldom afterwards, as it takes its time to answer. Chosen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Fields of `StepReport`, which says what they are."""

    device_peak_bytes: int
    device_context_bytes: int
    host_peak_bytes: int
    pinned_bytes: int
    pool_peak_bytes: int
    pool_waste_bytes: int
    pool_one_size_bytes: int


class MemoryWatch:
    """Watches the memory of one session."""

    def __init__(self, residency: Residency, device: torch.device) -> None:
        self._residency, self._device = residency, device
        self._context_bytes = 0

    def begin_step(self) -> None:
        """The device's peak is that of the step which begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def after_step(self, num_steps: int) -> StepMemory:
        """Of the step that has just been made.

        Args:
            num_steps: that the run has made.
        """
        residency = self._residency
        pools = residency.pool_reports()
        return StepMemory(
            device_peak_bytes=self._device_peak_bytes(),
            device_context_bytes=self._device_context_bytes(num_steps),
            host_peak_bytes=host_peak_bytes(),
            pinned_bytes=residency.host.pinned_bytes,
            pool_peak_bytes=sum(pool.peak_bytes for pool in pools),
            pool_waste_bytes=sum(pool.peak_bytes - pool.peak_asked_bytes for pool in pools),
            pool_one_size_bytes=sum(pool.one_size_bytes for pool in pools),
        )

    def _device_peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return self._residency.device.peak_bytes

    def _device_context_bytes(self, num_steps: int) -> int:
        """What the driver counts beside the allocator's: this process's context, and other programs; as it last said."""
        if self._device.type == "cuda" and (num_steps < ALWAYS_ASKED_STEPS or num_steps % ASKED_EVERY_STEPS == 0):
            free, total = torch.cuda.mem_get_info(self._device)
            self._context_bytes = max(0, total - free - torch.cuda.memory_reserved(self._device))
        return self._context_bytes
