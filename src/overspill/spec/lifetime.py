"""How long an SSD lasts under a run: formulas, and nothing but formulas.

Words:

* **rated bytes** (TBW): what the maker promises can be written before the flash may wear out; of a data sheet, as `--ssd-tbw`.
* **worn fraction**: how much of that life is used up. 1 is the rated end: no cliff, but the end of the promise.
* **drive's writes**: everything anybody ever wrote to the drive, as its SMART log counts it.
* **own writes**: what overspill wrote in one directory, or set of striped places, as the counter beside the data says (`tiers/wear.py`).

    bytes a day       = bytes a step * 86400 / step time                       training without a pause
    remaining bytes   = rated bytes - the drive's writes                       its share of own writes, where SMART cannot be read
    years             = remaining bytes / (share * bytes a day * 365.25)       share: of own writes, striped over several drives

Where no rating is given, SMART's own percentage gives one: written / worn fraction, once at least `LEAST_PERCENTAGE` is used.

Limits: host bytes; what the drive writes besides (write amplification) is in its rating for the maker's workload, which is harder than
these large sequential writes.
"""

from __future__ import annotations

import dataclasses

SECONDS_A_DAY = 86400.0
DAYS_A_YEAR = 365.25
LEAST_PERCENTAGE = 3
"""Below, a whole percent more or less changes the estimate of the rating by more than a third. Chosen."""
DEFAULT_MIN_YEARS = 3.0
"""Chosen: a common warranty is 3 to 5 years."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriveHealth:
    """What a drive says of itself (NVMe log page 02h)."""

    percentage_used: int
    """Estimate of the maker, in whole percent of the rated life; may exceed 100, and stops at 255."""
    written_bytes: int
    """By all hosts, ever."""
    spare_percentage: int
    """Of the spare blocks that are left."""
    spare_threshold_percentage: int
    has_warning: bool
    """Whether the drive reports any critical condition (spare used up, too hot, degraded, read-only)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wear:
    """How far a drive's rated life is used up; the state between two steps."""

    own_bytes: int
    """Own writes, over the directory's life."""
    rated_bytes: int | None
    """As given, or estimated from SMART; None: unknown."""
    source: str
    """Where the rating is from, for people: `given`, `estimated from SMART` or `unknown`."""
    drive_bytes: int | None
    """The drive's writes; None: SMART cannot be read."""
    share_fraction: float = 1.0
    """Of own writes, what goes to this drive: each of several striped drives takes its part."""

    @property
    def written_bytes(self) -> int:
        """What counts against the rating."""
        own_bytes = round(self.own_bytes * self.share_fraction)
        return own_bytes if self.drive_bytes is None else max(own_bytes, self.drive_bytes)

    @property
    def worn_fraction(self) -> float | None:
        return None if self.rated_bytes is None else self.written_bytes / self.rated_bytes

    @property
    def remaining_bytes(self) -> int | None:
        return None if self.rated_bytes is None else max(0, self.rated_bytes - self.written_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WearForecast:
    """What steps of one length and size do to a drive, if they never stop."""

    bytes_per_step: float
    step_s: float
    bytes_per_day: float
    """To all drives."""
    years_left: float | None
    """To the rated end; None: the rating is unknown. Infinite if nothing is written."""


def build_wear(*, own_bytes: int, rated_bytes: int | None, health: DriveHealth | None, share_fraction: float = 1.0) -> Wear:
    """What is known of a drive.

    Args:
        rated_bytes: of each drive, as the user gave it; wins over the estimate.
        share_fraction: of own writes, what goes to this drive.
    """
    source = "given" if rated_bytes is not None else "unknown"
    if rated_bytes is None and health is not None and health.percentage_used >= LEAST_PERCENTAGE:
        rated_bytes, source = round(health.written_bytes * 100 / health.percentage_used), "estimated from SMART"
    drive_bytes = health.written_bytes if health else None
    return Wear(own_bytes=own_bytes, rated_bytes=rated_bytes, source=source, drive_bytes=drive_bytes, share_fraction=share_fraction)


def forecast_wear(wear: Wear, *, bytes_per_step: float, step_s: float) -> WearForecast:
    """The formulas at the top."""
    assert step_s > 0 and bytes_per_step >= 0, (step_s, bytes_per_step)
    per_day = bytes_per_step * SECONDS_A_DAY / step_s
    years: float | None = None
    if wear.remaining_bytes is not None:
        years = wear.remaining_bytes / (wear.share_fraction * per_day * DAYS_A_YEAR) if per_day else float("inf")
    return WearForecast(bytes_per_step=bytes_per_step, step_s=step_s, bytes_per_day=per_day, years_left=years)
