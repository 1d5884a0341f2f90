"""Watches one round: when forward made each record, when backward wanted it, what the copies took, how long compute waited for them.

Times are marks of the link (on CUDA events in compute's stream), read when the device has passed them all: nobody waits for a measurement.
Time in which compute waited is taken out of all that comes after it, so that a round in which too much left tells what one without would
be like. Only the first micro-batch of a round is watched.

Costs: two events a record on CUDA, in the rounds that are watched (`is_watched`).
"""

from __future__ import annotations

import bisect
import math

from overspill.activations.flight import Profile
from overspill.activations.links import End, Link, Mark
from overspill.activations.mover import Mover
from overspill.activations.records import Record
from overspill.spec.activations import ActivationRates

FIRST_WATCHED = (2, 3, 5)
"""The first round allocates, compiles and pins; the second is measured, and the third and the fifth again, as they run with what that
decided (the third only where the host sees the second's end before it begins)."""
WATCHED_EVERY = 32
"""Rounds, from then on: links are shared, and shapes change. Chosen."""


def is_watched(number: int) -> bool:
    """Whether round `number`, counted from 1, is measured."""
    return number in FIRST_WATCHED or number % WATCHED_EVERY == 0


class Timeline:
    """The marks of one round."""

    def __init__(self, link: Link, *, is_free: bool) -> None:
        self._link, self.is_free = link, is_free
        self._sizes: list[tuple[int, int]] = []
        self._packed: list[Mark] = []
        self._needed: dict[int, Mark] = {}
        self._micro_batch = 0
        self._later: Mark | None = None
        """Where the first record of another micro-batch was made."""
        self.holds: list[tuple[Mark, Mark]] = []
        """Before and after each wait of compute for a copy."""
        self.ends_out: list[End] = []
        self.ends_in: list[End] = []
        self.is_complete = False

    def pack(self, record: Record) -> None:
        """A record was made."""
        if not self._packed:
            self._micro_batch = record.micro_batch
        if record.micro_batch != self._micro_batch:
            self._later = self._later if self._later is not None else self._link.time_mark()
        elif record.index == len(self._sizes):
            record.is_watched = True
            self._sizes.append((record.num_bytes, record.stored_bytes))
            self._packed.append(self._link.time_mark())

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
        later = [self._later] if self._later is not None else []
        last = [*later, *self._packed[-1:], *list(self._needed.values())[-1:], *(after for _, after in self.holds[-1:])]
        return self.is_complete and all(map(self._link.has_passed, last)) and all(end.is_done for end in (*self.ends_out, *self.ends_in))

    def profile(self) -> Profile | None:
        """The times; None if nothing was wanted, as when backward never ran."""
        if not self._packed or not self._needed:
            return None
        origin, seconds = self._packed[0], self._link.seconds
        waits = sorted((seconds(origin, before), seconds(before, after)) for before, after in self.holds)
        starts, waited_s = [at for at, _ in waits], [0.0]
        for _, took_s in waits:
            waited_s.append(waited_s[-1] + took_s)

        def time_s(mark: Mark) -> float:
            at_s = seconds(origin, mark)
            return at_s - waited_s[bisect.bisect_left(starts, at_s)]

        needed_s = {index: time_s(mark) for index, mark in self._needed.items()}
        return Profile(
            device_bytes=tuple(device for device, _ in self._sizes),
            stored_bytes=tuple(stored for _, stored in self._sizes),
            packed_s=tuple(map(time_s, self._packed)),
            needed_s=tuple(needed_s.get(index, math.inf) for index in range(len(self._sizes))),
            forward_s=min([*needed_s.values(), *([time_s(self._later)] if self._later is not None else [])]),
        )

    def waited_fraction(self) -> float:
        """Of the time from the first record to the last one that was wanted: that in which compute waited for copies."""
        if not self._packed or not self._needed:
            return 0.0
        all_s = self._link.seconds(self._packed[0], list(self._needed.values())[-1])
        return sum(self._link.seconds(before, after) for before, after in self.holds) / all_s if all_s > 0 else 0.0

    def rates(self, mover: Mover, before: ActivationRates) -> ActivationRates:
        """What the copies of the round ran at; as before where there were none."""
        ssd = mover.ssd
        return ActivationRates(
            d2h_bytes_per_s=_rate(self.ends_out) or before.d2h_bytes_per_s,
            h2d_bytes_per_s=_rate(self.ends_in) or before.h2d_bytes_per_s,
            ssd_write_bytes_per_s=(ssd.take_rate("write") if ssd is not None else None) or before.ssd_write_bytes_per_s,
            ssd_read_bytes_per_s=(ssd.take_rate("read") if ssd is not None else None) or before.ssd_read_bytes_per_s,
        )


def _rate(ends: list[End]) -> float | None:
    timed = [(end.num_bytes, span_s) for end in ends if (span_s := end.span_s()) is not None]
    busy_s = sum(span_s for _, span_s in timed)
    return sum(size for size, _ in timed) / busy_s if busy_s > 0 else None
