"""What watched rounds say of compute and of the links, without what disturbed some of them.

Compute's time: the quickest of the last watched rounds of one shape counts.

What a watched round tells is compute's time and whatever disturbed it: a host that launched late, another program, clocks that had just
fallen. Pauses for copies and recomputation are taken out (`timeline.py`), disturbances cannot be. A round that looks longer than it is lets
more leave than the link can take, and all after it wait; one that looks shorter costs a little memory. So forward takes what it took in the
quickest of the last `NUM_KEPT` watched rounds, and so does backward; what happens in between moves along.

The last few, not all: a device that has become slower for good is believed after as many looks. Rounds of other shapes begin anew.

A link's rate: what two looks in a row agree on. A link is shared, and in a round in which somebody else copied it gives two thirds of what
it gives in all others: what is decided from such a round stays so for as many rounds as pass until the next look. So a rate that is not
what is believed changes nothing, but for another look once it is read; and neither do waits in it, which it explains.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics

from overspill.activations.flight import Profile
from overspill.spec.activations import ActivationRates

NUM_KEPT = 4
"""Chosen: the last of the first looks at a run, which follow each other most closely, no longer know what its first second was like."""
AGREEING = 0.04
"""By which two rates may differ that are one. Chosen: undisturbed rounds on an H100 differed by 2 %."""
MOST_DOUBTS = 4
"""Looks in a row that agree with none before; then the middle one of them is believed. Chosen: a drive may never give the same twice."""


class QuickestRounds:
    """Seconds of forward and backward in the last watched rounds of one shape."""

    def __init__(self) -> None:
        self._seconds: collections.deque[tuple[float, float]] = collections.deque(maxlen=NUM_KEPT)
        self._device_bytes: tuple[int, ...] = ()

    def steady(self, profile: Profile) -> Profile:
        """The round that was just watched, with the times of the quickest of the last."""
        if not self._is_same_shape(profile):
            self._seconds.clear()
        self._device_bytes = profile.device_bytes
        self._seconds.append((profile.forward_s, profile.step_s - profile.forward_s))
        return at_times(profile, min(forward_s for forward_s, _ in self._seconds), min(backward_s for _, backward_s in self._seconds))

    def _is_same_shape(self, profile: Profile) -> bool:
        """Whether every place has its size of before, but for those that either round did not see."""
        pairs = zip(profile.device_bytes, self._device_bytes, strict=False)
        return len(profile.device_bytes) == len(self._device_bytes) and all(now == before or not now or not before for now, before in pairs)


class BelievedRate:
    """Of one link, or one direction of a drive."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._doubts: list[float] = []
        """Looks that said otherwise, since the last that did not."""
        self._num_silent = 0
        """Looks in a row that said nothing."""

    @property
    def is_in_doubt(self) -> bool:
        """Whether the last look said otherwise."""
        return bool(self._doubts)

    def see(self, found: float | None) -> None:
        """What a watched round says; None: nothing, for nothing was copied."""
        self._num_silent = self._num_silent + 1 if found is None else 0
        if found is None:
            if self._num_silent == MOST_DOUBTS:  # nobody uses it any more
                self._doubts = []
            return
        known = [one for one in (self.bytes_per_s, *self._doubts[-1:]) if one is not None]
        if not known or any(_agree(found, one) for one in known):
            self.bytes_per_s, self._doubts = found, []
        else:
            self._doubts.append(found)
            if len(self._doubts) == MOST_DOUBTS:
                self.bytes_per_s, self._doubts = statistics.median_high(self._doubts), []


class BelievedRates:
    """Of all links of a cache."""

    def __init__(self) -> None:
        self._each = {field.name: BelievedRate() for field in dataclasses.fields(ActivationRates)}

    @property
    def is_in_doubt(self) -> bool:
        """Whether the next round has to be looked at, too."""
        return any(rate.is_in_doubt for rate in self._each.values())

    def see(self, found: ActivationRates) -> ActivationRates:
        """What a watched round says; what is believed now."""
        for name, rate in self._each.items():
            rate.see(getattr(found, name))
        return ActivationRates(**{name: rate.bytes_per_s for name, rate in self._each.items()})


def _agree(one: float, other: float) -> bool:
    return abs(one - other) <= AGREEING * max(one, other)


def at_times(profile: Profile, forward_s: float, backward_s: float) -> Profile:
    """The same round if forward and backward took so many seconds: each moment keeps its share of them."""
    forward = forward_s / profile.forward_s if profile.forward_s > 0 else 1.0
    backward = backward_s / (profile.step_s - profile.forward_s) if profile.step_s > profile.forward_s else 1.0
    return dataclasses.replace(
        profile,
        packed_s=tuple(at_s * forward for at_s in profile.packed_s),
        forward_s=profile.forward_s * forward,
        needed_s=tuple(
            profile.forward_s * forward + (at_s - profile.forward_s) * backward if at_s < math.inf else at_s for at_s in profile.needed_s
        ),
    )
