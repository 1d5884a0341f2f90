"""What has left, of the round that runs, and what of it comes back before backward wants it.

Rules:

1. With a measured round's pace those are fetched that would else come too late, in the order in which they are wanted; and of an earlier
   micro-batch, whose backward begins nobody knows when, as many as the window reaches.
2. Without a pace those that were packed before the one that is wanted, nearest first, as far as a window's bytes reach. What backward
   wants again and again, such as the tables of rotary positions, was packed long before the rest: if more than a window is yet to come in
   between, what is fetched are those before the **front**, the last record that was wanted in its turn.

The cache locks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from overspill.activations.amounts import Target
from overspill.activations.mover import Mover
from overspill.activations.records import Record
from overspill.activations.rounds import Rounds

MOST_DEAD = 4096
"""Places of dead records that a round keeps. Chosen: more than a step has."""
MOST_DEAD_PASSED = 64
"""Places of dead records that a look ahead passes, before it takes them for the end of a micro-batch. Chosen."""


class Fetching:
    """The records of one cache that left, and their way back.

    Args:
        note_backward: called before anything is fetched within a backward.
    """

    def __init__(self, mover: Mover, rounds: Rounds, note_backward: Callable[[], None]) -> None:
        self._mover, self._rounds, self._note_backward = mover, rounds, note_backward
        self._moved: list[Record | None] = []
        """Records that left, of this round, in the order in which they were packed; None: dead."""
        self._ends: dict[int, int] = {}
        """Where in `_moved` the records of each micro-batch of this round end."""
        self._fronts: dict[int, int] = {}
        """Of each micro-batch whose backward runs: where in `_moved` the front is (rule 2)."""
        self._starts: dict[int, int] = {}
        """Where they begin there."""
        self._places: dict[tuple[int, int], Record] = {}
        """They, by micro-batch and place; the last one of a micro-batch that is packed in parts."""
        self._num_back: dict[int, int] = {}
        """Of each micro-batch whose backward runs: how far its way back has begun."""
        self._fetched: dict[Record, None] = {}
        """What was fetched and is alive, for the end of a backward that keeps its graph."""

    @property
    def num_moved(self) -> int:
        """Records of this round that left, the dead included, since they were last compacted."""
        return len(self._moved)

    def begin_round(self) -> None:
        """No record is alive."""
        for books in (self._moved, self._ends, self._fronts, self._starts, self._places, self._num_back):
            books.clear()

    def note_packed(self, record: Record) -> None:
        """A record was made, which left or stays."""
        micro_batch = record.micro_batch
        if record.target is not Target.KEEP:
            self._starts.setdefault(micro_batch, len(self._moved))
            self._moved.append(record)
            self._places[micro_batch, record.index] = record
        self._ends[micro_batch] = len(self._moved)

    def note_fetched(self, record: Record) -> None:
        """It is on its way back, or was made of another form."""
        self._fetched[record] = None

    def note_wanted(self, record: Record) -> None:
        """It no longer counts as fetched ahead."""
        if record.is_ahead:
            record.is_ahead = False
            self._mover.ahead_bytes -= record.stored_bytes

    def forget(self, record: Record) -> None:
        """Its last view has died."""
        if record.target is not Target.KEEP:
            self._moved[record.position] = None
            if self._places.get((record.micro_batch, record.index)) is record:
                del self._places[record.micro_batch, record.index]
        self._fetched.pop(record, None)

    def end_backward(self) -> None:
        """Let go of what was fetched and still lives: its graph is kept for another backward."""
        self._num_back.clear()
        for record in self._fetched:
            if record.coming is not None or record.is_ahead:
                continue  # of a micro-batch whose backward is yet to come
            self._mover.leave_again(record)
        self._fetched = {
            record: None
            for record in self._fetched
            if (record.payload is not None and not record.is_only_here) or record.coming is not None
        }

    def fetch_last(self, micro_batch: int | None) -> None:
        """Begin as the first unpack of a micro-batch's backward would; None: of the one that was packed last.

        Raises:
            ValueError: nothing was packed for that micro-batch.
        """
        if micro_batch is not None and micro_batch not in self._ends:
            known = ", ".join(map(str, self._ends)) or "none"
            raise ValueError(f"micro-batch {micro_batch} has no saved tensors in this round; those that have: {known}")
        self._prefetch(self._ends[micro_batch] if micro_batch is not None else len(self._moved))

    def _front_at(self, record: Record) -> int:
        """Where the front is, now that this record is wanted (rule 2); before backward wanted any, it was behind all of them."""
        front = self._fronts.get(record.micro_batch, self._ends.get(record.micro_batch, record.position))
        between_bytes = 0
        for other in self._moved[record.position : front]:
            if other is not None and not other.is_wanted:
                between_bytes += other.stored_bytes
                if between_bytes > self._mover.back_window_bytes:
                    return front
        self._fronts[record.micro_batch] = record.position
        return record.position

    def fetch_around(self, record: Record) -> None:
        """Now that this one is wanted."""
        if not self.fetch_in_turn(record.index, record.micro_batch):
            self._prefetch(self._front_at(record))

    def fetch_in_turn(self, place: int, micro_batch: int) -> bool:
        """Rule 1, now that this place is wanted; False: there is no pace."""
        way = self._rounds.way_back(place)
        if way is None:
            return False
        if torch._C._current_graph_task_id() != -1:
            self._note_backward()
        order, until = way
        start, near_bytes = self._starts.get(micro_batch, 0), 0
        if start:
            near_bytes = self._bytes_to_come(order, micro_batch)
            nearest = next((one for one in reversed(self._moved[max(0, start - MOST_DEAD_PASSED) : start]) if one is not None), None)
            if nearest is None or (near_bytes and near_bytes + nearest.stored_bytes > self._mover.back_window_bytes):
                start = 0
            else:
                until = len(order)  # what is wanted sooner crosses the link sooner
        begun = self._num_back.get(micro_batch, 0)
        while begun < until:
            other = self._places.get((micro_batch, order[begun]))
            if other is not None and _is_away(other) and not self._fetch_ahead(other):
                break
            begun += 1
        self._num_back[micro_batch] = begun
        if start:
            self._prefetch(start, near_bytes=near_bytes)
        return True

    def _bytes_to_come(self, order: Sequence[int], micro_batch: int) -> int:
        """Of what is away, or has come too early, of a micro-batch; or more than a window."""
        num_bytes = num_passed = 0
        for place in reversed(order):
            record = self._places.get((micro_batch, place))
            if num_bytes > self._mover.back_window_bytes or num_passed > MOST_DEAD_PASSED:
                break
            if record is not None and (record.is_ahead or _is_away(record)):
                num_bytes += record.stored_bytes
            else:
                num_passed += 1
        return num_bytes

    def _prefetch(self, position: int, *, near_bytes: int = 0) -> None:
        """Rule 2, for the records before `position`, if so many bytes are nearer."""
        if torch._C._current_graph_task_id() != -1:
            self._note_backward()
        window_bytes, num_dead = self._mover.back_window_bytes, 0
        for index in range(min(position, len(self._moved)) - 1, -1, -1):
            record = self._moved[index]
            if record is None:
                num_dead += 1
                if num_dead > MOST_DEAD_PASSED:
                    return
                continue
            if near_bytes and near_bytes + record.stored_bytes > window_bytes:
                return
            near_bytes += record.stored_bytes
            if _is_away(record) and not self._fetch_ahead(record):
                return

    def _fetch_ahead(self, record: Record) -> bool:
        """Start its way back before it is wanted; False: the window is full, or there is no way now."""
        mover = self._mover
        if mover.ahead_bytes and mover.ahead_bytes + record.stored_bytes > mover.back_window_bytes:
            return False
        if not mover.fetch(record, must=False, is_timed=self._rounds.timeline is not None):
            return False
        record.is_ahead = True
        mover.ahead_bytes += record.stored_bytes
        self._fetched[record] = None
        return True

    def compact(self, num_live: int, live: Iterable[Iterable[Record]]) -> None:
        """Forget the dead of a round that does not end, as when somebody holds a graph for ever, once they are many."""
        if len(self._moved) <= 2 * num_live + MOST_DEAD:
            return
        before = [0]
        for record in self._moved:
            before.append(before[-1] + (record is not None))
        for record in (record for same in live for record in same):
            record.position = before[record.position]
        self._ends = {number: before[end] for number, end in list(self._ends.items())[-MOST_DEAD:]}
        self._starts = {number: before[start] for number, start in list(self._starts.items())[-MOST_DEAD:]}
        self._moved = [record for record in self._moved if record is not None]
        self._fronts.clear()


def _is_away(record: Record) -> bool:
    """Whether the device has it no more, nor soon."""
    return record.payload is None and record.coming is None and record.weak is not None and record.weak.expired()
