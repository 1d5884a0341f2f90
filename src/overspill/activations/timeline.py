"""Watches one round: when forward made each record, when backward wanted it, what the copies took, how long compute waited for them, and
what it rebuilt or ran again.

Times are marks of the link (on CUDA events in compute's stream), read when the device has passed them all: nobody waits for a measurement.
Time in which compute waited or recomputed is taken out of all that comes after it, so that a round in which too much left tells what one
without would be like. Each of these **pauses** counts for itself alone, less those inside of it. Only the first micro-batch of a round is
watched.

Costs: two events a record and two a pause on CUDA, in the rounds that are watched (`is_watched`).
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

from overspill.activations.flight import Call, Profile
from overspill.activations.links import End, Link, Mark
from overspill.activations.mover import Mover
from overspill.activations.rebuild import Rebuild
from overspill.activations.records import Record
from overspill.spec.activations import ActivationRates

FIRST_WATCHED = (2, 3, 5, 8, 12, 16, 24)
"""The first round allocates, compiles and pins; the second is measured, and the third, the fifth and the eighth again, as they run with
what that decided (the third only where the host sees the second's end before it begins). The others are for a device whose clocks are high
in its first second: the quickest of the last looks counts (`steadying.py`), and an H100's forward became a tenth slower by then."""
WATCHED_EVERY = 32
"""Rounds, from then on: links are shared, and shapes change. Chosen."""


_Whose = TypeVar("_Whose", bound=Hashable)


def is_watched(number: int) -> bool:
    """Whether round `number`, counted from 1, is measured."""
    return number in FIRST_WATCHED or number % WATCHED_EVERY == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """One place of the micro-batch, as it was packed."""

    device_bytes: int
    stored_bytes: int
    moved_bytes: int
    """That rebuilding it reads and writes; 0: it has no recipe."""
    rest_bytes: int
    """That it takes all the same."""
    packed: Mark


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchedCall:
    """One call of a module that may be run again."""

    first: int
    stop: int
    input_bytes: tuple[int, ...]
    is_again: bool
    begin: Mark | None
    """None: before the round."""
    last: Mark
    """Where it saved its last tensor; has no effect if it is run again."""


class Timeline:
    """The marks of one round."""

    def __init__(self, link: Link, *, number: int, is_free: bool) -> None:
        self._link, self.number, self.is_free = link, number, is_free
        self._places: dict[int, _Place] = {}
        self._origin: Mark | None = None
        """Where the first record was made."""
        self._calls: dict[int, WatchedCall] = {}
        self._rebuilt: list[tuple[int, Mark, Mark]] = []
        """Place, and before and after rebuilding it."""
        self._run_again: list[tuple[int, Mark, Mark]] = []
        """The same of calls."""
        self._needed: dict[int, Mark] = {}
        self._micro_batch = 0
        self._later: Mark | None = None
        """Where the first record of another micro-batch was made."""
        self.holds: list[tuple[Mark, Mark]] = []
        """Before and after each wait of compute for a copy."""
        self.ends_out: list[End] = []
        self.ends_in: list[End] = []
        self.is_complete = False

    def pack(self, record: Record, moved_bytes: int, rest_bytes: int) -> None:
        """A record was made; 0 bytes moved: of something that has no recipe. What has an exact form is noted as if it had none."""
        stored_bytes = record.num_bytes if record.is_narrowed else record.stored_bytes
        record.is_watched = self._pack(record.index, record.micro_batch, record.num_bytes, stored_bytes, moved_bytes, rest_bytes)
        if record.is_watched and record.is_narrowed:
            record.timed = functools.partial(self._pause, self._rebuilt, record.index)

    def pack_rebuilt(self, place: int, micro_batch: int, rebuild: Rebuild) -> None:
        """Something was dropped that will be rebuilt."""
        if self._pack(place, micro_batch, rebuild.num_bytes, rebuild.num_bytes, rebuild.moved_bytes):
            rebuild.timed = functools.partial(self._pause, self._rebuilt, place)

    def _pack(self, place: int, micro_batch: int, device_bytes: int, stored_bytes: int, moved_bytes: int, rest_bytes: int = 0) -> bool:
        """Whether it is of the micro-batch that is watched."""
        mark = self._link.time_mark()
        if self._origin is None:
            self._origin, self._micro_batch = mark, micro_batch
        if micro_batch != self._micro_batch:
            self._later = self._later if self._later is not None else mark
            return False
        if place in self._places:
            return False
        self._places[place] = _Place(
            device_bytes=device_bytes, stored_bytes=stored_bytes, moved_bytes=moved_bytes, rest_bytes=rest_bytes, packed=mark
        )
        return True

    def call(self, number: int, micro_batch: int, call: WatchedCall) -> None:
        """A module that may be run again has returned."""
        if self._origin is not None and micro_batch == self._micro_batch:
            self._calls[number] = call

    def running_again(self, number: int, micro_batch: int) -> contextlib.AbstractContextManager[None]:
        """Around running a call again."""
        is_watched = micro_batch == self._micro_batch and number in self._calls
        return self._pause(self._run_again, number) if is_watched else contextlib.nullcontext()

    @contextlib.contextmanager
    def _pause(self, pauses: list[tuple[int, Mark, Mark]], number: int) -> Iterator[None]:
        begin = self._link.time_mark()
        try:
            yield
        finally:  # checkpoint breaks off with an exception once it has what it wants
            if not self.is_complete:
                pauses.append((number, begin, self._link.time_mark()))

    def need(self, record: Record) -> None:
        """It is wanted."""
        if record.is_watched and record.index not in self._needed:
            self._needed[record.index] = self._link.time_mark()

    def finish(self, mover: Mover) -> None:
        """The round has ended."""
        self.is_complete = True
        self.ends_out, mover.timed_out = mover.timed_out, []
        self.ends_in, mover.timed_in = mover.timed_in, []

    def is_readable(self) -> bool:
        """Whether the device has passed every mark."""
        last = [place.packed for place in list(self._places.values())[-1:]]
        last += [after for _, after in self.holds[-1:]] + [after for _, _, after in (*self._rebuilt[-1:], *self._run_again[-1:])]
        last += [*list(self._needed.values())[-1:], *([self._later] if self._later is not None else [])]
        return self.is_complete and all(map(self._link.has_passed, last)) and all(end.is_done for end in (*self.ends_out, *self.ends_in))

    def profile(self, before: Profile | None) -> Profile | None:
        """The times; None if nothing was wanted, as when backward never ran.

        Args:
            before: of an earlier round, for what rebuilding took at places that this one stored.
        """
        origin, seconds = self._origin, self._link.seconds
        if origin is None or not self._needed:
            return None
        outer, own_s = self._own_pauses
        starts, paused_s = [begin_s for begin_s, _ in outer], [0.0]
        for begin_s, end_s in outer:
            paused_s.append(paused_s[-1] + end_s - begin_s)

        def time_s(mark: Mark) -> float:
            at_s = seconds(origin, mark)
            number = bisect.bisect_left(starts, at_s)
            return at_s - (paused_s[number] - max(0.0, outer[number - 1][1] - at_s) if number else 0.0)

        needed = self._needed | {place: begin for place, begin, _ in reversed(self._rebuilt) if place not in self._needed}
        needed_s = {place: time_s(mark) for place, mark in needed.items()}
        num_places = max([*self._places, *(call.stop - 1 for call in self._calls.values())]) + 1
        seen = [self._places.get(place) for place in range(num_places)]
        packed_s = [0.0]
        for item in seen:
            packed_s.append(time_s(item.packed) if item is not None else packed_s[-1])
        moved_bytes = tuple(item.moved_bytes if item is not None else 0 for item in seen)
        rest_bytes = tuple(item.rest_bytes if item is not None else 0 for item in seen)
        return Profile(
            device_bytes=tuple(item.device_bytes if item is not None else 0 for item in seen),
            stored_bytes=tuple(item.stored_bytes if item is not None else 0 for item in seen),
            packed_s=tuple(packed_s[1:]),
            needed_s=tuple(needed_s.get(place, math.inf) for place in range(num_places)),
            forward_s=min([*needed_s.values(), *([time_s(self._later)] if self._later is not None else [])]),
            moved_bytes=moved_bytes,
            rest_bytes=rest_bytes,
            rebuild_s=tuple(
                (2 if rest_bytes[place] else 1) * own_s[("rebuilt", place)]  # what is narrowed in forward is widened in backward
                if ("rebuilt", place) in own_s
                else _rebuild_s(before, place, moved)
                for place, moved in enumerate(moved_bytes)
            ),
            calls=tuple(self._call(number, time_s, own_s) for number in sorted(self._calls)),
        )

    @functools.cached_property
    def _own_pauses(self) -> tuple[list[tuple[float, float]], dict[tuple[str, int], float]]:
        """`_own_times` of all, by kind and number; of a round that has ended, for each asks the device's events."""
        origin, seconds = self._origin, self._link.seconds
        pauses: list[tuple[float, float, tuple[str, int]]] = []
        for kind, marks in (("rebuilt", self._rebuilt), ("again", self._run_again), ("held", [(0, *hold) for hold in self.holds])):
            pauses += [(seconds(origin, begin), seconds(origin, end), (kind, number)) for number, begin, end in marks]
        return _own_times(pauses)

    def _call(self, number: int, time_s: Callable[[Mark], float], own_s: Mapping[tuple[str, int], float]) -> Call:
        """A module that was not run again is taken to need what it took until it saved its last tensor: there checkpoint breaks off."""
        call = self._calls[number]
        begin_s = time_s(call.begin) if call.begin is not None else 0.0
        return Call(
            first=call.first,
            stop=call.stop,
            input_bytes=call.input_bytes,
            again_s=own_s.get(("again", number), 0.0) if call.is_again else max(0.0, time_s(call.last) - begin_s),
            is_again=call.is_again,
        )

    def paused_s(self) -> dict[str, float]:
        """Seconds of the pauses of each kind: rebuilt, again, held; without those inside of them."""
        found = {"rebuilt": 0.0, "again": 0.0, "held": 0.0}
        for (kind, _), taken_s in self._own_pauses[1].items():
            found[kind] += taken_s
        return found

    def waited_fraction(self) -> float:
        """Of the time from the first record to the last one that was wanted: that in which compute waited for copies."""
        if self._origin is None or not self._needed:
            return 0.0
        all_s = self._link.seconds(self._origin, list(self._needed.values())[-1])
        return sum(self._link.seconds(before, after) for before, after in self.holds) / all_s if all_s > 0 else 0.0

    def rates(self, mover: Mover) -> ActivationRates:
        """What the copies of the round ran at; None where there were none."""
        ssd = mover.ssd
        return ActivationRates(
            d2h_bytes_per_s=_rate(self.ends_out),
            h2d_bytes_per_s=_rate(self.ends_in),
            ssd_write_bytes_per_s=ssd.take_rate("write") if ssd is not None else None,
            ssd_read_bytes_per_s=ssd.take_rate("read") if ssd is not None else None,
        )


def _rate(ends: list[End]) -> float | None:
    timed = [(end.num_bytes, span_s) for end in ends if (span_s := end.span_s()) is not None]
    busy_s = sum(span_s for _, span_s in timed)
    return sum(size for size, _ in timed) / busy_s if busy_s > 0 else None


def _own_times(pauses: Iterable[tuple[float, float, _Whose]]) -> tuple[list[tuple[float, float]], dict[_Whose, float]]:
    """Of pauses (begin, end, whose), some inside of others: those that are in no other, and what each takes without those inside of it."""
    outer: list[tuple[float, float]] = []
    own_s: dict[_Whose, float] = {}
    around: list[tuple[float, _Whose]] = []
    for begin_s, end_s, whose in sorted(pauses, key=lambda pause: (pause[0], -pause[1])):
        while around and around[-1][0] <= begin_s:
            around.pop()
        if around:
            own_s[around[-1][1]] -= end_s - begin_s
        else:
            outer.append((begin_s, end_s))
        own_s[whose] = own_s.get(whose, 0.0) + end_s - begin_s
        around.append((end_s, whose))
    return outer, own_s


def _rebuild_s(before: Profile | None, place: int, moved_bytes: int) -> float:
    """What rebuilding the same took in an earlier round; infinite: not known."""
    is_same = before is not None and place < len(before.rebuild_s) and before.moved_bytes[place] == moved_bytes
    return before.rebuild_s[place] if before is not None and is_same else math.inf
