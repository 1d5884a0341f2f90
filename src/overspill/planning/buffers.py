"""Which earlier ops an op waits for because they still use the buffer that it fills: the lending of `runtime/residency.py`, on paper.

A buffer is given back at the op that frees it, together with the work that still uses it, and lent again at once: whoever gets it waits
for that work. So an op may wait for ops that the schedule does not name. Here the same buffers are handed on in the same order:

1. On the device, regions and fetched hidden states lie where `planning.arena` puts them, and so does each piece in host memory that is no
   home; whoever is given bytes waits for the work that is left on any of them.
2. A record of scratch is waited for by its next writer; hidden states, and activations, take the record given back first.
3. Other steps of the program ran before: all records that it needs are there, and idle ones come before those given back since.

Several programs may be gone through one after the other. An op then also waits for what the program before did to the homes that it
reads or changes: `waits` are numbered through all programs.

Limit: where a budget has no room for an arena, slots are lent by size; here they lie in it all the same.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence

from overspill.planning.arena import ArenaPlan, Place, waiting_offsets
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

Work = tuple[int, ...]
Copy = tuple[Piece, Tier]


class BufferWaits:
    """The books of one plan's buffers.

    Args:
        arenas: of the programs that will be followed, by tier.
    """

    def __init__(self, plan: Plan, arenas: Mapping[Tier, ArenaPlan]) -> None:
        self._plan, self._arenas = plan, arenas
        self._homes = initial_copies(plan, pending=False).keys()
        self._places: dict[Tier, Iterator[Place]] = {}
        self._waiting = {tier: waiting_offsets(plan, tier) for tier in arenas}
        self._left = {tier: LeftWork[int]() for tier in arenas}
        """Of bytes of the arenas that nobody has."""
        self._regions: dict[RegionKey, _Region] = {}
        self._single: dict[Copy, Place] = {}
        """What lies in an arena by itself: pieces in host memory, hidden states on the device."""
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
        self._places = {tier: iter(arena.places) for tier, arena in self._arenas.items()}
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
        """Records that steps before have left idle: as many as this program has in use at most (rule 3)."""
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
        if tier is Tier.SSD:
            if piece in self._on_ssd:
                return ()
            self._on_ssd.add(piece)
            if piece.role in BUNDLE_ROLES:
                return self._records.pop(piece, ())
            records = self._idle_records[_is_stored(piece)]
            return records.popleft() if records else ()
        if tier is Tier.HOST or piece.role not in BUNDLE_ROLES:
            if (piece, tier) in self._single or (tier is Tier.DEVICE and not is_fetched):
                return ()
            place = self._single[piece, tier] = self._waiting[tier][piece.owner, piece.index] if is_waiting else next(self._places[tier])
            return self._take(tier, place)
        region = self._regions.get(region_key(piece))
        if region is None:
            place = self._waiting[tier][piece.owner, None] if is_waiting else next(self._places[tier])
            region = self._regions[region_key(piece)] = _Region(place, self._take(tier, place))
        if piece in region.pieces:
            return ()
        region.pieces.add(piece)
        return (*region.after, *region.left)

    def _take(self, tier: Tier, place: Place) -> Work:
        return tuple(self._left[tier].take(place[0], sum(place)))

    def _drop(self, piece: Piece, tier: Tier, work: Work) -> None:
        if tier is Tier.SSD:
            self._on_ssd.discard(piece)
            if piece.role in BUNDLE_ROLES:
                self._records[piece] = work
            else:
                self._idle_records[_is_stored(piece)].append(work)
        elif tier is Tier.HOST or piece.role not in BUNDLE_ROLES:
            if (piece, tier) in self._single:
                place = self._single.pop((piece, tier))
                self._left[tier].leave(place[0], sum(place), work)
        else:
            region = self._regions[region_key(piece)]
            region.pieces.discard(piece)
            region.left = [*region.left, *(number for number in work if number not in region.left)]
            if not region.pieces:
                del self._regions[region_key(piece)]
                self._left[Tier.DEVICE].leave(region.place[0], sum(region.place), tuple(region.left))

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
