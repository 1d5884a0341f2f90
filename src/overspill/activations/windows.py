"""How much may be under way: the windows each way, chosen on paper from a measured round.

What a window is for. A block's largest tensors are made back to back (an MLP's inner state, and its activation), and while they are there
nothing else may be on the device's account for long: a window of two of them has no room for the smaller ones before, so one of the two
stays, in every block. A wider window costs its bytes at the moment when memory is fullest. What backward needs is less: it takes twice as
long as forward, and wants one tensor at a time.

Rules:

1. While nothing is measured, and where somebody has asked for a window, both ways have the same (`default_window_bytes`).
2. `Adaptive` tries `OUT_FACTORS` of the largest record that can leave, and `BESIDE` a little more, and takes the window with the lowest
   peak on paper among those with which nearly as much leaves (`NEARLY`) as without any limit; then the way back the same among
   `BACK_FACTORS`.
3. What is chosen has room: its peak is at most `Room.peak_bytes`, or it is no wider than what rule 1 says. Where something must leave that
   costs time, or goes to a drive (which is not on this paper), the windows are rule 1's.
4. A window is the most. In forward the mover lets go of what is gone by the pace that follows (`flight.py`), which is earlier.
5. Where starting the copies would take the host more than `START_FRACTION` of forward, small records leave only where the link has nothing
   else to do, as long as about as much leaves (`ABOUT`): fewer, larger copies. A Llama saves 15 tensors in each block, and the link takes a
   fifth of their bytes; two of the largest keep it as busy as six of all sizes.
6. With so many copies, and where somebody allows time to be lost, the link is filled to `LINK_SHARE` alone. The last tenth of it is what
   costs most: copies that a host starts a little late end after forward, and compute waits for them; rebuilding the same bytes costs a
   third of that.
7. A round that was decided so and in which compute waited all the same was too bold: the link does not give beside compute what single
   copies were measured at. The next decision takes less for its rates (`next_caution`), and part of that back when nothing waits.

Costs: some 15 walks over the records of a micro-batch, each time that a round was measured; by rule 5 as many again for each size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from overspill.activations.amounts import Adaptive, Amount, Room, Target, decide_targets
from overspill.activations.flight import Flight, Pace, Profile, simulate_flight
from overspill.activations.mix import Mix, choose_mix, rebuild_all, what_is_left
from overspill.spec.activations import ActivationRates
from overspill.units import MIB

LEAST_WINDOW_BYTES = 128 * MIB
"""2.4 ms of a link of 55 GB/s: enough to reach from one record to the next. Chosen."""
MOST_WINDOW_BYTES = 1024 * MIB
"""Of rule 1, so that a few huge tensors, such as logits, do not hold as much memory as what has left. Chosen."""
OUT_FACTORS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
BACK_FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the largest record. Chosen: in between nothing changes, for records are whole."""
BESIDE = 1.03
"""Times that, so that what is small (an attention's statistics) does not take the place of a large one. Chosen."""
NEARLY = 0.98
"""Of the bytes that could leave. Chosen: what is lost is less than what the claim of 0.9 of the bound leaves."""

ABOUT = 0.95
"""Of the bytes that leave. Chosen: a copy more or less of a Llama's largest tensors is 3 % of all that does."""
START_S, START_FRACTION = 4e-4, 0.25
"""What it takes the host to start a copy, and to know of it: 0.1 ms on a quick machine, four times that beside copies on a slow host of an
H100, measured. Of forward, chosen: what is beside it is the model's own Python, and hooks that move nothing."""
LINK_SHARE = 0.92
"""Of the rate out. Chosen, after two calls on two H100 machines, so with what their hosts differ by in it: with a Llama's 2,048 tokens
4.3 GB in a forward in which 5.6 could leave cost 2.7 ms, and 5.7 GB 6.4 ms; rebuilding costs 1.4 ms a GB."""
DRIVE_CAUTION = 0.7
"""Of a drive's rate: its reads are waited for by the host, and they differ more than the link's copies. Chosen."""

MOST_WAITED_FRACTION = 0.004
"""Of a round: what events around waits that are none add up to stays below. Chosen."""
FORWARDS_A_ROUND = 3.0
"""Backward takes twice forward: what waited was a share of forward three times as large."""
MOST_CORRECTION = 0.1
LEAST_CAUTION = 0.6
"""Both chosen: one round with a hiccup of something else shall not end all moving."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Device memory that may be under way; one record may always."""

    out_bytes: int
    back_bytes: int
    largest_bytes: int
    """The largest record of the round that they were chosen for; of rounds with larger ones they are as much wider."""

    def grown(self, largest_bytes: int) -> Windows:
        """For rounds whose largest record has so many bytes."""
        if largest_bytes <= self.largest_bytes:
            return self
        most = largest_bytes
        return Windows(
            out_bytes=self.out_bytes * most // self.largest_bytes,
            back_bytes=self.back_bytes * most // self.largest_bytes,
            largest_bytes=most,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What is done in rounds like the one that was measured."""

    targets: tuple[Target, ...]
    """For each place."""
    mix: Mix
    windows: Windows
    pace: Pace | None
    """None: no rate is known."""
    is_free: bool
    """Whether compute never waits, on paper; not said of amounts that do not ask, nor of drives."""


def next_caution(caution: float, waited_fraction: float) -> float:
    """Rule 7: of the rates, what the next decision takes, after a decided round in which compute waited for so much of the time."""
    if waited_fraction > MOST_WAITED_FRACTION:
        return max(LEAST_CAUTION, caution * (1 - min(FORWARDS_A_ROUND * waited_fraction, MOST_CORRECTION)))
    return min(1.0, caution + (1 - caution) / 4)


def slowed(rates: ActivationRates, caution: float) -> ActivationRates:
    """The rates of the link, times so much."""
    out, back = rates.d2h_bytes_per_s, rates.h2d_bytes_per_s
    return dataclasses.replace(rates, d2h_bytes_per_s=out and out * caution, h2d_bytes_per_s=back and back * caution)


def default_window_bytes(largest_bytes: int) -> int:
    """Rule 1: two of the largest record, within limits."""
    return max(LEAST_WINDOW_BYTES, min(2 * largest_bytes, MOST_WINDOW_BYTES))


def decide(
    amount: Amount, profile: Profile, rates: ActivationRates, room: Room, *, may_choose: bool, throughput: float | None = None
) -> Decision:
    """What is recomputed, where records go, and how much may be under way.

    Args:
        room: with the windows of rule 1.
        may_choose: whether nobody has asked for a window.
        throughput: least share of plain PyTorch's that recomputation leaves; None: whatever can be rebuilt is.
    """
    unlimited = dataclasses.replace(room, window_bytes=_ALL, back_window_bytes=_ALL, keep_bytes=None)

    def staying_bytes(rest: Profile) -> int:
        targets = decide_targets(amount, rest, rates, unlimited)
        return sum(size for size, target in zip(rest.device_bytes, targets, strict=True) if target is Target.KEEP)

    def copies_s(rest: Profile) -> float:
        targets = decide_targets(amount, rest, rates, unlimited)
        moved_bytes = sum(size for size, target in zip(rest.stored_bytes, targets, strict=True) if target is not Target.KEEP)
        return sum(moved_bytes / one for one in (rates.d2h_bytes_per_s, rates.h2d_bytes_per_s or rates.d2h_bytes_per_s) if one)

    mix = rebuild_all(profile) if throughput is None else choose_mix(profile, throughput, staying_bytes, copies_s)
    profile = what_is_left(profile, mix)
    is_adaptive, rate = isinstance(amount, Adaptive), rates.d2h_bytes_per_s

    def choose(asked: Room, rates: ActivationRates) -> Room:
        return _chosen_room(amount, profile, rates, asked) if may_choose and is_adaptive else asked

    chosen = choose(room, rates)
    free = amount.leaves(profile, rates, chosen)
    targets = decide_targets(amount, profile, rates, chosen)
    is_free = rate is not None and is_adaptive and _is_free(targets, free)
    if is_free and rate is not None and _are_many(profile, free):
        less = rates if throughput is None else _out_alone_slowed(rates, rate)
        others = _with_fewer(amount, profile, less, room, choose)
        found = decide_targets(amount, profile, less, others)
        if _is_free(found, amount.leaves(profile, less, others)):  # else what stays now has pushed out what must leave
            chosen, targets = others, found
    elif not is_free and chosen is not room:
        chosen, targets = room, decide_targets(amount, profile, rates, room)
    leaves = [target is not Target.KEEP for target in targets]
    largest_bytes = max(1, *profile.stored_bytes)
    return Decision(
        targets=tuple(
            Target.REBUILD if is_rebuilt and not profile.rest_at(place) else target
            for place, (target, is_rebuilt) in enumerate(zip(targets, mix.rebuilt, strict=True))
        ),
        mix=mix,
        windows=Windows(out_bytes=chosen.window_bytes, back_bytes=chosen.back_bytes, largest_bytes=largest_bytes),
        pace=_fly(profile, leaves, rate, _back_s(profile, targets, rates), chosen).pace if rate is not None else None,
        is_free=is_free,
    )


def _sizes(profile: Profile, leaves: Sequence[bool]) -> list[int]:
    """Of what leaves."""
    return [size for size, is_moved in zip(profile.stored_bytes, leaves, strict=True) if is_moved and size]


def _are_many(profile: Profile, leaves: Sequence[bool]) -> bool:
    """Whether starting the copies would take the host too long (rule 5)."""
    return START_S * len(_sizes(profile, leaves)) > START_FRACTION * profile.forward_s


def _out_alone_slowed(rates: ActivationRates, out: float) -> ActivationRates:
    """Rule 6. The way back is not filled, and keeps its rate."""
    return dataclasses.replace(rates, d2h_bytes_per_s=LINK_SHARE * out, h2d_bytes_per_s=rates.h2d_bytes_per_s or out)


def _with_fewer(
    amount: Amount, profile: Profile, rates: ActivationRates, room: Room, choose: Callable[[Room, ActivationRates], Room]
) -> Room:
    """Rule 5: the chosen room with the largest size that what leaves may have; with any if no copies are saved by it."""
    anything = choose(room, rates)
    all_sizes = _sizes(profile, amount.leaves(profile, rates, anything))
    for least_bytes in sorted({size for size in profile.stored_bytes if size > min(all_sizes, default=size)}, reverse=True):
        fewer = choose(dataclasses.replace(room, least_bytes=least_bytes), rates)
        sizes = _sizes(profile, amount.leaves(profile, rates, fewer))
        if len(sizes) < len(all_sizes) and sum(sizes) >= ABOUT * sum(all_sizes):
            return fewer
    return anything


def _chosen_room(amount: Amount, profile: Profile, rates: ActivationRates, room: Room) -> Room:
    """Rules 2 and 3; the same room if there is nothing to choose."""
    rate = rates.d2h_bytes_per_s
    unlimited = dataclasses.replace(room, window_bytes=_ALL, back_window_bytes=_ALL)
    free = amount.leaves(profile, rates, unlimited)
    largest = max((size for size, is_moved in zip(profile.stored_bytes, free, strict=True) if is_moved), default=0)
    if rate is None or largest == 0:
        return room
    best, back_s = room, _back_s(profile, (Target.HOST,) * len(free), rates)
    for way, factors in (("window_bytes", [BESIDE * factor for factor in OUT_FACTORS]), ("back_window_bytes", BACK_FACTORS)):
        start = best if way == "back_window_bytes" else dataclasses.replace(room, back_window_bytes=_ALL)
        tried: list[tuple[int, int, int, Room]] = []  # bytes that leave, peak, window
        for num_bytes in sorted({max(LEAST_WINDOW_BYTES, int(factor * largest)) for factor in factors}):
            other = dataclasses.replace(start, **{way: num_bytes})
            leaves = amount.leaves(profile, rates, other)
            # The way back is not chosen yet: its window is counted as rule 1's until then.
            narrow = dataclasses.replace(other, back_window_bytes=min(other.back_bytes, room.back_bytes))
            flight = _fly(profile, leaves, rate, back_s, narrow)
            is_narrow = num_bytes <= (room.window_bytes if way == "window_bytes" else room.back_bytes)
            if is_narrow or room.peak_bytes is None or flight.peak_bytes <= room.peak_bytes:
                gone_bytes = sum(size for size, is_moved in zip(profile.device_bytes, leaves, strict=True) if is_moved)
                tried.append((gone_bytes, flight.peak_bytes, num_bytes, other))
        if not tried:
            return room
        enough = NEARLY * max(gone_bytes for gone_bytes, *_ in tried)
        *_, best = min((item for item in tried if item[0] >= enough), key=lambda item: item[1:3])
    return best


def _fly(profile: Profile, leaves: list[bool], rate: float, back_s: Sequence[float] | None, room: Room) -> Flight:
    return simulate_flight(profile, leaves, rate, room.window_bytes, room.back_bytes, back_s=back_s)


def _back_s(profile: Profile, targets: Sequence[Target], rates: ActivationRates) -> list[float] | None:
    """Seconds that each takes on its way back, from where it would be; None: that is not known."""
    link, drive = rates.h2d_bytes_per_s or rates.d2h_bytes_per_s, rates.ssd_read_bytes_per_s
    if drive is None and rates.ssd_write_bytes_per_s is not None:
        drive = DRIVE_CAUTION * rates.ssd_write_bytes_per_s  # nothing was read yet
    if link is None or (drive is None and Target.SSD in targets):
        return None
    drive_s = 1 / (DRIVE_CAUTION * drive) if drive is not None else 0.0
    return [
        size / link + (size * drive_s if target is Target.SSD else 0.0) for size, target in zip(profile.stored_bytes, targets, strict=True)
    ]


def _is_free(targets: tuple[Target, ...], leaves: list[bool]) -> bool:
    """Whether nothing goes to the drive, and nothing leaves but what can without a wait."""
    return all(target is not Target.SSD and (target is Target.KEEP or is_free) for target, is_free in zip(targets, leaves, strict=True))


_ALL = int(math.ldexp(1, 62))
"""Bytes: no limit."""
