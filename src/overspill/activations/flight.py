"""What is under way on paper: the copies of one round beside the round's measured times. Pure functions.

Words:

* **the way out**: what was packed and still occupies the device, because its copy has not ended. At most a window of it, whole records:
  nothing of a storage is freed before all of it has left.
* **the way back**: what backward wants soon and was fetched early. At most a window of its own.
* **place**: the number of a storage in the order in which a micro-batch saves them, whether it is stored or rebuilt.
* **just in time**: what backward wants is fetched as late as the link lets it, not as early as the window does: memory is fullest where the
  gradients of a module are made, and what comes back for others shall not be there yet.
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
import itertools
import math
from collections.abc import Sequence

SLACK_FRACTION = 0.1
"""Of the time from pack to the end of the copy. Chosen: links were measured to differ by a few percent from copy to copy."""
LATE_FRACTION = 0.01
"""Of forward: so much after its end a copy out may end. Records are whole, and one that would be a tenth of a millisecond late would stay
for that. Nothing waits for it where backward begins. Chosen: rounds differ by more."""
LEAD_S = 0.001
"""By which what is fetched just in time is back before backward wants it. Chosen: more than starting a copy takes."""
MOST_MOMENTS = 64
"""That are looked at for one from which a record is near enough. Chosen: a layer wants fewer tensors."""


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
class Pace:
    """When what leaves is gone, by numbers of records in their micro-batch, so that it holds for other lengths as well."""

    num_gone: tuple[int, ...]
    """For each record: when it is packed, all that left before this one are gone."""
    num_gone_at_turn: int
    """The same when backward begins."""
    fetch_from: tuple[int, ...] | None = None
    """For each record: when backward wants it first, those from this number on that left are on their way back, just in time; None: as many
    as the window takes."""


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


def those_out_in_time(profile: Profile, bytes_per_s: float, window_bytes: float) -> list[bool]:
    """The records that can leave without a wait: there is room on the way out when each is packed, and its copy ends with forward."""
    way, chosen, most_s = WayOut(bytes_per_s, window_bytes), [], (1 + LATE_FRACTION) * profile.forward_s
    for number, (size, packed_s) in enumerate(zip(profile.stored_bytes, profile.packed_s, strict=True)):
        way.advance(packed_s)
        fits = way.has_room(size) and way.end_s(size, packed_s) <= most_s
        chosen.append(fits)
        if fits:
            way.take(number, size, packed_s)
    return chosen


def those_back_in_time(profile: Profile, leaves: Sequence[bool], bytes_per_s: float, window_bytes: float) -> list[bool]:
    """Of the records that leave, those that are back when backward wants them.

    As the cache fetches: whenever backward wants a record, those that were packed before it, nearest first, as far as the window reaches;
    before the front, if more than a window is yet to come between the two. What would come too late stays, and gives its time on the link
    to the next.
    """
    result, fetched = list(leaves), [False] * len(leaves)
    moved = [number for number, is_moved in enumerate(leaves) if is_moved]
    free_s, num_left, front = profile.forward_s, len(moved), len(moved)
    for wanted_s, number in sorted((at_s, number) for number, at_s in enumerate(profile.needed_s) if at_s < math.inf):
        if result[number] and not fetched[number]:
            result[number], num_left = False, num_left - 1
        if num_left == 0:
            continue  # all of them are back or on their way
        place = bisect.bisect_left(moved, number)
        between = (other for other in moved[place:front] if result[other] and profile.needed_s[other] > wanted_s)
        if sum(profile.stored_bytes[other] for other in between) <= window_bytes:
            front = place
        near_bytes = 0
        for place in range(front - 1, -1, -1):
            other = moved[place]
            if not result[other] or profile.needed_s[other] < wanted_s:
                continue  # it stays, or backward has had it
            size = profile.stored_bytes[other]
            if near_bytes and near_bytes + size > window_bytes:
                break
            if not fetched[other]:
                took_s = size / bytes_per_s
                end_s = max(free_s, wanted_s) + took_s
                if end_s + SLACK_FRACTION * took_s > profile.needed_s[other]:
                    result[other], num_left = False, num_left - 1
                    continue
                free_s, fetched[other], num_left = end_s, True, num_left - 1
            near_bytes += size
    return result


def just_in_time(profile: Profile, leaves: Sequence[bool], back_s: Sequence[float], window_bytes: float = math.inf) -> tuple[int, ...]:
    """`Pace.fetch_from`: one record comes after the other, what was packed last first, and each begins so late that it and all behind it
    are back in time, by the slack and `LEAD_S`. A fetch begins where backward wants something that is near enough: at the last such moment
    before.

    Args:
        back_s: what each takes to come back.
        window_bytes: how far what is wanted reaches, as the cache fetches (`TensorCache`, rule 6).
    """
    latest_s, behind_s = [], math.inf
    for took_s, needed_s, is_moved in zip(back_s, profile.needed_s, leaves, strict=True):  # from the one that is fetched last
        if is_moved and needed_s < math.inf:
            behind_s = min(needed_s - LEAD_S, behind_s) - (1 + SLACK_FRACTION) * took_s
        latest_s.append(behind_s)
    wanted = _wanted(profile)
    reaches = _reaches(profile, leaves, wanted, window_bytes)
    times = [at_s for at_s, _ in wanted]
    firsts = [len(leaves)] * len(wanted)  # of each moment: the first that must be on its way
    for number, is_moved in enumerate(leaves):
        if is_moved and wanted:
            last = max(0, bisect.bisect_right(times, latest_s[number]) - 1)
            near = (moment for moment in range(last, max(-1, last - MOST_MOMENTS), -1) if reaches[moment][0] <= number < reaches[moment][1])
            moment = next(near, last)
            firsts[moment] = min(firsts[moment], number)
    firsts = list(itertools.accumulate(firsts, min))
    found = [0] * len(leaves)
    for moment, (at_s, number) in enumerate(wanted):
        found[number] = firsts[bisect.bisect_right(times, at_s, lo=moment) - 1]  # of moments at one time the order is not known
    return tuple(found)


def _reaches(profile: Profile, leaves: Sequence[bool], wanted: Sequence[tuple[float, int]], window_bytes: float) -> list[tuple[int, int]]:
    """For each moment at which backward wants something: the records that it may fetch, from the first to before the second."""
    sizes = [size if is_moved else 0 for size, is_moved in zip(profile.stored_bytes, leaves, strict=True)]
    before = [0, *itertools.accumulate(sizes)]
    found, front = [], len(sizes)
    for _, number in wanted:
        stop = max(front, number)
        if number > front or before[front] - before[number] <= window_bytes:
            front = number
        found.append((min(bisect.bisect_left(before, before[front] - window_bytes), max(0, front - 1)), stop))
    return found


def _wanted(profile: Profile) -> list[tuple[float, int]]:
    """When backward wants what is there, and which place."""
    return sorted((at_s, number) for number, at_s in enumerate(profile.needed_s) if at_s < math.inf and profile.device_bytes[number])


def _most_in_backward(profile: Profile, leaves: Sequence[bool], fetch_from: Sequence[int], window_bytes: float) -> int:
    """Most bytes of records on the device in backward: what stays until it was wanted, and what has come for what is yet to be wanted."""
    kept_bytes = sum(size for size, is_moved in zip(profile.device_bytes, leaves, strict=True) if not is_moved)
    first, ahead_bytes, most = len(leaves), 0, kept_bytes
    is_had = [False] * len(leaves)
    for _, number in _wanted(profile):
        while first > fetch_from[number]:
            first -= 1
            if leaves[first] and not is_had[first]:
                ahead_bytes += profile.stored_bytes[first]
        most = max(most, kept_bytes + int(min(ahead_bytes, window_bytes)))
        is_had[number] = True
        if not leaves[number]:
            kept_bytes -= profile.device_bytes[number]
        elif number >= first:
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
        fetch_from, backward_bytes = None, kept_bytes + int(min(back_window_bytes, moved_bytes))
    else:
        fetch_from = just_in_time(profile, leaves, back_s, back_window_bytes)
        backward_bytes = _most_in_backward(profile, leaves, fetch_from, back_window_bytes)
    return Flight(
        pace=Pace(num_gone=tuple(num_gone), num_gone_at_turn=way.first(len(num_gone)), fetch_from=fetch_from),
        stalled_s=stalled_s,
        peak_bytes=max(peak_bytes, kept_bytes + way.num_bytes, backward_bytes),
    )
