"""Where in one block of memory each slot of a program lies: decided beforehand, because the program is known.

A pool that keeps slots by size holds each size at its own most, or frees some for others in the middle of a step and waits for the
device to do so. Here all slots of a program on a tier, device or host, share one **arena**: the ops that borrow a slot and give it back
are known, so offsets can be chosen such that slots lent at one time never overlap (dynamic storage allocation). The arena takes little
more than the most that is lent at one time, nothing is allocated or freed in a step, and the same program finds every buffer at the same
address in every step.

Rules:

1. Gradients that wait for the next step's update outlive the program. Each has a fixed offset, the same in all programs of the plan:
   one bundle after the other from the arena's start, in the order of backward, in host memory chunk by chunk. While a gradient is not there
   its room is used for others; sums of earlier groups, which are twice as large, are then out of a gradient's room when it comes.
2. On the device all else is placed one by one, into the lowest gap among what is lent at the same time and placed already: largest first,
   in the order of the program, longest lent first; in each order again with whatever ended highest put first. The smallest arena is taken.
3. In host memory a slot is a chunk, a hidden state, or what a graph stores: some hundred times as many, of few sizes. They are placed
   largest first, or in a pass through the program (`planning/sweep.py`), and with as much rest as `RESTING_WASTE` of the arena gives: a
   slot's bytes stay free for a while, so that nobody waits for the lane that has just given them back.
4. Offsets and sizes are multiples of the slots' granule.

Costs, once a program: some 20 us a slot and attempt on the device; in host memory three or four attempts of some 7 us a slot (0.4 s for
the 13,779 slots of Llama-3.1-8B with parameters and states on the SSD).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from overspill.planning.pools import SLOT_BYTES, PoolEvent
from overspill.planning.space import host_room_bytes, pinned_room_bytes
from overspill.planning.sweep import Fit, Lifetime, sweep, with_rest
from overspill.spec.plan import Plan, UpdateTiming
from overspill.spec.tensors import Tier
from overspill.units import align_up

EVENTS_A_STRETCH = 32
"""Slots are found by the stretches of the program that they live in. Chosen."""

ATTEMPTS = 24
"""In each order, and less where the program has many slots: `MOST_PLACED`."""
MOST_PLACED = 16384
"""Slots placed in all attempts of an order together. Chosen: some tenths of a second."""
RESTING_SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.95)
"""Of the least bytes: what lent and resting slots in host memory may take together. Tried; the largest that is found to fit is taken."""
RESTING_WASTE = 0.04
"""Share of an arena in host memory that may be spent on rest. Chosen: all that is lent at one time is then more than 95 % of it."""
MOST_COMPARISONS = 1_000_000
"""Of slots with those beside them, up to which slots in host memory are also placed one by one. Chosen: a tenth of a second."""

Place = tuple[int, int]
"""(offset, bytes)."""
Chunk = tuple[str, int | None]
"""Bundle and chunk; None: all of its chunks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArenaPlan:
    """Places of a program's slots on one tier."""

    places: tuple[Place, ...]
    """Of each slot, in the order in which the program borrows them, those that wait before its first op left out."""
    num_bytes: int
    """Of the arena, the waiting gradients' room included."""
    least_bytes: int
    """Most bytes lent at one time: no arena is smaller."""


def plan_arenas(events: Iterable[PoolEvent], plan: Plan, *, most_host_bytes: int | None = None) -> dict[Tier, ArenaPlan]:
    """Places for the slots of the program of these events on the device and in host memory, there with rest up to `most_host_bytes`."""
    known = tuple(events)
    return {tier: plan_arena(known, plan, tier, most_bytes=most_host_bytes) for tier in (Tier.DEVICE, Tier.HOST)}


def plan_arena(events: Iterable[PoolEvent], plan: Plan, tier: Tier = Tier.DEVICE, *, most_bytes: int | None = None) -> ArenaPlan:
    """Places for the slots on a tier of the program of these events.

    Args:
        most_bytes: in host memory slots rest (rule 3) only as far as the arena is no larger; None: the plan's budgets alone bound it.
    """
    waiting = waiting_offsets(plan, tier)
    items, least_bytes = _collect(events, waiting, tier)
    fixed_bytes = max((offset + size for offset, size in waiting.values()), default=0)
    wanted_bytes = max(least_bytes, fixed_bytes)
    if tier is Tier.HOST:
        bounds = (int(wanted_bytes / (1 - RESTING_WASTE)), host_room_bytes(plan), pinned_room_bytes(plan), most_bytes)
        most_bytes = min(bound for bound in bounds if bound is not None)
        offsets, num_bytes = _pass_through(items, fixed_bytes, wanted_bytes=wanted_bytes, most_bytes=most_bytes)
    else:
        offsets, num_bytes = _search(items, fixed_bytes, least_bytes=wanted_bytes)
    places = tuple((offsets[item.number], item.num_bytes) for item in items if not item.is_waiting)
    return ArenaPlan(places=places, num_bytes=num_bytes, least_bytes=least_bytes)


def waiting_offsets(plan: Plan, tier: Tier = Tier.DEVICE) -> Mapping[Chunk, Place]:
    """Where each gradient that waits on a tier for the next step's update lies in the arena (rule 1)."""
    places: dict[Chunk, Place] = {}
    if plan.timing is not UpdateTiming.PENDING or tier is Tier.SSD:
        return places
    end = 0
    for name, bundle in reversed(list(plan.bundles.items())):
        if bundle.trainable and plan.placements[name].gradients is tier:
            chunks = [(chunk.index, chunk.num_elements * bundle.element_bytes) for chunk in bundle.chunks]
            for index, num_bytes in chunks if tier is Tier.HOST else [(None, bundle.parameter_bytes)]:
                size = align_up(num_bytes, SLOT_BYTES)
                places[name, index] = (end, size)
                end += size
    return places


def _collect(events: Iterable[PoolEvent], waiting: Mapping[Chunk, Place], tier: Tier) -> tuple[list[Lifetime], int]:
    """The slots in the order of borrowing, and the most bytes lent at one time."""
    begun: dict[int, tuple[int, int, PoolEvent]] = {}
    ends: dict[int, int] = {}
    lent = most = 0
    clock = 0
    for event in events:
        if event.tier is not tier:
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
        offset = None
        if event.is_waiting or number not in ends:
            offset, room = waiting[event.bundle, event.chunk]
            assert room == size, f"the slot of {event.bundle} that outlives its program has {size} B"
        items.append(Lifetime(number, size, begin, ends.get(number, clock), offset, event.is_waiting, event.bundle))
    return items, most


def _pass_through(items: Sequence[Lifetime], fixed_bytes: int, *, wanted_bytes: int, most_bytes: int) -> tuple[dict[int, int], int]:
    """The arena of rule 3: offsets by slot, and bytes."""

    def attempts(items: Sequence[Lifetime], *fits: Fit) -> Iterator[tuple[dict[int, int], int]]:
        if _num_comparisons(items) <= MOST_COMPARISONS:
            yield _place(sorted(items, key=_by_size), fixed_bytes)
        for fit in fits:
            offsets, highest = sweep(items, wanted_bytes=wanted_bytes, fit=fit)
            yield offsets, max(highest, fixed_bytes)

    low, high, best = 0, len(RESTING_SHARES), None
    while low < high:
        middle = (low + high) // 2
        rested = with_rest(items, limit_bytes=int(RESTING_SHARES[middle] * wanted_bytes))
        found = next((arena for arena in attempts(rested, Fit.LOWEST) if arena[1] <= most_bytes), None)
        if found is not None:
            low, best = middle + 1, found
        else:
            high = middle
    return best or min(attempts(items, *Fit), key=lambda arena: arena[1])


def _num_comparisons(items: Sequence[Lifetime]) -> int:
    """What `_place` does with them: each looks at all that share a stretch with it."""
    changes: collections.Counter[int] = collections.Counter()
    for item in items:
        stretches = _stretches(item)
        changes[stretches.start] += 1
        changes[stretches.stop] -= 1
    total = beside = before = 0
    for stretch, change in sorted(changes.items()):
        total += (stretch - before) * beside * beside
        beside, before = beside + change, stretch
    return total


def _by_size(item: Lifetime) -> tuple[int, int]:
    """Largest first."""
    return -item.num_bytes, item.begin


def _search(items: Sequence[Lifetime], fixed_bytes: int, *, least_bytes: int) -> tuple[dict[int, int], int]:
    """The smallest arena that is found (rule 2): offsets by slot, and bytes."""
    orders: tuple[Callable[[Lifetime], tuple[int, int]], ...] = (
        _by_size,
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


def _place(items: Sequence[Lifetime], fixed_bytes: int) -> tuple[dict[int, int], int]:
    """Offsets by slot, items placed in the order given after those that have theirs; and the end of the highest."""
    offsets: dict[int, int] = {}
    stretches: collections.defaultdict[int, list[Lifetime]] = collections.defaultdict(list)
    highest = fixed_bytes

    def put(item: Lifetime, offset: int) -> None:
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


def _stretches(item: Lifetime) -> range:
    return range(item.begin // EVENTS_A_STRETCH, (item.end - 1) // EVENTS_A_STRETCH + 1)


def _lowest_gap(num_bytes: int, taken: Sequence[tuple[int, int]]) -> int:
    """The lowest offset with so much room beside `taken`, (offset, bytes) in ascending order."""
    end = 0
    for offset, size in taken:
        if offset - end >= num_bytes:
            return end
        end = max(end, offset + size)
    return end
