"""Byte ranges that nobody has, with the work that is left on them.

Who hands bytes on before the work on them has ended must tell whoever gets any of them next. The runtime keeps this book with completions
(`tiers/arena.py`), the planner with the numbers of ops (`planning/buffers.py`).

Costs: a look-up finds its first range by bisection, so a book of some thousand ranges is asked in microseconds.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Work = TypeVar("Work")


class LeftWork(Generic[Work]):
    """Ranges [start, end) that do not overlap, each with the work left on it; a range without work need not be noted."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, Sequence[Work]]] = []
        """In ascending order, as `_starts` has their first bytes."""

    def __len__(self) -> int:
        return len(self._ranges)

    def __iter__(self) -> Iterator[Work]:
        """All work, range by range."""
        return (item for _, _, work in self._ranges for item in work)

    def leave(self, start: int, end: int, work: Sequence[Work]) -> None:
        """Nobody has these bytes any more, and `work` still uses them."""
        index = bisect.bisect_left(self._starts, start)
        self._starts.insert(index, start)
        self._ranges.insert(index, (start, end, work))

    def take(self, start: int, end: int) -> list[Work]:
        """Somebody gets these bytes: the work that is left on any of them, each once. From now on it is his to wait for it; what overlaps
        them in part keeps its work on the rest."""
        first = bisect.bisect_right(self._starts, start)
        if first and self._ranges[first - 1][1] > start:
            first -= 1
        last = bisect.bisect_left(self._starts, end, first)
        found: list[Work] = []
        rest: list[tuple[int, int, Sequence[Work]]] = []
        for low, high, work in self._ranges[first:last]:
            found.extend(item for item in work if item not in found)
            rest += [(begin, stop, work) for begin, stop in ((low, start), (end, high)) if begin < stop]
        if first < last:
            self._ranges[first:last] = rest
            self._starts[first:last] = [low for low, _, _ in rest]
        return found

    def forget(self, is_over: Callable[[Work], bool]) -> None:
        """Ranges whose work is all over are noted no more."""
        self._ranges = [entry for entry in self._ranges if not all(map(is_over, entry[2]))]
        self._starts = [low for low, _, _ in self._ranges]

    def clear(self) -> None:
        """Nothing is left on any."""
        self._ranges, self._starts = [], []
