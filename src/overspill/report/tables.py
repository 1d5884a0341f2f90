"""Tables for people, from the frozen documents: plain data in, a rich table out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from overspill.spec.report import PoolReport
from overspill.units import format_bytes

TIERS = ("device", "host", "ssd")


def placement_table(rows: Sequence[tuple[str, Mapping[str, int]]], *, title: str = "Placement") -> Table:
    """What rests where between steps: a row a role, a column a tier, sums below.

    Args:
        rows: (role, tier -> bytes), as `Plan.table()` gives them.
    """
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("", footer="sum")
    for tier in TIERS:
        table.add_column(tier, justify="right", footer=_cell(sum(per_tier.get(tier, 0) for _, per_tier in rows)))
    for role, per_tier in rows:
        table.add_row(role, *(_cell(per_tier.get(tier, 0)) for tier in TIERS))
    return table


def pool_table(reports: Sequence[PoolReport], *, title: str = "Pools of slots") -> Table:
    """What pools hold and have held: a row a size class, one for each pool, and beside it a pool of one slot size for everything."""
    table = Table(title=title, title_justify="left")
    table.add_column("pool / slot of")
    for name in ("most in flight", "used", "wasted", "idle", "peak", "waste of peak", "one size: peak", "its waste"):
        table.add_column(name, justify="right")
    for report in reports:
        for item in report.classes:
            held = (item.used_bytes, item.wasted_bytes, item.idle_bytes, item.peak_bytes)
            table.add_row(f"  {format_bytes(item.slot_bytes)}", str(item.most_in_flight), *map(_cell, held), "", "", "")
        table.add_row(
            f"{report.name} in all",
            str(report.most_in_flight),
            *map(_cell, (report.used_bytes, report.wasted_bytes, report.idle_bytes, report.peak_bytes)),
            f"{report.waste_fraction:.1%}",
            _cell(report.one_size_bytes),
            f"{report.one_size_waste_fraction:.1%}",
            end_section=True,
        )
    return table


def describe_pools(reports: Sequence[PoolReport]) -> str:
    """The same in one sentence, for the end of a run; empty if nothing was borrowed."""
    parts = [
        f"{report.name} pool {format_bytes(report.peak_bytes)} at most, {report.waste_fraction:.1%} of it waste "
        f"(slots of one size: {format_bytes(report.one_size_bytes)}, {report.one_size_waste_fraction:.1%})"
        for report in reports
        if report.peak_bytes
    ]
    return "; ".join(parts)


def _cell(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes else "–"
