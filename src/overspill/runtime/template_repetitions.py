"""Which runs of a template count: sizes that grow, first runs that do not, repetitions until they agree.

Rules:

1. Sizes grow from a few tokens to those asked for. The next one is the largest of which two runs are predicted to take `JUMP_SHARE` of the
   time that is left at most, and to end in time also if its first run takes as much beyond the second as the last size's did; else the
   next larger one (by `GROWTH`), if two runs of it fit at all: a run cannot be cut short, so a slow one must not be begun. Predicted is by
   FLOPs, from the last size: too much where a small size is bound by weights or launches. Few sizes, because the first run of each loads
   kernels of its own.
2. The first run of a size does not count where there is time for another: by what it took itself, by what the size before had predicted,
   or, of the first size, by several times what is assumed on paper; loading a kernel says nothing about running it. Neither does any that
   took twice as long as the next one: kernels are loaded, the allocator maps memory, a clock rises. `MOST_WARMUPS` runs wait for that.
3. Of a size of which there was time for the first run alone, that run counts only if it is quicker than the size before had predicted.
4. Repetitions that disagree (`DISAGREEMENT`) are made more of, and their spread is told. Python's cycle collector rests in each.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from overspill.runtime.machine import without_cycle_collection
from overspill.runtime.template_runs import Clock, Sample
from overspill.units import format_seconds

SMALLEST_TOKENS = 32
"""Of the first size. Chosen: its time is that of reading the weights, anywhere."""
GROWTH = 4
JUMP_SHARE = 0.5
"""Chosen: as much time is left as was taken, for repetitions."""
MOST_WARMUPS = 3
"""Runs of a size after the first. Chosen."""
MOST_REPETITIONS = 20
"""Chosen: the median of as many is steady, and a small model needs no more."""
MOST_IN_DOUBT = 60
"""Repetitions where those before disagree. Chosen."""
DISAGREEMENT = 0.25
"""Of the median: the quartiles' distance from which on repetitions disagree. Chosen."""

Size = tuple[int, int]
"""Samples, tokens."""


def build_sizes(wanted: Size) -> list[Size]:
    """Sizes that grow to `wanted`, tokens before samples (rule 1)."""
    samples, tokens = wanted
    sizes = []
    now = min(SMALLEST_TOKENS, tokens)
    while now < tokens:
        sizes.append((1, now))
        now = min(now * GROWTH, tokens)
    now = 1
    while now < samples:
        sizes.append((now, tokens))
        now = min(now * GROWTH, samples)
    return [*sizes, wanted]


def spread_of(seconds: list[float]) -> float:
    """Upper quartile less the lower one; 0 of one."""
    lower, _, upper = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else (0.0, 0.0, 0.0)
    return upper - lower


def do_disagree(samples: list[Sample]) -> bool:
    """Whether repetitions are too far apart for their median to be trusted (rule 4)."""
    totals = [sample.total_s for sample in samples]
    return spread_of(totals) > DISAGREEMENT * statistics.median(totals)


AnyRun = TypeVar("AnyRun", bound=Callable[[], Sample])
"""One repetition."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled(Generic[AnyRun]):
    """A size whose runs are steady, or were not to be waited for."""

    size: Size
    run: AnyRun
    samples: list[Sample]
    """Those that count."""
    wall_s: float
    """Least that one took, on the host."""
    load_s: float
    """What its first run took beyond that."""
    is_first: bool
    """Whether there was time for the first run alone."""
    note: str = ""
    """Why it is not the size that was asked for."""
    is_late: bool = False
    """Whether that was for want of time."""


class Repetitions(Generic[AnyRun]):
    """Runs a template at growing sizes, and then again and again.

    Args:
        work: FLOPs of a size, relative to any other.
        most_s: what a run of the smallest size takes at most, on paper; infinity: not known.
        make: what is repeated, at a size.
        missing_room: why there is no memory for a size; empty if there is.
        deadline: by the clock's host time; what one more run would take beyond it is not begun.
    """

    def __init__(
        self,
        wanted: Size,
        clock: Clock,
        *,
        work: Callable[[Size], float],
        most_s: float = math.inf,
        make: Callable[[Size], AnyRun],
        missing_room: Callable[[Size], str],
        deadline: float,
    ) -> None:
        self._sizes, self._clock, self._work, self._make, self._missing_room = build_sizes(wanted), clock, work, make, missing_room
        self._deadline, self._most_s = deadline, most_s

    def missing_room(self) -> str:
        """Why not even the smallest size can begin; empty if it can."""
        return self._missing_room(self._sizes[0])

    def begin(self) -> Settled[AnyRun]:
        """The smallest size."""
        return self._settle(self._sizes[0], self._most_s)

    def grow(self, found: Settled[AnyRun]) -> Settled[AnyRun]:
        """The largest size that fits time and memory (rules 1 to 3)."""
        at, last, no_memory = 0, len(self._sizes) - 1, ""
        while at < last:
            following, note = self._choose(found, at, last)
            if following == at:
                return dataclasses.replace(found, note=note, is_late=not self._missing_room(self._sizes[at + 1]))
            size = self._sizes[following]
            predicted_s = self._predict(found, size)
            try:
                larger = self._settle(size, predicted_s)
            except torch.OutOfMemoryError as error:
                no_memory, last = f"{size[0]} x {size[1]} ran out of memory ({str(error).splitlines()[0][:120]})", following - 1
                continue
            if larger.is_first and not found.is_first and larger.wall_s > predicted_s:
                note = (
                    f"{size[0]} x {size[1]} had time for its first run alone, {format_seconds(larger.wall_s)}, which is more than the "
                    f"{format_seconds(predicted_s)} that were predicted"
                )
                return dataclasses.replace(found, note=note, is_late=True)
            found, at = larger, following
        return dataclasses.replace(found, note=no_memory)

    def repeat(self, found: Settled[AnyRun]) -> list[Sample]:
        """All repetitions that count (rules 2 and 4)."""
        samples, last_s = list(found.samples), found.wall_s
        while len(samples) < MOST_REPETITIONS or (len(samples) < MOST_IN_DOUBT and do_disagree(samples)):
            if not self._has_time(last_s):
                break
            sample, last_s = self._timed(found.run)
            samples.append(sample)
        return samples[1:] if found.is_first and len(samples) > 1 else samples

    def _settle(self, size: Size, predicted_s: float) -> Settled[AnyRun]:
        """Rule 2; `predicted_s` for one run of it, by the size before."""
        run = self._make(size)
        newest, first_s = self._timed(run)
        last_s = least_s = first_s
        is_first = True
        for _ in range(MOST_WARMUPS):
            if not self._has_time(min(last_s, predicted_s)):
                break
            before_s = last_s
            newest, last_s = self._timed(run)
            least_s, is_first = min(least_s, last_s), False
            if last_s >= before_s / 2:
                break
        return Settled(size=size, run=run, samples=[newest], wall_s=least_s, load_s=first_s - least_s, is_first=is_first)

    def _choose(self, found: Settled[AnyRun], at: int, last: int) -> tuple[int, str]:
        """Number of the size to go on with, and if it is `at`, why (rule 1)."""
        note = ""
        for number in range(last, at, -1):
            size, left_s = self._sizes[number], self._deadline - self._clock.now()
            two_s = 2 * self._predict(found, size)
            fits = two_s <= left_s
            if number > at + 1:
                fits = two_s <= JUMP_SHARE * left_s and two_s + found.load_s <= left_s
            if not fits:
                note = (
                    f"two runs of {size[0]} x {size[1]} were predicted to take {format_seconds(two_s)}, "
                    f"{format_seconds(max(left_s, 0))} were left"
                )
            elif not (note := self._missing_room(size)):
                return number, ""
        return at, note

    def _predict(self, found: Settled[AnyRun], size: Size) -> float:
        return found.wall_s * self._work(size) / self._work(found.size)

    def _has_time(self, seconds: float) -> bool:
        return self._clock.now() + seconds < self._deadline

    def _timed(self, run: AnyRun) -> tuple[Sample, float]:
        begin_s = self._clock.now()
        with without_cycle_collection():
            sample = run()
        return sample, self._clock.now() - begin_s
