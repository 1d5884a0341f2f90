"""A step's time for people: what each lane did, what it made the step longer by, and how near the step is to its floor."""

from __future__ import annotations

from rich.table import Table

from overspill.spec.report import StepReport
from overspill.spec.trace import DISPATCH
from overspill.units import format_bytes, format_seconds


def lane_table(report: StepReport) -> Table:
    """A row a lane that had work: busy and exposed seconds, bytes, and the seconds that its work needs."""
    table = Table(title=f"Step {report.step}: {format_seconds(report.step_s)}", title_justify="left")
    table.add_column("lane")
    for name in ("busy", "exposed", "moved", "floor"):
        table.add_column(name, justify="right")
    work_s = report.floor.work_s if report.floor is not None else {}
    for lane, busy_s in report.lane_busy_s.items():
        if busy_s:
            moved = report.lane_bytes.get(lane, 0)
            cells = (
                _seconds(busy_s),
                "–" if lane == "compute" else _seconds(report.exposed_s.get(lane, 0.0)),
                format_bytes(moved) if moved else "–",
                _seconds(work_s[lane]) if lane in work_s else "–",
            )
            table.add_row(lane, *cells)
    if DISPATCH in report.exposed_s:
        table.add_row(DISPATCH, "–", _seconds(report.exposed_s[DISPATCH]), "–", "–")
    return table


def describe_step_time(report: StepReport) -> str:
    """One sentence beside the table; empty where nobody asked for a floor."""
    if report.floor is None or report.step_over_floor is None:
        return ""
    where = "compute and what must come before and after it" if report.floor.bound_by == "chain" else report.floor.bound_by
    text = f"step {report.step} took {report.step_over_floor:.2f} of its floor of {format_seconds(report.floor.floor_s)} (bound by {where})"
    if report.floor.unmeasured:
        text += f"; {', '.join(report.floor.unmeasured)} not measured, so the floor is too low"
    if report.step_s:
        text += f"; tracing it took {report.trace_s / report.step_s:.2%} of it"
    return text


def _seconds(value: float) -> str:
    return format_seconds(value) if value else "–"
