"""A pool of slots whose places are known beforehand: one block of device or host memory, in which each slot has its offset.

The places come from `planning/arena.py`, in the order in which the program borrows. What has no place (no program is followed, or its
arena finds no room) is lent by a `SlotPool` beside it.

Rules:

1. `follow` names the places of the slots that are borrowed next. Slots that are lent already stay where they are; nobody is given
   bytes of theirs.
2. A slot's content is undefined when it is acquired, and it is lent together with all unfinished work that was handed over with any of
   its bytes (`Slot.after`): as in a `SlotPool`, whoever works on it next waits for that, and lending follows the program's order.
3. A block that grows is moved, which only happens while nothing in it is lent. One that is new comes with the work of its allocation.
4. Ctrl-C may come between any two lines here; `recover` counts everything anew from what the borrower says it has.
5. Who is in no program borrows with `borrow`: from the block if nothing in it is lent, else by size. What was lent by size and is idle is
   freed when the next program is followed.

Limit: host memory is pinned block by block, so where pinning is refused the whole block is pageable, and a warning says so.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence

import torch

from overspill.errors import BudgetError
from overspill.ranges import LeftWork
from overspill.spec.report import PoolReport, SizeClassReport
from overspill.tiers.pool import SLOT_ALIGNMENT_BYTES, Pending, Slot, SlotPool, Work, unfinished
from overspill.tiers.protocol import Memory
from overspill.units import align_up

FORGET_FROM = 8
"""Chosen: as many ranges are looked through in no time."""

Place = tuple[int, int]
"""(offset, bytes) of a slot in the arena."""


class Arena:
    """Slots of one memory by plan; thread-safe.

    Args:
        memory: where the block is allocated; its budget bounds it.
        name: prefix of the allocations' names, for errors and reports.
        fresh_work: called when memory was allocated: what must have ended before it is touched.
    """

    def __init__(self, memory: Memory, name: str, *, fresh_work: Callable[[], Iterable[Pending]] = tuple) -> None:
        self.name = name
        self.unplanned = SlotPool(memory, name, fresh_work=lambda: self._fresh_work())
        """Lends what has no place."""
        self._fresh_work = fresh_work
        self._memory = memory
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._block_name = ""
        self._block: torch.Tensor | None = None
        self._places: Sequence[Place] = ()
        self._next = 0
        self._lent: dict[str, tuple[int, int, int]] = {}
        """Slot -> offset, bytes held, bytes asked for."""
        self._starts: list[int] = []
        """Of the slots lent, in ascending order."""
        self._ends: dict[int, int] = {}
        """Of the slots lent: first byte -> the one behind the last."""
        self._used_bytes = self._asked_bytes = 0
        """Of the slots lent in the block."""
        self._left = LeftWork[Pending]()
        """Work still under way on bytes that nobody has."""
        self._most_left = FORGET_FROM
        """Ranges of it from which on those are forgotten whose work is over."""
        self._most_block_bytes = 0
        self._most_in_block = 0
        self._peak_bytes = 0
        self._peak_asked_bytes = 0
        self._most_lent = 0
        self._largest = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots lent now, rounded."""
        return self._used_bytes + self.unplanned.used_bytes

    @property
    def resident_bytes(self) -> int:
        """Memory held now, lent or not."""
        return self.block_bytes + self.unplanned.resident_bytes

    @property
    def block_bytes(self) -> int:
        """Of the block."""
        return self._block.numel() if self._block is not None else 0

    def follow(self, places: Sequence[Place], *, num_bytes: int) -> bool:
        """Lend by these places from now on (rule 1); whether the block of `num_bytes` could be had. If not, slots are lent by size.

        Raises:
            torch.OutOfMemoryError: the device itself has no room.
        """
        with self._lock:
            self._places, self._next = (), 0
            if num_bytes > self.block_bytes and not self._grow(num_bytes):
                return False
            self.unplanned.trim()
            self._places = places
            return True

    def has_room_beside_lent(self, num_bytes: int | None) -> bool:
        """Whether a program with a block of `num_bytes`, or None for slots by size, would leave no block unused beside its slots: what is
        lent in a block holds it as it is (rule 3)."""
        with self._lock:
            return not self._lent or (num_bytes is not None and num_bytes <= self.block_bytes)

    def leave(self) -> None:
        """Follow nothing: slots are lent by size."""
        with self._lock:
            self._places, self._next = (), 0

    def free_block(self) -> None:
        """Free the block, for slots lent by size, if no program is followed and nothing in it is lent."""
        with self._lock:
            if not self._lent and not self._places:
                self._free_block()

    def acquire(self, num_bytes: int) -> Slot:
        """Borrow the next slot, at least `num_bytes` bytes.

        Raises:
            BudgetError: it has no place, and the memory's budget has no room for it.
        """
        with self._lock:
            if not self._places:
                return self._noted(self.unplanned.acquire(num_bytes))
            assert self._next < len(self._places), f"{self.name}: the program borrows more than the {len(self._places)} slots of its plan"
            offset, size = self._places[self._next]
            assert size == align_up(num_bytes, SLOT_ALIGNMENT_BYTES), f"{self.name}: slot {self._next} has {size} B, asked {num_bytes} B"
            self._next += 1
            return self._lend(offset, size, num_bytes)

    def borrow(self, num_bytes: int) -> Slot:
        """Borrow a slot outside of a program (rule 5). What still used its bytes, of a step that lands, has ended when this returns.

        Raises:
            BudgetError: nothing in the block is free, and the memory's budget has no room beside it.
            KeyboardInterrupt: while it waited; nothing is borrowed.
        """
        slot = self._borrow_anywhere(num_bytes)
        try:
            for work in slot.after:
                work.settle()
        except BaseException:
            slot.release(slot.after)
            raise
        return slot

    def _borrow_anywhere(self, num_bytes: int) -> Slot:
        """In the idle block, else by size."""
        size = align_up(num_bytes, SLOT_ALIGNMENT_BYTES)
        with self._lock:
            if not self._lent and size <= self.block_bytes:
                return self._lend(0, size, num_bytes)
            self.unplanned.limit_bytes = None  # which was the program's
            try:
                return self._noted(self.unplanned.acquire(num_bytes))
            except BudgetError:
                if self._lent or self._block is None:
                    raise
                self.leave()
                self._free_block()
            return self._noted(self.unplanned.acquire(num_bytes))

    def recover(self, held: Iterable[Slot]) -> None:
        """Count the books anew after an interruption (rule 4): `held` are lent, all else is not; done again, it does no harm.

        No work on any slot may be under way.
        """
        slots = list(held)
        with self._lock:
            self.leave()
            blocks = self._memory.blocks(f"{self.name}/arena-")
            if self._block_name not in blocks:
                self._block_name, self._block = "", None
            for name in blocks:
                if name != self._block_name:  # it was allocated, and not taken
                    self._memory.free(name)
            kept = {slot.block_name: slot for slot in slots}
            self._lent = {name: place for name, place in self._lent.items() if name in kept and self._block is not None}
            self._left.clear()
            self._starts = sorted(offset for offset, _, _ in self._lent.values())
            self._ends = {offset: offset + size for offset, size, _ in self._lent.values()}
            self._used_bytes = sum(size for _, size, _ in self._lent.values())
            self._asked_bytes = sum(asked for _, _, asked in self._lent.values())
            self.unplanned.recover(slot for slot in slots if slot.block_name not in self._lent)

    def trim(self) -> int:
        """Free all that is not lent; its bytes."""
        with self._lock:
            freed = self.unplanned.trim()
            if self._block is not None and not self._lent and not self._places:
                freed += self.block_bytes
                self._free_block()
            return freed

    def report(self) -> PoolReport:
        """What the arena, and the pool beside it, hold now and have held at most."""
        with self._lock:
            beside = self.unplanned.report()
            if not self._most_block_bytes:
                return beside
            arena = SizeClassReport(
                slot_bytes=self._largest,
                used_bytes=self._used_bytes,
                wasted_bytes=self._used_bytes - self._asked_bytes,
                idle_bytes=self.block_bytes - self._used_bytes,
                peak_bytes=self._most_block_bytes,
                most_in_flight=self._most_in_block,
            )
            return PoolReport(
                name=self.name,
                classes=(arena, *beside.classes),
                peak_bytes=self._peak_bytes,
                peak_asked_bytes=self._peak_asked_bytes,
                most_in_flight=self._most_lent,
                num_created=beside.num_created,
                num_trimmed=beside.num_trimmed,
            )

    def _noted(self, slot: Slot) -> Slot:
        """A slot that was lent by size."""
        self._note()
        return slot

    def _note(self) -> None:
        """Peaks of block and slots by size together."""
        self._peak_bytes = max(self._peak_bytes, self.resident_bytes)
        self._peak_asked_bytes = max(self._peak_asked_bytes, self._asked_bytes + self.unplanned.asked_bytes)
        self._most_lent = max(self._most_lent, len(self._lent) + self.unplanned.num_lent)

    def _grow(self, num_bytes: int) -> bool:
        """A larger block, if nothing in the old one is lent (rule 3) and the budget has room; slots lent by size make room for it."""
        if self._lent:
            return False
        self._free_block()
        self.unplanned.trim()
        name = f"{self.name}/arena-{next(self._numbers)}"
        try:
            block = self._memory.allocate(name, num_bytes)
        except BudgetError:
            return False
        self._block_name, self._block = name, block
        self._left.clear()
        self._left.leave(0, num_bytes, unfinished(self._fresh_work()))
        self._most_block_bytes = max(self._most_block_bytes, num_bytes)
        self._note()
        return True

    def _free_block(self) -> None:
        if self._block is None:
            return
        for item in self._left:
            item.settle()  # Ctrl-C may end this: the block is there still
        name, self._block_name, self._block = self._block_name, "", None
        self._left.clear()
        self._memory.free(name)

    def _lend(self, offset: int, size: int, num_bytes: int) -> Slot:
        assert self._block is not None
        end = offset + size
        index = bisect.bisect_left(self._starts, offset)
        for other in self._starts[max(0, index - 1) : index + 1]:
            stop = self._ends[other]
            assert stop <= offset or end <= other, f"{self.name}: bytes {offset} to {end} are lent, {other} to {stop}"
        after = unfinished(self._left.take(offset, end))
        name = f"{self.name}/arena-slot-{next(self._numbers)}"
        self._lent[name] = (offset, size, num_bytes)
        self._starts.insert(index, offset)
        self._ends[offset] = end
        self._used_bytes += size
        self._asked_bytes += num_bytes
        self._most_in_block, self._largest = max(self._most_in_block, len(self._lent)), max(self._largest, size)
        self._note()
        view = self._block[offset:end].data  # its own version counter: to write to one slot changes no other
        return Slot(self, name, view, num_bytes, after)

    def take_back(self, block_name: str, block: torch.Tensor, num_bytes: int, after: Work) -> None:
        """See `Slot.release`."""
        torch.autograd.graph.increment_version(block)  # a graph that still reads the slot is refused by autograd
        with self._lock:
            offset, size, asked = self._lent.pop(block_name)
            del self._starts[bisect.bisect_left(self._starts, offset)]
            del self._ends[offset]
            self._used_bytes -= size
            self._asked_bytes -= asked
            if after:
                self._left.leave(offset, offset + size, after)
            if len(self._left) >= self._most_left:  # not each time: asking a GPU's event takes a microsecond
                self._left.forget(lambda item: item.is_done)
                self._most_left = max(FORGET_FROM, 2 * len(self._left))
