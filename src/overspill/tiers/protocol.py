"""What the rest of overspill may ask of a tier: three protocols, and the rules that every implementation keeps.

Words:

* **memory**: bytes that code can read and write in place, on the host or on a device (`HostMemory`, `DeviceMemory`).
* **store**: bytes that must be copied into a buffer to be used (`SsdStore`, `FakeStore`). Every copy is a transfer.
* **extent**: the named, contiguous range of a store that `allocate` gives.
* **transfer**: one copy that has been started; it ends at some later time, with success or with a `StorageError`.
* **block**: 1 MiB of a transfer, counted from its first byte, the last as long as it is: what has a checksum (`checksums.py`).
* **payload**: the bytes a caller asked for; what is moved besides (the rest of a page, zeros) is no payload.

Rules for callers:

1. `start_read` and `start_write` lend the buffer to the store. Until `wait()` has returned or raised, a buffer being read
   into is neither read nor written, and a buffer being written from is not written.
2. Transfers run in any order. Two transfers in flight may touch the same bytes of one extent only if both read; whoever
   needs an order waits for the first before starting the second. Disjoint bytes are always independent, even in one page.
3. Every transfer is waited for once. `wait()` may be called again, from any thread, and does the same again. A failure
   that nobody waited for is raised by `close()`.
4. An extent is freed after its transfers have ended (asserted), a memory after its last use on any stream or thread (not
   known here: `runtime/residency` owns in-flight hazards).

Rules for implementations:

5. An allocation reads as zeros until it is written, also where its bytes were used before.
6. A transfer that ends without an error moved every byte. Short transfers are continued, and nothing is ignored.
7. Wrong arguments raise `ValueError` at the call, a full tier `BudgetError` at the call, a failing device `StorageError`
   at `wait()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import torch


@runtime_checkable
class Transfer(Protocol):
    """A copy between a buffer and an extent that has been started (rules 1 to 3)."""

    @property
    def is_done(self) -> bool:
        """Whether `wait()` would return or raise at once."""
        ...

    def wait(self) -> None:
        """Block until the copy has ended and the buffer is the caller's again.

        Raises:
            StorageError: it failed; what a read left in the buffer, or a write in the extent, is undefined.
        """
        ...


@runtime_checkable
class CheckedTransfer(Transfer, Protocol):
    """A transfer whose blocks were summed as they went by."""

    @property
    def checksums(self) -> tuple[int, ...]:
        """CRC-32C of each block of the buffer; after `wait()`, of a transfer that was asked for them."""
        ...


@runtime_checkable
class Memory(Protocol):
    """Named allocations in one budget, all bytes counted."""

    @property
    def budget_bytes(self) -> int | None:
        """Most bytes that may be allocated; None: no limit."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated now, rounding included."""
        ...

    @property
    def peak_bytes(self) -> int:
        """The most that `allocated_bytes` has been."""
        ...

    @property
    def pinned_bytes(self) -> int:
        """Bytes of `allocated_bytes` that are page-locked."""
        ...

    def allocate(self, name: str, num_bytes: int, *, pinned: bool = True) -> torch.Tensor:
        """A zero-filled uint8 tensor of shape [num_bytes] under a name that is not in use.

        Args:
            pinned: whether it will be copied to or from a GPU; no effect where memory is not pinned.

        Raises:
            BudgetError: the budget, or the machine, has no room; nothing was allocated.
        """
        ...

    def blocks(self, prefix: str) -> dict[str, torch.Tensor]:
        """The allocations whose names begin with `prefix`, all bytes of each.

        What Ctrl-C left half-way through `allocate` or `free` is freed first, so nothing of either may be running.
        """
        ...

    def free(self, name: str) -> None:
        """Give an allocation back; neither its tensor nor a view of it may be used afterwards (rule 4)."""
        ...

    def close(self) -> None:
        """Free everything; nothing can be allocated afterwards. Closing again does nothing."""
        ...


@runtime_checkable
class Store(Protocol):
    """Named extents in one capacity, read and written by transfers."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes that all extents together can take."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the extents take now, rounding included."""
        ...

    @property
    def read_bytes(self) -> int:
        """Payload of all reads started so far."""
        ...

    @property
    def written_bytes(self) -> int:
        """Payload of all writes started so far."""
        ...

    def allocate(self, name: str, num_bytes: int) -> None:
        """Make an extent of zeros under a name that is not in use.

        Raises:
            BudgetError: no free range is long enough; nothing was allocated.
        """
        ...

    def free(self, name: str) -> None:
        """Give an extent back (rule 4)."""
        ...

    def num_bytes(self, name: str) -> int:
        """The size that the extent was allocated with."""
        ...

    def start_read(self, name: str, offset: int, buffer: torch.Tensor, *, expected: Sequence[int] | None = None) -> CheckedTransfer:
        """Start copying bytes [offset, offset + len(buffer)) of an extent into `buffer`, which is lent (rule 1).

        Args:
            buffer: contiguous uint8 CPU tensor of shape [n]; any n, offset and address are correct, page-aligned ones fast.
            expected: one checksum a block; `wait()` raises `DamagedBlock` where the bytes have another. None: nothing is summed.
        """
        ...

    def start_write(self, name: str, offset: int, buffer: torch.Tensor, *, with_checksums: bool = False) -> CheckedTransfer:
        """Start copying `buffer`, which is lent (rule 1), to bytes [offset, offset + len(buffer)) of an extent."""
        ...

    def interrupt(self) -> None:
        """Until `proceed`, let transfers that wait for something a person must do (free space on a drive) fail instead."""
        ...

    def proceed(self) -> None:
        """What was given up has ended: transfers may wait again."""
        ...

    def close(self) -> None:
        """Wait for the transfers in flight and drop all content. Closing again does nothing.

        Raises:
            StorageError: a transfer failed and was never waited for (rule 3).
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
