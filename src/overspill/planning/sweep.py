"""Places for a program's slots in one pass through it: quick, for programs with thousands of slots.

The program is gone through in its order. A slot that is given back leaves a gap, neighbouring gaps are one, and a slot that is borrowed
takes a gap that has room for it: the lowest one, or the tightest one (`Fit`). Where no gap has room the arena grows.

Slots with a place of their own (gradients that wait, `planning/arena.py`, rule 1) leave a gap while they are not there. It is taken only
by what is given back before they come, bundle by bundle: from when the first chunk of a bundle comes, the room of all its chunks is
kept clear.

Rest. Whoever is given bytes waits for the work that is left on them. If a slot is given the bytes that were given back last, its lane waits
for the one that just got them off its hands, and lanes that could overlap take turns. `with_rest` therefore keeps a slot's bytes for a
while after it was given back, oldest first to go, as far as lent and resting slots together stay below a bound.

Cost: some 2 us a slot. Limit: of `MOST_LOOKS` gaps none has room, then the slot goes to the end, though a later gap may have had it.
"""

from __future__ import annotations

import bisect
import collections
import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MOST_LOOKS = 256
"""Gaps that are looked at for one slot. Chosen: programs of real models have a few at a time."""

ENDLESS = 1 << 62
"""More bytes than there are."""


class Fit(enum.Enum):
    """Which gap a slot takes."""

    LOWEST = "lowest"
    TIGHTEST = "tightest"


class Lifetime(NamedTuple):
    """One slot, from the event that borrows it to the one that gives it back, the latter left out. A tuple: there are many thousands."""

    number: int
    num_bytes: int
    begin: int
    end: int
    offset: int | None
    """Where it must lie; None: anywhere."""
    is_waiting: bool
    """There before the program's first op."""
    bundle: str = ""


def sweep(items: Sequence[Lifetime], *, wanted_bytes: int, fit: Fit) -> tuple[dict[int, int], int]:
    """Offsets by slot, and the end of the highest.

    Args:
        items: in the order in which they are borrowed.
        wanted_bytes: as large as the arena should be: the tightest gap within it is preferred to what lies beyond.
    """
    gaps, reserved = _Gaps(), _Reserved(items)
    offsets: dict[int, int] = {}
    leaving = sorted(items, key=lambda item: item.end)
    next_leaving = highest = 0
    for item in items:
        while leaving[next_leaving].end <= item.begin:
            gone = leaving[next_leaving]
            gaps.give(offsets[gone.number], offsets[gone.number] + gone.num_bytes)
            next_leaving += 1
        offset = item.offset if item.offset is not None else _find(gaps, reserved, item, wanted_bytes=wanted_bytes, fit=fit)
        gaps.take(offset, offset + item.num_bytes)
        offsets[item.number] = offset
        highest = max(highest, offset + item.num_bytes)
    return offsets, highest


def with_rest(items: Sequence[Lifetime], *, limit_bytes: int) -> list[Lifetime]:
    """The same slots, each kept on after its end while what is lent and what rests take no more than `limit_bytes` together.

    Slots with a place of their own do not rest: nobody else is given it soon.
    """
    last = max((item.end for item in items), default=0)
    leaving = sorted((item for item in items if item.end < last), key=lambda item: item.end)
    ends: dict[int, int] = {}
    resting: collections.deque[Lifetime] = collections.deque()
    held_bytes = next_leaving = 0
    for item in items:
        while next_leaving < len(leaving) and leaving[next_leaving].end <= item.begin:
            gone = leaving[next_leaving]
            next_leaving += 1
            if gone.offset is None:
                resting.append(gone)
            else:
                held_bytes -= gone.num_bytes
        held_bytes += item.num_bytes
        while resting and held_bytes > limit_bytes:
            woken = resting.popleft()
            held_bytes -= woken.num_bytes
            ends[woken.number] = item.begin
    ends.update((item.number, last) for item in resting)
    return [Lifetime(*item[:3], ends[item.number], *item[4:]) if item.number in ends else item for item in items]


def _find(gaps: _Gaps, reserved: _Reserved, item: Lifetime, *, wanted_bytes: int, fit: Fit) -> int:
    best: tuple[int, int] | None = None
    for low, high in gaps.near_the_bottom():
        offset = reserved.find(low, high, item)
        if offset is None:
            continue
        if fit is Fit.LOWEST:
            return offset
        room = (wanted_bytes if high == ENDLESS and offset + item.num_bytes <= wanted_bytes else high) - offset
        if best is None or room < best[0]:
            best = room, offset
    assert best is not None, "the last gap has no end"
    return best[1]


class _Gaps:
    """Ranges that nobody has, in ascending order; the last one has no end."""

    def __init__(self) -> None:
        self._starts, self._ends = [0], [ENDLESS]

    def near_the_bottom(self) -> Iterator[tuple[int, int]]:
        """The lowest ones, and the last."""
        yield from zip(self._starts[: MOST_LOOKS - 1], self._ends[: MOST_LOOKS - 1], strict=True)
        if len(self._starts) >= MOST_LOOKS:
            yield self._starts[-1], self._ends[-1]

    def take(self, start: int, end: int) -> None:
        index = bisect.bisect_right(self._starts, start) - 1
        low, high = self._starts[index], self._ends[index]
        assert low <= start and end <= high, f"bytes {start} to {end} are taken"
        rest = [(first, last) for first, last in ((low, start), (end, high)) if first < last]
        self._starts[index : index + 1] = [first for first, _ in rest]
        self._ends[index : index + 1] = [last for _, last in rest]

    def give(self, start: int, end: int) -> None:
        index = bisect.bisect_left(self._starts, start)
        joins_after = index < len(self._starts) and self._starts[index] == end
        if index and self._ends[index - 1] == start:
            self._ends[index - 1] = self._ends[index] if joins_after else end
            if joins_after:
                del self._starts[index], self._ends[index]
        elif joins_after:
            self._starts[index] = start
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)


class _Reserved:
    """The room of slots with places of their own, bundle by bundle, and when each is wanted."""

    def __init__(self, items: Sequence[Lifetime]) -> None:
        rooms: dict[str, tuple[int, int, list[int]]] = {}
        for item in items:
            if item.offset is not None:
                low, high, begins = rooms.get(item.bundle, (item.offset, 0, []))
                rooms[item.bundle] = min(low, item.offset), max(high, item.offset + item.num_bytes), [*begins, item.begin]
        self._rooms = sorted((low, high, sorted(begins)) for low, high, begins in rooms.values())
        self._starts = [low for low, _, _ in self._rooms]
        self._end = max((high for _, high, _ in self._rooms), default=0)

    def find(self, low: int, high: int, item: Lifetime) -> int | None:
        """The lowest offset in a gap at which an item keeps clear of what comes while it is there; None: it has no room."""
        offset = low
        while offset + item.num_bytes <= high:
            if offset >= self._end:
                return offset
            blocked = self._blocked_until(offset, offset + item.num_bytes, item)
            if blocked is None:
                return offset
            offset = blocked
        return None

    def _blocked_until(self, start: int, end: int, item: Lifetime) -> int | None:
        """The end of the first room in [start, end) that is wanted while the item is there."""
        first = max(0, bisect.bisect_right(self._starts, start) - 1)
        for room_start, room_end, begins in self._rooms[first : bisect.bisect_left(self._starts, end)]:
            if room_end > start and room_start < end:
                next_one = bisect.bisect_right(begins, item.begin)
                if next_one < len(begins) and begins[next_one] < item.end:
                    return room_end
        return None
