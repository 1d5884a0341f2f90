"""Which earlier ops an op waits for because they still use the buffer that it fills: the lending of `runtime/residency.py`, on paper.

A buffer is given back at the op that frees it, together with the work that still uses it, and lent again at once: whoever gets it waits
for that work. So an op may wait for ops that the schedule does not name. Here the same buffers are handed on in the same order:

1. On the device, regions and fetched hidden states lie where `planning.arena` puts them; whoever is given bytes waits for the work that
   is left on any of them.
2. In host memory a slot of the same size is taken, the one given back first.
3. A record of scratch is waited for by its next writer; hidden states, and activations, take the record given back first.
4. Other steps of the program ran before: all slots and records that it needs are there, and idle ones come before those given back since.

Several programs may be gone through one after the other. An op then also waits for what the program before did to the homes that it
reads or changes: `waits` are numbered through all programs.

Limit: where the device budget has no room for the arena, slots are lent by size; here they lie in it all the same.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

from overspill.planning.arena import ArenaPlan
from overspill.planning.pools import SLOT_BYTES, most_slots, pool_events
from overspill.ranges import LeftWork
from overspill.spec.plan import Plan
from overspill.spec.schedule import (
    BUNDLE_ROLES,
    Effects,
    Evict,
    Fetch,
    Free,
    Piece,
    RegionKey,
    Role,
    Schedule,
    effects,
    initial_copies,
    region_key,
)
from overspill.spec.tensors import Tier
from overspill.units import align_up

Work = tuple[int, ...]
Copy = tuple[Piece, Tier]


class BufferWaits:
    """The books of one plan's buffers."""

    def __init__(self, plan: Plan, arena: ArenaPlan) -> None:
        self._plan, self._arena = plan, arena
        self._homes = initial_copies(plan, pending=False).keys()
        self._places: Iterator[tuple[int, int]] = iter(())
        self._left = LeftWork[int]()
        """Of bytes of the arena that nobody has."""
        self._regions: dict[RegionKey, _Region] = {}
        self._fetched: dict[Piece, tuple[int, int]] = {}
        """Hidden states on the device that lie in the arena."""
        self._host_sizes: dict[Piece, int] = {}
        self._idle: collections.defaultdict[int, collections.deque[Work]] = collections.defaultdict(collections.deque)
        self._records: dict[Piece, Work] = {}
        self._idle_records: collections.defaultdict[bool, collections.deque[Work]] = collections.defaultdict(collections.deque)
        """By whether they are of activations, whose records are larger than those of hidden states."""
        self._on_ssd: set[Piece] = set()
        self._writer: dict[Copy, int] = {}
        self._readers: dict[Copy, list[int]] = {}
        """Of homes, through all programs."""
        self._num_ops = 0
        self._effects: tuple[Schedule, list[Effects]] | None = None
        """Of the program that was followed last: a step in a row of equal ones is followed twice."""

    def follow(self, schedule: Schedule) -> list[tuple[int, ...]]:
        """What each op of the next program waits for, the schedule's own waits included; numbered through all programs."""
        base = self._num_ops
        if base == 0:
            self._fill(schedule)
        self._places = iter(self._arena.places)
        if base == 0 and schedule.starts_pending:
            self._start_with(initial_copies(self._plan, pending=True))
        found = []
        if self._effects is None or self._effects[0] is not schedule:
            self._effects = schedule, [effects(item.op, self._plan) for item in schedule.ops]
        for index, (item, effect) in enumerate(zip(schedule.ops, self._effects[1], strict=True)):
            number = base + index
            own = [base + wait for wait in item.waits]
            waits = set(own)
            if base:
                waits.update(self._of_homes(effect))
            if not isinstance(item.op, Free):
                self._note_homes(number, effect)
            if effect.in_place:
                self._rename(effect)
            else:
                for piece, tier, size in effect.creates:
                    waits.update(self._create(piece, tier, size, is_fetched=isinstance(item.op, Fetch)))
                # a sum that was cast is given back with the cast itself; all else with what the op has waited for
                left = tuple(own) if isinstance(item.op, Free) else (number,)
                for piece, tier in effect.drops:
                    self._drop(piece, tier, left)
            waits.discard(number)
            found.append(tuple(waits))
        self._num_ops += len(schedule.ops)
        return found

    def _fill(self, schedule: Schedule) -> None:
        """Slots and records that steps before have left idle: as many as this program has in use at most (rule 4)."""
        for (tier, size), number in most_slots(pool_events(schedule, self._plan)).items():
            if tier is Tier.HOST:
                self._idle[size].extend([()] * number)
        now, most = collections.Counter[bool](), collections.Counter[bool]()
        known: set[Piece] = set()
        for item in schedule.ops:
            op = item.op
            if isinstance(op, Evict) and op.target is Tier.SSD and op.piece.role not in BUNDLE_ROLES and op.piece not in known:
                known.add(op.piece)
                now[_is_stored(op.piece)] += 1
                most[_is_stored(op.piece)] = max(most[_is_stored(op.piece)], now[_is_stored(op.piece)])
            elif isinstance(op, Free) and op.tier is Tier.SSD and op.piece in known:
                known.discard(op.piece)
                now[_is_stored(op.piece)] -= 1
        for is_stored, number in most.items():
            self._idle_records[is_stored].extend([()] * number)

    # -- homes -------------------------------------------------------------------------------------------------------

    def _of_homes(self, effect: Effects) -> Iterator[int]:
        for key in effect.reads:
            if key in self._writer:
                yield self._writer[key]
        for key in effect.written:
            if key in self._homes:
                yield from self._readers.get(key, ())
                if key in self._writer:
                    yield self._writer[key]

    def _note_homes(self, number: int, effect: Effects) -> None:
        for key in effect.reads:
            if key in self._homes:
                self._readers.setdefault(key, []).append(number)
        for key in effect.written:
            if key in self._homes:
                self._writer[key], self._readers[key] = number, []

    # -- buffers -----------------------------------------------------------------------------------------------------

    def _start_with(self, copies: dict[Copy, int]) -> None:
        """Gradients that the program before has left."""
        for (piece, tier), size in copies.items():
            if piece.role is Role.GRADIENT:
                self._create(piece, tier, size, is_fetched=True, is_waiting=True)

    def _create(self, piece: Piece, tier: Tier, size: int, *, is_fetched: bool, is_waiting: bool = False) -> Sequence[int]:
        if (piece, tier) in self._homes:
            return ()
        if tier is Tier.HOST:
            if piece in self._host_sizes:
                return ()
            slot = self._host_sizes[piece] = align_up(size, SLOT_BYTES)
            return self._idle[slot].popleft() if self._idle[slot] else ()
        if tier is Tier.SSD:
            if piece in self._on_ssd:
                return ()
            self._on_ssd.add(piece)
            if piece.role in BUNDLE_ROLES:
                return self._records.pop(piece, ())
            records = self._idle_records[_is_stored(piece)]
            return records.popleft() if records else ()
        if piece.role not in BUNDLE_ROLES:
            if not is_fetched or piece in self._fetched:
                return ()
            self._fetched[piece] = next(self._places)
            return self._take(*self._fetched[piece])
        region = self._regions.get(region_key(piece))
        if region is None:
            place = (0, 0) if is_waiting else next(self._places)
            region = self._regions[region_key(piece)] = _Region(place, () if is_waiting else self._take(*place))
        if piece in region.pieces:
            return ()
        region.pieces.add(piece)
        return (*region.after, *region.left)

    def _take(self, offset: int, size: int) -> Work:
        return tuple(self._left.take(offset, offset + size))

    def _drop(self, piece: Piece, tier: Tier, work: Work) -> None:
        if tier is Tier.HOST:
            self._idle[self._host_sizes.pop(piece)].append(work)
        elif tier is Tier.SSD:
            self._on_ssd.discard(piece)
            if piece.role in BUNDLE_ROLES:
                self._records[piece] = work
            else:
                self._idle_records[_is_stored(piece)].append(work)
        elif piece.role not in BUNDLE_ROLES:
            if piece in self._fetched:
                offset, size = self._fetched.pop(piece)
                self._left.leave(offset, offset + size, work)
        else:
            region = self._regions[region_key(piece)]
            region.pieces.discard(piece)
            region.left = [*region.left, *(number for number in work if number not in region.left)]
            if not region.pieces:
                del self._regions[region_key(piece)]
                self._left.leave(region.place[0], sum(region.place), tuple(region.left))

    def _rename(self, effect: Effects) -> None:
        """A partial gradient becomes the gradient where it lies."""
        region = self._regions.pop(region_key(effect.drops[0][0]))
        region.pieces = {piece for piece, _, _ in effect.creates}
        self._regions[region_key(effect.creates[0][0])] = region


def _is_stored(piece: Piece) -> bool:
    return piece.role is Role.ACTIVATIONS


class _Region:
    def __init__(self, place: tuple[int, int], after: Sequence[int]) -> None:
        self.place, self.after = place, after
        self.pieces: set[Piece] = set()
        self.left: list[int] = []
