"""The device's memory as the driver sees it, sampled while a process trains.

What the driver has given away on the whole device: contexts, allocators' caches, memory of libraries and of worker processes. So
nothing else should use the device. The allocator's own peak (`max_memory_reserved`) is exact and misses what is not the allocator's;
sampling may miss what lives for less than `PERIOD_S`. Both are reported. So is how often the allocator had to ask the driver for memory, or
failed and gave cached memory back first: each time compute waits.
"""

from __future__ import annotations

import threading

import torch

PERIOD_S = 0.025
"""Chosen: short beside a step, and a call takes tens of microseconds."""


class DeviceWatch:
    """Watches from now on; on a machine without CUDA it sees 0."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak_bytes = self._num_calls = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(target=self._watch, name="device-watch", daemon=True)
            self._thread.start()

    def read(self) -> dict[str, int]:
        """Peaks since the last `read` (or the start), in bytes, and calls of the driver for memory since then; then all start again."""
        if self._device.type != "cuda":
            return dict.fromkeys(("driver_peak_bytes", "reserved_peak_bytes", "allocated_peak_bytes", "num_driver_calls"), 0)
        self._look()
        peak, self._peak_bytes = self._peak_bytes, 0
        stats, before = torch.cuda.memory_stats(self._device), self._num_calls
        self._num_calls = sum(int(stats.get(name, 0)) for name in ("num_device_alloc", "num_device_free", "num_alloc_retries"))
        return {
            "driver_peak_bytes": peak,
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(self._device),
            "allocated_peak_bytes": torch.cuda.max_memory_allocated(self._device),
            "num_driver_calls": self._num_calls - before,
        }

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._look()

    def _look(self) -> None:
        free, total = torch.cuda.mem_get_info(self._device)
        self._peak_bytes = max(self._peak_bytes, total - free)


def cap_device(device: torch.device, cap_bytes: int) -> None:
    """Bound what this process takes of the device, the context that it has by now included, as a smaller device would.

    Raises:
        ValueError: the context alone takes more.
    """
    if device.type != "cuda":
        return
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    if cap_bytes <= context:
        raise ValueError(f"a cap of {cap_bytes} B leaves nothing beside the context of {context} B; raise the row's cap")
    index = device.index if device.index is not None else torch.cuda.current_device()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_bytes - context) / total), index)
