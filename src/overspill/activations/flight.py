"""What is under way on paper: the copies of one round beside the round's measured times. Pure functions.

Words:

* **the way out**: what was packed and still occupies the device, because its copy has not ended. At most a window of it, whole records:
  nothing of a storage is freed before all of it has left.
* **the way back**: what backward wants soon and was fetched early. At most a window of its own.
* **place**: the number of a storage in the order in which a micro-batch saves them, whether it is stored or rebuilt.
* **just in time**: what backward wants is fetched in the order in which it wants it, as late as the link lets it, not as early as the
  window does: memory is fullest where the gradients of a module are made, and what comes back for others shall not be there yet.
* **gone**: on paper, when a record's copy has ended and `SLACK_FRACTION` of the time since it was packed has passed besides. The mover may
  then take it for copied, without a look at the copy; a link that is a little slower than it was measured costs no wait.

The link takes one copy after the other, in each direction. So whatever was packed earlier is gone earlier, and where the way out stands is
one number: the first record that is not gone (`Pace`).

Limits: only the link between device and host memory is here, not the drive behind it. Rates are one number each way.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
from collections.abc import Sequence

SLACK_FRACTION = 0.1
"""Of the time from pack to the end of the copy. Chosen: links were measured to differ by a few percent from copy to copy."""
LATE_FRACTION = 0.01
"""Of forward: so much after its end a copy out may end. Records are whole, and one that would be a tenth of a millisecond late would stay
for that. Nothing waits for it where backward begins. Chosen: rounds differ by more."""
LEAD_S = 0.001
"""By which what is fetched just in time is back before backward wants it. Chosen: more than starting a copy takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module whose forward may be run again in backward (`segments.py`)."""

    first: int
    """The first place that is saved in it."""
    stop: int
    """The first place behind it."""
    input_bytes: tuple[int, ...]
    """Of the tensors that go in and are saved for nobody else: what its first places are if it is run again, and the others nothing."""
    again_s: float
    """What running it again takes: what it took in that round, or else its forward."""
    is_again: bool
    """Whether that round ran it again. What it saves was then not seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What one round was like, place by place in the order of forward; seconds after the first record, time in which compute waited
    for copies, rebuilt or ran modules again taken out."""

    device_bytes: tuple[int, ...]
    """If it were stored; 0 for a place that was not seen."""
    stored_bytes: tuple[int, ...]
    """What crosses the link for each; equal to `device_bytes` if records are stored as they are."""
    packed_s: tuple[float, ...]
    needed_s: tuple[float, ...]
    """When backward asked for it first; infinite if it never did."""
    forward_s: float
    """When the micro-batch's forward had ended: another one began, or backward asked for the first of them."""
    moved_bytes: tuple[int, ...] = ()
    """That rebuilding a place reads and writes; 0: it cannot be rebuilt. Empty: none of them can."""
    rest_bytes: tuple[int, ...] = ()
    """What a place takes if it is rebuilt: of a widening cast's result what it was cast from, and of all others nothing. Empty: nothing."""
    rebuild_s: tuple[float, ...] = ()
    """What rebuilding it took; infinite: not known."""
    calls: tuple[Call, ...] = ()
    """Of modules that may be run again, in the order of forward."""

    def rest_at(self, place: int) -> int:
        return self.rest_bytes[place] if self.rest_bytes else 0

    @property
    def step_s(self) -> float:
        """From the first record to the last one that was wanted."""
        return max((at_s for at_s in self.needed_s if at_s < math.inf), default=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WayBack:
    """How what has left comes back just in time, by numbers of records in their micro-batch."""

    order: tuple[int, ...]
    """Those that left and are wanted, the one that is wanted first first."""
    until: tuple[int, ...]
    """For each record: when backward wants it first, so many of these are on their way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """When what leaves is gone, by numbers of records in their micro-batch, so that it holds for other lengths as well."""

    num_gone: tuple[int, ...]
    """For each record: when it is packed, all that left before this one are gone."""
    num_gone_at_turn: int
    """The same when backward begins."""
    way_back: WayBack | None = None
    """None: what was packed last comes first, as much as the window takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flight:
    """A round on paper."""

    pace: Pace
    stalled_s: float
    """Time in which compute waits for room on the way out."""
    peak_bytes: int
    """Most bytes of records on the device: what stays so far and what is on its way out; in backward what stays still and what is back."""


class WayOut:
    """Copies out, one after the other, in at most a window of device memory; a single record may always be there."""

    def __init__(self, bytes_per_s: float, window_bytes: float) -> None:
        self._rate, self._window_bytes = bytes_per_s, window_bytes
        self._leaving: collections.deque[tuple[int, int, float, float]] = collections.deque()
        """Number, bytes, when the copy ends, when it is gone."""
        self.num_bytes = 0
        self._free_s = 0.0

    def advance(self, at_s: float) -> None:
        """Time goes on; what is gone leaves its memory."""
        while self._leaving and self._leaving[0][3] <= at_s:
            self._pop()

    def end_s(self, size: int, at_s: float) -> float:
        """When the copy of so many bytes would end that is started now."""
        return max(self._free_s, at_s) + size / self._rate

    def has_room(self, size: int) -> bool:
        return not self._leaving or self.num_bytes + size <= self._window_bytes

    def wait_for_room(self, size: int, at_s: float) -> float:
        """Seconds until there is room, for what has to leave."""
        begin_s = at_s
        while not self.has_room(size):
            at_s = max(at_s, self._pop())
        return at_s - begin_s

    def take(self, number: int, size: int, at_s: float) -> None:
        """Start a record's copy."""
        self._free_s = end_s = self.end_s(size, at_s)
        self._leaving.append((number, size, end_s, end_s + SLACK_FRACTION * (end_s - at_s)))
        self.num_bytes += size

    def first(self, otherwise: int) -> int:
        """The number of the first record that is not gone."""
        return self._leaving[0][0] if self._leaving else otherwise

    def _pop(self) -> float:
        _, size, end_s, _ = self._leaving.popleft()
        self.num_bytes -= size
        return end_s


def those_out_in_time(profile: Profile, bytes_per_s: float, window_bytes: float, least_bytes: int = 0) -> list[bool]:
    """The records that can leave without a wait: there is room on the way out when each is packed, and its copy ends with forward. Smaller
    ones than `least_bytes` do where the link has nothing else to do."""
    way, chosen, most_s = WayOut(bytes_per_s, window_bytes), [], (1 + LATE_FRACTION) * profile.forward_s
    for number, (size, packed_s) in enumerate(zip(profile.stored_bytes, profile.packed_s, strict=True)):
        way.advance(packed_s)
        fits = (size >= least_bytes or not way.num_bytes) and way.has_room(size) and way.end_s(size, packed_s) <= most_s
        chosen.append(fits)
        if fits:
            way.take(number, size, packed_s)
    return chosen


def those_back_in_time(profile: Profile, leaves: Sequence[bool], bytes_per_s: float, window_bytes: float) -> list[bool]:
    """Of the records that leave, those that are back when backward wants them.

    They come one after the other in the order in which they are wanted, at most a window ahead of that; a single record always may. What
    would come too late stays, and gives its time on the link to the next.
    """
    result, free_s = list(leaves), profile.forward_s
    ahead: collections.deque[tuple[float, int]] = collections.deque()  # when it is wanted, and its bytes; what was not wanted yet
    ahead_bytes = 0
    for needed_s, number in _by_need(profile, leaves):
        size, begin_s, num_had, had_bytes = profile.stored_bytes[number], free_s, 0, 0
        while num_had < len(ahead) and ahead_bytes - had_bytes + size > window_bytes:
            begin_s = max(begin_s, ahead[num_had][0])
            num_had, had_bytes = num_had + 1, had_bytes + ahead[num_had][1]
        took_s = size / bytes_per_s
        if begin_s + (1 + SLACK_FRACTION) * took_s > needed_s:
            result[number] = False
            continue
        for _ in range(num_had):
            ahead.popleft()
        ahead.append((needed_s, size))
        ahead_bytes += size - had_bytes
        free_s = begin_s + took_s
    return result


def just_in_time(profile: Profile, leaves: Sequence[bool], back_s: Sequence[float]) -> WayBack:
    """One record comes after the other, what is wanted first first, and each begins so late that it and all behind it are back in time, by
    the slack and `LEAD_S`. A fetch begins where backward wants something: at the last such moment before.

    Args:
        back_s: what each takes to come back.
    """
    order = [number for _, number in _by_need(profile, leaves)]
    latest_s, behind_s = [], math.inf
    for number in reversed(order):
        behind_s = min(profile.needed_s[number] - LEAD_S, behind_s) - (1 + SLACK_FRACTION) * back_s[number]
        latest_s.append(behind_s)
    latest_s.reverse()  # which only grows
    until, now_s, next_s = [0] * len(leaves), math.inf, math.inf
    for at_s, number in reversed(_wanted(profile)):
        if at_s < now_s:  # of those at one time the order is not known
            now_s, next_s = at_s, now_s
        until[number] = bisect.bisect_left(latest_s, next_s)
    return WayBack(order=tuple(order), until=tuple(until))


def _by_need(profile: Profile, leaves: Sequence[bool]) -> list[tuple[float, int]]:
    """When backward wants what leaves, and which place, the first first; of those at one time what was packed last."""
    pairs = ((at_s, -number) for number, (at_s, is_moved) in enumerate(zip(profile.needed_s, leaves, strict=True)) if is_moved)
    return [(at_s, -number) for at_s, number in sorted(pairs) if at_s < math.inf]


def _wanted(profile: Profile) -> list[tuple[float, int]]:
    """When backward wants what is there, and which place."""
    return sorted((at_s, number) for number, at_s in enumerate(profile.needed_s) if at_s < math.inf and profile.device_bytes[number])


def _most_in_backward(profile: Profile, leaves: Sequence[bool], way: WayBack, window_bytes: float) -> int:
    """Most bytes of records on the device in backward: what stays until it was wanted, and what has come for what is yet to be wanted."""
    kept_bytes = sum(size for size, is_moved in zip(profile.device_bytes, leaves, strict=True) if not is_moved)
    num_fetched, ahead_bytes, most = 0, 0, kept_bytes
    is_there = [False] * len(leaves)
    for _, number in _wanted(profile):
        for other in way.order[num_fetched : way.until[number]]:
            is_there[other] = True
            ahead_bytes += profile.stored_bytes[other]
        num_fetched = max(num_fetched, way.until[number])
        most = max(most, kept_bytes + int(min(ahead_bytes, window_bytes)))
        if not leaves[number]:
            kept_bytes -= profile.device_bytes[number]
        elif is_there[number]:
            ahead_bytes -= profile.stored_bytes[number]
    return most


def simulate_flight(
    profile: Profile,
    leaves: Sequence[bool],
    bytes_per_s: float,
    window_bytes: float,
    back_window_bytes: float,
    *,
    back_s: Sequence[float] | None = None,
) -> Flight:
    """A round in which these leave, whether or not there is time for them.

    Args:
        back_s: what each takes to come back; then it comes just in time. None: as early as the window lets it.
    """
    way, num_gone = WayOut(bytes_per_s, window_bytes), []
    stalled_s, kept_bytes, moved_bytes, peak_bytes = 0.0, 0, 0, 0
    for number, (size, packed_s) in enumerate(zip(profile.stored_bytes, profile.packed_s, strict=True)):
        way.advance(packed_s + stalled_s)
        if leaves[number]:
            stalled_s += way.wait_for_room(size, packed_s + stalled_s)
            way.take(number, size, packed_s + stalled_s)
            moved_bytes += size
        else:
            kept_bytes += profile.device_bytes[number]
        num_gone.append(way.first(number))
        peak_bytes = max(peak_bytes, kept_bytes + way.num_bytes)
    way.advance(profile.forward_s + stalled_s)
    if back_s is None:
        way_back, backward_bytes = None, kept_bytes + int(min(back_window_bytes, moved_bytes))
    else:
        way_back = just_in_time(profile, leaves, back_s)
        backward_bytes = _most_in_backward(profile, leaves, way_back, back_window_bytes)
    return Flight(
        pace=Pace(num_gone=tuple(num_gone), num_gone_at_turn=way.first(len(num_gone)), way_back=way_back),
        stalled_s=stalled_s,
        peak_bytes=max(peak_bytes, kept_bytes + way.num_bytes, backward_bytes),
    )
