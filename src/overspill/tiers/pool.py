"""A pool of slots: buffers that are borrowed for one fetch or evict and used again by the next.

A **slot** is a buffer of one **size class**: the wanted bytes rounded up to 4096. Each class has its own free list, so a
small tensor never occupies the space of the largest one. That is MemAscend's adaptive buffer pool (arXiv:2505.23254); pools
with one slot size for all tensors, as in DeepSpeed's swapper, waste most of their bytes as soon as an embedding is among
them.

Rules:

1. A slot is used by whoever acquired it until `release()`; its tensor, and every view of it, is dead afterwards. Using the
   slot again, or releasing it again, is asserted; a kept view cannot be seen from here.
2. A slot's content is undefined when it is acquired.
3. Acquiring takes an idle slot of the class (the one released first: whatever still works on it is likeliest to be done), else it
   allocates one. Where `limit_bytes` or the memory's budget leaves no room for it, idle slots of other classes are freed first, the
   one that was idle longest first, and no more of them than needed.
4. The pool never waits for a slot: how many are in flight is the Schedule's decision, and `validate` proved that they fit.
5. A slot may be released while work on it is still under way, and is lent again at once together with that work (`Slot.after`):
   whoever acquires it lets everything that touches its memory wait for that first. So lending follows the order of the program,
   whatever runs late. A slot that was just allocated comes with the work of its allocation (`fresh_work`).
6. Ctrl-C may come between any two lines here and at the borrower's, so counters and lists may disagree after it. `recover` takes two
   things as true, the memory's allocations and the slots that the borrower says it has, and counts everything anew from them.

Costs: freeing unpins and allocating pins again, so a limit below what a step's classes need together costs time in every step;
`PoolReport.num_trimmed` says how often that happened.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol, Self

import torch

from overspill.errors import BudgetError
from overspill.spec.report import PoolReport, SizeClassReport
from overspill.tiers.protocol import Memory
from overspill.units import align_up, format_bytes

SLOT_ALIGNMENT_BYTES = 4096
"""Granule of the size classes: a page, and the block that direct I/O wants."""


class Pending(Protocol):
    """Work that may still be under way."""

    @property
    def is_done(self) -> bool: ...

    def settle(self) -> object:
        """Block until it has ended, well or not; Ctrl-C passes through."""
        ...


Work = tuple[Pending, ...]


class Lender(Protocol):
    """Whoever lends slots."""

    def take_back(self, block_name: str, block: torch.Tensor, num_bytes: int, after: Work) -> None: ...


class Slot:
    """A borrowed buffer (rule 1). Leaving a `with` block releases it."""

    def __init__(self, pool: Lender, block_name: str, block: torch.Tensor, num_bytes: int, after: Work) -> None:
        self._pool, self._block = pool, block
        self.block_name = block_name
        """The pool's name for it."""
        self._is_released = False
        self.after = after
        """What must have ended before the slot's memory is touched (rule 5)."""
        self.num_bytes = num_bytes
        """Bytes that were asked for."""

    @property
    def tensor(self) -> torch.Tensor:
        """The slot's bytes, uint8 of shape [num_bytes], on the memory's device and with its alignment."""
        assert not self._is_released, f"slot {self.block_name} is used after its release"
        return self._block[: self.num_bytes]

    def release(self, after: Iterable[Pending] = ()) -> None:
        """Give the slot back; the bytes may be overwritten as soon as `after` has ended (rule 5)."""
        assert not self._is_released, f"slot {self.block_name} is released twice"
        self._is_released = True
        self._pool.take_back(self.block_name, self._block, self.num_bytes, unfinished(after))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._is_released:
            self.release()


class _SizeClass:
    """The slots of one size, and what was seen of them."""

    def __init__(self) -> None:
        self.idle: collections.deque[tuple[int, str, torch.Tensor, Work]] = collections.deque()
        """(when it was released, name, block, work still under way); the newest last."""
        self.num_lent = 0
        self.asked_bytes = 0
        """Of the slots lent now."""
        self.most_lent = 0
        self.most_held = 0


class SlotPool:
    """Slots of exact size classes in one memory; thread-safe.

    Args:
        memory: where slots are allocated; its budget bounds the pool. The pool is the only one to free them.
        name: prefix of the allocations' names, for errors and reports.
        fresh_work: called when a slot was allocated: what must have ended before its memory is touched.
        limit_bytes: most bytes held, lent and idle; None: only the memory's budget. May be changed at any time, and holds from the
            next `acquire` on.
    """

    def __init__(
        self, memory: Memory, name: str, *, limit_bytes: int | None = None, fresh_work: Callable[[], Iterable[Pending]] = tuple
    ) -> None:
        self.name = name
        self._fresh_work = fresh_work
        self.limit_bytes = limit_bytes
        self._memory = memory
        # Reentrant: a collected slot may be released while this thread is inside.
        self._lock = threading.RLock()
        self._classes: collections.defaultdict[int, _SizeClass] = collections.defaultdict(_SizeClass)
        self._numbers = itertools.count()
        self._num_created = 0
        self._num_trimmed = 0
        self._num_released = 0
        self._used_bytes = 0
        self._asked_bytes = 0
        self._idle_bytes = 0
        self._num_lent = 0
        self._peak_bytes = 0
        self._peak_asked_bytes = 0
        self._most_lent = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots lent now, rounded to their classes."""
        return self._used_bytes

    @property
    def asked_bytes(self) -> int:
        """Bytes that were asked for of the slots lent now."""
        return self._asked_bytes

    @property
    def num_lent(self) -> int:
        return self._num_lent

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
            BudgetError: `limit_bytes` or the memory's budget has no room for it, even without the idle slots.
        """
        if num_bytes <= 0:
            raise ValueError(f"{self.name}: a slot has at least 1 byte, got {num_bytes} B")
        size = align_up(num_bytes, SLOT_ALIGNMENT_BYTES)
        with self._lock:
            if size in self._classes and self._classes[size].idle:
                _, block_name, block, after = self._classes[size].idle.popleft()
                self._idle_bytes -= size
            else:
                block_name, block = self._create(size)
                after = tuple(self._fresh_work())
            self._note_lent(self._classes[size], size, num_bytes)
        return Slot(self, block_name, block, num_bytes, unfinished(after))

    def recover(self, held: Iterable[Slot]) -> None:
        """Count the books anew after an interruption (rule 6): `held` are lent, all else is idle; done again, it does no harm.

        No work on any slot may be under way.
        """
        lent = {slot.block_name: slot.num_bytes for slot in held}
        with self._lock:
            for item in self._classes.values():
                item.idle.clear()
                item.num_lent = item.asked_bytes = 0
            self._num_lent = self._used_bytes = self._asked_bytes = self._idle_bytes = 0
            for block_name, block in self._memory.blocks(f"{self.name}/slot-").items():
                size, num_bytes = block.numel(), lent.get(block_name)
                if num_bytes is None:
                    self._classes[size].idle.append((self._num_released, block_name, block, ()))
                    self._num_released += 1
                    self._idle_bytes += size
                else:
                    self._note_lent(self._classes[size], size, num_bytes)

    def trim(self) -> int:
        """Free all idle slots; their bytes."""
        with self._lock:
            return self._free_idle(self._idle_bytes)

    def close(self) -> None:
        """Free all slots; none may be lent."""
        assert self._used_bytes == 0, f"pool {self.name} is closed with {self._used_bytes} B of slots lent"
        self.trim()

    def report(self) -> PoolReport:
        """What the pool holds now, and the most it has held."""
        with self._lock:
            classes = tuple(
                SizeClassReport(
                    slot_bytes=size,
                    used_bytes=item.num_lent * size,
                    wasted_bytes=item.num_lent * size - item.asked_bytes,
                    idle_bytes=len(item.idle) * size,
                    peak_bytes=item.most_held * size,
                    most_in_flight=item.most_lent,
                )
                for size, item in sorted(self._classes.items(), reverse=True)
            )
            return PoolReport(
                name=self.name,
                classes=classes,
                peak_bytes=self._peak_bytes,
                peak_asked_bytes=self._peak_asked_bytes,
                most_in_flight=self._most_lent,
                num_created=self._num_created,
                num_trimmed=self._num_trimmed,
            )

    def _note_lent(self, item: _SizeClass, size: int, num_bytes: int) -> None:
        item.num_lent += 1
        item.asked_bytes += num_bytes
        item.most_lent = max(item.most_lent, item.num_lent)
        item.most_held = max(item.most_held, item.num_lent + len(item.idle))
        self._num_lent += 1
        self._most_lent = max(self._most_lent, self._num_lent)
        self._used_bytes += size
        self._asked_bytes += num_bytes
        self._peak_asked_bytes = max(self._peak_asked_bytes, self._asked_bytes)
        self._peak_bytes = max(self._peak_bytes, self.resident_bytes)

    def _create(self, size: int) -> tuple[str, torch.Tensor]:
        block_name = f"{self.name}/slot-{next(self._numbers)}"  # never one that an interrupted allocation may have
        if self.limit_bytes is not None:
            if self._used_bytes + size > self.limit_bytes:
                left = self.limit_bytes - self._used_bytes
                raise BudgetError(
                    f"{block_name} needs {format_bytes(size)} ({size} B) but the limit of pool {self.name}, "
                    f"{format_bytes(self.limit_bytes)}, leaves {format_bytes(left)} ({left} B) beside what is lent"
                )
            self._free_idle(self.resident_bytes + size - self.limit_bytes)
        while True:
            try:
                block = self._memory.allocate(block_name, size)
                break
            except BudgetError:
                if not self._free_idle(1):
                    raise
        self._num_created += 1
        return block_name, block

    def _free_idle(self, wanted_bytes: int) -> int:
        """Free idle slots, longest idle first, until `wanted_bytes` are free or none is left; the bytes freed."""
        freed = 0
        while freed < wanted_bytes and self._idle_bytes:
            size, item = min(((size, item) for size, item in self._classes.items() if item.idle), key=lambda entry: entry[1].idle[0][0])
            for work in item.idle[0][3]:
                work.settle()  # Ctrl-C may end this: the slot is idle still
            _, block_name, block, _ = item.idle.popleft()
            del block  # or device memory would not be free
            self._idle_bytes -= size
            self._num_trimmed += 1
            freed += size
            self._memory.free(block_name)
        return freed

    def take_back(self, block_name: str, block: torch.Tensor, num_bytes: int, after: Work) -> None:
        """See `Slot.release`."""
        size = block.numel()
        with self._lock:
            item = self._classes[size]
            item.num_lent -= 1
            item.asked_bytes -= num_bytes
            item.idle.append((self._num_released, block_name, block, after))
            self._num_released += 1
            self._num_lent -= 1
            self._used_bytes -= size
            self._asked_bytes -= num_bytes
            self._idle_bytes += size


def unfinished(work: Iterable[Pending]) -> Work:
    """What of it may still be under way."""
    return tuple(item for item in work if not item.is_done)
