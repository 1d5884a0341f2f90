"""What a schedule borrows from the pools of slots, on paper: how large they must be, and what their size classes are.

As `runtime/residency.py` does it for real: on the device one slot for all chunks of a role of a bundle, from its first chunk to its
last; in host memory one slot a chunk or hidden state. Homes are no slots, nor are hidden states that the device has computed; those
that it is given back from elsewhere are.

Limit: a slot counts as given back when its op is done. An executor that lends a slot longer needs as much more.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator

from overspill.spec.plan import Plan
from overspill.spec.schedule import BUNDLE_ROLES, Fetch, Piece, RegionKey, Role, Schedule, effects, initial_copies, region_key
from overspill.spec.tensors import Tier
from overspill.units import align_up

SLOT_BYTES = 4096
"""Granule of a slot (`tiers/pool.py`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolEvent:
    """A slot is borrowed (`num_bytes` of it) or given back (0)."""

    tier: Tier
    slot: int
    """Which one; numbers are not used again."""
    num_bytes: int
    bundle: str = ""
    """Whose slot it is, if it is borrowed for a role of a bundle."""
    chunk: int | None = None
    """Which of the bundle's; None: all of them, or it is no bundle's."""
    is_waiting: bool = False
    """A gradient that the program before has left for this one's updates, there before the first op."""


def pool_events(schedule: Schedule, plan: Plan) -> Iterator[PoolEvent]:
    """Every borrowing and giving back of a schedule, in the order of its ops."""
    books = _Books(plan)
    if schedule.starts_pending:
        for (piece, tier), size in initial_copies(plan, pending=True).items():
            if piece.role is Role.GRADIENT:
                for event in books.create(piece, tier, size):
                    yield dataclasses.replace(event, is_waiting=True)
    for item in schedule.ops:
        effect = effects(item.op, plan)
        if effect.in_place:
            books.rename([piece for piece, _ in effect.drops], [piece for piece, _, _ in effect.creates])
            continue
        for piece, tier, size in effect.creates:
            yield from books.create(piece, tier, size, is_computed=not isinstance(item.op, Fetch))
        for piece, tier in effect.drops:
            yield from books.drop(piece, tier)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolDemand:
    """What a schedule asks of the pool of one tier that lends slots by size, each rounded to its class."""

    least_bytes: int
    """Most bytes of slots lent at one time: the least `limit_bytes` that the schedule can run with. Slots of one class are then freed
    for those of another within the step."""
    steady_bytes: int
    """Each class at its own most: with as much, every step finds the slots of the step before."""


def pool_demand(events: Iterable[PoolEvent]) -> dict[Tier, PoolDemand]:
    """What the schedule of these events asks of each pool."""
    lent: dict[Tier, dict[int, int]] = {Tier.DEVICE: {}, Tier.HOST: {}}
    now, peak = dict.fromkeys(lent, 0), dict.fromkeys(lent, 0)
    known = tuple(events)
    for event in known:
        if event.num_bytes:
            size = align_up(event.num_bytes, SLOT_BYTES)
            lent[event.tier][event.slot] = size
            now[event.tier] += size
            peak[event.tier] = max(peak[event.tier], now[event.tier])
        else:
            now[event.tier] -= lent[event.tier].pop(event.slot)
    steady = dict.fromkeys(lent, 0)
    for (tier, size), number in most_slots(known).items():
        steady[tier] += size * number
    return {tier: PoolDemand(least_bytes=peak[tier], steady_bytes=steady[tier]) for tier in lent}


def most_slots(events: Iterable[PoolEvent]) -> dict[tuple[Tier, int], int]:
    """(tier, size of a class) -> most slots of it lent at one time."""
    sizes: dict[tuple[Tier, int], int] = {}
    now: collections.Counter[tuple[Tier, int]] = collections.Counter()
    most: dict[tuple[Tier, int], int] = {}
    for event in events:
        if event.num_bytes:
            size = sizes[event.tier, event.slot] = align_up(event.num_bytes, SLOT_BYTES)
            now[event.tier, size] += 1
            most[event.tier, size] = max(most.get((event.tier, size), 0), now[event.tier, size])
        else:
            now[event.tier, sizes.pop((event.tier, event.slot))] -= 1
    return most


class _Books:
    """Which slots are lent for which pieces."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._homes = initial_copies(plan, pending=False).keys()
        self._num_slots = 0
        self._regions: dict[RegionKey, tuple[int, set[Piece]]] = {}
        self._single: dict[tuple[Piece, Tier], int] = {}

    def create(self, piece: Piece, tier: Tier, size: int, *, is_computed: bool = False) -> Iterator[PoolEvent]:
        in_region = tier is Tier.DEVICE and piece.role in BUNDLE_ROLES
        if (piece, tier) in self._homes or tier is Tier.SSD or (tier is Tier.DEVICE and not in_region and is_computed):
            return
        if not in_region:
            if (piece, tier) not in self._single:
                slot = self._single[piece, tier] = self._next_slot()
                owner = (piece.owner, piece.index) if piece.role in BUNDLE_ROLES else ("", None)
                yield PoolEvent(tier=tier, slot=slot, num_bytes=size, bundle=owner[0], chunk=owner[1])
            return
        key = region_key(piece)
        if key not in self._regions:
            self._regions[key] = (self._next_slot(), set())
            bundle = self._plan.bundles[piece.owner]
            per_element = size // bundle.chunks[piece.index].num_elements
            num_bytes = bundle.num_elements * per_element
            yield PoolEvent(tier=tier, slot=self._regions[key][0], num_bytes=num_bytes, bundle=piece.owner)
        self._regions[key][1].add(piece)

    def drop(self, piece: Piece, tier: Tier) -> Iterator[PoolEvent]:
        key = region_key(piece)
        if (piece, tier) in self._single:
            yield PoolEvent(tier=tier, slot=self._single.pop((piece, tier)), num_bytes=0)
        elif tier is Tier.DEVICE and key in self._regions:
            slot, pieces = self._regions[key]
            pieces.discard(piece)
            if not pieces:
                del self._regions[key]
                yield PoolEvent(tier=tier, slot=slot, num_bytes=0)

    def rename(self, before: list[Piece], after: list[Piece]) -> None:
        """A partial gradient becomes the gradient where it lies."""
        slot, _ = self._regions.pop(region_key(before[0]))
        self._regions[region_key(after[0])] = (slot, set(after))

    def _next_slot(self) -> int:
        self._num_slots += 1
        return self._num_slots
