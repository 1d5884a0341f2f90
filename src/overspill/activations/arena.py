"""Ranges of host memory for saved tensors, lent from segments that are pinned once.

A saved tensor's size changes with every batch's length, so slots of exact size classes would be pinned and unpinned all the time. Lifetimes
however are those of a stack (what forward saves last, backward drops first), which first fit in one address range serves with next to no
fragmentation: a round takes its ranges from the front of the first segment, and leaves all free. And most rounds are like the one before:
what is given back stays cut as it is, for a request of the same length, until one of another length comes: cut around them, what that
takes would leave holes when there is room no more.

Rules:

1. A segment is allocated when no other has room, and is kept: pinning costs (`tiers/pinned.py`). Only a request that fits nowhere frees
   segments that are empty. What is cut of sixteen segments wastes the end of each: tensors of a little more than half of a segment fill
   half of the arena. Where a request was refused while more than `MOST_TORN` of it was free, `mend` makes fewer and larger segments, all
   pinned anew; at most twice in an arena's life.
2. A range is the borrower's until `give`. It may be given back with work that still touches it; whoever gets any of the same bytes next
   gets that work too (`Range.after`), and lets whatever touches the bytes wait for it.
3. `take` never waits and never raises for want of room: it says None.

Thread-safe: the SSD's threads give ranges back.
"""

from __future__ import annotations

import collections
import itertools
import threading
import warnings
from collections.abc import Iterable

import torch

from overspill.activations.links import End
from overspill.errors import BudgetError
from overspill.tiers import Memory
from overspill.tiers.extents import EXTENT_ALIGNMENT_BYTES, ExtentTable
from overspill.units import MIB, align_up

LEAST_SEGMENT_BYTES = 256 * MIB
"""Grown by at least this much at a time: 0.1 s of pinning. Chosen."""
MOST_SEGMENTS = 16
"""Of which an arena of its full size consists, so that large tensors find room beside small ones. Chosen."""

MOST_TORN = 1 / 8
"""Of the limit: what may be free and of no use. Chosen: less is what the ends of sixteen segments usually are."""
LARGER = 4
"""Times the size are the segments after that: sixteen, four, one."""


class _Segment:
    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.table = ExtentTable(tensor.numel())
        self.pending: collections.deque[tuple[int, int, End]] = collections.deque()
        """Bytes that were given back, first and last + 1, and the work that touched them, about in the order in which it ends."""

    def after(self, start: int, stop: int) -> tuple[End, ...]:
        """What still touches these bytes. Asks as few of them as it can: each is a call of the device's driver."""
        self.forget_ended()
        return tuple(end for other, last, end in self.pending if other < stop and last > start and not end.is_done)

    def forget_ended(self) -> None:
        """The oldest; one that ends out of turn goes with those before it."""
        while self.pending and self.pending[0][2].is_done:
            self.pending.popleft()


class Range:
    """Borrowed bytes (rule 2)."""

    __slots__ = ("_is_lent", "_segment", "_name", "after", "num_bytes", "tensor")

    def __init__(self, segment: _Segment, name: str, tensor: torch.Tensor, num_bytes: int, after: tuple[End, ...]) -> None:
        self._segment, self._name, self.tensor, self.after = segment, name, tensor, after
        self.num_bytes = num_bytes
        """What it takes of its arena."""
        self._is_lent = True


class HostArena:
    """Ranges in at most `limit_bytes` of one memory.

    Args:
        segment_bytes: None: what the limit suggests.
    """

    def __init__(self, memory: Memory, name: str, *, limit_bytes: int, segment_bytes: int | None = None) -> None:
        self._memory, self._name, self.limit_bytes = memory, name, limit_bytes // EXTENT_ALIGNMENT_BYTES * EXTENT_ALIGNMENT_BYTES
        self._segment_bytes = align_up(segment_bytes or max(LEAST_SEGMENT_BYTES, limit_bytes // MOST_SEGMENTS), EXTENT_ALIGNMENT_BYTES)
        self._is_refused = False
        self._is_torn = False
        """Whether a request was refused for want of a whole piece, and not of bytes."""
        self._segments: list[_Segment] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._spare: dict[int, list[Range]] = {}
        """What was given back and is cut still, by length."""
        self.used_bytes = 0
        self.peak_bytes = 0

    def take(self, num_bytes: int) -> Range | None:
        """A range of `num_bytes`, on a page; None: there is no room."""
        with self._lock:
            found = self._take_spare(num_bytes)
            if found is None:
                self._join_spares()
                found = self._cut_anywhere(num_bytes)
            if found is None and (grown := self._grow(align_up(num_bytes, EXTENT_ALIGNMENT_BYTES))) is not None:
                found = self._cut(grown, num_bytes)
            if found is not None:
                self.used_bytes += found.num_bytes
                self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            elif not self._is_refused:
                free_bytes = self.limit_bytes - self.used_bytes
                self._is_torn = self._is_torn or (free_bytes >= num_bytes and free_bytes > MOST_TORN * self.limit_bytes)
            return found

    def give(self, item: Range, after: Iterable[End] = ()) -> None:
        """Take a range back, with the work that still touches it."""
        with self._lock:
            assert item._is_lent, f"{item._name} of {self._name} is given back twice"
            item._is_lent, item.after = False, (*item.after, *after)  # who gives it back unused has waited for nothing
            self._spare.setdefault(item.tensor.numel(), []).append(item)
            self.used_bytes -= item.num_bytes

    def mend(self) -> None:
        """Begin anew with larger segments, if that is wanted (rule 1) and nothing is lent. Takes as long as pinning; call it where nobody
        measures."""
        if not self._is_torn:
            return
        with self._lock:
            if not self.used_bytes and self._segment_bytes < self.limit_bytes:
                self._drop_all()
                self._segment_bytes, self._is_torn = min(LARGER * self._segment_bytes, self.limit_bytes), False

    def close(self) -> None:
        """Free all. Nothing is lent, unless Ctrl-C came between a range and its record; no copy may be under way."""
        with self._lock:
            self._drop_all()

    def _take_spare(self, num_bytes: int) -> Range | None:
        """The one of this length that was given back last. As a new object: who has the old one has nothing."""
        spare = self._spare.get(num_bytes)
        if not spare:
            return None
        item = spare[-1]
        found = Range(item._segment, item._name, item.tensor, item.num_bytes, tuple([end for end in item.after if not end.is_done]))
        spare.pop()
        return found

    def _join_spares(self) -> None:
        """Give their bytes back to the segments, for requests of any length."""
        if not self._spare:
            return
        spares, self._spare = self._spare, {}
        for item in (item for same in spares.values() for item in same):
            extent = item._segment.table.find(item._name)
            item._segment.table.free(item._name)
            item._segment.forget_ended()
            item._segment.pending += [(extent.offset, extent.end, end) for end in item.after if not end.is_done]

    def _cut_anywhere(self, num_bytes: int) -> Range | None:
        for segment in self._segments:
            if segment.table.free_bytes >= num_bytes and (found := self._cut(segment, num_bytes)) is not None:
                return found
        return None

    def _cut(self, segment: _Segment, num_bytes: int) -> Range | None:
        name = str(next(self._numbers))
        try:
            extent = segment.table.allocate(name, num_bytes)
        except BudgetError:
            return None
        tensor, after = segment.tensor[extent.offset : extent.offset + num_bytes], segment.after(extent.offset, extent.end)
        return Range(segment, name, tensor, align_up(num_bytes, EXTENT_ALIGNMENT_BYTES), after)

    def _grow(self, num_bytes: int) -> _Segment | None:
        """A new segment; where there is no room for one, empty segments go first (rule 1)."""
        held = sum(segment.tensor.numel() for segment in self._segments)
        if held + num_bytes > self.limit_bytes:
            if self.used_bytes + num_bytes > self.limit_bytes:
                return None
            for segment in [segment for segment in self._segments if segment.table.allocated_bytes == 0]:
                self._drop(segment)
                held -= segment.tensor.numel()
                if held + num_bytes <= self.limit_bytes:
                    break
            else:
                return None
        name = f"{self._name}[{next(self._numbers)}]"
        try:
            tensor = self._memory.allocate(name, min(max(self._segment_bytes, num_bytes), self.limit_bytes - held))
        except BudgetError as error:  # of the system: our own limit was looked at
            if not self._is_refused:
                self._is_refused = True
                warnings.warn(
                    f"saved tensors stay on the device, or go to the SSD, for want of host memory: {error}", RuntimeWarning, stacklevel=2
                )
            return None
        self._segments.append(_Segment(name, tensor))
        return self._segments[-1]

    def _drop_all(self) -> None:
        self._join_spares()
        for segment in list(self._segments):
            self._drop(segment)

    def _drop(self, segment: _Segment) -> None:
        """Free an empty segment; where waiting for what touched it fails, or is broken off, the arena has it as before."""
        for _, _, end in segment.pending:
            end.wait()
        self._segments.remove(segment)
        self._memory.free(segment.name)


__all__ = ["HostArena", "Range"]
