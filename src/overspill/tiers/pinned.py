"""Pinned memory: the one place that page-locks host memory for CUDA, and unlocks it.

* **pinned** (page-locked): the kernel may not move or drop the pages, so a GPU copies from them by DMA, at full link speed
  and without stopping the CPU.
* **page-aligned**: the address is a multiple of 4096. Direct disk I/O wants that; it has nothing to do with pinning.

How: the memory comes from an anonymous `mmap` of exactly the wanted size and is then registered with `cudaHostRegister`.
torch's caching host allocator is not used, because it rounds sizes up to powers of two (MemAscend, arXiv:2505.23254, names
this as a main waste of SSD-offloaded training) and keeps what is freed.

Rules:

1. Registering comes after mapping, unregistering before unmapping; the same object does both.
2. A refusal (no CUDA, the driver, `RLIMIT_MEMLOCK`, a container's limit) is no error: the memory stays pageable, copies
   are slower and cannot overlap, a warning says so once, and this locker does not try again.

Limits: registering faults every page in (measured on an H100 machine: 1.8 s for 4 GiB), so memory is pinned once and reused,
never per step.
"""

from __future__ import annotations

import resource
import threading
import warnings

import torch

from overspill.units import format_bytes

_CUDA_HOST_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable of the CUDA runtime API: pinned for every context of the process, so for every GPU of a rank."""


def cuda_register(address: int, num_bytes: int) -> str | None:
    """Page-lock [address, address + num_bytes) for CUDA; the reason as text if that is refused, else None."""
    try:
        cudart = torch.cuda.cudart()
        code = int(cudart.cudaHostRegister(address, num_bytes, _CUDA_HOST_REGISTER_PORTABLE))
        if code == 0:
            return None
        reason = f"cudaHostRegister failed with CUDA error {code}: {cudart.cudaGetErrorString(cudart.cudaError(code))}"
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts, a driver that is gone raises
        return f"CUDA cannot be used: {error}"
    _clear_cuda_error()
    return reason


def cuda_unregister(address: int) -> str | None:
    """Undo `cuda_register`; the reason as text if that is refused, else None."""
    code = int(torch.cuda.cudart().cudaHostUnregister(address))
    if code == 0:
        return None
    _clear_cuda_error()
    return f"cudaHostUnregister failed with CUDA error {code}"


def _clear_cuda_error() -> None:
    """Take the refusal off the CUDA runtime's "last error", where torch's next kernel launch would find and raise it.

    torch exports no cudaGetLastError, so a launch is made here for the error to be found by.
    """
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError:
        torch.zeros(1, device="cuda").add_(1)


class PageLocker:
    """Page-locks ranges of host memory while that is wanted and possible (rules 1 and 2)."""

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._locked: dict[int, int] = {}
        self._locked_bytes = 0
        self._refusal: str | None = None
        self._lock = threading.Lock()

    @property
    def locked_bytes(self) -> int:
        return self._locked_bytes

    @property
    def refusal(self) -> str | None:
        """Why memory is pageable although pinned was wanted; None if it is pinned or was not wanted."""
        return self._refusal

    def lock(self, name: str, address: int, num_bytes: int) -> bool:
        """Page-lock a mapped range; False if it stays pageable."""
        with self._lock:
            if not self._is_wanted or self._refusal is not None:
                return False
            reason = cuda_register(address, num_bytes) if torch.cuda.is_available() else "this torch sees no CUDA device"
            if reason is None:
                self._locked[address] = num_bytes
                self._locked_bytes += num_bytes
                return True
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            self._refusal = reason
        allowed = "unlimited" if limit == resource.RLIM_INFINITY else format_bytes(limit)
        warnings.warn(
            f"{name}: {format_bytes(num_bytes)} of host memory could not be pinned beside {format_bytes(self.locked_bytes)} that are "
            f"({reason}; `ulimit -l` is {allowed}); from here on host memory is pageable, so copies to and from the GPU are slower and "
            "do not overlap; raise the limit or lower --host-budget",
            RuntimeWarning,
            stacklevel=3,
        )
        return False

    def unlock(self, address: int) -> None:
        """Unlock a range if it was locked; must come before its unmapping (rule 1)."""
        with self._lock:
            num_bytes = self._locked.pop(address, 0)
            if not num_bytes:
                return
            self._locked_bytes -= num_bytes
            reason = cuda_unregister(address)
        if reason is not None:
            warnings.warn(f"host memory at {address:#x} stays pinned until the process ends ({reason})", RuntimeWarning, stacklevel=3)
