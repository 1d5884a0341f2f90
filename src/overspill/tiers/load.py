"""The load of a drive over time, from the trace of a store: for asking whether a phase kept it busy evenly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferSpan:
    """One part of a transfer on its drive; times are those of `time.monotonic()`."""

    start_s: float
    end_s: float
    num_bytes: int
    """Moved, rests of pages included."""
    is_write: bool
    file: int
    """Which of the store's files."""


def load_profile(spans: Sequence[TransferSpan], *, interval_s: float, start_s: float, end_s: float) -> list[float]:
    """Bytes moved in each interval of [start_s, end_s); a part's bytes are spread evenly over its time.

    The last interval is left out if it is not whole.
    """
    if interval_s <= 0 or end_s < start_s:
        raise ValueError(f"a profile needs a positive interval and an end after its start, got {interval_s} s from {start_s} to {end_s}")
    profile = [0.0] * int((end_s - start_s) / interval_s)
    for span in spans:
        rate = span.num_bytes / max(span.end_s - span.start_s, 1e-9)
        first = max(0, int((span.start_s - start_s) / interval_s))
        for index in range(first, min(len(profile), int((span.end_s - start_s) / interval_s) + 1)):
            left = start_s + index * interval_s
            overlap_s = min(span.end_s, left + interval_s) - max(span.start_s, left)
            profile[index] += rate * max(0.0, overlap_s)
    return profile


def peak_to_mean(profile: Sequence[float]) -> float:
    """The busiest interval over the mean one; 1 is an even load, and 0 none at all."""
    total = sum(profile)
    return max(1.0, max(profile) * len(profile) / total) if total else 0.0  # an even load's sum may round up
