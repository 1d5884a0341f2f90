"""A pool of slots: buffers that are borrowed for one fetch or evict and used again by the next.

A **slot** is a buffer of one **size class**: the wanted bytes rounded up to 4096. Each class has its own free list, so a
small tensor never occupies the space of the largest one. That is MemAscend's adaptive buffer pool (arXiv:2505.23254); pools
with one slot size for all tensors, as in DeepSpeed's swapper, waste most of their bytes as soon as an embedding is among
them.

Rules:

1. A slot is used by whoever acquired it until `release()`; its tensor, and every view of it, is dead afterwards. Using the
   slot again, or releasing it again, is asserted; a kept view cannot be seen from here.
2. A slot's content is undefined when it is acquired.
3. Acquiring takes an idle slot of the class (the one released first: whatever still works on it is likeliest to be done),
   else it allocates one. Only when the memory's budget refuses that, idle slots of all classes are freed, and it is tried once
   more.
4. The pool never waits for a slot: how many are in flight is the Schedule's decision, and `validate` proved that they fit.
5. A slot may be released while work on it is still under way, and is lent again at once together with that work
   (`Slot.after`): whoever acquires it lets everything that touches its memory wait for that first. So lending follows the
   order of the program, whatever runs late.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

import torch

from overspill.errors import BudgetError
from overspill.tiers.protocol import Memory
from overspill.units import align_up

SLOT_ALIGNMENT_BYTES = 4096
"""Granule of the size classes: a page, and the block that direct I/O wants."""


class Pending(Protocol):
    """Work that may still be under way."""

    @property
    def is_done(self) -> bool: ...

    def settle(self) -> object:
        """Block until it has ended, well or not."""
        ...


class Slot:
    """A borrowed buffer (rule 1). Leaving a `with` block releases it."""

    def __init__(self, pool: SlotPool, block_name: str, block: torch.Tensor, num_bytes: int, after: tuple[Pending, ...]) -> None:
        self._pool, self._block_name, self._block = pool, block_name, block
        self._is_released = False
        self.after = after
        """What must have ended before the slot's memory is touched (rule 5)."""
        self.num_bytes = num_bytes
        """Bytes that were asked for."""

    @property
    def tensor(self) -> torch.Tensor:
        """The slot's bytes, uint8 of shape [num_bytes], on the memory's device and with its alignment."""
        assert not self._is_released, f"slot {self._block_name} is used after its release"
        return self._block[: self.num_bytes]

    def release(self, after: Iterable[Pending] = ()) -> None:
        """Give the slot back; the bytes may be overwritten as soon as `after` has ended (rule 5)."""
        assert not self._is_released, f"slot {self._block_name} is released twice"
        self._is_released = True
        self._pool._take_back(self._block_name, self._block, self.num_bytes, tuple(work for work in after if not work.is_done))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._is_released:
            self.release()


class SlotPool:
    """Slots of exact size classes in one memory; thread-safe.

    Args:
        memory: where slots are allocated; its budget bounds the pool. The pool is the only one to free them.
        name: prefix of the allocations' names, for errors and reports.
    """

    def __init__(self, memory: Memory, name: str) -> None:
        self.name = name
        self._memory = memory
        self._lock = threading.Lock()
        self._idle: dict[int, collections.deque[tuple[str, torch.Tensor, tuple[Pending, ...]]]] = {}
        self._num_created = 0
        self._used_bytes = 0
        self._asked_bytes = 0
        self._idle_bytes = 0
        self._peak_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots lent now, rounded to their classes."""
        return self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most memory that the pool has held, lent and idle."""
        return self._peak_bytes

    @property
    def resident_bytes(self) -> int:
        """Memory that the pool holds now: slots lent and idle."""
        return self._used_bytes + self._idle_bytes

    @property
    def waste_bytes(self) -> int:
        """Memory held that nobody asked for: idle slots, and the rounding of those lent."""
        return self.resident_bytes - self._asked_bytes

    def acquire(self, num_bytes: int) -> Slot:
        """Borrow a slot of at least `num_bytes` bytes (rules 2 and 3).

        Raises:
            BudgetError: the memory's budget has no room for it, even without the idle slots.
        """
        if num_bytes <= 0:
            raise ValueError(f"{self.name}: a slot has at least 1 byte, got {num_bytes} B")
        size = align_up(num_bytes, SLOT_ALIGNMENT_BYTES)
        with self._lock:
            idle = self._idle.get(size)
            after: tuple[Pending, ...] = ()
            if idle:
                block_name, block, after = idle.popleft()
                self._idle_bytes -= size
            else:
                block_name, block = self._create(size)
            self._used_bytes += size
            self._asked_bytes += num_bytes
            self._peak_bytes = max(self._peak_bytes, self.resident_bytes)
        return Slot(self, block_name, block, num_bytes, tuple(work for work in after if not work.is_done))

    def trim(self) -> int:
        """Free all idle slots; their bytes."""
        with self._lock:
            return self._free_idle()

    def close(self) -> None:
        """Free all slots; none may be lent."""
        assert self._used_bytes == 0, f"pool {self.name} is closed with {self._used_bytes} B of slots lent"
        self.trim()

    def _create(self, size: int) -> tuple[str, torch.Tensor]:
        block_name = f"{self.name}/slot-{self._num_created}"
        self._num_created += 1
        try:
            return block_name, self._memory.allocate(block_name, size)
        except BudgetError:
            if not self._idle_bytes:
                raise
        self._free_idle()
        return block_name, self._memory.allocate(block_name, size)

    def _free_idle(self) -> int:
        freed, self._idle_bytes = self._idle_bytes, 0
        idle = [(block_name, after) for blocks in self._idle.values() for block_name, _, after in blocks]
        self._idle.clear()
        for block_name, after in idle:
            for work in after:
                work.settle()
            self._memory.free(block_name)
        return freed

    def _take_back(self, block_name: str, block: torch.Tensor, num_bytes: int, after: tuple[Pending, ...]) -> None:
        size = block.numel()
        with self._lock:
            self._used_bytes -= size
            self._asked_bytes -= num_bytes
            self._idle_bytes += size
            self._idle.setdefault(size, collections.deque()).append((block_name, block, after))
