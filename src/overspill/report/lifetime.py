"""Sentences about an SSD's life, from the formulas of `spec/lifetime.py`."""

from __future__ import annotations

from overspill.spec.lifetime import Wear, WearForecast
from overspill.units import format_bytes, format_seconds


def describe_wear(wear: Wear, *, where: str = "in this directory so far") -> str:
    """How far the drive's life is used up, as far as that is known.

    Args:
        where: own writes were counted.
    """
    own = f"overspill wrote {format_terabytes(wear.own_bytes)} {where}"
    if wear.share_fraction < 1:
        own += f", {wear.share_fraction:.0%} of it to the drive that lasts shortest"
    if wear.drive_bytes is not None:
        own += f", the drive {format_terabytes(wear.drive_bytes)} in all (SMART)"
    if wear.rated_bytes is None:
        return f"{own}; its rated life is unknown: give --ssd-tbw from the drive's data sheet"
    assert wear.worn_fraction is not None
    return f"{own}: {wear.worn_fraction:.1%} of the rated {format_terabytes(wear.rated_bytes)} ({wear.source})"


def describe_forecast(forecast: WearForecast) -> str:
    """What training without a pause does at the measured speed."""
    rate = (
        f"{format_bytes(forecast.bytes_per_step)} written a step of {format_seconds(forecast.step_s)}: "
        f"{format_terabytes(forecast.bytes_per_day)} a day of training"
    )
    if forecast.years_left is None:
        return rate
    return f"{rate}, {format_years(forecast.years_left)} to the drive's rated end"


def describe_run(wear: Wear, *, bytes_per_step: float, num_steps: int) -> str:
    """What a whole run will write, before its speed is known."""
    total = bytes_per_step * num_steps
    text = f"{num_steps} steps write {format_terabytes(total)} to the SSD ({format_bytes(bytes_per_step)} a step)"
    if wear.rated_bytes:
        text += f", {wear.share_fraction * total / wear.rated_bytes:.2%} of the drive's rated life"
    return text


def wear_warning(wear: Wear, forecast: WearForecast, *, min_years: float, description: str | None = None) -> str | None:
    """Why the drive would not last; None if it would, or if that is unknown.

    Args:
        description: in place of `describe_wear`.
    """
    if forecast.years_left is None or forecast.years_left >= min_years:
        return None
    return (
        f"the SSD would reach the end of its rated life after {format_years(forecast.years_left)} of training without a pause, sooner "
        f"than the {min_years:g} years of --ssd-years: {describe_forecast(forecast)}; {description or describe_wear(wear)}; "
        "let more rest in host memory (raise --host-budget), give each step more tokens (--accumulate), or lower --ssd-years"
    )


def format_terabytes(num_bytes: float) -> str:
    """Decimal, as endurance is rated: `1.25 TB`, `310 GB`."""
    if num_bytes >= 1e12:
        return f"{num_bytes / 1e12:.2f} TB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def format_years(years: float) -> str:
    """`4.2 years`, `11 days`."""
    if years > 1000:
        return "more than 1000 years"
    if years >= 1:
        return f"{years:.1f} years"
    return f"{years * 365.25:.0f} days" if years * 365.25 >= 1 else f"{years * 365.25 * 24:.1f} hours"
