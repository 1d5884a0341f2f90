"""Compute's time in rounds of one shape: the quickest of the last watched ones counts.

What a watched round tells is compute's time and whatever disturbed it: a host that launched late, another program, clocks that had just
fallen. Pauses for copies and recomputation are taken out (`timeline.py`), disturbances cannot be. A round that looks longer than it is lets
more leave than the link can take, and all after it wait; one that looks shorter costs a little memory. So forward takes what it took in the
quickest of the last `NUM_KEPT` watched rounds, and so does backward; what happens in between moves along.

The last few, not all: a device that has become slower for good is believed after as many looks. Rounds of other shapes begin anew.
"""

from __future__ import annotations

import collections
import dataclasses
import math

from overspill.activations.flight import Profile

NUM_KEPT = 4
"""Chosen: the first looks at a run are four."""


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
