"""Memory tiers: host memory of exact size, pinned if wanted, and device memory, both under a budget.

Rules:

1. Sizes are exact: an allocation takes its bytes rounded up to one page (host) or to 512 bytes (device), never to a power
   of two, and `allocated_bytes` counts that rounding.
2. Nothing is allocated beyond the budget: `BudgetError` is raised before the memory is touched.
3. Memory is zero when it is allocated. On the host the kernel gives zero pages when they are first touched.
4. Freed host memory goes back to the system at once: its pages are dropped even if a forgotten view is still alive. Such a
   view reads zeros then; it cannot crash, because the addresses stay mapped until the last view is gone.
5. Only what crosses the link to a GPU needs pinning: parameters, gradients, hidden states. Optimizer states that are updated on the
   host do not, so `allocate(..., pinned=False)` leaves them pageable, in huge pages where the system grants them.

Limits: freed device memory goes back to torch's caching allocator when the last view of it dies, so the model's own tensors
can use it but `nvidia-smi` does not fall. Device allocations of 1 MiB and more may take up to 2 MiB more inside that
allocator; that is not in `allocated_bytes`. A device out of memory raises torch's own `torch.OutOfMemoryError`.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Mapping

import torch

from overspill.errors import BudgetError
from overspill.tiers.mapped import MappedBlock, map_anonymous, prefer_node
from overspill.tiers.pinned import PageLocker
from overspill.units import align_up, format_bytes

DEVICE_GRANULE_BYTES = 512
"""What torch's CUDA caching allocator rounds a tensor's bytes up to (kMinBlockSize in CUDACachingAllocator)."""


class _Account:
    """Counts the bytes of one memory against its budget; thread-safe."""

    def __init__(self, *, tier: str, flag: str, budget_bytes: int | None) -> None:
        if budget_bytes is not None and budget_bytes < 0:
            raise ValueError(f"the {tier} budget cannot be negative, got {budget_bytes} B")
        self._tier, self._flag, self.budget_bytes = tier, flag, budget_bytes
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self.peak_bytes = 0

    @property
    def allocated_bytes(self) -> int:
        return sum(tuple(self._sizes.values()))  # no counter beside the sizes: Ctrl-C between the two would make them differ

    def reserve(self, name: str, num_bytes: int) -> None:
        """Count an allocation, or raise (rule 2)."""
        with self._lock:
            if name in self._sizes:
                raise ValueError(f"{name} is already allocated in {self._tier} memory")
            after = self.allocated_bytes + num_bytes
            if self.budget_bytes is not None and after > self.budget_bytes:
                left = self.budget_bytes - self.allocated_bytes
                raise BudgetError(
                    f"{name} needs {format_bytes(num_bytes)} ({num_bytes} B) but the {self._tier} budget of "
                    f"{format_bytes(self.budget_bytes)} leaves {format_bytes(left)} ({left} B); raise {self._flag} to at least {after} B"
                )
            self._sizes[name] = num_bytes
            self.peak_bytes = max(self.peak_bytes, after)

    def release(self, name: str) -> None:
        self.require(name)
        del self._sizes[name]

    def forget(self, name: str) -> None:
        """Release what may not have been counted."""
        self._sizes.pop(name, None)

    def require(self, name: str) -> None:
        """Raise unless the name is allocated."""
        if name not in self._sizes:
            raise ValueError(f"{name} is not allocated in {self._tier} memory")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sizes)


def _validate_size(name: str, num_bytes: int) -> None:
    if num_bytes <= 0:
        raise ValueError(f"{name}: an allocation has at least 1 byte, got {num_bytes} B")


def _unlock_blocks(blocks: Mapping[str, MappedBlock], locker: PageLocker) -> None:
    """Unpin what a memory that was dropped without `close()` still holds, before it is unmapped."""
    for block in blocks.values():
        locker.unlock(block.address)


class HostMemory:
    """Host memory in exact, page-aligned allocations; page-locked for CUDA if `pin` (see `tiers/pinned.py`).

    Args:
        pin: lock allocations unless they say otherwise; where that is refused, the memory is pageable and one warning says why.
        budget_bytes: most bytes allocated at once, pinned or not; None: no limit.
        pinned_budget_bytes: most bytes locked at once; what goes beyond is pageable, with one warning. None: no limit.
        numa_node: where pages shall come from, which is where the GPU hangs; None: wherever they are touched.
    """

    def __init__(
        self, *, pin: bool, budget_bytes: int | None, pinned_budget_bytes: int | None = None, numa_node: int | None = None
    ) -> None:
        self._account = _Account(tier="host", flag="--host-budget", budget_bytes=budget_bytes)
        self._locker = PageLocker(is_wanted=pin, budget_bytes=pinned_budget_bytes)
        self._numa_node = numa_node
        self._blocks: dict[str, MappedBlock] = {}
        self._is_closed = False
        # Not at exit: the process ends anyway, and CUDA may be gone by then.
        weakref.finalize(self, _unlock_blocks, self._blocks, self._locker).atexit = False

    @property
    def budget_bytes(self) -> int | None:
        return self._account.budget_bytes

    @property
    def allocated_bytes(self) -> int:
        return self._account.allocated_bytes

    @property
    def peak_bytes(self) -> int:
        return self._account.peak_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are really locked."""
        return self._locker.locked_bytes

    def resident_bytes(self) -> int:
        """Bytes of all allocations that are in memory now: what was pinned, and of the rest what was touched. Some 10 ns a page."""
        return sum(block.resident_bytes() for block in tuple(self._blocks.values()))

    @property
    def pin_refusal(self) -> str | None:
        """Why allocations are pageable although `pin` was asked for; None if they are as asked."""
        return self._locker.refusal

    def allocate(self, name: str, num_bytes: int, *, pinned: bool = True) -> torch.Tensor:
        """A zero-filled uint8 tensor of shape [num_bytes] that starts on a page.

        Args:
            pinned: False for what the host alone reads and writes (rule 5).

        Raises:
            BudgetError: the budget leaves less, or the system refuses to map it.
        """
        assert not self._is_closed, f"{name} is allocated in host memory that is closed"
        _validate_size(name, num_bytes)
        size = align_up(num_bytes, mmap.PAGESIZE)
        self._account.reserve(name, size)
        try:
            block = self._blocks[name] = map_anonymous(size)
            if self._numa_node is not None:
                prefer_node(block.address, size, self._numa_node)
            if pinned and self._locker.lock(name, block.address, size):
                block.keep_from_children()
        except BaseException as error:  # Ctrl-C too: locking takes its time, and what is half there could not be freed
            if name in self._blocks:
                self._locker.unlock(self._blocks.pop(name).address)
            self._account.release(name)
            if not isinstance(error, OSError | ValueError | OverflowError):
                raise
            raise BudgetError(
                f"{name} needs {format_bytes(size)} but the system refused to map it beside {format_bytes(self.allocated_bytes)} "
                f"of host memory ({error}); lower --host-budget"
            ) from error
        return block.tensor(num_bytes)

    def free(self, name: str) -> None:
        """Unpin an allocation and return its pages to the system (rule 4)."""
        self._account.require(name)
        block = self._blocks[name]
        self._locker.unlock(block.address)  # before anything forgets the block: Ctrl-C here leaves it allocated, only pageable
        block.drop_pages()
        del self._blocks[name]
        self._account.release(name)

    def blocks(self, prefix: str) -> dict[str, torch.Tensor]:
        """See `Memory.blocks`."""
        for name in {*self._account.names} ^ {*self._blocks}:
            if name in self._blocks:
                self._locker.unlock(self._blocks[name].address)
                del self._blocks[name]
            self._account.forget(name)
        return {name: block.tensor(block.num_bytes) for name, block in self._blocks.items() if name.startswith(prefix)}

    def close(self) -> None:
        """Free everything."""
        self._is_closed = True
        for name in self.blocks(""):
            self.free(name)


class DeviceMemory:
    """Memory of one torch device under a budget; `cpu` is a device too and behaves alike.

    Args:
        device: where the tensors live. Allocations start on 512 bytes (`cuda`) or on a page (`cpu`).
        budget_bytes: most bytes allocated at once; None: no limit.
    """

    def __init__(self, device: torch.device, *, budget_bytes: int | None) -> None:
        self.device = torch.device(device)
        self._account = _Account(tier="device", flag="--device-budget", budget_bytes=budget_bytes)
        self._tensors: dict[str, torch.Tensor] = {}
        self._is_closed = False

    @property
    def budget_bytes(self) -> int | None:
        return self._account.budget_bytes

    @property
    def allocated_bytes(self) -> int:
        return self._account.allocated_bytes

    @property
    def peak_bytes(self) -> int:
        return self._account.peak_bytes

    @property
    def pinned_bytes(self) -> int:
        return 0

    def allocate(self, name: str, num_bytes: int, *, pinned: bool = True) -> torch.Tensor:
        """A zero-filled uint8 tensor of shape [num_bytes] on the device, owned by the current stream; `pinned` has no effect.

        Raises:
            BudgetError: the budget leaves less.
            torch.OutOfMemoryError: the device itself has no room.
        """
        assert not self._is_closed, f"{name} is allocated in device memory that is closed"
        _validate_size(name, num_bytes)
        self._account.reserve(name, align_up(num_bytes, DEVICE_GRANULE_BYTES))
        try:
            if self.device.type == "cpu":
                tensor = map_anonymous(num_bytes).tensor(num_bytes)
            else:
                tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        except BaseException:
            self._account.release(name)
            raise
        self._tensors[name] = tensor
        return tensor

    def free(self, name: str) -> None:
        """Forget an allocation; its bytes return to torch's allocator when the last view of it is gone."""
        self._account.require(name)
        del self._tensors[name]
        self._account.release(name)

    def blocks(self, prefix: str) -> dict[str, torch.Tensor]:
        """See `Memory.blocks`."""
        for name in {*self._account.names} ^ {*self._tensors}:
            self._tensors.pop(name, None)
            self._account.forget(name)
        return {name: tensor for name, tensor in self._tensors.items() if name.startswith(prefix)}

    def close(self) -> None:
        """Free everything."""
        self._is_closed = True
        for name in self.blocks(""):
            self.free(name)
