"""Tables for people, from the frozen documents: plain data in, a rich table out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

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


def _cell(num_bytes: int) -> str:
    return format_bytes(num_bytes) if num_bytes else "–"
