"""Where in one block of device memory each slot of a program lies: decided beforehand, because the program is known.

A pool that keeps slots by size holds each size at its own most, or frees some for others in the middle of a step and waits for the
device to do so. Here all slots of a program share one **arena**: the ops that borrow a slot and give it back are known, so offsets can
be chosen such that slots lent at one time never overlap (dynamic storage allocation). The arena takes little more than the most that is
lent at one time, nothing is allocated or freed in a step, and the same program finds every buffer at the same address in every step.

Rules:

1. Gradients that wait for the next step's update outlive the program. Each has a fixed offset, the same in all programs of the plan:
   one bundle after the other from the arena's start. While a gradient is not there its room is used for others.
2. All else is placed one by one, into the lowest gap among what is lent at the same time and placed already: largest first, in the order
   of the program, longest lent first; in each order again with whatever ended highest put first. The smallest arena is taken.
3. Offsets and sizes are multiples of the slots' granule.

Cost: some 20 us a slot and attempt, once a program.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from overspill.planning.pools import SLOT_BYTES, PoolEvent
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.tensors import Tier
from overspill.units import align_up

EVENTS_A_STRETCH = 32
"""Slots are found by the stretches of the program that they live in. Chosen."""

ATTEMPTS = 24
"""In each order, and less where the program has many slots: `MOST_PLACED`."""
MOST_PLACED = 16384
"""Slots placed in all attempts of an order together. Chosen: some tenths of a second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArenaPlan:
    """Places of a program's device slots."""

    places: tuple[tuple[int, int], ...]
    """(offset, bytes) of each slot, in the order in which the program borrows them, those that wait before its first op left out."""
    num_bytes: int
    """Of the arena, the waiting gradients' room included."""
    least_bytes: int
    """Most bytes lent at one time: no arena is smaller."""


@dataclasses.dataclass(frozen=True)
class _Item:
    """One slot, from the event that borrows it to the one that gives it back, the latter left out."""

    number: int
    num_bytes: int
    begin: int
    end: int
    offset: int | None
    """Of a gradient that outlives the program (rule 1)."""
    is_waiting: bool


def plan_arena(events: Iterable[PoolEvent], plan: Plan) -> ArenaPlan:
    """Places for the device slots of the program of these events."""
    waiting = waiting_offsets(plan)
    items, least_bytes = _collect(events, waiting)
    fixed_bytes = max((offset + size for offset, size in waiting.values()), default=0)
    offsets, num_bytes = _search(items, fixed_bytes, least_bytes=max(least_bytes, fixed_bytes))
    places = tuple((offsets[item.number], item.num_bytes) for item in items if not item.is_waiting)
    return ArenaPlan(places=places, num_bytes=num_bytes, least_bytes=least_bytes)


def waiting_offsets(plan: Plan) -> Mapping[str, tuple[int, int]]:
    """Bundle -> (offset, bytes) of its gradient that waits on the device for the next step's update (rule 1)."""
    places: dict[str, tuple[int, int]] = {}
    if plan.timing is not UpdateTiming.PENDING:
        return places
    end = 0
    for name, bundle in plan.bundles.items():
        if bundle.trainable and plan.placements[name].gradients is Tier.DEVICE:
            size = align_up(bundle.parameter_bytes, SLOT_BYTES)
            places[name] = (end, size)
            end += size
    return places


def _collect(events: Iterable[PoolEvent], waiting: Mapping[str, tuple[int, int]]) -> tuple[list[_Item], int]:
    """The slots in the order of borrowing, and the most bytes lent at one time."""
    begun: dict[int, tuple[int, int, PoolEvent]] = {}
    ends: dict[int, int] = {}
    lent = most = 0
    clock = 0
    for event in events:
        if event.tier is not Tier.DEVICE:
            continue
        if event.num_bytes:
            size = align_up(event.num_bytes, SLOT_BYTES)
            begun[event.slot] = (clock, size, event)
            lent += size
            most = max(most, lent)
        else:
            ends[event.slot] = clock
            lent -= begun[event.slot][1]
        clock += 1
    items = []
    for number, (begin, size, event) in begun.items():
        outlives = event.is_waiting or number not in ends
        assert not outlives or waiting[event.bundle][1] == size, f"the slot of {event.bundle} that outlives its program has {size} B"
        offset = waiting[event.bundle][0] if outlives else None
        items.append(_Item(number, size, begin, ends.get(number, clock), offset, event.is_waiting))
    return items, most


def _search(items: Sequence[_Item], fixed_bytes: int, *, least_bytes: int) -> tuple[dict[int, int], int]:
    """The smallest arena that is found (rule 2): offsets by slot, and bytes."""
    orders: tuple[Callable[[_Item], tuple[int, int]], ...] = (
        lambda item: (-item.num_bytes, item.begin),
        lambda item: (item.begin, item.number),
        lambda item: (item.begin - item.end, item.begin),
    )
    best: tuple[dict[int, int], int] | None = None
    for order in orders:
        wanted = sorted(items, key=order)
        for _ in range(max(1, min(ATTEMPTS, MOST_PLACED // max(len(items), 1)))):
            offsets, num_bytes = _place(wanted, fixed_bytes)
            if best is None or num_bytes < best[1]:
                best = offsets, num_bytes
            if num_bytes <= least_bytes:
                return best
            at_the_top = next(item for item in wanted if offsets[item.number] + item.num_bytes == num_bytes)
            wanted.remove(at_the_top)
            wanted.insert(0, at_the_top)
    assert best is not None
    return best


def _place(items: Sequence[_Item], fixed_bytes: int) -> tuple[dict[int, int], int]:
    """Offsets by slot, items placed in the order given after those that have theirs; and the end of the highest."""
    offsets: dict[int, int] = {}
    stretches: collections.defaultdict[int, list[_Item]] = collections.defaultdict(list)
    highest = fixed_bytes

    def put(item: _Item, offset: int) -> None:
        nonlocal highest
        offsets[item.number] = offset
        highest = max(highest, offset + item.num_bytes)
        for stretch in _stretches(item):
            stretches[stretch].append(item)

    for item in items:
        if item.offset is not None:
            put(item, item.offset)
    for item in items:
        if item.offset is None:
            beside = {
                other.number: (offsets[other.number], other.num_bytes)
                for stretch in _stretches(item)
                for other in stretches[stretch]
                if other.begin < item.end and item.begin < other.end
            }
            put(item, _lowest_gap(item.num_bytes, sorted(beside.values())))
    return offsets, highest


def _stretches(item: _Item) -> range:
    return range(item.begin // EVENTS_A_STRETCH, (item.end - 1) // EVENTS_A_STRETCH + 1)


def _lowest_gap(num_bytes: int, taken: Sequence[tuple[int, int]]) -> int:
    """The lowest offset with so much room beside `taken`, (offset, bytes) in ascending order."""
    end = 0
    for offset, size in taken:
        if offset - end >= num_bytes:
            return end
        end = max(end, offset + size)
    return end
