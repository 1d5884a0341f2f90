"""The table of a store: which name owns which byte range, and which ranges are free. Pure bookkeeping, no I/O.

Rules:

1. An extent is one contiguous range that starts on 4096 bytes and takes a multiple of 4096, which direct I/O wants.
2. First fit: an extent takes the lowest free range that is long enough. Freed ranges merge with free neighbours.
3. `high_water` is the end of the highest range ever owned: beyond it the file has never been written.

Limits: an extent is never split over several ranges, so a fragmented table can refuse what its free bytes would hold; the
error then says how long the longest range is. Training allocates its states once, in one order, and does not fragment.
"""

from __future__ import annotations

import dataclasses

from overspill.errors import BudgetError
from overspill.units import align_up, format_bytes

EXTENT_ALIGNMENT_BYTES = 4096
"""The largest logical block of common drives, and the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """The bytes of one name."""

    name: str
    offset: int
    """First byte in the store."""
    num_bytes: int
    """As asked for; the range is longer by rounding (`end`)."""

    @property
    def end(self) -> int:
        """End of the range that belongs to this extent alone."""
        return self.offset + align_up(self.num_bytes, EXTENT_ALIGNMENT_BYTES)

    def validate_range(self, offset: int, num_bytes: int) -> None:
        """Raise ValueError unless [offset, offset + num_bytes) lies inside."""
        if offset < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(f"bytes [{offset}, {offset + num_bytes}) are outside of {self.name}, which has {self.num_bytes} B")


class ExtentTable:
    """Names and their extents in a store of `capacity_bytes`; not thread-safe, its store locks.

    Args:
        capacity_bytes: bytes of the store; what is beyond the last multiple of 4096 stays unused.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < EXTENT_ALIGNMENT_BYTES:
            raise ValueError(f"a store has at least {EXTENT_ALIGNMENT_BYTES} B, got {capacity_bytes} B; raise --ssd-budget")
        self.capacity_bytes = capacity_bytes // EXTENT_ALIGNMENT_BYTES * EXTENT_ALIGNMENT_BYTES
        self.high_water = 0
        self._extents: dict[str, Extent] = {}
        self._free: list[tuple[int, int]] = [(0, self.capacity_bytes)]
        """Free ranges [start, end), ascending, no two touching."""

    @property
    def free_bytes(self) -> int:
        return sum(end - start for start, end in self._free)

    @property
    def allocated_bytes(self) -> int:
        return self.capacity_bytes - self.free_bytes

    def find(self, name: str) -> Extent:
        """The extent of a name; ValueError if it has none."""
        if name not in self._extents:
            raise ValueError(f"{name} is not allocated in this store")
        return self._extents[name]

    def allocate(self, name: str, num_bytes: int) -> Extent:
        """Give a name the first free range that is long enough (rule 2).

        Raises:
            BudgetError: there is none; the table is unchanged.
        """
        if num_bytes <= 0:
            raise ValueError(f"{name}: an extent has at least 1 byte, got {num_bytes} B")
        if name in self._extents:
            raise ValueError(f"{name} is already allocated in this store, with {self._extents[name].num_bytes} B")
        size = align_up(num_bytes, EXTENT_ALIGNMENT_BYTES)
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                extent = Extent(name=name, offset=start, num_bytes=num_bytes)
                rest = [(start + size, end)] if end - start > size else []
                self.high_water = max(self.high_water, extent.end)
                # Without a call between the two: Ctrl-C is seen at calls, and a range that left one book is in the other.
                self._free[index : index + 1] = rest
                self._extents[name] = extent
                return extent
        longest = max((end - start for start, end in self._free), default=0)
        raise BudgetError(
            f"{name} needs {format_bytes(size)} ({size} B) but the SSD budget of {format_bytes(self.capacity_bytes)} leaves "
            f"{format_bytes(self.free_bytes)} ({self.free_bytes} B), at most {longest} B of it in one piece; "
            f"raise --ssd-budget to at least {self.capacity_bytes + size - longest} B"
        )

    def adopt(self, name: str, offset: int, num_bytes: int) -> Extent:
        """Give a name the range at `offset`, which an earlier run gave it.

        Raises:
            ValueError: the range is not free, not aligned, or outside of the store; the table is unchanged.
        """
        extent = Extent(name=name, offset=offset, num_bytes=num_bytes)
        inside = next(((start, end) for start, end in self._free if start <= offset and extent.end <= end), None)
        if num_bytes <= 0 or offset % EXTENT_ALIGNMENT_BYTES or name in self._extents or inside is None:
            raise ValueError(
                f"{name} cannot have bytes [{offset}, {extent.end}) of a store of {self.capacity_bytes} B: they are in use, not aligned, "
                "or outside of it"
            )
        start, end = inside
        index = self._free.index(inside)
        self._free[index : index + 1] = [(a, b) for a, b in ((start, offset), (extent.end, end)) if a < b]
        self._extents[name] = extent
        self.high_water = max(self.high_water, extent.end)
        return extent

    def free(self, name: str) -> None:
        """Take a name's range back (rule 2)."""
        extent = self.find(name)
        del self._extents[name]
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._free, (extent.offset, extent.end)]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self._free = merged
