"""Pinned memory: the one place that page-locks host memory for CUDA, and unlocks it.

* **pinned** (page-locked): the kernel may not move or drop the pages, so a GPU copies from them by DMA, at full link speed
  and without stopping the CPU.
* **page-aligned**: the address is a multiple of 4096. Direct disk I/O wants that; it has nothing to do with pinning.

How: the memory is mapped in exactly the wanted size (`mapped.py`), touched by several threads, and then registered with
`cudaHostRegister`. torch's caching host allocator is not used, because it rounds sizes up to powers of two (MemAscend,
arXiv:2505.23254, names this as a main waste of SSD-offloaded training) and keeps what is freed.

Rules:

1. Registering comes after mapping, unregistering before unmapping.
2. A refusal (no CUDA, the driver, `RLIMIT_MEMLOCK`, a container's limit) is no error: the memory stays pageable, copies
   are slower and cannot overlap, a warning says so once, and this locker does not try again.
3. A budget is a cap on page-locked bytes. What would exceed it stays pageable; one warning says what that costs, measured here.
   A smaller range may still be pinned afterwards.
4. Unpinning while a copy is in flight is the caller's error, because torch tells nobody which copies are. Keep a tensor until the
   copy's event has completed, or say `hold_until(tensor, event)`: then whoever drops the last view waits for the event.
5. A forked child does not get locked memory at all (`MADV_DONTFORK`: the kernel would copy all of it at once), and unregisters nothing.
   Touching such a tensor there ends the child with SIGSEGV, as torch's own pinned tensors do; `spawn` has no such limit.

One range is registered by one call: two adjacent registrations are not one range to CUDA, so a copy across their border would
fail. What takes the time is making pages resident, and that is what the threads do first.

Limits: registering costs (measured on an H100 machine, first touch included, one thread: 1.8 s for 4 GiB), so memory is pinned once
and reused, never per step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import numbers
import resource
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch

from overspill.errors import BudgetError
from overspill.tiers.mapped import map_anonymous, node_of_device, populate, prefer_node
from overspill.units import MIB, format_bytes

PRICE_BYTES = 64 * MIB
"""Buffer with which the price of pageable memory is measured. Chosen: a few chunks; long enough to reach full link speed."""

_CUDA_HOST_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable of the CUDA runtime API: pinned for every context of the process, so for every GPU of a rank."""


class Completion(Protocol):
    """The end of a copy, such as a `torch.cuda.Event` recorded after it."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyRates:
    """Bytes per second of a copy between host and device, measured."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float

    def __str__(self) -> str:
        return f"{self.h2d_bytes_per_s / 1e9:.1f} GB/s to the GPU and {self.d2h_bytes_per_s / 1e9:.1f} GB/s from it"


def measure_copy_rates(buffer: torch.Tensor) -> CopyRates:
    """The best of three copies each way between `buffer` (uint8, host) and the current CUDA device; a few milliseconds."""
    on_device = torch.empty_like(buffer, device="cuda")
    best = {}
    for way, (target, source) in {"h2d": (on_device, buffer), "d2h": (buffer, on_device)}.items():
        times = []
        for _ in range(4):  # the first warms up
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        best[way] = buffer.numel() / min(times[1:])
    return CopyRates(h2d_bytes_per_s=best["h2d"], d2h_bytes_per_s=best["d2h"])


@functools.cache
def measure_price(num_bytes: int) -> tuple[CopyRates, CopyRates] | None:
    """Rates of a pinned and of a pageable buffer; None where CUDA refuses to pin. Measured once a process and size."""
    block = map_anonymous(num_bytes)
    buffer = block.tensor(num_bytes)
    populate(block.address, block.num_bytes)
    pageable = measure_copy_rates(buffer)
    if cuda_register(block.address, block.num_bytes) is not None:
        return None
    try:
        return measure_copy_rates(buffer), pageable
    finally:
        cuda_unregister(block.address)


class PageLocker:
    """Page-locks ranges of host memory while that is wanted, possible, and within the budget (rules 1 to 3); thread-safe.

    Args:
        budget_bytes: most bytes locked at once; None: no limit.
        flag: what a person raises to get more.
        cure: what a person does about a refusal.
    """

    def __init__(
        self,
        *,
        is_wanted: bool,
        budget_bytes: int | None = None,
        flag: str = "--pinned-budget",
        cure: str = "raise the limit or lower --host-budget",
    ) -> None:
        if budget_bytes is not None and budget_bytes < 0:
            raise ValueError(f"the budget of pinned memory cannot be negative, got {budget_bytes} B")
        self._is_wanted, self.budget_bytes, self._flag, self._cure = is_wanted, budget_bytes, flag, cure
        self._locked: dict[int, int] = {}
        self._events: dict[int, list[Completion]] = {}
        self._locked_bytes = 0
        self._refusal: str | None = None
        self._is_over_budget = False
        # Reentrant: a collected tensor may be unlocked while this thread is inside.
        self._lock = threading.RLock()

    @property
    def locked_bytes(self) -> int:
        return self._locked_bytes

    @property
    def refusal(self) -> str | None:
        """Why memory is pageable although pinned was wanted; None if it is pinned or was not wanted."""
        return self._refusal

    def lock(self, name: str, address: int, num_bytes: int, *, budget_bytes: int | None = None) -> bool:
        """Page-lock a mapped range; False if it stays pageable.

        Args:
            budget_bytes: instead of the locker's own.
        """
        budget = self.budget_bytes if budget_bytes is None else budget_bytes
        with self._lock:
            if not self._is_wanted or self._refusal is not None:
                return False
            if not torch.cuda.is_available():
                reason: str | None = "this torch sees no CUDA device"
            elif budget is not None and self._locked_bytes + num_bytes > budget:
                self._warn_of_budget(name, num_bytes, budget)
                return False
            else:
                populate(address, num_bytes)
                reason = cuda_register(address, num_bytes)
            if reason is None:
                self._locked[address] = num_bytes
                self._locked_bytes += num_bytes
                return True
            self._refusal = reason
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "unlimited" if limit == resource.RLIM_INFINITY else format_bytes(limit)
        warnings.warn(
            f"{name}: {format_bytes(num_bytes)} of host memory could not be pinned beside {format_bytes(self.locked_bytes)} that are "
            f"({reason}; `ulimit -l` is {allowed}); from here on host memory is pageable, so copies to and from the GPU are slower and "
            f"do not overlap; {self._cure}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False

    def _warn_of_budget(self, name: str, num_bytes: int, budget: int) -> None:
        """Rule 3, once. The measurement pins too, so it takes no more than the budget leaves."""
        if self._is_over_budget:
            return
        self._is_over_budget = True
        left = budget - self._locked_bytes
        size = min(PRICE_BYTES, left // mmap.PAGESIZE * mmap.PAGESIZE)
        rates = measure_price(size) if size >= MIB else None
        price = f"measured here: pinned {rates[0]}, pageable {rates[1]}" if rates else "copies are slower and do not overlap; not measured"
        warnings.warn(
            f"{name}: {format_bytes(num_bytes)} of host memory stay pageable, because {format_bytes(self._locked_bytes)} are pinned and "
            f"{self._flag} is {format_bytes(budget)} ({price}); raise {self._flag} to at least {self._locked_bytes + num_bytes} B",
            RuntimeWarning,
            stacklevel=4,
        )

    def hold_until(self, address: int, event: Completion) -> None:
        """Let `unlock` of a locked range wait for `event` (rule 4); nothing for a range that is not locked."""
        with self._lock:
            if address in self._locked:
                waiting = self._events.get(address, [])
                self._events[address] = [*(item for item in waiting if not item.query()), event]

    def unlock(self, address: int) -> None:
        """Unlock a range if it was locked; must come before its unmapping (rule 1)."""
        with self._lock:
            events = self._events.pop(address, ())
        for event in events:
            event.synchronize()
        with self._lock:
            num_bytes = self._locked.pop(address, 0)
            if not num_bytes:
                return
            reason = cuda_unregister(address)
            self._locked_bytes -= num_bytes
        if reason is not None:
            warnings.warn(f"host memory at {address:#x} stays pinned until the process ends ({reason})", RuntimeWarning, stacklevel=3)


_process_locker = PageLocker(is_wanted=True, flag="budget_bytes", cure="raise the limit or pin less")
"""Of all tensors made by `pinned_empty`."""


def pinned_empty(
    shape: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    budget_bytes: int | None = None,
    device: torch.device | str | int | None = None,
) -> torch.Tensor:
    """A CPU tensor of exactly its size in pinned memory, zero-filled; unpinned and unmapped when its last view is gone.

    Where pinning is refused, or the budget is spent, the tensor is pageable and one warning says why; `tensor.is_pinned()` says which.
    May be called from any thread. Rules 4 (copies in flight) and 5 (fork) of this file are the caller's to keep.

    Args:
        shape: a length, or the sizes of the dimensions.
        budget_bytes: most bytes that all tensors of this function may hold pinned together; None: no limit.
        device: the GPU whose NUMA node the pages shall be on, where there is more than one node; None: the current one.

    Raises:
        ValueError: a size is no whole number or negative, or the dtype is none of torch's.
        BudgetError: the system refuses to map that much.
    """
    sizes = (shape,) if not isinstance(shape, Sequence) or isinstance(shape, str) else tuple(shape)
    if any(isinstance(size, bool) or not isinstance(size, numbers.Integral) for size in sizes):
        raise ValueError(f"pinned_empty: a shape is a length or the sizes of the dimensions, whole numbers all, got {shape!r}")
    sizes = tuple(map(int, sizes))
    if budget_bytes is not None and (isinstance(budget_bytes, bool) or not isinstance(budget_bytes, numbers.Integral)):
        raise ValueError(f"pinned_empty: the budget is a whole number of bytes, got {budget_bytes!r}")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"pinned_empty: the dtype must be one of torch's, such as torch.float32, got {dtype!r}")
    if any(size < 0 for size in sizes):
        raise ValueError(f"pinned_empty: sizes cannot be negative, got {sizes}")
    if budget_bytes is not None and budget_bytes < 0:
        raise ValueError(f"pinned_empty: the budget cannot be negative, got {budget_bytes} B")
    num_bytes = math.prod(sizes) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(sizes, dtype=dtype)
    try:
        block = map_anonymous(num_bytes)
    except (OSError, ValueError, OverflowError) as error:
        raise BudgetError(
            f"pinned_empty: {sizes} of {dtype} needs {format_bytes(num_bytes)}, which the system refused to map ({error}); ask for less"
        ) from error
    is_cuda = torch.cuda.is_available()
    node = node_of_device(torch.device("cuda" if device is None else device)) if is_cuda else None
    if node is not None:
        prefer_node(block.address, block.num_bytes, node)
    tensor = block.tensor(num_bytes)
    if _process_locker.lock(f"pinned_empty{sizes}", block.address, block.num_bytes, budget_bytes=budget_bytes):
        block.keep_from_children()
        block.before_unmapping(functools.partial(_process_locker.unlock, block.address))
    return tensor.view(dtype).view(sizes)


def hold_until(tensor: torch.Tensor, event: Completion) -> None:
    """Let the memory of a `pinned_empty` tensor, or of a view of one, outlive a copy that is in flight (rule 4)."""
    _process_locker.hold_until(tensor.untyped_storage().data_ptr(), event)
